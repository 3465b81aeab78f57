"""The cells of data points as cones of directions, and networks whose neurons lie in given cells.

A neuron in cell c (`clarke.py`) with output sign s draws the line s g·x̃ on its active points, x̃ = (x, 1). A balanced
one, u ∝ g, costs ½(‖u‖² + v²) = ‖g‖, and neurons of one cell and sign add up: a network is one line for each pair
(s, c).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.clarke import cell_range
from gradflow.network import ReluNetwork
from gradflow.sites import Sites

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
    """The 2n cells of n ≥ 2 sorted points as cones between unit rays `first` and `second`, (2, 2n) each."""

    x: Float[Array, " n"]
    first: Float[Array, "2 cells"]
    second: Float[Array, "2 cells"]
    sites: Sites

    def __init__(self, x: Float[Array, " n"]):
        n = x.shape[0]
        ray = jnp.stack([jnp.ones_like(x), -x]) / jnp.hypot(1, x)[None]
        self.x, self.second = x, jnp.concatenate([ray, -ray], axis=1)
        self.first = jnp.roll(self.second, 1, axis=1)
        self.sites = Sites(x, *cell_range(jnp.arange(2 * n), n)).ready()

    def active(self, cell: Int[Array, " m"]) -> Bool[Array, "m n"]:
        """Which points are active in each of some cells."""
        low, high = cell_range(cell, self.x.shape[0])
        index = jnp.arange(self.x.shape[0], dtype=cell.dtype)
        return (index[None] >= low[:, None]) & (index[None] < high[:, None])

    def forces(self, force: Float[Array, " n"]) -> Float[Array, "2 2 cells"]:
        """s Σ_{i ∈ c} force_i x̃_i."""
        z = self.sites.pull(force)
        return jnp.stack([z, -z])

    def place(self, z: Float[Array, "2 2 cells"]):
        """0 where z lies in its cone, 1 or 2 where the projection is on the first or second ray, 3 where it is 0."""
        along = jnp.stack([jnp.sum(z * t[None], axis=1) for t in (self.first, self.second)])
        # Cells follow each other clockwise.
        inside = (_cross(self.first[None], z) <= 0) & (_cross(z, self.second[None]) <= 0)
        best = jnp.where(along[0] >= along[1], 1, 2)
        return jnp.where(inside, 0, jnp.where(jnp.max(along, axis=0) > 0, best, 3))

    def depth(self, z: Float[Array, "2 2 cells"]) -> Float[Array, "2 cells"]:
        """How far z is inside its cone: its distance from the nearer of both rays, negative outside."""
        return jnp.minimum(-_cross(self.first[None], z), -_cross(z, self.second[None]))

    def project(self, z: Float[Array, "2 2 cells"], place) -> Float[Array, "2 2 cells"]:
        t = jnp.where((place == 1)[:, None], self.first[None], self.second[None])
        on_ray = jnp.sum(z * t, axis=1, keepdims=True) * t
        place = place[:, None]
        return jnp.where(place == 0, z, jnp.where(place == 3, 0, on_ray))

    def margins(self, lines: Float[Array, "2 2 cells"], y) -> Float[Array, " n"]:
        return y * self.sites.lines(lines[0] - lines[1])

    def gram(self, b: Float[Array, "3 cells"]) -> Float[Array, "n n"]:
        """Σ_c [i, l ∈ c] x̃_iᵀ B_c x̃_l."""
        return self.sites.gram(b[jnp.array([0, 1, 1, 2])], slice(None))


def spaced(x: Float[Array, " n"], real: Bool[Array, " n"]) -> Float[Array, " n"]:
    """Ascending points of which those that are not `real` come last, equally spaced beyond the others.

    Where two points coincide lies a cell of no width, and no neuron would find its way through it.
    """
    first, last = x[0], jnp.max(jnp.where(real, x, -jnp.inf))
    length = jnp.where(last > first, last - first, 1)
    return jnp.where(real, x, last + length * jnp.cumsum(~real).astype(x.dtype))


def _cross(a, b):
    """Signed area, over the axis of coordinates of (2, 2, m)."""
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
