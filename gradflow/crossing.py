"""Many breakpoints crossed in one step, to second order: what makes thousands of points affordable.

A step is taken in the mode in which it starts. Where the breakpoint of neuron j passes the points i ∈ P meanwhile, the
field has jumped, each time by a little, and the step has missed

    δu_j = v_j h Σ_{i ∈ P} ± p_i y_i x̃_i (1 − s_i),    + where x_i becomes active,

s_i ∈ [0, 1] being the part of the step gone when the breakpoint is at x_i. With s_i linear in x_i between the
breakpoint at the start and at the end this is three prefix sums over the points for all neurons together, and it is
added to the step: the `kick`. v_j misses nothing to this order, as u_j·x̃_i = 0 at the crossing. (Landing on every
crossing instead takes one or two attempts for each: at 5,000 points and 64 neurons 3,000 attempts got to τ = 0.16.)

**What is left** of the jump |v_j| W_j h, W_j = Σ_P p_i ‖x̃_i‖, is a share of it: the relative change of all weights and
of the breakpoint's speed within the step. With R = Σ c_i ‖∂q_i‖² + Σ p_i ‖x̃_i‖, which bounds the rate of change of the
field, the depth D_j gone beyond the first ray, and w before and after, that is at most h R + |v_j| D_j + |Δw_j|/|w_j|.
Besides, the margins of the points passed were wrong by |v_j| D_j, and with them the forces on all neurons by
Σ_j W_j |v_j| D_j. All of it falls with h², so the step that would have been short enough is known.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.clarke import Field, Weights, cell_range, pulls
from gradflow.network import ReluNetwork
from gradflow.sites import sums_before

_LEFT = 0.2  # of the tolerance, that a kick may leave undone
_CHANGE = 0.5  # of the field in one step, up to which the estimate is believed
_AIM = 0.75  # of both, for a step that is tried again


class Crossing(eqx.Module):
    """What passing its points in one step does to each neuron.

    - `harmless`: the kick leaves nothing that counts;
    - `enough`: the part of the step that would be harmless, at most 5;
    - `kick`: (2, k) what is to be added to u.
    """

    harmless: Bool[Array, " k"]
    enough: Float[Array, " k"]
    kick: Float[Array, "2 k"]


def cross(
    field: Field,
    first: ReluNetwork,
    last: ReluNetwork,
    start: Weights,
    end: Weights,
    step: Float[Array, ""],
    cell: Int[Array, " k"],
    weight: Float[Array, " k"],
    depth: Float[Array, " k"],
    size: Float[Array, " k"],
    rtol: Float[Array, ""],
) -> Crossing:
    """Free neurons go from their cells at `first` to `cell` at `last`.

    **Arguments** `weight`: W_j; `depth`: D_j; `size`: what u_j may be wrong by.
    """
    points, n = field.points, field.points.x.shape[0]
    heaviest = jnp.maximum(start.p, end.p) * points.norm
    rate = jnp.sum(end.c * field.squared_gradients(last)) + jnp.sum(heaviest)
    keeps = (first.w * last.w > 0) & ~field.mode.sliding
    w = jnp.where(keeps, jnp.minimum(jnp.abs(first.w), jnp.abs(last.w)), 1)
    shift = jnp.abs(last.v) * depth
    share = step * rate + shift + jnp.abs(last.w - first.w) / w
    others = step * jnp.sum(jnp.where(field.mode.sliding, 0, weight * shift)) / rtol
    left = jnp.maximum(jnp.abs(last.v) * weight * step * share / size, jnp.where(weight > 0, others, 0))
    sticks = _passes_sticky_ray(field, last, end, cell)
    change = jnp.broadcast_to(step * rate, left.shape)
    harmless = keeps & ~sticks & (left <= _LEFT) & (change <= _CHANGE)
    enough = jnp.minimum(jnp.sqrt(_AIM * _LEFT / jnp.maximum(left, 0.03 * _LEFT)), _AIM * _CHANGE / change)
    enough = jnp.where(keeps & ~sticks, jnp.minimum(enough, 5), 0)

    force, centre = 0.5 * (start.p + end.p) * points.y, points.x[n // 2]
    x = points.x - centre  # far from 0, differences of x would be lost in the sums
    total = sums_before(force[None] * jnp.stack([jnp.ones_like(x), x, x**2]))
    (a, b), (c, d) = cell_range(field.mode.cell, n), cell_range(cell, n)
    m0, m1, m2 = (total[:, d] - total[:, c]) - (total[:, b] - total[:, a])
    begin, finish = -first.b / jnp.where(keeps, first.w, 1), -last.b / jnp.where(keeps, last.w, 1)
    moves = keeps & (finish != begin)
    # 1 − s_i = (finish − x_i)/(finish − begin).
    scale = jnp.where(moves, step * last.v / jnp.where(moves, finish - begin, 1), 0)
    finish -= centre
    offset = finish * m0 - m1
    kick = scale[None] * jnp.stack([finish * m1 - m2 + centre * offset, offset])
    # A breakpoint that starts on its ray up to rounding could be given a share s outside [0, 1].
    most = jnp.abs(last.v) * weight * step
    return Crossing(harmless, enough, jnp.clip(kick, -most[None], most[None]))


def _passes_sticky_ray(field: Field, net: ReluNetwork, weights: Weights, cell: Int[Array, " k"]) -> Bool[Array, " k"]:
    """Whether a breakpoint that goes to `cell` without turning passes a point at which it would stick.

    That depends on the neuron only through the signs of v and w, so it is counted once for all neurons.
    """
    points, n = field.points, field.points.x.shape[0]
    weight, off = weights.p * points.y, pulls(points, weights)
    x = jnp.concatenate([points.x, points.x])
    inactive = off[0] * x + off[1]
    active = inactive + jnp.tile(weight * points.squared_norm, 2)
    sticky = jnp.stack([(inactive < 0) & (active > 0), (inactive > 0) & (active < 0)])  # for v < 0, for v > 0
    each = sums_before(sticky.astype(x.dtype).reshape(4, n)).reshape(2, 2, n + 1)
    near, far = each[:, 0], each[:, 1]  # over the rays of w > 0, and of w < 0
    count = jnp.concatenate([near, near[:, -1:] + far[:, 1:]], axis=1)
    sign = (net.v > 0).astype(jnp.int32)
    old, rays = field.mode.cell, 2 * n
    passed = count[sign, jnp.maximum(old, cell)] - count[sign, jnp.minimum(old, cell)]
    # Cells lie on a circle; the way is the shorter one, and may lead through its seam.
    return jnp.where(2 * jnp.abs(cell - old) > rays, count[sign, rays] - passed, passed) != 0
