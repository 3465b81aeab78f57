"""The best there is: the global maximum-margin classifier, beside which a limit is judged.

By the number m of label switches along the line: in closed form, network and proof, for all m but two
(`closed_form.py`), and by minimisation over two numbers for m = 2 (`two_switches.py`). Both give multipliers λ, whose
Σλ is a lower bound on ½‖θ‖² for every network, of any width, that classifies the data with margin 1.

`by_program` solves the same problem, for any m, by the convex program of `program.py` with all cells allowed, on as
many points as it takes. It shares no formula with the above and serves to check it; where labels change within 1e-6 of
the data's length it runs out of digits.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gradflow.clarke import Points
from gradflow.closed_form import Solved, chosen, closed_form, count_switches
from gradflow.cones import neurons_held, spaced
from gradflow.data import Dataset
from gradflow.implicit import lasts, moved
from gradflow.network import ReluNetwork, is_concrete
from gradflow.piecewise import knots
from gradflow.program import lower_bound, solve
from gradflow.two_switches import two_switches
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

    Works under jit and vmap, and can be differentiated by `data.x`: as the closed form, and for two label switches
    through the optimality conditions (`implicit.py`); NaN where it is not proved or has no derivative.

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
    real = points.log_count > -jnp.inf
    found = closed_form(points.x, points.y, real)
    if points.x.shape[0] > 2:
        two = count_switches(points.y, real) == 2
        found = chosen(two, two_switches(points.x, points.y, real, two), found)
    return _as_optimum(found, points, data)


def _as_optimum(found: Solved, points: Points, data: Dataset) -> Optimum:
    return Optimum(found.network, 0.5 * found.network.squared_norm, found.bound, points.spread(found.multipliers, data))


@_optimum.def_jvp
def _optimum_jvp(primals, tangents):
    (data,), (seed,) = primals, tangents
    if seed.y is not None:
        raise ValueError("a maximum margin is differentiated by the inputs data.x, and by nothing else")
    found = _optimum(data)
    residual = jnp.where(found.proved, 0, jnp.inf)
    network, multipliers, value = moved(found.network, found.multipliers, residual, data, seed.x)
    implicit = Optimum(network, value, value, multipliers)

    def explicit(x):
        points = Points(eqx.tree_at(lambda d: d.x, data, x))
        return _as_optimum(closed_form(points.x, points.y, points.log_count > -jnp.inf), points, data)

    _, change = eqx.filter_jvp(explicit, (data.x,), (seed.x,))
    points = Points(data)
    switches = count_switches(points.y, points.log_count > -jnp.inf)
    # Where the conditions have no derivative the formula goes on, but for other data. N = 1 goes on for all near them.
    constant = (switches == 0) & found.proved & jnp.all(found.network.w == 0)
    sound = constant | lasts(found.network, found.multipliers, residual, data)
    change = jax.tree.map(lambda a: jnp.where(sound, a, undefined(seed.x, a)), change)
    change = eqx.tree_at(lambda c: c.lower_bound, change, change.value)
    return found, chosen(switches == 2, implicit, change)


def _padded(net: ReluNetwork, width: int) -> ReluNetwork:
    return jax.tree.map(lambda a: jnp.pad(a, (0, width - a.shape[0])), net)


@eqx.filter_jit
def by_program(data: Dataset) -> Optimum:
    """What `max_margin` finds, by a convex program instead: an independent check, slower and less exact."""
    points = Points(data)
    network, bound, shares = _program(points, points.log_count > -jnp.inf)
    return Optimum(network, 0.5 * network.squared_norm, bound, points.spread(shares, data))


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
        # One more point, without weight: the cones need two.
        ys, some = jnp.append(y[chosen], 1.0), jnp.append(real[chosen], False)
        xs = spaced(jnp.append(x[chosen], 0.0), some)
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
