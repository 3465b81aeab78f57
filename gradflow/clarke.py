"""The Clarke flow piece by piece: activation cells, sliding modes, and the smooth field inside one mode.

**Cells.** Sort the points, x_0 < … < x_{n−1}. On the circle of directions of u_j = (w_j, b_j) the n lines w x_i + b =
0 are 2n critical rays, and between two of them the neuron's pattern is fixed. The pattern is thus one integer, the
cell m ∈ {0, …, 2n−1}:

    m = 0 … n−1:    active on x_m … x_{n−1}      (m = 0: on all)
    m = n … 2n−1:   active on x_0 … x_{m−n−1}    (m = n: on none)

Ray β between the cells β and β + 1 (mod 2n) belongs to point β mod n, and w > 0 on it if β < n, w < 0 otherwise. Only
the rays m − 1 and m can be hit from cell m.

**Sliding.** On a ray of point i write a for the velocity of u_j·x̃_i without sample i, and b = v_j p_i y_i ‖x̃_i‖² for
what sample i adds on its active side (x̃ = (x, 1)). The breakpoint sticks to x_i if both sides push it back, a > 0 > a
+ b; the Filippov velocity is then the projection of v_j z_j to the ray, z_j = Σ_l p_l y_l A_jl x̃_l without sample i,
and sample i acts with weight μ = −a/b ∈ [0, 1]. That is gradient flow of the loss *restricted* to u_j on its ray,
hence smooth, and all formulas below hold for it with x̃_l replaced by its projection. v_j cancels in μ: neurons that
slide on one ray share it.

**One mode, one smooth field.** p depends on θ through the margins alone, so neurons interact through p only, and what
one neuron does at an event needs no knowledge of the others: simultaneous events are decided one by one.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.data import Dataset
from gradflow.loss import Loss
from gradflow.network import ReluNetwork


class Points(eqx.Module):
    """Sorted points without repetitions; the slots that repetitions leave free carry no weight and lie right of all.

    - `x`, `y`: (n,), x strictly ascending up to the padding;
    - `log_count`: (n,) log of how often each point occurs, −inf for padding;
    - `conflict`: whether some point carries both labels.
    """

    x: Float[Array, " n"]
    y: Float[Array, " n"]
    log_count: Float[Array, " n"]
    conflict: Bool[Array, ""]

    def __init__(self, data: Dataset):
        order = jnp.argsort(data.x)
        x, y = data.x[order], data.y[order]
        n = x.shape[0]
        new = jnp.concatenate([jnp.ones((1,), bool), x[1:] != x[:-1]])
        slot = jnp.cumsum(new) - 1
        beyond = x[-1] + (1 + x[-1] - x[0])
        count = jnp.zeros_like(x).at[slot].add(1)
        first = jnp.zeros_like(x).at[slot].set(y)
        self.x = jnp.full_like(x, beyond).at[slot].set(x)
        self.y = jnp.where(count > 0, first, 1)
        self.log_count = jnp.log(count)
        self.conflict = jnp.any(~new[1:] & (y[1:] != y[:-1])) if n > 1 else jnp.array(False)

    @property
    def squared_norm(self) -> Float[Array, " n"]:
        """‖x̃_i‖² = x_i² + 1."""
        return self.x**2 + 1


class Mode(eqx.Module):
    """The pattern of every neuron: its cell, and the ray on which it slides (−1: on none)."""

    cell: Int[Array, " k"]
    ray: Int[Array, " k"]

    @property
    def sliding(self) -> Bool[Array, " k"]:
        return self.ray >= 0

    def active(self, n: int) -> tuple[Int[Array, " k"], Int[Array, " k"]]:
        """The half-open range lo ≤ i < hi of active points; the point of a sliding neuron is left out."""
        cell = jnp.where(self.sliding, inactive_cell(self.ray, n), self.cell)
        return cell_range(cell, n)


def cell_range(cell: Int[Array, "..."], n: int):
    """The half-open range of points active in `cell`."""
    low = jnp.where(cell < n, cell, 0)
    return low, jnp.where(cell < n, n, cell - n)


def inactive_cell(ray: Int[Array, "..."], n: int):
    """The cell beside `ray` in which its point is inactive."""
    return jnp.where(ray < n, ray + 1, ray)


def active_cell(ray: Int[Array, "..."], n: int):
    """The cell beside `ray` in which its point is active."""
    return jnp.where(ray < n, ray, (ray + 1) % (2 * n))


def find_cell(net: ReluNetwork, points: Points) -> Int[Array, " k"]:
    """The cell of every neuron; a breakpoint exactly on a point counts as inactive there (max(0, ·)' = 0 at 0)."""
    n = points.x.shape[0]
    # The number of active points, by bisection on the monotone sequence w x_i + b: exact in floating point, O(log n).
    right = net.w > 0
    low, high = jnp.zeros_like(net.w, jnp.int32), jnp.full_like(net.w, n, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        active = net.w * points.x[jnp.minimum(middle, n - 1)] + net.b > 0
        # Right-facing: inactive points come first. Left-facing: active ones do.
        forward = jnp.where(right, ~active, active)
        open_ = low < high
        return jnp.where(open_ & forward, middle + 1, low), jnp.where(open_ & ~forward, middle, high)

    low, _ = jax.lax.fori_loop(0, max(n.bit_length(), 1), halve, (low, high))
    # Right-facing: `low` is the first active point. Left-facing: the number of active ones (n is "all", cell 0).
    return jnp.where(right, low, jnp.where(low == n, 0, n + low))


class Weights(eqx.Module):
    """What the margins decide: sample weights p, their response c_i = p_i |d log(−ℓ')/dq_i|, and the rate s."""

    q: Float[Array, " n"]
    p: Float[Array, " n"]
    c: Float[Array, " n"]
    log_rate: Float[Array, ""]
    log_loss: Float[Array, ""]


class Field(eqx.Module):
    """d(θ, clock)/dτ in one fixed mode: smooth, so that a solver keeps its order. A Diffrax vector field."""

    points: Points
    loss: Loss
    mode: Mode
    log_unit: Float[Array, ""]
    rank: int = eqx.field(static=True)

    def margins(self, net: ReluNetwork) -> Float[Array, " n"]:
        """q_i, each neuron taken as linear on its active range; O(n + k) by running sums."""
        n = self.points.x.shape[0]
        low, high = self.mode.active(n)
        lines = jnp.stack([net.v * net.w, net.v * net.b])
        total = jnp.cumsum(jnp.zeros((2, n + 1), net.w.dtype).at[:, low].add(lines).at[:, high].add(-lines), axis=1)
        return self.points.y * (total[0, :n] * self.points.x + total[1, :n])

    def weights(self, net: ReluNetwork) -> Weights:
        q = self.margins(net)
        log_total = jax.nn.logsumexp(self.points.log_count)
        # The padding has no weight; a finite margin there keeps derivatives finite.
        log_weight = self.loss.log_weight(q) + self.points.log_count
        log_sum = jax.nn.logsumexp(log_weight)
        p = jnp.exp(log_weight - log_sum)
        slope = jax.jvp(self.loss.log_weight, (q,), (jnp.ones_like(q),))[1]
        log_loss = jax.nn.logsumexp(self.loss.log_value(q) + self.points.log_count) - log_total
        return Weights(q, p, -p * slope, log_sum - log_total, log_loss)

    def tangent(self) -> Float[Array, "2 k"]:
        """Unit vector along each neuron's ray, oriented like u on it (for sliding neurons; anything for the others)."""
        n = self.points.x.shape[0]
        ray = jnp.maximum(self.mode.ray, 0)
        x = self.points.x[ray % n]
        sign = jnp.where(ray < n, 1, -1).astype(x.dtype)
        scale = sign / jnp.hypot(1, x)
        return jnp.stack([scale, -x * scale])

    def project(self, vector: Float[Array, "2 k"]) -> Float[Array, "2 k"]:
        """`vector` where a neuron is free, its part along the ray where it slides."""
        tangent = self.tangent()
        along = jnp.sum(vector * tangent, axis=0)
        return jnp.where(self.mode.sliding[None], along[None] * tangent, vector)

    def pull(self, force: Float[Array, " n"], low, high) -> Float[Array, "2 k"]:
        """z_j = Σ_{low_j ≤ i < high_j} force_i x̃_i."""
        total = jnp.cumsum(jnp.stack([force * self.points.x, force]), axis=1)
        total = jnp.concatenate([jnp.zeros_like(total[:, :1]), total], axis=1)
        return total[:, high] - total[:, low]

    def combine(self, net: ReluNetwork, force: Float[Array, " n"]) -> ReluNetwork:
        """Σ_i force_i y_i ∂q_i, with the projections of this mode."""
        z = self.project(self.pull(force * self.points.y, *self.mode.active(self.points.x.shape[0])))
        return ReluNetwork(net.v * z[0], net.v * z[1], z[0] * net.w + z[1] * net.b)

    def respond(self, net: ReluNetwork, change: ReluNetwork) -> Float[Array, " n"]:
        """∂q·change: how the margins answer to a small change of the parameters."""
        return jax.jvp(self.margins, (net,), (change,))[1]

    def __call__(self, time, y, args):
        net, clock = y
        weights = self.weights(net)
        return self.combine(net, weights.p), jnp.exp(-clock - weights.log_rate - self.log_unit)

    def squared_gradients(self, net: ReluNetwork) -> Float[Array, " n"]:
        """‖∂q_i‖² (an upper bound where neurons slide); O(n + k)."""
        n, x = self.points.x.shape[0], self.points.x
        low, high = self.mode.active(n)
        moments = jnp.stack([net.w**2, net.w * net.b, net.b**2, net.v**2])
        total = jnp.cumsum(jnp.zeros((4, n + 1), x.dtype).at[:, low].add(moments).at[:, high].add(-moments), axis=1)
        total = total[:, :n]
        return jnp.maximum(total[0] * x**2 + 2 * total[1] * x + total[2], 0) + total[3] * self.points.squared_norm

    def neglected(self, net: ReluNetwork, weights: Weights) -> Float[Array, ""]:
        """Bound on the norm of the part of the Jacobian that `resolvent` leaves out."""
        share = weights.c * self.squared_gradients(net)
        return jnp.maximum(jnp.sum(share) - jnp.sum(jax.lax.top_k(share, self.rank)[0]), 0)

    def resolvent(self, y, sigma):
        """r ↦ (σ I − J)^{−1} r, with J the Jacobian of this field at `y`.

        J = B − Qᵀ C Q: B is block-diagonal with the 3×3 blocks (0, z; zᵀ, 0) per neuron, Q = ∂q/∂θ, and
        C = diag(c) − p cᵀ from the softmax. Only the `rank` points with the largest c_i ‖∂q_i‖² are kept in C, so that
        Woodbury's formula needs one LU of that size; `neglected` bounds the rest. The clock's row comes last.
        """
        net, clock = y
        n = self.points.x.shape[0]
        weights = self.weights(net)
        low, high = self.mode.active(n)
        z = self.project(self.pull(weights.p * self.points.y, low, high))
        determinant = sigma**2 - jnp.sum(z**2, axis=0)

        def blocks(w, b, v):
            """(σ I − B)^{−1} for one right-hand side of parts (k,)."""
            along = (sigma * v + z[0] * w + z[1] * b) / determinant
            return (w + z[0] * along) / sigma, (b + z[1] * along) / sigma, along

        _, kept = jax.lax.top_k(weights.c * self.squared_gradients(net), self.rank)
        p, c = weights.p[kept], weights.c[kept]

        def row(i):
            """∂q_i, as its parts for w, b and v."""
            x, y_ = self.points.x[i], self.points.y[i]
            active = jnp.where((low <= i) & (i < high), y_, 0)
            u = self.project(jnp.stack([active * x, active])) * net.v[None]
            return u[0], u[1], active * (net.w * x + net.b)

        gradients = jax.vmap(row)(kept)
        rows, solved = jnp.concatenate(gradients, axis=1), jnp.concatenate(jax.vmap(blocks)(*gradients), axis=1)
        gram = rows @ solved.T
        core = jnp.eye(self.rank, dtype=p.dtype) + c[:, None] * gram - p[:, None] * (c @ gram)[None, :]
        # One inverse instead of a pair of triangular solves a stage: those cost more than all the rest of a batched
        # step.
        inverse = jax.scipy.linalg.lu_solve(jax.scipy.linalg.lu_factor(core), jnp.eye(self.rank, dtype=p.dtype))
        rate = jnp.exp(-clock - weights.log_rate - self.log_unit)
        sway = self.combine(net, weights.c)

        def solve(right):
            change, tick = right
            first = jnp.concatenate(blocks(change.w, change.b, change.v))
            response = rows @ first
            response = c * response - p * jnp.sum(c * response)
            w, b, v = jnp.split(first - (inverse @ response) @ solved, 3)
            out = ReluNetwork(w, b, v)
            pushed = sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(sway), jax.tree.leaves(out), strict=True))
            return out, (tick + rate * pushed) / (sigma + rate)

        return solve
