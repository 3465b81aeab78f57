"""The cells of data points as cones of directions, and networks whose neurons lie in given cells.

A neuron in cell c (`clarke.py`) with output sign s draws the line s g·x̃ on its active points, x̃ = (x, 1). A balanced
one, u ∝ g, costs ½(‖u‖² + v²) = ‖g‖, and neurons of one cell and sign add up: a network is one line for each pair
(s, c).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from gradflow.clarke import cell_range
from gradflow.length import length
from gradflow.network import ReluNetwork

_TURN = 1e-12  # angle between z and a ray that is rounding
_NOTHING = 1e-13  # a neuron's share of ½‖θ‖² that is rounding
_UPRIGHT = 1e-10  # change of a neuron along the data, relative to itself, that is rounding: 1e-14 was seen


def neurons_held(points: int) -> int:
    """How many cells may be active at once; no more than there are points, of which some have no weight, are needed."""
    return min(4 * points, points + 8)


class Solution(eqx.Module):
    """λ (n,); g (2, 2, 2n) by sign, coordinate and cell as `lines`; and how far both are from being optimal.

    `residual` is the largest of: what margins lack, what h exceeds 1 by, the gap between Σ‖g‖ and Σλ relative to Σλ,
    negative λ and ‖g‖ relative to Σλ, and how far a neuron is from where λ puts it, relative to all of θ. If it is 0,
    Σλ ≤ value ≤ Σ‖g‖ proves both optimal.
    """

    multipliers: Float[Array, " n"]
    lines: Float[Array, "2 2 cells"]
    residual: Float[Array, ""]

    def network(self, x: Float[Array, " n"]) -> ReluNetwork:
        """The balanced network with these lines: one neuron a cell in use, zero-padded to `neurons_held`.

        One that is constant on the points `x` up to rounding bends nowhere. It would at ±10¹⁵: where all points are
        active, optimal directions may well be upright, z = (0, ·).
        """
        size = jnp.sqrt(jnp.sum(self.lines**2, axis=1)).reshape(-1)
        size, index = jax.lax.top_k(jnp.where(size > _NOTHING * jnp.sum(size), size, 0), neurons_held(size.size // 4))
        sign, cell = index // self.lines.shape[-1], index % self.lines.shape[-1]
        root = jnp.sqrt(jnp.where(size > 0, size, 1))
        w, b = jnp.where(size > 0, 1 / root, 0)[None] * self.lines[sign, :, cell].T
        w = jnp.where(jnp.abs(w) * jnp.maximum(1, jnp.max(jnp.abs(x))) <= _UPRIGHT * jnp.abs(b), 0, w)
        return ReluNetwork(w, b, jnp.where(size > 0, jnp.where(sign == 0, root, -root), 0))


class Cones(eqx.Module):
    """The 2n cells of n ≥ 2 sorted points as cones between unit rays t₁ and t₂: ray c is the second of cell c, and the
    first of cell `after[c]` (n, the dead one, for none); the first of cell c is ray `before[c]`. Points from `count` on
    are padding, and have no rays and cells, but that there are two points at least; `exists` tells which cells there
    are.

    Forces λ_i y_i act by their values G = z·t on rays, `values` (2n, n) times them: sums of λ_i y_i (x_i − x_j), which
    lose no digits to an origin that is far from all points. How far z is from the rays of its cell, into the cell, is
    `from_first` and `from_second` (2n, n) times them. `cos`, `sin` and `theta` are of the angle from t₁ to t₂, and
    `half` the cosine and the sine of half of it.
    """

    x: Float[Array, " n"]
    rays: Float[Array, "2 cells"]
    values: Float[Array, "cells n"]
    from_first: Float[Array, "cells n"]
    from_second: Float[Array, "cells n"]
    cos: Float[Array, "1 cells"]
    sin: Float[Array, "1 cells"]
    theta: Float[Array, "1 cells"]
    half: Float[Array, "2 1 cells"]
    before: Int[Array, " cells"]
    after: Int[Array, " cells"]
    exists: Bool[Array, "1 cells"]

    def __init__(self, x: Float[Array, " n"], count: Int[Array, ""] | None = None):
        n = x.shape[0]
        count = jnp.asarray(n) if count is None else jnp.maximum(count, 2)
        index = jnp.arange(2 * n)
        self.exists = ((index < count) | ((index > n) & (index < n + count)))[None]
        self.before = jnp.where(index == 0, n + count, index) - 1
        self.after = jnp.where(index % n < count - 1, index + 1, jnp.where(index == n + count - 1, 0, n))
        self.x, size = x, jnp.hypot(1, x)
        ray = jnp.stack([jnp.ones_like(x), -x]) / size[None]
        self.rays = jnp.concatenate([ray, -ray], axis=1)
        apart = (x[None, :] - x[:, None]) / size[:, None]
        self.values = jnp.maximum(jnp.concatenate([apart, -apart]), 0)
        # A quarter turn from a ray, clockwise as cells follow each other, to the active points of its cells.
        turned = jnp.stack([self.rays[1], -self.rays[0]])
        active = self.active(index).astype(x.dtype)
        beside = turned[0][:, None] * x[None, :] + turned[1][:, None]
        self.from_first, self.from_second = beside[self.before] * active, -beside * active
        # Between neighbours, and from the last ray of one side to the first of the other.
        last = x[count - 1]
        gap = jnp.concatenate([(last - x[0])[None], jnp.diff(x)])
        inner = jnp.concatenate([-(1 + x[0] * last)[None], 1 + x[1:] * x[:-1]])
        sizes = jnp.concatenate([size, size])
        between = sizes * sizes[self.before]
        self.sin, self.cos = (jnp.tile(part, 2)[None] / between[None] for part in (gap, inner))
        self.theta = jnp.arctan2(self.sin, self.cos)
        # Of half the angle; the smaller of both would have lost its digits as a root.
        larger = jnp.sqrt(0.5 * (1 + jnp.abs(self.cos)))
        smaller, acute = self.sin / (2 * larger), self.cos > 0
        self.half = jnp.stack([jnp.where(acute, larger, smaller), jnp.where(acute, smaller, larger)])

    def active(self, cell: Int[Array, " m"]) -> Bool[Array, "m n"]:
        """Which points are active in each of some cells."""
        low, high = cell_range(cell, self.x.shape[0])
        index = jnp.arange(self.x.shape[0], dtype=cell.dtype)
        return (index[None] >= low[:, None]) & (index[None] < high[:, None])

    def first(self, of_rays: Shaped[Array, "... cells"]) -> Shaped[Array, "... cells"]:
        """For each cell what its first ray has, 0 for cells that do not exist."""
        taken = jnp.take(of_rays, self.before, axis=-1)
        return jnp.where(jnp.broadcast_to(self.exists[0], taken.shape), taken, jnp.zeros_like(taken))

    def as_first(self, of_cells: Shaped[Array, "... cells"]) -> Shaped[Array, "... cells"]:
        """For each ray what the cell has of which it is the first, 0 if there is none."""
        exists = jnp.broadcast_to(self.exists[0], of_cells.shape)
        return jnp.take(jnp.where(exists, of_cells, jnp.zeros_like(of_cells)), self.after, axis=-1)

    def on_rays(self, force: Float[Array, " n"]) -> Float[Array, "2 cells"]:
        """s G, by sign and ray."""
        value = self.values @ force
        return jnp.stack([value, -value])

    def across(self, force: Float[Array, " n"]) -> tuple[Float[Array, "2 cells"], Float[Array, "2 cells"]]:
        """How far s z is from both rays, into the cell."""
        first, second = self.from_first @ force, self.from_second @ force
        return jnp.stack([first, -first]), jnp.stack([second, -second])

    def sizes(self, force: Float[Array, " n"]) -> Float[Array, "2 cells"]:
        """h_c(s z)."""
        second = self.on_rays(force)
        first = self.first(second)
        from_first, from_second = self.across(force)
        inside = (from_first >= 0) & (from_second >= 0)
        return jnp.where(inside, length(first, from_first), jnp.maximum(jnp.maximum(first, second), 0))

    def angles(self, force: Float[Array, " n"]) -> tuple[Float[Array, "2 cells"], Bool[Array, "2 cells"]]:
        """The angle from t₁ to s z, and whether that is inside the cell by more than rounding."""
        first = self.first(self.on_rays(force))
        from_first, from_second = self.across(force)
        noise = 8 * jnp.finfo(force.dtype).eps * (jnp.abs(self.from_first) @ jnp.abs(force))
        least = _TURN * length(first, from_first) + noise[None]
        return jnp.arctan2(from_first, first), (from_first > least) & (from_second > least)

    def unit(self, angle: Float[Array, "2 cells"]) -> Float[Array, "2 2 cells"]:
        """Unit vectors at an angle from t₁, by sign, coordinate and cell."""
        first = self.first(self.rays)
        turned = jnp.stack([first[1], -first[0]])
        return jnp.cos(angle)[:, None] * first[None] + jnp.sin(angle)[:, None] * turned[None]


def spaced(x: Float[Array, " n"], real: Bool[Array, " n"]) -> Float[Array, " n"]:
    """Ascending points of which those that are not `real` come last, equally spaced beyond the others.

    Where two points coincide lies a cell of no width, and no neuron would find its way through it.
    """
    first, last = x[0], jnp.max(jnp.where(real, x, -jnp.inf))
    step = jnp.where(last > first, last - first, jnp.hypot(1, first))
    return jnp.where(real, x, last + step * jnp.cumsum(~real).astype(x.dtype))
