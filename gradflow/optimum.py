"""The best there is: the global maximum-margin classifier, beside which a limit is judged.

**Closed form** for m ≥ 3 label switches. At switch κ between the neighbours i, i + 1 of different labels let
L_κ(x) = a_κ x + d_κ be the line through (x_i, y_i) and (x_{i+1}, y_{i+1}). The optimum follows L_κ around switch κ and
turns from L_κ to L_{κ+1} where they meet, at ξ_κ; its value is

    ½‖θ*‖² = Σ_κ √((Δa_κ)² + (Δd_κ)²),    Δ: κ + 1 minus κ,

as a bend of size |Δa| at ξ costs |Δa| √(1 + ξ²) (Boursier and Flammarion 2023) and each has to be paid. Attained
by f* = Σ Δa_κ [(1 − β_κ) max(0, x − ξ_κ) + β_κ max(0, ξ_κ − x)] if the β leave no line over: if L_1 −
Σ β_κ (L_κ − L_{κ+1}) vanishes. The slopes alternate in sign, and the origin is a convex combination α L_1 + ζ L_2 +
η L_3 in the (a, d) plane; β_1 = 1 − α, β_2 = η, all others 0, will do.

**Program** for m ≤ 2, where the line left over has a price of its own and the formula is too low, and as an independent
check for all m: the convex program of `program.py` with all cells allowed, on as many points as it takes. Its Σλ is a
lower bound on ½‖θ‖² for every network, of any width, that classifies the data with margin 1.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gradflow.clarke import Points
from gradflow.cones import neurons_held
from gradflow.data import Dataset
from gradflow.implicit import lasts, moved
from gradflow.length import length
from gradflow.network import ReluNetwork, is_concrete
from gradflow.piecewise import knots
from gradflow.program import lower_bound, solve
from gradflow.undefined import undefined

_SIZES = (24, 64)  # points in the program at a time: at first, and if that proves nothing
_EXCHANGES = 6  # of points without multipliers for violated ones
_EXACT = 1e-9  # relative gap between value and bound, up to which the optimum is proved


class Optimum(eqx.Module):
    """The global maximum-margin classifier of a dataset.

    - `network`: attains it, with minimum margin 1, balanced and zero-padded;
    - `value`: ½‖θ*‖² = 1/(2γ*), of `network`;
    - `lower_bound`: on ½‖θ‖² of any network with margins ≥ 1, by duality;
    - `multipliers` λ (n,), in the order of the data: what the bound is made of;
    - `margin`: γ*.
    """

    network: ReluNetwork
    value: Float[Array, ""]
    lower_bound: Float[Array, ""]
    multipliers: Float[Array, " n"]

    @property
    def margin(self) -> Float[Array, ""]:
        """γ* = 1/(2 value)."""
        return 0.5 / self.value

    @property
    def proved(self) -> Bool[Array, ""]:
        """Whether value and lower bound meet, to 1e-9 of themselves."""
        return jnp.abs(self.value - self.lower_bound) <= _EXACT * self.value

    @property
    def knots(self) -> Float[Array, " knots"]:
        """Where the optimum bends, as in `gradflow.knots`."""
        return knots(self.network)

    def __repr__(self) -> str:
        if not is_concrete(self.value) or self.value.ndim:
            return super().__repr__()
        proof = "proved" if self.proved else "not proved"
        return (
            f"Maximum margin {self.margin:.10g} ({proof}): ½‖θ‖² {self.value:.12g} at minimum margin 1, "
            f"lower bound {self.lower_bound:.12g}, {self.knots.size} knots"
        )


def max_margin(data: Dataset) -> Optimum:
    """The network of any width with the largest min_i y_i N(x_i)/‖θ‖², and a proof of how far from it it may be.

    Works under jit and vmap, and can be differentiated by `data.x`: as the closed form, where that is the optimum, and
    else through the optimality conditions (`implicit.py`); NaN where it is not proved.

    **Raises** `ValueError` in float32, where the proof is out of reach.

    >>> import gradflow as gf
    >>> best = gf.max_margin(gf.Dataset([-1.0, 1.0], [-1, 1]))
    >>> print(best.proved, f"{best.value:.12f}")
    True 1.414213562373
    """
    if data.x.dtype != jnp.float64:
        raise ValueError("the maximum margin needs float64: call jax.config.update('jax_enable_x64', True) first")
    return _max_margin(data)


@eqx.filter_jit
def _max_margin(data: Dataset) -> Optimum:
    return _optimum(data)


@eqx.filter_custom_jvp
def _optimum(data: Dataset) -> Optimum:
    points = Points(data)
    by_program, bound, shares = _program(points, points.log_count > -jnp.inf)
    multipliers = points.spread(shares, data)
    if points.x.shape[0] < 4:
        return Optimum(by_program, 0.5 * by_program.squared_norm, bound, multipliers)
    closed, applies = _closed(points)
    width = max(closed.width, by_program.width)
    network = jax.tree.map(lambda a, b: jnp.where(applies, a, b), _padded(closed, width), _padded(by_program, width))
    return Optimum(network, 0.5 * network.squared_norm, bound, multipliers)


@_optimum.def_jvp
def _optimum_jvp(primals, tangents):
    (data,), (seed,) = primals, tangents
    if seed.y is not None:
        raise ValueError("a maximum margin is differentiated by the inputs data.x, and by nothing else")
    found = _optimum(data)
    residual = jnp.where(found.proved, 0, jnp.inf)
    network, multipliers, value = moved(found.network, found.multipliers, residual, data, seed.x)
    bound = value
    if data.x.shape[0] >= 4:
        (closed, applies), (change, _) = eqx.filter_jvp(
            lambda x: _closed(Points(eqx.tree_at(lambda d: d.x, data, x))), (data.x,), (seed.x,)
        )
        # Where the conditions have no derivative the formula goes on, but for other data.
        sound = lasts(found.network, found.multipliers, residual, data)
        change = jax.tree.map(lambda a: jnp.where(sound, a, undefined(seed.x, a)), _padded(change, found.network.width))
        network = jax.tree.map(lambda a, b: jnp.where(applies, a, b), change, network)
        pairs = zip(jax.tree.leaves(closed), jax.tree.leaves(change), strict=True)
        value = jnp.where(applies, sum(jnp.sum(a * b[: closed.width]) for a, b in pairs), value)
    return found, Optimum(network, value, bound, multipliers)


def _padded(net: ReluNetwork, width: int) -> ReluNetwork:
    return jax.tree.map(lambda a: jnp.pad(a, (0, width - a.shape[0])), net)


def _closed(points: Points) -> tuple[ReluNetwork, Bool[Array, ""]]:
    """The closed form, and whether it applies."""
    real = points.log_count > -jnp.inf
    switches = jnp.sum(real[1:] & (points.y[1:] != points.y[:-1]))
    return closed_form(points.x, points.y, real), switches >= 3


def closed_form(x: Float[Array, " n"], y: Float[Array, " n"], real: Bool[Array, " n"]) -> ReluNetwork:
    """The optimum for m ≥ 3 switches of n ≥ 4 ascending points, of width m + 1 padded to n; nonsense for fewer."""
    switch = real[1:] & (y[1:] != y[:-1])
    order = jnp.argsort(~switch, stable=True)
    count = jnp.sum(switch)
    gap = jnp.where(switch, x[1:] - x[:-1], 1)  # all padding lies in one place
    slope, offset = ((y[1:] - y[:-1]) / gap)[order], ((y[:-1] * x[1:] - y[1:] * x[:-1]) / gap)[order]
    bends = jnp.arange(order.size - 1) < count - 1
    rise, drop = jnp.where(bends, jnp.diff(slope), 0), jnp.where(bends, jnp.diff(offset), 0)

    # Barycentric coordinates of the origin among the first three lines.
    def area(i, j):
        return slope[i] * offset[j] - slope[j] * offset[i]

    parts = jnp.stack([area(1, 2), area(2, 0), area(0, 1)])
    total = jnp.sum(parts)
    first, _, third = parts / jnp.where(total == 0, 1, total)
    left = jnp.zeros_like(rise).at[0].set(1 - first).at[1].set(third)

    def neurons(share, rise, drop, sign):
        # A neuron with v u = sign · share · (Δa, Δd) is active on the side where that line has the sign of v.
        a, d = sign * share * rise, sign * share * drop
        size = length(a, d)
        root = jnp.sqrt(jnp.where(size > 0, size, 1))
        # Right-facing: v has the sign of Δa, u = (|Δa|, …); left-facing: the same v, u = (−|Δa|, …).
        v = jnp.where(size > 0, jnp.sign(rise) * root, 0)
        turn = jnp.where(size > 0, jnp.sign(rise) / root, 0)
        return a * turn, d * turn, v

    right, mirrored = neurons(1 - left, rise, drop, 1), neurons(left[:2], rise[:2], drop[:2], -1)
    return ReluNetwork(*(jnp.concatenate([r, m]) for r, m in zip(right, mirrored, strict=True)))


def _program(points: Points, real: Bool[Array, " n"]) -> tuple[ReluNetwork, Float[Array, ""], Float[Array, " n"]]:
    """The program's network, with margins of at least 1 on all points, its lower bound and its multipliers."""
    n = points.x.shape[0]
    first, *larger = sorted({min(n, size) for size in _SIZES})
    width = neurons_held(max([first, *larger]) + 1)

    def solved(size, wanted):
        net, bound, lam = _on_some(points, real, size, wanted)
        return _padded(net, width), bound, lam

    def open_(found):
        return ~(found[1] >= (1 - _EXACT) * 0.5 * found[0].squared_norm)

    found = solved(first, jnp.array(True))
    for size in larger:
        # A loop, as `cond` would run under vmap for lanes that need it and lanes that do not.
        found = jax.lax.while_loop(
            lambda pair: pair[0] & open_(pair[1]),
            lambda pair, size=size: (jnp.array(False), solved(size, pair[0] & open_(pair[1]))),
            (jnp.array(True), found),
        )[1]
    return found


