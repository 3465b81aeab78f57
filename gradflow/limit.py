"""The limit of a flow: the direction that θ/‖θ‖ tends to, as a network of its own, with a certificate.

Once all points are on their side, θ/‖θ‖ converges (Ji and Telgarsky 2020), to a direction along a KKT point of

    (P)  minimise ½‖θ‖²  subject to  y_i N(x_i) ≥ 1 for all i

(Lyu and Li 2020), while at any finite time a network of width k has up to k + 1 pieces and its margin is still biased.
The limit is a small object. A neuron that goes on growing turns to where its output grows fastest: inside the cell in
which it is, along ±z, or to a ray of that cell, with its breakpoint on a point (`program.py`). So with the neurons'
cells and signs taken from the flow, the limit solves a convex program.

**Cells.** If some neuron's best place is on the ray through which z leads out of its cell, it goes on into the next
cell: that is added to the allowed ones, and the program solved again, until nothing is added. At a ray on which
breakpoints stick, the next cell leads back to the same ray, and changes nothing. So for this purpose all points may
be treated as support vectors; the solution tells which are.

**Certificate.** `kkt_residual` recomputes everything from the network and the multipliers (`certificate.py`). A limit
is *certified* if that is at most 1e-10, or what rounding of the limit makes, and if the same limit comes from two
states of the flow, the later one with ten times the ρ² and nearer to it.

**Uniqueness.** Amplitudes need not be unique: a bend may be shared between a left- and a right-facing neuron. They can
move along the null space of the neurons' values at the support vectors; whether that moves N* too, values at all
breakpoints and far out tell. The flow has a limit that is one of them; if N* is not the same for all, it is not known.

**Points.** The program sees the points with the smallest margins, few at first; if others turn out to violate their
constraint, or the certificate fails, more.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.certificate import CERTIFIED, certifies, kkt_residual
from gradflow.clarke import Points, active_cell, find_cell, inactive_cell
from gradflow.cones import Cones, Solution, neurons_held, spaced
from gradflow.data import Dataset
from gradflow.implicit import moved
from gradflow.length import length
from gradflow.network import ReluNetwork, is_concrete
from gradflow.piecewise import knots, linear_regions
from gradflow.polish import CERTAIN
from gradflow.program import solve

_AGREE = 1e-8  # relative difference of the two values
_SIZES = (24, 64)  # how many points may be support vectors: first, and if need be
_EXCHANGES = 4  # of points without multipliers for violated ones
_SAME = 1e-7  # relative, up to which values of neurons count as linearly dependent
_ROUNDS = 40  # of the program with more and more cells
_RESOLUTION = 1e-10  # relative error of a breakpoint, over the length of the data


class LimitStatus(eqx.Enumeration):
    """What became of a limit. Printing a value gives its sentence."""

    certified = "Certified: a KKT point of the maximum-margin problem, the same from two states of the flow."
    certified_function = (
        "Certified, as a function: a KKT point of the maximum-margin problem, the same from two states of the flow. "
        "Other amplitudes of its neurons draw the same function at the same cost, and the flow may tend to those."
    )
    not_unique = (
        "The conditions leave room for more than one function at the same cost, and two states of a flow do not tell "
        "which it tends to: of this one, only ½‖θ‖² is certain."
    )
    not_separated = (
        "The flow has not classified all points, so its direction need not converge to a KKT point: integrate on, or, "
        "if it has stalled, take it as training that failed."
    )
    not_stationary = (
        "The program's solution misses the KKT conditions by more than 1e-10 and than rounding: integrate to a lower "
        "loss and try again. (Or these are not the data that the flow was of.)"
    )
    not_settled = (
        "Two states of the flow, with ρ² ten times apart, gave different limits: integrate to a lower loss and try "
        "again."
    )


# The names of `LimitStatus` in the order of their codes in a record.
LIMIT_STATUSES = (
    "certified",
    "certified_function",
    "not_unique",
    "not_separated",
    "not_stationary",
    "not_settled",
)


class Limit(eqx.Module):
    """A limit direction. `print(limit)` reports it in words; `limit.check()` raises if it is not certified.

    - `network`: scaled to minimum margin 1 and balanced, one neuron for each cell that is in use, zero-padded;
    - `multipliers` λ (n,), in the order of the data;
    - `value`: ½‖θ*‖² = 1/(2γ), γ the limit of the normalised margin;
    - `residual`: relative KKT residual, recomputed from `network` and `multipliers`;
    - `resolution`: 1e-10 of the length of the data, within which two breakpoints are one;
    - `disagreement`: relative difference between `value` and that from the earlier state of the flow;
    - `certified`: whether the function N* passed the certificate above; `status`.

    `network`, `multipliers`, `value` and what is made of them can be differentiated by the inputs (`implicit.py`): a
    limit that is certified stays where it is when the initialisation moves a little.
    """

    network: ReluNetwork
    multipliers: Float[Array, " n"]
    value: Float[Array, ""]
    residual: Float[Array, ""]
    resolution: Float[Array, ""]
    disagreement: Float[Array, ""]
    status: LimitStatus

    @property
    def certified(self) -> Bool[Array, "..."]:
        """Whether the status is `certified` or `certified_function`."""
        return (self.status == LimitStatus.certified) | (self.status == LimitStatus.certified_function)

    @property
    def knots(self) -> Float[Array, " knots"]:
        """Where N bends, as in `gradflow.knots`; breakpoints within `resolution` are one."""
        return knots(self.network, self.resolution)

    @property
    def regions(self) -> Int[Array, ""]:
        """The number of linear regions on the whole line: one more than knots."""
        return linear_regions(self.network, self.resolution)

    def check(self) -> "Limit":
        """This limit, or a `RuntimeError` with the status's advice. For people; not for jit or vmap."""
        if not bool(self.certified):
            raise RuntimeError(f"{LimitStatus[self.status]} (residual {self.residual:.1e})")
        return self

    def __repr__(self) -> str:
        if not is_concrete(self.value) or self.value.ndim:
            return super().__repr__()
        if self.status == LimitStatus.not_separated:
            return f"Limit: {LimitStatus[self.status]}"
        return (
            f"Limit: {LimitStatus[self.status]}\n"
            f"  ½‖θ‖² {self.value:.10g} at minimum margin 1, {self.regions} linear regions, "
            f"{int(jnp.sum(self.multipliers > 1e-12 * jnp.sum(self.multipliers)))} support vectors\n"
            f"  KKT residual {self.residual:.1e}, two states differ by {self.disagreement:.1e}"
        )


