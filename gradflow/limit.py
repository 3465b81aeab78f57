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

**Certificate.** `kkt_residual` recomputes everything from the network and the multipliers: feasibility, λ ≥ 0,
complementarity, and stationarity with fractional activations where a breakpoint sits on a point. A limit is *certified*
if that is at most 1e-10, and if the same limit comes from a second state of the flow, whose ρ² is ten times as large,
and which is nearer to it.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.clarke import Points, active_cell, find_cell, inactive_cell
from gradflow.data import Dataset
from gradflow.flow import integrate
from gradflow.loss import Loss
from gradflow.network import ReluNetwork, is_concrete
from gradflow.outcome import Flow, Until
from gradflow.piecewise import knots, linear_regions
from gradflow.program import Cones, Solution, solve

CERTIFIED = 1e-10  # largest relative residual of a certified limit
_AGREE = 1e-8  # relative difference of the two values
_CANDIDATES = 64  # points that may be support vectors: those with the smallest margins
_ROUNDS = 40  # of the program with more and more cells
_RESOLUTION = 1e-10  # relative error of a breakpoint, over the length of the data
_ON = 1e-11  # |u·x̃| over ‖u‖ ‖x̃‖ up to which a breakpoint is on a point: rounding


class LimitStatus(eqx.Enumeration):
    """What became of a limit. Printing a value gives its sentence."""

    certified = "Certified: a KKT point of the maximum-margin problem, the same from two states of the flow."
    not_separated = (
        "The flow has not classified all points, so its direction need not converge to a KKT point: integrate on, or, "
        "if it has stalled, take it as training that failed."
    )
    not_stationary = (
        "The program's solution misses the KKT conditions by more than 1e-10: integrate to a lower loss and try again."
    )
    not_settled = (
        "Two states of the flow, with ρ² ten times apart, gave different limits: integrate to a lower loss and try "
        "again."
    )


class Limit(eqx.Module):
    """A limit direction. `print(limit)` reports it in words; `limit.check()` raises if it is not certified.

    - `network`: scaled to minimum margin 1 and balanced, one neuron for each cell that is in use, zero-padded;
    - `multipliers` λ (n,), in the order of the data;
    - `value`: ½‖θ*‖² = 1/(2γ), γ the limit of the normalised margin;
    - `residual`: relative KKT residual, recomputed from `network` and `multipliers`;
    - `resolution`: 1e-10 of the length of the data, within which two breakpoints are one;
    - `disagreement`: relative difference between `value` and that from the earlier state of the flow;
    - `certified`, `status`.
    """

    network: ReluNetwork
    multipliers: Float[Array, " n"]
    value: Float[Array, ""]
    residual: Float[Array, ""]
    resolution: Float[Array, ""]
    disagreement: Float[Array, ""]
    status: LimitStatus

    @property
    def certified(self) -> Bool[Array, ""]:
        """Whether the status is `certified`."""
        return self.status == LimitStatus.certified

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
        return (
            f"Limit: {LimitStatus[self.status]}\n"
            f"  ½‖θ‖² {self.value:.10g} at minimum margin 1, {self.regions} linear regions, "
            f"{int(jnp.sum(self.multipliers > 1e-12 * jnp.sum(self.multipliers)))} support vectors\n"
            f"  KKT residual {self.residual:.1e}, two states differ by {self.disagreement:.1e}"
        )


def kkt_residual(net: ReluNetwork, data: Dataset, multipliers=None) -> Float[Array, ""]:
    """How far a network that classifies `data`, scaled to minimum margin 1, is from a KKT point of (P).

    **Arguments** `multipliers`: λ (n,); default the natural ones of the exponential loss, λ_i = p_i ρ²/(2 Σ p_l q_l), p
    the softmax of −q.

    **Returns** the largest of

    - stationarity: ‖θ − Σ λ_i ∂q_i‖/‖θ‖ with the Clarke subdifferential, the activation at a breakpoint on a point
      being the number in [0, 1] that fits best;
    - negative multipliers: max −λ_i/Σ λ; complementarity: Σ |λ_i| |q_i − 1|/Σ λ.

    Infinite if some margin is not positive. Works under jit and vmap.
    """
    q = data.margins(net)
    least = jnp.min(q)
    scale = 1 / jnp.sqrt(jnp.where(least > 0, least, 1))
    natural = jax.nn.softmax(-q)
    natural = natural * net.squared_norm / (2 * jnp.sum(natural * q))
    lam = natural if multipliers is None else jnp.asarray(multipliers, q.dtype)
    net, q = net.scaled(scale), q * scale**2

    x, force = data.x[None, :], (lam * data.y)[None, :]
    reach = jnp.hypot(1, x)
    inner = net.w[:, None] * x + net.b[:, None]
    on = jnp.abs(inner) <= _ON * jnp.hypot(net.w, net.b)[:, None] * reach
    active = ((inner > 0) & ~on).astype(q.dtype)
    z = jnp.stack([active @ (force * x)[0], active @ force[0]])
    # What u/v still lacks is to come from the points under the breakpoint, which lie in one place.
    lack = jnp.stack([net.w, net.b]) / jnp.where(net.v == 0, 1, net.v)[None] - z
    push = on.astype(q.dtype) * force
    needed = (lack[0][:, None] * x + lack[1][:, None]) / reach**2
    total = jnp.sum(push, axis=1, keepdims=True)
    share = jnp.where(total == 0, 0, needed / jnp.where(total == 0, 1, total))
    push = push * jnp.clip(share, 0, 1)
    z = z + jnp.stack([push @ data.x, jnp.sum(push, axis=1)])
    off = ReluNetwork(
        net.w - net.v * z[0], net.b - net.v * z[1], net.v - jnp.sum(jnp.maximum(inner, 0) * force, axis=1)
    )
    whole = jnp.sum(jnp.abs(lam))
    parts = (
        jnp.sqrt(off.squared_norm / net.squared_norm),
        jnp.max(-lam) / whole,
        jnp.sum(jnp.abs(lam) * jnp.abs(q - 1)) / whole,
    )
    residual = jnp.max(jnp.stack(parts))
    return jnp.where((least > 0) & ~jnp.isnan(residual), residual, jnp.inf)


