"""Neurons that come to the origin of the (w, b) plane, where all rays meet.

A neuron with |v| > ‖u‖, u = (w, b), may be driven to u = 0 in finite time (v² − ‖u‖² is conserved, so v stays away
from 0). Near there p and v stand still, and u̇ = v z depends on the direction of u alone: with G(u) = Σ p_i y_i
max(0, u·x̃_i), which grows linearly with the length of u, and u = r e^{iφ},

    ṙ = v G(φ),    r φ̇ = v G'(φ).

So u turns, the faster the smaller r, the way in which v G ascends, until it comes to a maximum of v G on the circle of
directions, a *stop*: the direction of s z inside a cell that contains it, s the sign of v, or a ray on which it sticks,
or the cell in which it is dead. There r grows or falls at a steady rate. A stop inside a cell leads away from the
origin, always; a ray may lead into it and through it, on to the opposite ray. If that, or the stop that follows it,
leads back, the neuron rests at the origin until p has changed so much that the way from there leads out.

All this is over within a time of r/|v|. Once r is within the tolerance of the neuron, it is put on its way out at once.
On which side it leaves may hang on less than rounding, as at any point at which several solutions start.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gradflow.clarke import Mode, Points, Weights, inactive_cell, pulls
from gradflow.length import length
from gradflow.network import ReluNetwork


def closest_approach(nodes: ReluNetwork, to_quartic, scan) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """How near u comes to the origin in a step, over |v|, and at which part of the step.

    **Arguments** `nodes`: the network at the five nodes of the step, each field (5, k); `to_quartic` (5, 5): from
    values at the nodes to coefficients; `scan` (m, 5): from those to m evenly spaced values. **Returns** (k,) each.
    """
    size = jnp.max(jnp.abs(nodes.v), axis=0)
    over = (1 / jnp.where(size > 0, size, 1))[None]
    w, b = (to_quartic @ jnp.where(size[None] > 0, a * over, 1) for a in (nodes.w, nodes.b))
    along_w, along_b = scan @ w, scan @ b
    step_w, step_b = jnp.diff(along_w, axis=0), jnp.diff(along_b, axis=0)
    length = step_w**2 + step_b**2
    inner = along_w[:-1] * step_w + along_b[:-1] * step_b
    part = jnp.clip(-inner / jnp.where(length > 0, length, 1), 0, 1)
    near_w, near_b = along_w[:-1] + part * step_w, along_b[:-1] + part * step_b
    distance = jnp.sqrt(near_w**2 + near_b**2)
    index = jnp.argmin(distance, axis=0)[None]
    distance, part = (jnp.take_along_axis(a, index, axis=0)[0] for a in (distance, part))
    return distance, (index[0].astype(part.dtype) + part) / (scan.shape[0] - 1)


def leave_origin(
    points: Points, net: ReluNetwork, weights: Weights, mode: Mode, there: Bool[Array, " k"]
) -> tuple[ReluNetwork, Mode]:
    """The network and the mode with the neurons that are `there`, at the origin, on their way out of it, or at rest.

    A sliding one starts on its ray, and is put back there if it sticks to it and that leads out. O(n + k).
    """

    def leave(state):
        _, net, mode = state
        return (jnp.array(False), *_leave(points, net, weights, mode, there))

    # A loop, as `cond` would run for every lane of a batch.
    return jax.lax.while_loop(lambda state: state[0], leave, (jnp.any(there), net, mode))[1:]


class Circle(eqx.Module):
    """The stops of neurons of one sign of v among the 4n places on the circle: cell c is at 2c, and ray β, between the
    cells β and β + 1, at 2β + 1.

    - `following`, `preceding`: the nearest stop at or after each place, and at or before it;
    - `rate`: at which u grows at each place, over |v|, −∞ where there is no stop;
    - `descends`: for each ray, whether one that does not stick leaves it for the cell before it.
    """

    following: Array
    preceding: Array
    rate: Float[Array, " places"]
    descends: Bool[Array, " rays"]

    def __init__(self, sign: int, directions, at_ray, z, inactive, active):
        cells = z.shape[1]
        first = jnp.roll(directions, 1, axis=1)
        inside = (sign * _cross(first, z) <= 0) & (sign * _cross(z, directions) <= 0) & jnp.any(z != 0, axis=0)
        sticks = (sign * inactive > 0) & (sign * active < 0)
        dead = jnp.arange(cells) == cells // 2
        stop = jnp.stack([inside | dead, sticks], axis=1).reshape(-1)
        rate = jnp.stack([jnp.sqrt(jnp.sum(z**2, axis=0)), sign * jnp.sum(at_ray * directions, axis=0)], axis=1)
        self.rate = jnp.where(stop, rate.reshape(-1), -jnp.inf)
        places = 2 * cells
        index, twice = jnp.arange(2 * places), jnp.tile(stop, 2)
        self.following = jax.lax.cummin(jnp.where(twice, index, 2 * places), reverse=True)[:places] % places
        self.preceding = jax.lax.cummax(jnp.where(twice, index, -1))[places:] % places
        to_active = (sign * active > 0) & ~(sign * inactive < 0)
        # The active cell comes before the ray where neurons face right.
        self.descends = to_active == (jnp.arange(cells) < cells // 2)

    def next_stop(self, place, descends):
        """The stop that u turns to from `place`, by turning this way."""
        return jnp.where(descends, self.preceding[place], self.following[place])

    def way_out(self, place, descends):
        """The stop at which u leaves from `place`, or the ray along which it comes to rest, and whether it does."""
        first = self.next_stop(place, descends)
        # Into the origin along a ray: on along the opposite one.
        opposite = (first + self.rate.size // 2) % self.rate.size
        second = self.next_stop(opposite, self.descends[opposite // 2])
        inward = (first % 2 == 1) & (self.rate[first] <= 0)
        return jnp.where(inward, second, first), inward & (second % 2 == 1) & (self.rate[second] <= 0)


def _leave(points: Points, net: ReluNetwork, weights: Weights, mode: Mode, there):
    n = points.x.shape[0]
    x, norm = points.x, points.norm
    right = jnp.stack([1 / norm, -x / norm])
    directions = jnp.concatenate([right, -right], axis=1)  # of the rays, in clockwise order
    at_ray, own = pulls(points, weights), weights.p * points.y
    z = at_ray + jnp.concatenate([jnp.stack([own * x, own]), jnp.zeros_like(right)], axis=1)  # in the cells
    twice = jnp.concatenate([x, x])
    inactive = at_ray[0] * twice + at_ray[1]
    active = inactive + jnp.concatenate([own, own]) * (twice**2 + 1)

    sign, ray = jnp.where(net.v < 0, -1, 1), jnp.where(mode.resting, -2 - mode.ray, mode.ray)
    start = jnp.where(ray >= 0, 2 * ray + 1, 2 * mode.cell)
    turn = sign * (net.w * z[1, mode.cell] - net.b * z[0, mode.cell])

    def decide(circle: Circle):
        return circle.way_out(start, jnp.where(ray >= 0, circle.descends[jnp.maximum(ray, 0)], turn > 0))

    positive, negative = (decide(Circle(s, directions, at_ray, z, inactive, active)) for s in (1, -1))
    stop, stays = jax.tree.map(lambda a, b: jnp.where(sign > 0, a, b), positive, negative)
    cell, on_ray = stop // 2, stop % 2 == 1
    size = jnp.sqrt(jnp.sum(z**2, axis=0))
    along_z = jnp.where((size > 0)[None], z / jnp.where(size > 0, size, 1)[None], 0)
    dead = jnp.stack([-x / norm, -1 / norm])[:, jnp.array([0, n - 1])].sum(axis=1)
    out = jnp.where(on_ray[None], directions[:, cell], sign[None] * along_z[:, cell])
    out = jnp.where((~on_ray & (cell == n))[None], dead[:, None] / jnp.sqrt(jnp.sum(dead**2)), out)
    w, b = jnp.where(stays, 0, length(net.w, net.b))[None] * out
    new_cell = jnp.where(stays, n, jnp.where(on_ray, inactive_cell(cell, n), cell))
    new_ray = jnp.where(stays, -2 - cell, jnp.where(on_ray, cell, -1))
    return (
        ReluNetwork(jnp.where(there, w, net.w), jnp.where(there, b, net.b), net.v),
        Mode(
            jnp.where(there, new_cell.astype(mode.cell.dtype), mode.cell),
            jnp.where(there, new_ray.astype(mode.ray.dtype), mode.ray),
        ),
    )


def _cross(a: Float[Array, "2 m"], b: Float[Array, "2 m"]) -> Float[Array, " m"]:
    return a[0] * b[1] - a[1] * b[0]