def _on_some(points: Points, real: Bool[Array, " n"], size: int, wanted):
    """The program on `size` points at a time, with those exchanged that turn out to matter."""
    x, y = points.x, points.y
    n = x.shape[0]
    last = jnp.sum(real) - 1
    change = real[1:] & (y[1:] != y[:-1])
    border = jnp.concatenate([jnp.zeros((1,), bool), change]) | jnp.concatenate([change, jnp.zeros((1,), bool)])
    index = jnp.arange(n)
    border |= (index == 0) | (index == last)
    # Next, points spread evenly over the line.
    spread = ((index * 7919) % n).astype(x.dtype)
    priority = jnp.where(border, float(n), spread)
    allowed = jnp.ones((2, 2 * (size + 1)), bool).at[:, size + 1].set(False)

    def goes_on(state):
        return state[2] & (state[0] < _EXCHANGES)

    def exchange(state):
        round_, priority, *_ = state
        chosen = jnp.sort(jax.lax.top_k(jnp.where(real, priority, -1), size)[1])
        # One more point, right of all and without weight: the cones need two.
        xs = jnp.append(x[chosen], 2 * x[chosen[-1]] - x[chosen[0]] + 1)
        ys, some = jnp.append(y[chosen], 1.0), jnp.append(real[chosen], False)
        solution = solve(xs, ys, some, allowed, goes_on(state))
        net = solution.network(xs)
        q = jnp.where(real, y * net(x), jnp.inf)
        lam = jnp.zeros_like(x).at[chosen].set(solution.multipliers[:-1])
        priority = jnp.where(lam > 0, 2.0 * n, jnp.where(q < 1, n * (1 + (1 - q) / (2 - q)), spread))
        least = jnp.min(q)
        net = net.scaled(1 / jnp.sqrt(jnp.where(least > 0, least, jnp.nan)))
        bound = lower_bound(xs, ys, jnp.where(some, solution.multipliers, 0))
        lam = jnp.where(real, lam, 0)
        return round_ + 1, priority, ~(least >= 1 - _EXACT) & (n > size), net, bound, lam

    blank = jnp.zeros((neurons_held(size + 1),), x.dtype)
    start = (
        jnp.zeros((), int),
        priority,
        wanted,
        ReluNetwork(blank, blank, blank),
        jnp.zeros((), x.dtype),
        jnp.zeros_like(x),
    )
    *_, net, bound, lam = jax.lax.while_loop(goes_on, exchange, start)
    return net, bound, lam
