"""The convex program behind a limit direction: the least ½‖θ‖² of networks whose neurons stay in given cells.

**Primal.** A neuron in cell c (`clarke.py`) with output sign s draws the line s g·x̃ on its active points, at the cost
½(‖u‖² + v²) = ‖g‖ if it is balanced, u ∝ g. Neurons of one cell and sign add up, so with the closed cones C_c of
directions, and a set A of allowed pairs (s, c),

    minimise Σ_A ‖g_sc‖  over g_sc ∈ C_c   subject to   y_i Σ_A s [i ∈ c] g_sc·x̃_i ≥ 1 for all i.

With all pairs allowed that is the maximum-margin problem at unlimited width, and its value ½‖θ*‖² = 1/(2γ*).

**Dual.** maximise Σ λ_i over λ ≥ 0 subject to h_c(s z_c) ≤ 1 on A, with z_c = Σ_{i ∈ c} λ_i y_i x̃_i and h_c(z) the
maximum of u·z over unit u ∈ C_c, that is ‖P_c z‖, P_c the projection to the cone (0 if it is the apex). The maximiser
is where the neurons of the cell end up: inside it along ±z_c, or on a ray, with their breakpoint on a data point.

**Method.** A barrier, μ (Σ log λ_i + Σ_A log(1 − h²)), maximised by damped Newton steps for falling μ. Its stationary
points are primal feasible too: g_sc = 2 μ P_c z/(1 − h²) has margins 1 + μ/λ_i. Slacks lose half of their digits on the
way, so the last steps are Newton's on the equations h = 1 and q_i = 1 of the constraints that have proved active,
proximally regularised as amplitudes need not be unique (Rockafellar 1976). Mostly they show at μ = 10⁻⁶ of the mean λ;
where what Newton's method then finds is not optimal to 10⁻¹¹, the barrier goes on.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gradflow.clarke import solver_of_positive_definite
from gradflow.cones import Cones, Solution
from gradflow.polish import CERTAIN, ROUNDS, polish

_CENTRE = 1e4  # first μ over the first λ: a path that starts in the middle stays there
_BARRIER = 200  # Newton steps of the barrier, at most
_SHRINK = 0.1  # of μ, once a Newton step was short
_ACCURATE = 1e-6, 1e-9, 1e-12  # μ over the mean λ at which the active constraints are read off, until all is certain
_PRECISE = 1e-8  # μ over the mean λ down to which amplitudes have their digits
_BARRIER_RIDGE = 1e-14  # what is below the rounding of a Hessian


def solve(
    x: Float[Array, " n"],
    y: Float[Array, " n"],
    real: Bool[Array, " n"],
    allowed: Bool[Array, "2 cells"],
    wanted: Bool[Array, ""],
) -> Solution:
    """Solve the program on ascending points, n ≥ 2; those that are not `real` have λ = 0.

    Where it is not `wanted` nothing is done: a batch waits for its slowest lane, and for finished ones in vain.
    """
    cones = Cones(x)
    real_ = real.astype(x.dtype)

    def ingredients(lam):
        z = cones.forces(lam * y)
        place = cones.place(z)
        p = cones.project(z, place)
        return z, place, p, jnp.where(allowed, jnp.sum(p**2, axis=1), 0)

    def barrier(lam, mu, step):
        """Its value at λ + t `step`, as a function of t. Forces are linear in t, and summed only once."""
        first, second = cones.first, cones.second

        def along(force):
            z = cones.sites.pull(force * y)
            turns = first[0] * z[1] - first[1] * z[0], z[0] * second[1] - z[1] * second[0]
            return jnp.stack([*turns, jnp.sum(z * first, axis=0), jnp.sum(z * second, axis=0), *z])

        here, change = along(lam), along(step)

        def value(t):
            from_first, to_second, on_first, on_second, *z = here + t * change
            new, squared = lam + t * step, z[0] ** 2 + z[1] ** 2
            good, slacks = jnp.all(jnp.where(real, new > 0, True)), jnp.zeros_like(mu)
            for sign, some in zip((1, -1), allowed, strict=True):
                inside = (sign * from_first <= 0) & (sign * to_second <= 0)  # as in `Cones.place`
                on_ray = jnp.maximum(jnp.maximum(sign * on_first, sign * on_second), 0)
                h = jnp.where(some, jnp.where(inside, squared, on_ray**2), 0)
                good &= jnp.all(h < 1)
                slacks += jnp.sum(jnp.log1p(-jnp.where(h < 1, h, 0)))
            own = jnp.sum(jnp.where(real, new + mu * jnp.log(jnp.where(new > 0, new, 1)), 0))
            return jnp.where(good, own + mu * slacks, -jnp.inf)

        return value

    def direction(lam, mu, careful):
        _, place, p, squared = ingredients(lam)
        # The barrier that let λ in may have been rounded otherwise.
        slack = jnp.where(allowed, jnp.maximum(1 - squared, jnp.finfo(lam.dtype).eps), 1)
        lines = jnp.where(allowed[:, None], 2 * mu * p / slack[:, None], 0)
        gradient = real_ * (1 + mu / jnp.where(real, lam, 1) - cones.margins(lines, y))
        curve = jnp.where(careful, _curvature(cones, jnp.zeros_like(place)), _curvature(cones, place))
        b = jnp.where(allowed[:, None], 2 * mu * curve / slack[:, None], 0)
        b = b + jnp.where(allowed[:, None], 4 * mu * _outer(p) / slack[:, None] ** 2, 0)
        h = cones.gram(jnp.sum(b, axis=0)) * (y * real_)[:, None] * (y * real_)[None, :]
        own = jnp.where(real, mu / jnp.where(real, lam, 1) ** 2, 1)
        # Where x̃_i is orthogonal to the rays in use, rounding may leave less than nothing of their share.
        h = jnp.where(jnp.eye(own.size, dtype=bool), (jnp.maximum(jnp.diag(h), 0) + own)[None], h)
        scale = 1 / jnp.sqrt(jnp.diag(h))
        # Where one cell holds all points the rest of h is below its rounding: a pivot of 0 was seen (one label).
        h = h * scale[:, None] * scale[None, :] + _BARRIER_RIDGE * jnp.eye(own.size, dtype=h.dtype)
        step = scale * solver_of_positive_definite(h)(scale * gradient)
        return step, jnp.sum(step * gradient) / mu, lines

    # Beyond 1 too: h² has jumps in its second derivative, where Newton's steps may be much too short. Where they prove
    # too long, the next step is careful: as if all z were inside their cells, where the second derivative is largest.
    lengths = jnp.append(2.0 ** jnp.arange(8, -16, -1, dtype=x.dtype), 0)

    def iterate(path, accurate):
        """One Newton step, and whether μ is small enough."""
        count, lam, mu, careful, kept = path
        step, decrement, lines = direction(lam, mu, careful)
        mean = jnp.sum(lam) / jnp.sum(real_)
        kept = jnp.where(mu > _PRECISE * mean, lines, kept)
        # To at most 0.95 of the boundary λ = 0; that of the cells by trial.
        toward = jnp.where(real & (step < 0), -step / jnp.where(real, lam, 1), 0)
        tries = jnp.minimum(lengths, 0.95 / jnp.maximum(jnp.max(toward), 1e-30))
        values = jax.vmap(barrier(lam, mu, step))(tries)
        best, here = jnp.argmax(values[:-1]), values[-1]
        moved = values[best] >= here
        new = jnp.where(moved, lam + tries[best] * step, lam)
        near = jnp.where(careful, ~moved, decrement < 0.3)
        careful = ~near & (~moved | (tries[best] < 0.1))
        small = mu <= accurate * mean
        return (count + 1, new, jnp.where(~near | small, mu, _SHRINK * mu), careful, kept), near & small

    def goes_on(state):
        stage, _, best = state
        return wanted & (stage < len(_ACCURATE)) & ~(best.residual <= CERTAIN)

    def attempt(state):
        """On with the barrier to the next accuracy, and Newton's method from there."""
        stage, path, best = state
        accurate, last = jnp.asarray(_ACCURATE, x.dtype)[stage], stage == len(_ACCURATE) - 1
        idle = ~goes_on(state)  # a lane that waits for others
        path, _ = jax.lax.while_loop(
            lambda s: ~s[1] & (s[0][0] < _BARRIER), lambda s: iterate(s[0], accurate), (path, idle)
        )
        _, lam, mu, _, kept = path
        _, _, lines = direction(lam, mu, False)
        rounds = jnp.where(idle, 0, jnp.where(last, ROUNDS, 2))
        found = polish(cones, y, real, allowed, lam, mu, lines, kept, rounds)
        better = (found.residual < best.residual) | (stage == 0)
        return stage + 1, path, jax.tree.map(lambda a, b: jnp.where(better, a, b), found, best)

    one = cones.forces(real_ * y)
    place = cones.place(one)
    largest = jnp.sqrt(jnp.max(jnp.where(allowed, jnp.sum(cones.project(one, place) ** 2, axis=1), 0)))
    lam = real_ * 0.3 / jnp.where(largest > 0, largest, 1)
    path = jnp.zeros((), int), lam, _CENTRE * jnp.max(lam), jnp.array(False), jnp.zeros_like(one)
    nothing = Solution(jnp.zeros_like(lam), jnp.zeros_like(one), jnp.full((), jnp.inf, x.dtype))
    return jax.lax.while_loop(goes_on, attempt, (jnp.zeros((), int), path, nothing))[2]


