"""Positions on the line at which neurons act, and sums over the active ones in time O(positions + neurons).

A neuron is active on a half-open range of sorted positions that reaches to one of the two ends. So a sum over the
neurons active at each position, or over the positions at which each neuron is active, is a running sum.

**Compression.** Between two neighbouring breakpoints the network is one line, so however many points lie there, their
second moments Σ c_i x̃_i x̃_iᵀ, x̃ = (x, 1), are those of two positions, mean ± standard deviation, of half the weight
each; and any vector Σ a_i x̃_i is a combination of these two. k neurons cut the line into k + 1 intervals: a Jacobian
that sums over any number of points is one over at most 2(k + 1) positions, exactly.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Sites(eqx.Module):
    """Positions `x` (s,), in order, and the range `low` ≤ i < `high` (k,) on which each neuron is active.

    `high` = s marks a right-facing neuron, also one that is active everywhere; `low` = 0 a left-facing one, also one
    that is active nowhere (`high` = 0).
    """

    x: Float[Array, " s"]
    low: Int[Array, " k"]
    high: Int[Array, " k"]

    @property
    def count(self) -> int:
        return self.x.shape[0]

    def over_neurons(self, terms: Float[Array, "m k"]) -> Float[Array, "m s"]:
        """Σ of `terms` over the neurons active at each position."""
        empty = jnp.zeros((terms.shape[0], self.count + 1), terms.dtype)
        return jnp.cumsum(empty.at[:, self.low].add(terms).at[:, self.high].add(-terms), axis=1)[:, : self.count]

    def lines(self, slope: Float[Array, " k"], offset: Float[Array, " k"]) -> Float[Array, " s"]:
        """Σ_j (slope_j x + offset_j) over the neurons active at each position."""
        total = self.over_neurons(jnp.stack([slope, offset]))
        return total[0] * self.x + total[1]

    def pull(self, force: Float[Array, " s"]) -> Float[Array, "2 k"]:
        """z_j = Σ force_i x̃_i over the positions at which each neuron is active."""
        total = jnp.cumsum(jnp.stack([force * self.x, force]), axis=1)
        total = jnp.concatenate([jnp.zeros_like(total[:, :1]), total], axis=1)
        return total[:, self.high] - total[:, self.low]

    def squares(self, moments: Float[Array, "4 k"]) -> Float[Array, " s"]:
        """Σ_j (a_j x² + 2 b_j x + c_j + d_j (x² + 1)) over the neurons active at each position, never negative."""
        a, b, c, d = self.over_neurons(moments)
        # Where no neuron is left, running sums leave rounding of either sign.
        return jnp.maximum(a * self.x**2 + 2 * b * self.x + c, 0) + jnp.maximum(d, 0) * (self.x**2 + 1)

    def gram(self, matrix: Float[Array, "4 k"], kept: Int[Array, " r"]) -> Float[Array, "r r"]:
        """Σ_j x̃_iᵀ M_j x̃_l over the neurons active at both i and l of `kept`, M_j = (m_0, m_1; m_2, m_3).

        For x_i ≤ x_l those are the right-facing neurons active at x_i and the left-facing ones active at x_l.
        """
        s = self.count
        right = jnp.where((self.high == s)[None], matrix, 0)
        left = jnp.where(((self.high < s) & (self.high > 0))[None], matrix, 0)
        empty = jnp.zeros((4, s), matrix.dtype)
        rightward = jnp.cumsum(empty.at[:, jnp.minimum(self.low, s - 1)].add(right), axis=1)
        leftward = jnp.cumsum(empty.at[:, jnp.maximum(self.high - 1, 0)].add(left)[:, ::-1], axis=1)[:, ::-1]
        # At l ≥ i the former belong to i and the latter to l, at l < i the other way round: no gathers of r² entries.
        rightward, leftward = rightward[:, kept], leftward[:, kept]
        ordered = (kept[:, None] <= kept[None, :])[None]
        h = jnp.where(ordered, rightward[:, :, None], rightward[:, None, :])
        h += jnp.where(ordered, leftward[:, None, :], leftward[:, :, None])
        x = self.x[kept]
        return h[0] * (x[:, None] * x[None, :]) + h[1] * x[:, None] + h[2] * x[None, :] + h[3]

    def compress(self, weight: Float[Array, " s"], vectors: Float[Array, "m s"]):
        """Two positions per interval between breakpoints that stand for all of its positions.

        **Arguments** `weight` c ≥ 0; `vectors`: coefficients a of vectors Σ a_i x̃_i, of the size of c at most.
        **Returns** the new sites, c' and a', with Σ c x̃ x̃ᵀ and Σ a x̃ kept over every interval.
        """
        k = self.low.shape[0]
        border = jnp.where(self.high == self.count, self.low, self.high)
        borders = jnp.sort(border)
        home = jnp.searchsorted(borders, jnp.arange(self.count, dtype=borders.dtype), side="right")

        def collect(values):
            return jax.ops.segment_sum(values, home, num_segments=k + 1)

        mass = collect(weight)
        safe = jnp.where(mass > 0, mass, 1)
        mean = collect(weight * self.x) / safe
        offset = self.x - mean[home]
        variance = collect(weight * offset**2) / safe
        spread = jnp.sqrt(jnp.where(variance > 0, variance, 1))
        deviation = jnp.where(variance > 0, spread, 0)
        total = jax.vmap(collect)(vectors)
        tilt = jnp.where((deviation > 0)[None], jax.vmap(collect)(vectors * offset[None]) / spread[None], 0)

        def interleave(a, b):
            return jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], 2 * (k + 1))

        first = 2 * (jnp.searchsorted(borders, border, side="left") + 1)
        everything = jnp.full_like(first, 2 * (k + 1))
        faces_right = self.high == self.count
        sites = Sites(
            interleave(mean - deviation, mean + deviation),
            jnp.where(faces_right, first, 0),
            jnp.where(faces_right, everything, first),
        )
        return sites, interleave(mass / 2, mass / 2), interleave((total - tilt) / 2, (total + tilt) / 2)
