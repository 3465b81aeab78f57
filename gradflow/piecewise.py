"""A network as what it is: an exact piecewise-linear function of x on the whole line.

Neuron j bends N at its breakpoint t_j = −b_j/w_j, where the slope changes by c_j = v_j |w_j| from left to right,
whichever way the neuron faces. Everything here follows from the sorted breakpoints, with no sampling of x.

**Counting rule.** Breakpoints that coincide add their *signed* slope changes; a sum that vanishes is no knot; N has one
region more than knots. In floating point, "coincide" and "vanish" need a tolerance:

- t_j carries one rounding of a quotient, so two of them are one if they differ by at most 4 ε |t|, ε the machine
  epsilon. `merge`, in units of x, raises that to a distance: runs of breakpoints with gaps ≤ `merge` count as one.
- a sum of slope changes carries k roundings, so it vanishes if it is below 4 k ε Σ|c_j| over the run. `drop` raises
  that: changes below `drop` · Σ_j |c_j| over the whole network are dropped.

The defaults `merge = drop = 0` leave rounding only and give the exact count of the network in hand. A network in the
middle of training has as many regions as its neurons allow; only its limit has few. Counting those before the limit
("effectively") needs a positive `merge` and `drop`, and an answer worth having does not depend on them.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from gradflow.network import ReluNetwork, is_concrete


class Piecewise(eqx.Module):
    """The breakpoints of a network, sorted; shapes are static, so that it works under jit and vmap.

    - `breakpoints` (k,): t_j ascending, +inf for neurons that do not bend (w = 0);
    - `changes` (k,): slope change c_j at each, 0 where the breakpoint is infinite;
    - `values` (k,): N at each breakpoint, 0 where the breakpoint is infinite or where all of N is rounding;
    - `slope_left`, `slope_right`: the slopes towards −∞ and +∞;
    - `constant`: N(0), the value of a network that bends nowhere.

    >>> import gradflow as gf
    >>> print(gf.Piecewise(gf.ReluNetwork([1.0, 1.0], [1.0, -1.0], [1.0, -2.0])).breakpoints)
    [-1.  1.]
    """

    breakpoints: Float[Array, " k"]
    changes: Float[Array, " k"]
    values: Float[Array, " k"]
    slope_left: Float[Array, ""]
    slope_right: Float[Array, ""]
    constant: Float[Array, ""]

    def __init__(self, net: ReluNetwork):
        w, b, v = net.w, net.b, net.v
        position = jnp.where(w == 0, jnp.inf, -b / jnp.where(w == 0, 1, w))
        # A quotient that overflows is a breakpoint beyond every float, that is, none.
        position = jnp.where(jnp.isinf(position), jnp.inf, position)
        order = jnp.argsort(position)
        self.breakpoints = position[order]
        nowhere = self.breakpoints == jnp.inf
        self.changes = jnp.where(nowhere, 0, (v * jnp.abs(w))[order])
        self.values = jnp.where(nowhere, 0, _values(net, jnp.where(nowhere, 0, self.breakpoints)))
        self.slope_left = _cancelling_sum(jnp.where(w < 0, v * w, 0))
        self.slope_right = _cancelling_sum(jnp.where(w > 0, v * w, 0))
        self.constant = net(jnp.zeros((), w.dtype))

    def knots(self, merge: ArrayLike = 0.0, drop: ArrayLike = 0.0) -> tuple[Float[Array, " k"], Bool[Array, " k"]]:
        """Positions where the slope changes, by the counting rule above, and which entries are such positions.

        A run of merged breakpoints is put at the mean of its positions weighted by |c_j|, in the slot of its first.
        """
        t, c = self.breakpoints, self.changes
        k = t.shape[0]
        merge, drop = jnp.asarray(merge, t.dtype), jnp.asarray(drop, t.dtype)
        eps = jnp.finfo(t.dtype).eps
        finite = jnp.isfinite(t)
        safe = jnp.where(t == jnp.inf, 0, t)
        gap = jnp.diff(safe)
        rounding = 4 * eps * jnp.maximum(jnp.abs(safe[1:]), jnp.abs(safe[:-1]))
        starts = jnp.concatenate([jnp.ones((1,), bool), (gap > jnp.maximum(merge, rounding)) | ~finite[1:]])
        run = jnp.cumsum(starts) - 1
        signed = jnp.zeros_like(c).at[run].add(c)
        total = jnp.zeros_like(c).at[run].add(jnp.abs(c))
        # Relative to the run's first breakpoint, so that far-out runs keep their digits.
        first = jnp.zeros_like(t).at[run].add(jnp.where(starts, safe, 0))
        shift = jnp.zeros_like(t).at[run].add(jnp.abs(c) * (safe - first[run]))
        position = first + shift / jnp.where(total > 0, total, 1)
        # Asked this way round, NaN is a knot: a failed network must not pass for a simple one.
        real = ~(jnp.abs(signed) <= jnp.maximum(4 * k * eps * total, drop * jnp.sum(jnp.abs(c))))
        return jnp.where(real, position, jnp.inf), real

    def roots(self) -> tuple[Float[Array, " pieces"], Bool[Array, " pieces"]]:
        """Positions where N changes sign, and which entries are such positions: k + 1, one a linear piece.

        N is linear between breakpoints, so its sign changes at most once there. If N vanishes on a whole interval
        between opposite signs, the sign change is put at that interval's right end.
        """
        finite = jnp.isfinite(self.breakpoints)
        t, value = jnp.where(finite, self.breakpoints, 0), self.values
        # The signs of N towards −∞, at each breakpoint and towards +∞; 0 where N vanishes or nothing is to be seen.
        leftmost = jnp.where(jnp.any(finite), -jnp.sign(self.slope_left), jnp.sign(self.constant))
        signs = jnp.concatenate([leftmost[None], jnp.sign(value), jnp.sign(self.slope_right)[None]])
        last = _last_nonzero(signs[:-1])
        changes = (signs[1:] != 0) & (last != 0) & (signs[1:] != last)
        # Piece 0 reaches to −∞, piece i from breakpoint i−1 to breakpoint i, piece k to +∞.
        rise = value[1:] - value[:-1]
        chord = t[1:] - (t[1:] - t[:-1]) * value[1:] / jnp.where(rise == 0, 1, rise)
        inner = jnp.where(value[:-1] == 0, t[:-1], chord)
        final = jnp.maximum(jnp.sum(finite) - 1, 0)
        left = t[0] - value[0] / jnp.where(self.slope_left == 0, 1, self.slope_left)
        right = t[final] - value[final] / jnp.where(self.slope_right == 0, 1, self.slope_right)
        position = jnp.concatenate([left[None], inner, right[None]])
        return jnp.where(changes, position, jnp.inf), changes


def _values(net: ReluNetwork, t: Float[Array, " k"]) -> Float[Array, " k"]:
    """N at the breakpoints t, or an exact 0 where all that is left is rounding, that of t included."""
    eps = jnp.finfo(t.dtype).eps
    inner = net.w[None, :] * t[:, None] + net.b[None, :]
    size = jnp.abs(net.w[None, :] * t[:, None]) + jnp.abs(net.b[None, :])
    # A neuron that is clearly off adds no rounding; one that bends here may come out on or off.
    size = jnp.where(inner > -4 * eps * size, size, 0)
    value = net(t)
    return jnp.where(jnp.abs(value) <= 4 * t.shape[0] * eps * (size @ jnp.abs(net.v)), 0, value)


def _last_nonzero(signs: Float[Array, " m"]) -> Float[Array, " m"]:
    """The last non-zero entry up to and including each position (0 before any)."""
    latest = jax.lax.cummax(jnp.where(signs != 0, jnp.arange(signs.shape[0]), -1))
    return jnp.where(latest >= 0, signs[jnp.maximum(latest, 0)], 0)


def _cancelling_sum(terms: Float[Array, " k"]) -> Float[Array, ""]:
    """Σ terms, or an exact 0 where all that is left is rounding."""
    total = jnp.sum(terms)
    rounding = 4 * terms.shape[0] * jnp.finfo(terms.dtype).eps * jnp.sum(jnp.abs(terms))
    return jnp.where(jnp.abs(total) <= rounding, 0, total)


def _sorted(positions, real):
    """Real positions ascending: exactly those outside jit, padded with +inf to the static length under it."""
    return jnp.sort(positions[real] if is_concrete(positions) else positions)


def knots(net: ReluNetwork, merge: ArrayLike = 0.0, drop: ArrayLike = 0.0) -> Float[Array, " knots"]:
    """The positions where N bends, ascending.

    **Arguments** `merge` (units of x) and `drop` (share of Σ|v_j w_j|): tolerances of the counting rule at the top of
    this module; the defaults count exactly. **Returns** exactly the knots; under jit or vmap, where shapes are static,
    k entries of which the last are +inf.

    >>> import gradflow as gf
    >>> net = gf.ReluNetwork([1.0, 1.0, 1.0], [0.0, -1.0, -1.0], [1.0, -2.0, 2.0])
    >>> print(gf.knots(net))  # at 1 two neurons cancel
    [0.]
    """
    return _sorted(*Piecewise(net).knots(merge, drop))


def linear_regions(net: ReluNetwork, merge: ArrayLike = 0.0, drop: ArrayLike = 0.0) -> Int[Array, ""]:
    """The number of linear regions of N on the whole line: one more than `knots`. Arguments as there.

    NaN weights count as knots, so that a failed network does not pass for a simple one.

    >>> import gradflow as gf
    >>> net = gf.ReluNetwork([1.0, 1.0], [0.0, -1.0], [1.0, -2.0])
    >>> print(gf.linear_regions(net), gf.linear_regions(net, merge=2.0))
    3 2
    """
    return 1 + jnp.sum(Piecewise(net).knots(merge, drop)[1])


def sign_changes(net: ReluNetwork) -> Float[Array, " roots"]:
    """The positions where N changes sign, ascending, by the roots of its linear pieces.

    **Returns** exactly those positions; under jit or vmap, where shapes are static, k + 1 entries of which the last
    are +inf.

    >>> import gradflow as gf
    >>> print(gf.sign_changes(gf.ReluNetwork([1.0, 1.0, -1.0], [1.0, -1.0, 0.0], [1.0, -2.0, -1.0])))
    [-0.5  3. ]
    """
    return _sorted(*Piecewise(net).roots())
