"""How a KKT point of the maximum-margin problem moves with the data: derivatives from its optimality conditions.

    (P)  minimise ½‖θ‖²  subject to  q_i(θ) = y_i N(x_i) ≥ 1.

At a KKT point neuron j has a unit direction e_j, an amplitude a_j and the sign s_j of v_j: u = √a e, v = s √a. Its
breakpoint is between points, and then e_j = s_j z_j/‖z_j‖ with z_j = Σ λ_i y_i x̃_i over its active points; or it is on
a support vector x_i, and e_j lies on that point's ray. The multipliers of the support vectors and the amplitudes are as
many unknowns as there are conditions

    F(λ, a; x) = 0:    s_j z_j·e_j = 1 for each neuron,    Σ_j a_j s_j max(0, e_j·x̃_i) y_i = 1 for each support vector,

so that d(λ, a) = −F'^{−1} ∂F/∂x dx. Amplitudes need not be unique (`limit.py`): F' is singular then, the conditions
have solutions all the same, and of these the smallest is taken, which moves the function N* as any other.

**Value.** By the envelope theorem d(½‖θ*‖²) = −Σ λ_i ∂q_i/∂x_i dx_i at fixed multipliers, amplitudes and directions,
but for those on a ray, which moves with its point. That needs no system to be solved.

**Where there is none**: a margin of 1 whose multiplier is 0 starts to count on one side only (strict complementarity
fails), a point that occurs twice is two when it is moved, and breakpoints of points without a multiplier do not stick.
Derivatives are NaN then.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gradflow.certificate import ON, certifies
from gradflow.data import Dataset
from gradflow.length import length
from gradflow.network import ReluNetwork
from gradflow.undefined import undefined

_NO_WEIGHT = 1e-9  # of the sum of all, that a multiplier or an amplitude must exceed
_TIGHT = 1e-7  # of margin 1, up to which a margin is one that should have a multiplier
_SINGULAR = 1e-11  # of the largest singular value
_HELD = 72  # support vectors, at most


class Conditions(eqx.Module):
    """What is fixed about a KKT point when the data move a little.

    - `support`: which points have multipliers, `rows` (s,) their places and `counts` which of these places count;
    - `sign` s, `live` (k,): the neurons; `active` (k, s): at which of the support vectors each is active;
    - `ray` (k,): the place of the point whose ray a neuron is on, if it is `on` one; `orientation` of u along it.
    """

    rows: Array
    counts: Bool[Array, " s"]
    sign: Float[Array, " k"]
    live: Bool[Array, " k"]
    active: Bool[Array, "k s"]
    on: Bool[Array, " k"]
    ray: Array
    orientation: Float[Array, " k"]
    y: Float[Array, " s"]

    def directions(self, lam: Float[Array, " s"], x: Float[Array, " n"]) -> Float[Array, "2 k"]:
        """e_j."""
        z = self.forces(lam, x[self.rows])
        size = length(*jnp.where(self.live & ~self.on, z, 1))
        free = self.sign[None] * z / size[None]
        at = x[self.ray]
        ray = self.orientation[None] * jnp.stack([jnp.ones_like(at), -at]) / jnp.hypot(1, at)[None]
        return jnp.where(self.live, jnp.where(self.on, ray, free), 0)

    def forces(self, lam: Float[Array, " s"], at: Float[Array, " s"]) -> Float[Array, "2 k"]:
        """z_j, without the point whose ray a neuron is on, which has no part in z·e."""
        push = jnp.where(self.active, (lam * self.y)[None], 0)
        return jnp.stack([push @ at, jnp.sum(push, axis=1)])

    def margins(self, a: Float[Array, " k"], e: Float[Array, "2 k"], at: Float[Array, " s"]) -> Float[Array, " s"]:
        inner = e[0][:, None] * at[None, :] + e[1][:, None]
        return self.y * ((a * self.sign) @ jnp.where(self.active, inner, 0))

    def gaps(self, unknowns, x: Float[Array, " n"]):
        """F, with 0 for what does not count."""
        lam, a = unknowns
        e, z = self.directions(lam, x), self.forces(lam, x[self.rows])
        pull = self.sign * jnp.sum(z * e, axis=0)
        lack = self.margins(a, e, x[self.rows]) - 1
        return jnp.where(self.counts, lack, 0), jnp.where(self.live, pull - 1, 0)

    def network(self, unknowns, x: Float[Array, " n"]) -> ReluNetwork:
        lam, a = unknowns
        root = jnp.sqrt(jnp.where(self.live, a, 1))
        w, b = root[None] * self.directions(lam, x)
        return ReluNetwork(w, b, jnp.where(self.live, self.sign * root, 0))


def conditions(net: ReluNetwork, multipliers: Float[Array, " n"], data: Dataset) -> tuple[Conditions, Bool[Array, ""]]:
    """The conditions that hold at a KKT point, and whether they go on holding when the data move."""
    total = jnp.sum(multipliers)
    size = length(net.w, net.b)
    live = size * jnp.abs(net.v) > 1e-13 * net.squared_norm
    support = data.real & (multipliers > _NO_WEIGHT * total)
    held = min(_HELD, data.x.shape[0])
    weight, rows = jax.lax.top_k(jnp.where(support, multipliers, 0), held)
    counts = weight > 0
    at = data.x[rows]
    inner = net.w[:, None] * at[None, :] + net.b[:, None]
    near = jnp.abs(inner) <= ON * size[:, None] * jnp.hypot(1, at)[None, :]
    on_each = near & counts[None, :] & live[:, None]
    on, place = jnp.any(on_each, axis=1), rows[jnp.argmax(on_each, axis=1)]
    orientation = jnp.sign(net.w - data.x[place] * net.b)
    active = (inner > 0) & ~near & counts[None, :] & live[:, None]
    found = Conditions(rows, counts, jnp.sign(net.v), live, active, on, place, orientation, data.y[rows])
    q = data.margins(net)
    tight = data.real & (q <= 1 + _TIGHT)
    same = (data.x[:, None] == data.x[rows][None, :]) & data.real[:, None] & counts[None, :]
    repeated = jnp.any(jnp.sum(same, axis=0) > 1)
    return found, ~jnp.any(tight & ~support) & ~repeated & (jnp.sum(support) <= held)


def lasts(
    net: ReluNetwork, multipliers: Float[Array, " n"], residual: Float[Array, ""], data: Dataset
) -> Bool[Array, ""]:
    """Whether a KKT point, certified to `residual`, stays one of the same kind when the data move a little."""
    return conditions(net, multipliers, data)[1] & certifies(residual, net, data)


def moved(
    net: ReluNetwork, multipliers: Float[Array, " n"], residual: Float[Array, ""], data: Dataset, x: Float[Array, " n"]
) -> tuple[ReluNetwork, Float[Array, " n"], Float[Array, ""]]:
    """Tangents of the network, the multipliers and the value ½‖θ‖² of a KKT point with minimum margin 1 when the inputs
    have the tangents `x`; linear in them.
    """
    (held, _), sound = conditions(net, multipliers, data), lasts(net, multipliers, residual, data)
    lam = jnp.where(held.counts, multipliers[held.rows], 0)
    a = jnp.where(held.live, length(net.w, net.b) * jnp.abs(net.v), 0)
    unknowns, total = (lam, a), jnp.sum(lam)

    flat = jnp.concatenate(unknowns) / total
    cut = lam.size

    def gaps(flat, x):
        return jnp.concatenate(held.gaps((total * flat[:cut], total * flat[cut:]), x))

    matrix = jax.jacfwd(gaps)(flat, data.x)
    counts = jnp.concatenate([held.counts, held.live])
    matrix = jnp.where(counts[None, :] & counts[:, None], matrix, 0)
    # Rows and columns of λ and of a are scaled alike, as the matrix is symmetric but for the units of its parts.
    most = jnp.maximum(jnp.max(jnp.abs(matrix), axis=0), jnp.max(jnp.abs(matrix), axis=1))
    scale = jnp.where(most > 0, 1 / jnp.sqrt(jnp.where(most > 0, most, 1)), 1)
    inverse = jnp.linalg.pinv(scale[:, None] * matrix * scale[None, :], rtol=_SINGULAR)
    inverse = jnp.where(sound, scale[:, None] * inverse * scale[None, :], 0)

    rate = jax.jvp(lambda x: gaps(flat, x), (data.x,), (x,))[1]
    change = -total * (inverse @ rate)
    change_lam, change_a = change[:cut], change[cut:]
    network = jax.jvp(held.network, (unknowns, data.x), ((change_lam, change_a), x))[1]
    spread = jnp.zeros_like(multipliers).at[held.rows].add(change_lam)

    def lagrangian(x):
        at = x[held.rows]
        free = jax.lax.stop_gradient(held.directions(lam, data.x))
        e = jnp.where(held.on[None], held.directions(lam, x), free)
        return -jnp.sum(lam * held.margins(a, e, at))

    value = jax.jvp(lagrangian, (data.x,), (x,))[1]
    return jax.tree.map(lambda a: jnp.where(sound, a, undefined(x, a)), (network, spread, value))