@eqx.filter_custom_jvp
def on_data(found: Limit, data: Dataset) -> Limit:
    """`found` as the limit on `data`, of which it is a differentiable function: a KKT point of (P) there, or its status
    says that it is none.
    """
    residual = kkt_residual(found.network, data, found.multipliers)
    holds = certifies(residual, found.network, data) | ~found.certified
    status = LimitStatus.where(holds, found.status, LimitStatus.not_stationary)
    return eqx.tree_at(lambda f: (f.residual, f.status), found, (jnp.where(holds, found.residual, residual), status))


@on_data.def_jvp
def _on_data_jvp(primals, tangents):
    (found, data), (_, seed) = primals, tangents
    found, constant = on_data(found, data), jax.tree.map(lambda _: None, found)
    if seed.y is not None:
        raise ValueError("a limit is differentiated by the inputs data.x, and by nothing else")
    if seed.x is None:
        return found, constant
    change = moved(found.network, found.multipliers, jnp.where(found.certified, found.residual, jnp.inf), data, seed.x)
    return found, eqx.tree_at(
        lambda f: (f.network, f.multipliers, f.value), constant, change, is_leaf=lambda leaf: leaf is None
    )


class Candidate(eqx.Module):
    """The limit that one state leads to, if it has settled: `network` at minimum margin 1, `multipliers` in the order
    of the data, the certificate's `residual`; and `raw`, ½‖θ‖² of the state itself at minimum margin 1.
    """

    network: ReluNetwork
    multipliers: Float[Array, " n"]
    residual: Float[Array, ""]
    raw: Float[Array, ""]

    @property
    def value(self) -> Float[Array, ""]:
        """½‖θ*‖²."""
        return 0.5 * self.network.squared_norm

    @classmethod
    def none(cls, data: Dataset) -> "Candidate":
        """Of the shapes that a state on `data` gives, and certified by nothing."""
        blank, infinite = jnp.zeros((_width(data.x.shape[0]),), data.x.dtype), jnp.full((), jnp.inf, data.x.dtype)
        return cls(ReluNetwork(blank, blank, blank), jnp.zeros_like(data.x), infinite, infinite)


def judged(before: Candidate, now: Candidate, separated: Bool[Array, ""], data: Dataset) -> Limit:
    """The limit that two states of a flow lead to, `now` with ten times the ρ² of `before`."""
    value = now.value
    # The smoothed margin never falls, and exceeds the margin by less than (log n)/ρ²: the limit's is no smaller.
    first, second = (before.raw - value) / value, (now.raw - value) / value
    disagreement = jnp.abs(before.value / value - 1)
    nearer = (second >= -CERTIFIED) & (second <= jnp.maximum(first, CERTIFIED))
    agrees = (disagreement <= _AGREE) & nearer
    amplitudes, function = uniqueness(now.network, now.multipliers, data)
    status = LimitStatus.where(amplitudes, LimitStatus.certified, LimitStatus.certified_function)
    status = LimitStatus.where(function, status, LimitStatus.not_unique)
    status = LimitStatus.where(agrees, status, LimitStatus.not_settled)
    status = LimitStatus.where(certifies(now.residual, now.network, data), status, LimitStatus.not_stationary)
    status = LimitStatus.where(separated, status, LimitStatus.not_separated)
    resolution = _RESOLUTION * (jnp.max(data.x) - jnp.min(data.x))
    return Limit(now.network, now.multipliers, value, now.residual, resolution, disagreement, status)


