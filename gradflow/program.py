"""The convex program behind a limit direction: the least ½‖θ‖² of networks whose neurons stay in given cells.

**Primal.** A neuron in cell c (`clarke.py`) with output sign s draws the line s g·x̃ on its active points, at the cost
½(‖u‖² + v²) = ‖g‖ if it is balanced, u ∝ g. Neurons of one cell and sign add up, so with the closed cones C_c of
directions, and a set A of allowed pairs (s, c),

    minimise Σ_A ‖g_sc‖  over g_sc ∈ C_c   subject to   y_i Σ_A s [i ∈ c] g_sc·x̃_i ≥ 1 for all i.

With all pairs allowed that is the maximum-margin problem at unlimited width, and its value ½‖θ*‖² = 1/(2γ*).

**Dual.** maximise Σ λ_i over λ ≥ 0 subject to h_c(s z_c) ≤ 1 on A, with z_c = Σ_{i ∈ c} λ_i y_i x̃_i and h_c(z) the
maximum of u·z over unit u ∈ C_c, that is ‖P_c z‖, P_c the projection to the cone (0 if it is the apex). The maximiser
is where the neurons of the cell end up: inside it along ±z_c, or on a ray, with their breakpoint on a data point.

**Method.** The barrier of `barrier.py`, for falling μ. Its slacks lose half of their digits on the way, so the last
steps are Newton's on the equations h = 1 and q_i = 1 of the constraints that have proved active (`polish.py`): those
whose multipliers have not fallen with μ. Mostly they show at μ = 10⁻⁶ of the mean λ; where what Newton's method then
finds is not optimal to 10⁻¹¹, the barrier goes on.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gradflow.barrier import Barrier
from gradflow.cones import Cones, Solution
from gradflow.polish import CERTAIN, ROUNDS, polish

_ACCURATE = 1e-6, 1e-9, 1e-12  # μ over the mean λ at which the active constraints are read off, until all is certain
_BARRIER = 200  # Newton steps of the barrier, at most


def solve(
    x: Float[Array, " n"],
    y: Float[Array, " n"],
    real: Bool[Array, " n"],
    allowed: Bool[Array, "2 cells"],
    wanted: Bool[Array, ""],
) -> Solution:
    """Solve the program on ascending points, n ≥ 2; those that are not `real`, beyond the others, have λ = 0.

    Where it is not `wanted` nothing is done: a batch waits for its slowest lane, and for finished ones in vain.
    """
    cones = Cones(x, jnp.sum(real))
    barrier = Barrier(cones, y, real, allowed)

    def goes_on(state):
        stage, _, best = state
        return wanted & (stage < len(_ACCURATE)) & ~(best.residual <= CERTAIN)

    def attempt(state):
        """On with the barrier to the next accuracy, and Newton's method from there."""
        stage, path, best = state
        accurate, last = jnp.asarray(_ACCURATE, x.dtype)[stage], stage == len(_ACCURATE) - 1
        idle = ~goes_on(state)  # a lane that waits for others
        path, _ = jax.lax.while_loop(
            lambda s: ~s[1] & (s[0].steps < _BARRIER), lambda s: barrier.step(s[0], accurate), (path, idle)
        )
        rounds = jnp.where(idle, 0, jnp.where(last, ROUNDS, 2))
        found = polish(cones, y, real, allowed, path, barrier.shares(path), rounds)
        better = (found.residual < best.residual) | (stage == 0)
        return stage + 1, path, jax.tree.map(lambda a, b: jnp.where(better, a, b), found, best)

    lines = jnp.zeros((2, 2, 2 * x.shape[0]), x.dtype)
    nothing = Solution(jnp.zeros_like(x), lines, jnp.full((), jnp.inf, x.dtype))
    return jax.lax.while_loop(goes_on, attempt, (jnp.zeros((), int), barrier.start(), nothing))[2]


def lower_bound(x: Float[Array, " n"], y: Float[Array, " n"], multipliers: Float[Array, " n"]) -> Float[Array, ""]:
    """A lower bound on ½‖θ‖² for every network of any width with margins ≥ 1, from any λ: Σλ/max_c h_c, λ < 0 as 0."""
    cones, lam = Cones(x), jnp.maximum(multipliers, 0)
    largest = jnp.max(cones.sizes(lam * y))
    return jnp.sum(lam) / jnp.where(largest > 0, largest, jnp.inf)