def lower_bound(x: Float[Array, " n"], y: Float[Array, " n"], multipliers: Float[Array, " n"]) -> Float[Array, ""]:
    """A lower bound on ½‖θ‖² for every network of any width with margins ≥ 1, from any λ: Σλ/max_c h_c, λ < 0 as 0."""
    cones, lam = Cones(x), jnp.maximum(multipliers, 0)
    z = cones.forces(lam * y)
    largest = jnp.sqrt(jnp.max(jnp.sum(cones.project(z, cones.place(z)) ** 2, axis=1)))
    return jnp.sum(lam) / jnp.where(largest > 0, largest, jnp.inf)


def _outer(p):
    """(xx, xb, bb) entries of p pᵀ: (2, 3, cells) from (2, 2, cells)."""
    return jnp.stack([p[:, 0] ** 2, p[:, 0] * p[:, 1], p[:, 1] ** 2], axis=1)


def _curvature(cones: Cones, place):
    """The derivative of P z: identity, t tᵀ or 0, as (2, 3, cells)."""
    t = jnp.where((place == 1)[:, None], cones.first[None], cones.second[None])
    identity = jnp.array([1.0, 0, 1], cones.x.dtype)[None, :, None]
    place = place[:, None]
    return jnp.where(place == 0, identity, jnp.where(place == 3, 0, _outer(t)))