def uniqueness(net: ReluNetwork, multipliers: Float[Array, " n"], data: Dataset):
    """Whether no other amplitudes of its neurons satisfy the conditions that `net` does; whether no other function."""
    size, live = length(net.w, net.b), net.v != 0
    direction = jnp.stack([net.w, net.b]) / jnp.where(size > 0, size, 1)[None]

    def values(first, second):
        """max(0, u·(first, second)) of unit vectors u, times the sign of v: one column a neuron."""
        place = jnp.stack([first, second]) / length(first, second)[None]
        inner = place.T @ direction
        inner = jnp.where(jnp.abs(inner) <= _SAME, 0, jnp.maximum(inner, 0))
        return jnp.where(live[None], inner * jnp.sign(net.v)[None], 0)

    support = multipliers > _SAME * jnp.max(multipliers)
    seen = jnp.where(support[:, None], values(data.x, jnp.ones_like(data.x)), 0)
    far = jnp.stack([jnp.ones_like(net.w[0]), -jnp.ones_like(net.w[0])])
    # Between these places all neurons are linear: at the breakpoints (−b : w), and far out.
    everywhere = values(jnp.concatenate([-net.b, far]), jnp.concatenate([net.w, jnp.zeros_like(far)]))
    everywhere = jnp.concatenate([seen, jnp.where(jnp.isfinite(everywhere), everywhere, 0)])
    # Row by row: at once it would be an array of all places and all pairs.
    gap = jnp.zeros((net.width, net.width), net.w.dtype)
    gap = jax.lax.fori_loop(
        0, len(everywhere), lambda i, gap: jnp.maximum(gap, jnp.abs(everywhere[i, :, None] - everywhere[i, None])), gap
    )
    index = jnp.arange(net.width)
    repeats = (gap <= _SAME) & (index[:, None] < index[None, :]) & live[:, None]
    distinct = jnp.sum(live & ~jnp.any(repeats, axis=0))
    return _rank(seen) == distinct, _rank(seen) == _rank(everywhere)


def _rank(columns: Float[Array, "m k"]) -> Int[Array, ""]:
    """How many columns of size about 1 are linearly independent, by Gram–Schmidt with pivots."""

    def sizes(rest):
        return jnp.sqrt(jnp.sum(rest**2, axis=0))

    def remove(state):
        count, rest = state
        size = sizes(rest)
        most = jnp.argmax(size)
        unit = rest[:, most] / size[most]
        return count + 1, rest - unit[:, None] * (unit @ rest)[None, :]

    def goes_on(state):
        count, rest = state
        return (count < min(columns.shape)) & (jnp.max(sizes(rest)) > _SAME)

    return jax.lax.while_loop(goes_on, remove, (jnp.zeros((), int), columns))[0]


def candidate(net: ReluNetwork, sliding: Float[Array, " k"], data: Dataset, wanted: Bool[Array, ""]) -> Candidate:
    """The limit that one state leads to, if it is `wanted`; `sliding` as in `Flow`."""
    points = Points(data)
    first, *larger = (size for size in _SIZES if size < data.x.shape[0] or size == _SIZES[0])
    found = _candidate(net, sliding, data, points, first, wanted)

    def fails(pair):
        wanted, found = pair
        return wanted & ~certifies(found.residual, found.network, data)

    for size in larger:
        # A loop, as `cond` would run under vmap for lanes that need it and lanes that do not.
        found = jax.lax.while_loop(
            fails,
            lambda pair, size=size: (jnp.array(False), _candidate(net, sliding, data, points, size, fails(pair))),
            (wanted, found),
        )[1]
    return found


def _width(samples: int) -> int:
    return neurons_held(max(min(size, samples) for size in _SIZES) + 1)


