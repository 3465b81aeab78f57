"""Coordinates in which late training is straight: every neuron together with the line that it draws.

Where neuron j is active it adds the line g_j·x̃ to the network, g_j = v_j u_j, x̃ = (x, 1). Margins are bilinear in θ
but linear in the g_j. Late in training some margins hardly move while θ does (those of points whose forces cancel, and
the differences among support vectors); θ then follows a manifold that is curved, under stiff forces normal to it. A
Rosenbrock method sees the curvature as a force, h ‖J‖ times a second difference, and pays with steps as short as
(h ‖J‖)^{−1/2} (an index 2 problem: Hairer and Wanner 1996, VI and VII). In the g_j the same manifold is flat. So the
solver is given g as a further unknown, from which margins are computed,

    du_j/dτ = v_j z_j,    dv_j/dτ = u_j·z_j,    dg_j/dτ = v_j² z_j + (u_j·z_j) u_j,    z_j = z_j(p(q(g))),

with g_j = v_j u_j at the start of each step. At its end (u_j, v_j) is determined anew from g_j and the invariant
v_j² − ‖u_j‖², so that both hold to rounding and the margins are those that the solver found. (On a step that moved θ by
1e-4 of itself at a rate of 4e-9, its margins were wrong by 2e-11 with g, and by 1e25 without.)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gradflow.network import ReluNetwork

_TURNS = 0.1  # |v|/‖u‖ below which u is not determined from g = v u: v may pass through 0, and g forgets where u points


def lifts(net: ReluNetwork) -> Bool[Array, " k"]:
    """Whether a step from `net` computes margins from the line of each neuron, as an unknown of its own, or from v u.

    Where |v| is small against ‖u‖, fast motion is in v alone, and in the line it is along u, which turns: there the
    manifold is flat in (u, v), and curved in g.
    """
    return net.v**2 >= _TURNS**2 * (net.w**2 + net.b**2)


def drive(net: ReluNetwork, z: Float[Array, "2 k"]) -> tuple[ReluNetwork, Float[Array, "2 k"]]:
    """Velocities of the neurons and of their lines under the forces z_j on the g_j; linear in z."""
    along = net.w * z[0] + net.b * z[1]
    return (
        ReluNetwork(net.v * z[0], net.v * z[1], along),
        (net.v**2)[None] * z + along[None] * jnp.stack([net.w, net.b]),
    )


def from_lines(
    net: ReluNetwork, lines: Float[Array, "2 k"], balance: Float[Array, " k"], lifted: Bool[Array, " k"]
) -> ReluNetwork:
    """The network near `net` with v_j u_j = `lines` and v_j² − ‖u_j‖² = `balance`: exactly, from
    v² = (β + √(β² + 4‖g‖²))/2 and u = g/v.

    Where neurons are not `lifted`, or |v| has become small against ‖u‖, `net` put back on the invariant by one Newton
    step u(1 + ε), v(1 − ε) instead, ε of the size of the step's error (Hairer, Lubich and Wanner 2006, IV.4: projection
    keeps the order).
    """
    # A neuron that dies shrinks for ever, to where its squares lose their digits: there it is left as it is.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(jnp.stack([net.w, net.b, net.v])), axis=0))
    number = jnp.finfo(largest.dtype)
    vanishes = largest**2 <= number.tiny / number.eps
    # In units of the largest squares stay in range. Stand-ins keep derivatives finite in the branch that is not taken.
    over = 1 / jnp.where(vanishes, 1, largest)
    w, b, v = (jnp.where(vanishes, 1, a * over) for a in (net.w, net.b, net.v))
    squared_norm = w**2 + b**2
    far = lifted & (v**2 >= 0.25 * _TURNS**2 * squared_norm) & (squared_norm > 0) & ~vanishes
    beta = balance * over**2

    g = jnp.where(far[None], lines * over[None] ** 2, 1)
    signed = jnp.where(far, beta, 0)
    squared_length = g[0] ** 2 + g[1] ** 2
    size = jnp.sqrt(signed**2 + 4 * squared_length)
    positive = signed >= 0
    squared_v = jnp.where(positive, (signed + size) / 2, 2 * squared_length / jnp.where(positive, 1, size - signed))
    there = jnp.where(v < 0, -1, 1) * jnp.sqrt(squared_v)

    total = squared_norm + v**2
    epsilon = jnp.where(vanishes, 0, 0.5 * (v**2 - squared_norm - beta) / total)
    per_v = largest / jnp.where(far, there, 1)
    return ReluNetwork(
        jnp.where(far, per_v * g[0], net.w * (1 + epsilon)),
        jnp.where(far, per_v * g[1], net.b * (1 + epsilon)),
        jnp.where(far, largest * there, net.v * (1 - epsilon)),
    )


class Local(eqx.Module):
    """σI − B for the Jacobian B of (u, v, g) ↦ (v z, u·z, v² z + (u·z) u) at fixed z: one 5 × 5 block per neuron.

    `lifted` (k,): whether the margins take a neuron's line from g or from v u; `tangent` (2, k): unit vectors along the
    rays of the neurons that are `sliding`.
    """

    net: ReluNetwork
    z: Float[Array, "2 k"]
    sigma: Float[Array, ""]
    lifted: Bool[Array, " k"]
    sliding: Bool[Array, " k"]
    tangent: Float[Array, "2 k"]
    # What the stages of a step share.
    u: Float[Array, "2 k"]
    inner: Float[Array, " k"]
    over_determinant: Float[Array, " k"]
    over_sigma: Float[Array, ""]

    def __init__(self, net: ReluNetwork, z, sigma, lifted, sliding, tangent):
        self.net, self.z, self.sigma, self.lifted, self.sliding, self.tangent = net, z, sigma, lifted, sliding, tangent
        self.u = jnp.stack([net.w, net.b])
        self.inner = net.w * z[0] + net.b * z[1]
        self.over_determinant = 1 / (sigma**2 - jnp.sum(z**2, axis=0))
        self.over_sigma = 1 / sigma

    def solve(self, change: ReluNetwork, lines: Float[Array, "2 k"]) -> tuple[ReluNetwork, Float[Array, "2 k"]]:
        """(σI − B)^{−1} of changes of the neurons and of their lines."""
        z = self.z
        v = (self.sigma * change.v + z[0] * change.w + z[1] * change.b) * self.over_determinant
        w, b = (change.w + z[0] * v) * self.over_sigma, (change.b + z[1] * v) * self.over_sigma
        turned = z[0] * w + z[1] * b
        pushed = (2 * self.net.v * v)[None] * z + self.inner[None] * jnp.stack([w, b]) + turned[None] * self.u
        return ReluNetwork(w, b, v), (lines + pushed) * self.over_sigma

    def line_changes(self, change: ReluNetwork, lines: Float[Array, "2 k"]) -> Float[Array, "2 k"]:
        """The changes of the lines that margins are computed from."""
        own = self.net.v[None] * jnp.stack([change.w, change.b]) + change.v[None] * self.u
        return jnp.where(self.lifted[None], lines, own)

    def response(self) -> Float[Array, "4 k"]:
        """G_j (2 × 2, row by row): the change of the line in (σI − B)^{−1} per change of the force z_j.

        With a = σu + v z and β = v + (u·z)/σ that of g_j is (v β P + (a + β z) aᵀ/(σ² − ‖z‖²))/σ, P the projection to
        the ray where the neuron slides and the identity elsewhere; and that of v_j u_j (v² P + a aᵀ/(σ² − ‖z‖²))/σ.
        """
        v = self.net.v
        a = self.sigma * self.u + v[None] * self.z
        beta = jnp.where(self.lifted, v + self.inner * self.over_sigma, v)
        left = (a + jnp.where(self.lifted, beta, 0)[None] * self.z) * self.over_determinant[None]
        t = self.tangent
        cross = jnp.where(self.sliding, t[0] * t[1], 0)
        projection = jnp.stack(
            [jnp.where(self.sliding, t[0] ** 2, 1), cross, cross, jnp.where(self.sliding, t[1] ** 2, 1)]
        )
        outer = jnp.stack([left[0] * a[0], left[0] * a[1], left[1] * a[0], left[1] * a[1]])
        return ((v * beta)[None] * projection + outer) * self.over_sigma