def limit(flow: Flow, data: Dataset, loss: Loss | None = None) -> Limit:
    """The limit direction of a flow on `data`, from its end and from a later state with ten times its ρ².

    **Arguments** `flow`: what `integrate` returned; `loss`: the loss it was made with (default exponential), for going
    on. **Returns** a `Limit`, under jit and vmap too: failure is its `status`.

    **Raises** `ValueError` in float32, where 1e-10 is out of reach.
    """
    if data.x.dtype != jnp.float64:
        raise ValueError("a certified limit needs float64: call jax.config.update('jax_enable_x64', True) first")
    return _limit(flow, data, loss)


@eqx.filter_jit
def _limit(flow: Flow, data: Dataset, loss: Loss | None) -> Limit:
    goal = jnp.where(flow.separated, jnp.sqrt(10 * flow.final.squared_norm), 0)
    later = integrate(flow.final, data, loss, Until(norm=goal))
    states = jax.tree.map(lambda a, b: jnp.stack([a, b]), (flow.final, flow.sliding), (later.final, later.sliding))
    nets, multipliers, residuals = jax.vmap(lambda net, sliding: from_state(net, sliding, data))(*states)
    network = jax.tree.map(lambda a: a[1], nets)
    values = 0.5 * jax.vmap(lambda net: net.squared_norm)(nets)
    raw = 0.5 / jnp.stack([flow.margin, later.margin])
    # The smoothed margin never falls, and exceeds the margin by less than (log n)/ρ²: the limit's is no smaller.
    near = (raw - values[1]) / values[1]
    disagreement = jnp.abs(values[0] / values[1] - 1)
    agrees = (disagreement <= _AGREE) & (near[1] >= -CERTIFIED) & (near[1] < near[0]) & flow.separated
    status = LimitStatus.where(agrees, LimitStatus.certified, LimitStatus.not_settled)
    good = residuals[1] <= CERTIFIED
    status = LimitStatus.where(good, status, LimitStatus.not_stationary)
    status = LimitStatus.where(flow.separated, status, LimitStatus.not_separated)
    resolution = _RESOLUTION * (jnp.max(data.x) - jnp.min(data.x))
    return Limit(network, multipliers[1], values[1], residuals[1], resolution, disagreement, status)


def from_state(net: ReluNetwork, sliding: Float[Array, " k"], data: Dataset):
    """The limit that one state leads to: its network, its multipliers in the order of the data, and its residual."""
    points = Points(data)
    n = points.x.shape[0]
    real = points.log_count > -jnp.inf
    q = jnp.where(real, points.y * net(points.x), jnp.inf)
    chosen = jnp.sort(jnp.argsort(q)[: min(n, _CANDIDATES)])
    # One more point, right of all and without weight: the cones need two.
    x = jnp.append(points.x[chosen], 2 * points.x[chosen[-1]] - points.x[chosen[0]] + 1)
    y, real = jnp.append(points.y[chosen], 1.0), jnp.append(real[chosen], False)
    allowed = cells_of(net, sliding, x)
    cones = Cones(x)

    def more(state):
        round_, allowed, *_ = state
        solution = solve(x, y, real, allowed)
        new = spread(cones, allowed, cones.forces(solution.multipliers * y))
        return round_ + 1, new, jnp.any(new != allowed), solution

    empty = Solution(jnp.zeros_like(x), jnp.zeros((2, 2, 2 * x.shape[0]), x.dtype), jnp.zeros((), x.dtype))
    start = (jnp.zeros((), int), allowed, jnp.array(True), empty)
    *_, solution = jax.lax.while_loop(lambda s: s[2] & (s[0] < _ROUNDS), more, start)
    network = solution.network()
    # Points that occur several times share their multiplier.
    shares = jnp.zeros_like(points.x).at[chosen].set(jnp.where(real, solution.multipliers, 0)[:-1])
    shares = shares / jnp.where(points.log_count > -jnp.inf, jnp.exp(points.log_count), 1)
    order = jnp.argsort(data.x)
    sorted_x = data.x[order]
    slot = jnp.cumsum(jnp.concatenate([jnp.zeros((1,), int), (sorted_x[1:] != sorted_x[:-1]).astype(int)]))
    multipliers = jnp.zeros_like(data.x).at[order].set(shares[slot])
    residual = kkt_residual(network, data, multipliers)
    least = jnp.min(data.margins(network))
    return network.scaled(1 / jnp.sqrt(jnp.where(least > 0, least, 1))), multipliers, residual


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


def spread(cones: Cones, allowed: Bool[Array, "2 cells"], z: Float[Array, "2 2 cells"]) -> Bool[Array, "2 cells"]:
    """`allowed` and all cells that its neurons go on to under the forces `z`, through the ray nearer to z."""
    n = cones.x.shape[0]
    along = jnp.stack([jnp.sum(z * t[None], axis=1) for t in (cones.first, cones.second)])
    leaves = (cones.place(z) != 0) & (jnp.sum(z**2, axis=1) > 0)
    back, forth = leaves & (along[0] >= along[1]), leaves & (along[0] < along[1])

    def go(_, held):
        held = held | jnp.roll(held & back, -1, axis=1) | jnp.roll(held & forth, 1, axis=1)
        return held.at[:, n].set(False)

    return jax.lax.fori_loop(0, 2 * n, go, allowed)