def _candidate(net: ReluNetwork, sliding, data: Dataset, points: Points, size: int, wanted) -> Candidate:
    n = points.x.shape[0]
    real = points.log_count > -jnp.inf
    q = jnp.where(real, points.y * net(points.x), jnp.inf)
    raw = 0.5 * net.squared_norm / jnp.min(q)
    size = min(n, size)

    def goes_on(state):
        return state[2] & (state[0] < _EXCHANGES)

    def exchange(state):
        """Solve on `size` points, and say which to take next: those with multipliers, then the most violated."""
        round_, rank, *_ = state
        chosen = jnp.sort(jnp.argsort(rank)[:size])
        # One more point, without weight: the cones need two.
        y, some = jnp.append(points.y[chosen], 1.0), jnp.append(real[chosen], False)
        x = spaced(jnp.append(points.x[chosen], 0.0), some)
        solution = _settle(x, y, some, net, sliding, goes_on(state))
        found = solution.network(x)
        margins = jnp.where(real, points.y * found(points.x), jnp.inf)
        shares = jnp.zeros_like(points.x).at[chosen].set(jnp.where(real[chosen], solution.multipliers[:-1], 0))
        violated = jnp.any(margins < 1 - CERTIFIED)
        least = jnp.min(margins)
        found = found.scaled(1 / jnp.sqrt(jnp.where(least > 0, least, 1)))
        rank = jnp.where(shares > 0, -jnp.inf, jnp.where(margins < 1, margins - 1, q))
        return round_ + 1, rank, violated & (n > size), (found, shares)

    width = neurons_held(size + 1)
    blank = jnp.zeros((width,), points.x.dtype)
    start = (jnp.zeros((), int), q, wanted, (ReluNetwork(blank, blank, blank), jnp.zeros_like(points.x)))
    *_, (network, shares) = jax.lax.while_loop(goes_on, exchange, start)
    network = jax.tree.map(lambda a: jnp.pad(a, (0, _width(data.x.shape[0]) - width)), network)
    multipliers = points.spread(shares, data)
    return Candidate(network, multipliers, kkt_residual(network, data, multipliers), raw)


def _settle(x, y, real, net: ReluNetwork, sliding, wanted) -> Solution:
    """The program on ascending points, with the cells of the state's neurons and all that they go on to."""
    cones = Cones(x, jnp.sum(real))

    def goes_on(state):
        return state[2] & (state[0] < _ROUNDS)

    def more(state):
        round_, allowed, *_ = state
        solution = solve(x, y, real, allowed, goes_on(state))
        force = solution.multipliers * y
        new = spread(cones, allowed, force)
        # Cells that would grow no neuron leave the solution as it is. One that has grown and turns on by an angle δ
        # gains δ²/2, which may be below rounding.
        size, turns = cones.sizes(force), cones.angles(force)[1]
        gains = (size > 1 + CERTAIN) | (turns & (size > 1 - CERTAIN))
        return round_ + 1, new, jnp.any(new & ~allowed & gains), solution

    empty = Solution(jnp.zeros_like(x), jnp.zeros((2, 2, 2 * x.shape[0]), x.dtype), jnp.zeros((), x.dtype))
    # Among padding a left-facing neuron is where all real points are active.
    held, index = cells_of(net, sliding, x), jnp.arange(2 * x.shape[0])
    beyond = jnp.any(held & (index > x.shape[0])[None] & ~cones.exists, axis=1)
    held = (held & cones.exists).at[:, 0].max(beyond)
    start = (jnp.zeros((), int), held, wanted, empty)
    *_, solution = jax.lax.while_loop(goes_on, more, start)
    return solution


def cells_of(net: ReluNetwork, sliding: Float[Array, " k"], x: Float[Array, " n"]) -> Bool[Array, "2 cells"]:
    """Which cells hold a neuron, by sign of v: a sliding one counts on both sides of its ray, a dead one nowhere."""
    n = x.shape[0]
    cell = find_cell(net, x)
    place = jnp.argmin(jnp.abs(x[None, :] - sliding[:, None]), axis=1).astype(cell.dtype)
    slides = jnp.isfinite(sliding) & (x[place] == sliding)
    ray = jnp.where(net.w > 0, place, place + n)
    row = (net.v < 0).astype(int)
    held = jnp.zeros((2, 2 * n), bool)
    for side in (active_cell(ray, n), inactive_cell(ray, n)):
        held = held.at[row, jnp.where(slides, side, cell)].set(True)
    return held.at[:, n].set(False)


def spread(cones: Cones, allowed: Bool[Array, "2 cells"], force: Float[Array, " n"]) -> Bool[Array, "2 cells"]:
    """`allowed` and all cells that its neurons go on to under forces λ y, through the ray nearer to z."""
    n, second = cones.x.shape[0], cones.on_rays(force)
    first = cones.first(second)
    from_first, from_second = cones.across(force)
    leaves = ~((from_first >= 0) & (from_second >= 0))
    back, forth = leaves & (first >= second), leaves & (first < second)

    def go(_, held):
        held = held | cones.as_first(held & back) | cones.first(held & forth)
        return held.at[:, n].set(False) & cones.exists

    return jax.lax.fori_loop(0, 2 * n, go, allowed)
