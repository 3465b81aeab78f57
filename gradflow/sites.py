"""Positions on the line at which neurons act, and sums over the active ones in time O(positions + neurons).

A neuron is active on a half-open range of sorted positions that reaches to one of the two ends. So a sum over the
neurons active at each position, or over the positions at which each neuron is active, is a running sum. Where there are
few of both, a product with the matrix of who is active where is faster, and gives the same up to rounding.

**Compression.** Between two neighbouring breakpoints the network is one line, so however many points lie there, their
second moments Σ c_i x̃_i x̃_iᵀ, x̃ = (x, 1), are those of two positions, mean ± standard deviation, of half the weight
each; and any vector Σ a_i x̃_i is a combination of these two. k neurons cut the line into k + 1 intervals: a Jacobian
that sums over any number of points is one over at most 2(k + 1) positions, exactly.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_FEW = 4096  # pairs: products were faster at 1,600; where they stop being so was not measured


def few(positions: int, neurons: int) -> bool:
    """Whether all pairs are few enough to be looked at one by one."""
    return positions * neurons <= _FEW


def sums_before(terms: Float[Array, "m n"]) -> Float[Array, "m n+1"]:
    """Of every row, the sums of its first 0, 1, …, n terms; by a product, if they are few."""
    n = terms.shape[1]
    if few(n, n + 1):
        return _product(terms, jnp.asarray(np.tri(n + 1, n, -1).T, terms.dtype))
    return jnp.concatenate([jnp.zeros_like(terms[:, :1]), jnp.cumsum(terms, axis=1)], axis=1)


class Sites(eqx.Module):
    """Positions `x` (s,), in order, and the range `low` ≤ i < `high` (k,) on which each neuron is active.

    `high` = s marks a right-facing neuron, also one that is active everywhere; `low` = 0 a left-facing one, also one
    that is active nowhere (`high` = 0).
    """

    x: Float[Array, " s"]
    low: Int[Array, " k"]
    high: Int[Array, " k"]
    active: Float[Array, "k s"] | None = None  # 1 and 0, and transposed, if `ready`
    transposed: Float[Array, "s k"] | None = None

    def ready(self) -> "Sites":
        """For many sums: by products, if there are few enough pairs."""
        if not few(self.count, self.low.shape[0]):
            return self
        index = jnp.arange(self.count, dtype=self.low.dtype)
        active = (self.low[:, None] <= index[None]) & (index[None] < self.high[:, None])
        transposed = (self.low[None] <= index[:, None]) & (index[:, None] < self.high[None])
        return Sites(self.x, self.low, self.high, active.astype(self.x.dtype), transposed.astype(self.x.dtype))

    @property
    def count(self) -> int:
        return self.x.shape[0]

    def over_neurons(self, terms: Float[Array, "m k"]) -> Float[Array, "m s"]:
        """Σ of `terms` over the neurons active at each position."""
        if self.active is not None:
            return _product(terms, self.active)
        empty = jnp.zeros((terms.shape[0], self.count + 1), terms.dtype)
        return jnp.cumsum(empty.at[:, self.low].add(terms).at[:, self.high].add(-terms), axis=1)[:, : self.count]

    def lines(self, lines: Float[Array, "2 k"]) -> Float[Array, " s"]:
        """Σ_j (slope_j x + offset_j) over the neurons active at each position."""
        total = self.over_neurons(lines)
        return total[0] * self.x + total[1]

    def pull(self, force: Float[Array, " s"]) -> Float[Array, "2 k"]:
        """z_j = Σ force_i x̃_i over the positions at which each neuron is active."""
        moments = jnp.stack([force * self.x, force])
        if self.transposed is not None:
            return _product(moments, self.transposed)
        total = sums_before(moments)
        return total[:, self.high] - total[:, self.low]

    def squares(self, moments: Float[Array, "4 k"]) -> Float[Array, " s"]:
        """Σ_j (a_j x² + 2 b_j x + c_j + d_j (x² + 1)) over the neurons active at each position, never negative."""
        a, b, c, d = self.over_neurons(moments)
        # Where no neuron is left, running sums leave rounding of either sign.
        return jnp.maximum(a * self.x**2 + 2 * b * self.x + c, 0) + jnp.maximum(d, 0) * (self.x**2 + 1)

    def gram(self, matrix: Float[Array, "4 k"], kept: Int[Array, " r"] | slice) -> Float[Array, "r r"]:
        """Σ_j x̃_iᵀ M_j x̃_l over the neurons active at both i and l of `kept`, M_j = (m_0, m_1; m_2, m_3).

        For x_i ≤ x_l those are the right-facing neurons active at x_i and the left-facing ones active at x_l, with sums
        R_i and L_l of their matrices: the entry is (R_iᵀ x̃_i)·x̃_l + (L_l x̃_l)·x̃_i, so that nothing but vectors along
        the sites is summed. For x_i > x_l the roles change: (R_l x̃_l)·x̃_i + (L_iᵀ x̃_i)·x̃_l.
        """
        s = self.count
        right = jnp.where((self.high == s)[None], matrix, 0)
        left = jnp.where(((self.high < s) & (self.high > 0))[None], matrix, 0)
        if self.active is not None:
            rightward, leftward = self.over_neurons(right), self.over_neurons(left)
        else:
            empty = jnp.zeros((4, s), matrix.dtype)
            rightward = jnp.cumsum(empty.at[:, jnp.minimum(self.low, s - 1)].add(right), axis=1)
            leftward = empty.at[:, jnp.maximum(self.high - 1, 0)].add(left)
            leftward = jnp.cumsum(leftward[:, ::-1], axis=1)[:, ::-1]

        def times(m):
            return jnp.stack([m[0] * self.x + m[1], m[2] * self.x + m[3]])[:, kept]

        def transposed_times(m):
            return jnp.stack([m[0] * self.x + m[2], m[1] * self.x + m[3]])[:, kept]

        rows, columns = (transposed_times(rightward), times(leftward)), (transposed_times(leftward), times(rightward))
        x = self.x[kept]

        def pair(of_row, of_column):
            return (of_row[0][:, None] * x[None, :] + of_row[1][:, None]) + (
                x[:, None] * of_column[0][None, :] + of_column[1][None, :]
            )

        index = jnp.arange(s)[kept]
        return jnp.where(index[:, None] <= index[None, :], pair(*rows), pair(*columns))

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


def _product(a: Float[Array, "m k"], b: Float[Array, "k s"]) -> Float[Array, "m s"]:
    # Sums, not approximations: some devices round the factors of a product.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
