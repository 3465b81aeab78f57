"""Gradient flow, followed exactly through kinks, sliding and stiffness.

Gradient flow on the mean loss L is dθ/dt ∈ −∂L(θ), ∂ the Clarke subdifferential. Late in training L falls like
1/(t log t), so physical time runs to e^{1000} and beyond while the direction of θ still moves. In rescaled time τ, with
dτ/dt = e^s = mean_i(−ℓ'(q_i)),

    dθ/dτ = Σ_i p_i ∂q_i(θ),    q_i = y_i N(x_i),    p_i = −ℓ'(q_i) / Σ_l −ℓ'(q_l),

(the gradient flow of −log L for the exponential loss) any t is reached in moderate τ. Physical time is carried along as
the state c = log(1 + t/t₀), dc/dτ = exp(−c − s − log t₀), which starts at 0 and needs no exponential of a margin; the
unit t₀ = e^{−s}/max_i‖∂q_i‖² is taken at the start, so that early times keep their digits on any scale of the data.

**The loop.** The state holds θ, c and a *mode*: every neuron's activation pattern, and the data point that its
breakpoint sticks to, if any (`clarke.py`). Inside a mode the field is smooth and a Diffrax solver takes ordinary
steps. A step that would pass an event which matters (`events.py`) is rejected and taken again, by the solver itself,
so as to end on the event; there the mode is decided anew with the velocities on both sides. Steps are explicit where
nothing is stiff and the Jacobian is large, and where it has more parts than the stiff solver's linear algebra keeps.

**Failure.** Training that fails does not stop either, it becomes ever slower, and may succeed after all. Such flows are
followed on their own, slow time scale (`slow.py`): "stalled" means that they had not left a positive loss by t = e^496,
or by 1/L of the loss that was asked for; or that all forces cancel to 1e-10.

**Errors.** A step's error is at most atol + rtol · size in every parameter and 1e-3 in every margin that matters, less
where forces almost cancel; events are met to a fifth of rtol ‖u_j‖, and releases to 0.3 √rtol of the force, which
moves a breakpoint by O(rtol). v_j² − w_j² − b_j² is conserved in every mode and restored after each step.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.clarke import Field, Mode, Points, find_cell
from gradflow.data import Dataset
from gradflow.events import update
from gradflow.hybrid import FLOAT32_LOG_LOSS, Problem, State, misalignment
from gradflow.limit import Candidate, Limit, LimitStatus, candidate, judged
from gradflow.loss import Exponential, Loss
from gradflow.network import ReluNetwork, is_concrete
from gradflow.outcome import Entry, Flow, Path, Status, Until
from gradflow.rosenbrock import Rodas4
from gradflow.slow import no_split

_RANK = 160  # positions kept in the Jacobian of the stiff solver: all of them up to 79 neurons, or 160 points
_ROUNDS = 6  # of ten times the ρ², until a limit is certified


def integrate(
    net: ReluNetwork,
    data: Dataset,
    loss: Loss | None = None,
    until: Until | None = None,
    *,
    rtol=1e-6,
    atol=1e-6,
    solver: diffrax.AbstractSolver | None = None,
    save: int | None = None,
    max_steps: int | Array = 200_000,
) -> Flow:
    """Gradient flow on the mean loss, from `net`, on one dataset.

    **Arguments**

    - `net`, `data`: the initial network and the points, of one float dtype.
    - `loss`: default `Exponential()`.
    - `until`: when to stop; default `Until()`, until the limit of the direction is certified.
    - `rtol`, `atol`: error allowed in each parameter in one step, relative and absolute (units of θ). Traced.
    - `solver`: any Diffrax solver with an error estimate, for all steps. Default: Rodas4, and Tsit5 where too many
        points matter at once for its linear algebra.
    - `save`: the most snapshots to keep along the way (even, ≥ 2), in `flow.path`; default none.
    - `max_steps`: the most step attempts. Traced.

    **Returns** a `Flow`, under jit and vmap too: failure is its `status`, never an exception.

    **Raises**, before anything compiles: `TypeError` for an argument of the wrong kind; `ValueError` for mixed dtypes,
    tolerances that are not positive, an odd `save`, a solver without error estimate, batched weights or points (use
    `jax.vmap`), and in float32 for `Until()` and an `until.log_loss` below −50.
    """
    loss = Exponential() if loss is None else loss
    until = Until() if until is None else until
    for name, value, kind, example in (
        ("net", net, ReluNetwork, "gradflow.ReluNetwork.random(key, width=32)"),
        ("data", data, Dataset, "gradflow.Dataset(x, y)"),
        ("loss", loss, Loss, "gradflow.Logistic()"),
        ("until", until, Until, "gradflow.Until(log_loss=-100.0)"),
        ("solver", diffrax.Tsit5() if solver is None else solver, diffrax.AbstractSolver, "diffrax.Kvaerno5()"),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, such as {example}, got {value!r}")
    solvers = (diffrax.Tsit5(scan_kind="lax"), Rodas4()) if solver is None else (_with_tolerances(solver, rtol, atol),)
    if net.w.ndim != 1 or data.x.ndim != 1:
        raise ValueError(
            f"integrate takes one network and one dataset, got weights of shape {net.w.shape} and points of shape "
            f"{data.x.shape}: map it over a batch with jax.vmap"
        )
    dtype = net.w.dtype
    if data.x.dtype != dtype:
        raise ValueError(f"the network is {dtype} and the data {data.x.dtype}: convert one of them")
    for name, value in (("rtol", rtol), ("atol", atol), ("max_steps", max_steps)):
        if jnp.ndim(value) != 0 or (is_concrete(value) and not value > 0):
            raise ValueError(f"{name} must be one positive number, got {value}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if is_concrete(value) and not value < 1:
            raise ValueError(f"{name} must be below 1, got {value}: nothing would be left of the flow")
    if is_concrete(max_steps):
        if max_steps != int(max_steps):
            raise ValueError(f"max_steps must be a whole number, got {max_steps}")
        max_steps = min(int(max_steps), 2**31 - 1)
    if save is not None and (save != int(save) or save < 2 or save % 2):
        raise ValueError(f"save must be an even number of snapshots, at least 2, got {save}")
    low = is_concrete(until.log_loss) and -jnp.inf < until.log_loss < FLOAT32_LOG_LOSS
    if dtype == jnp.float32 and (until.certifies or low):
        what = "a certified limit" if until.certifies else f"log loss {until.log_loss}"
        raise ValueError(
            f"{what} needs float64: call jax.config.update('jax_enable_x64', True) before making arrays, or ask for "
            f"less, such as Until(log_loss={FLOAT32_LOG_LOSS})"
        )
    tolerances = jnp.asarray(rtol, dtype), jnp.asarray(atol, dtype)
    return _integrate(net, data, loss, until, *tolerances, solvers, save, jnp.asarray(max_steps))


def _with_tolerances(solver: diffrax.AbstractSolver, rtol, atol) -> diffrax.AbstractSolver:
    """`solver`, whose root finder, if it has one that waits for the tolerances of the integration, gets them."""
    finder = getattr(solver, "root_finder", None)
    if finder is None or isinstance(finder.rtol, int | float | jax.Array):
        return solver
    return eqx.tree_at(
        lambda s: (s.root_finder.rtol, s.root_finder.atol, s.root_finder.norm), solver, (rtol, atol, _max_norm)
    )


def _max_norm(y) -> Float[Array, ""]:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(y)]))


@eqx.filter_jit
def _integrate(net, data, loss, until, rtol, atol, solvers, save, max_steps) -> Flow:
    dtype, points = net.w.dtype, Points(data)
    cell = find_cell(net, points.x)
    mode = Mode(cell, jnp.full_like(cell, -1))
    zero, one, none = jnp.zeros((), dtype), jnp.ones((), dtype), jnp.zeros(cell.shape, bool)
    rank = min(data.x.shape[0], 2 * (net.width + 1), _RANK)

    initial = Field(points, loss, mode, no_split(points.x), zero, rank)
    weights = initial.weights(net.lines)
    largest = jnp.max(jnp.where(weights.p > 0, initial.squared_gradients(net), 0))
    safe = jnp.where(largest > 0, largest, 1)
    log_unit = -weights.log_rate - jnp.log(safe)
    problem = Problem(
        points,
        loss,
        solvers,
        until,
        log_unit,
        net.balance,
        rtol,
        atol,
        max_steps,
        loss.log_separated(jnp.asarray(data.samples, dtype)),
        rank,
    )
    # Breakpoints that start on a point are decided like those that arrive there.
    start, mode, _ = update(initial, net, weights, none, none, zero, problem.tolerance(one))
    speed = jnp.sqrt(eqx.tree_at(lambda f: f.mode, initial, mode).combine(start, weights.p).squared_norm)
    # A hundredth of the time in which θ, or the fastest margin, changes by its own size.
    first = 0.01 * jnp.minimum(jnp.sqrt(net.squared_norm) / jnp.where(speed > 0, speed, 1), 1 / safe)
    count = jnp.zeros((), int)
    far = jnp.full((), jnp.inf, dtype)
    state = problem.judge(
        State(
            start,
            zero,
            mode,
            initial.slow,
            zero,
            first,
            far,
            jnp.array(False),
            zero,
            one,
            weights.log_loss,
            zero - jnp.inf,
            zero,
            zero - jnp.inf,
            Entry(*jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), (zero, zero, net))),
            Status.running,
            count,
            count,
            count,
        )
    )

    path = None
    if save is not None:
        path = problem.record(Path.empty(save, net), state, jnp.array(True))

    def follow(problem, state, path):
        def body(carry):
            before, path = carry
            state = problem.attempt(before)
            if path is not None:
                due = (state.accepted > before.accepted) & (state.accepted % path.stride == 0)
                path = problem.record(path, state, due)
            return state, path

        return jax.lax.while_loop(lambda carry: carry[0].status == Status.running, body, (state, path))

    limit = None
    if until.certifies:
        state, path, limit = _until_certified(problem, follow, state, path, data)
    else:
        state, path = follow(problem, state, path)
    if path is not None:
        path = problem.record(path, state, state.time > path.time[path.count - 1])
    field = problem.field(state)
    weights = field.weights(state.net.lines)
    scale = state.net.squared_norm
    return Flow(
        final=state.net,
        status=state.status,
        time=state.time,
        log_time=problem.log_time(state.clock),
        log_loss=weights.log_loss,
        margin=problem.margin(weights, state.net),
        separated=problem.separates(weights.log_loss),
        residual=misalignment(state.net, field.combine(state.net, weights.p)),
        drift=jnp.max(jnp.abs(state.net.balance - net.balance)) / scale,
        rise=state.rise,
        fall=state.fall,
        entry=state.entry,
        steps=state.accepted,
        rejected=state.rejected,
        events=state.events,
        sliding=_sliding(state, points),
        path=path,
        limit=limit,
    )


def _sliding(state: State, points: Points) -> Float[Array, " k"]:
    return jnp.where(state.mode.sliding, points.x[state.mode.ray % points.x.shape[0]], jnp.nan)


def _until_certified(problem: Problem, follow, state: State, path: Path | None, data: Dataset):
    """Follow the flow until it has settled, then to ten times the ρ², and so on, until two states have one limit."""
    until = problem.until

    def advance(carry):
        round_, state, path, before, _ = carry
        wanted = goes_on(carry)  # in a batch, lanes that have ended come along, and should take no time
        goal = jnp.where(round_ == 0, jnp.inf, jnp.sqrt(10 * state.net.squared_norm))
        settled = jnp.where(round_ == 0, until.settled, -1)
        running = Status.where((round_ == 0) | ~wanted, state.status, Status.running)
        state = eqx.tree_at(lambda s: s.status, state, running)
        state, path = follow(
            eqx.tree_at(lambda p: (p.until.norm, p.until.settled), problem, (goal, settled)), state, path
        )
        separated = problem.separates(state.log_loss)
        wanted &= separated & (state.status == Status.reached)
        now = candidate(state.net, _sliding(state, problem.points), data, wanted)
        return round_ + 1, state, path, now, judged(before, now, separated, data)

    def goes_on(carry):
        round_, state, _, _, limit = carry
        return (round_ == 0) | ((state.status == Status.reached) & ~limit.certified & (round_ <= _ROUNDS))

    nothing = Candidate.none(data)
    start = (jnp.zeros((), int), state, path, nothing, judged(nothing, nothing, jnp.array(False), data))
    _, state, path, _, limit = jax.lax.while_loop(goes_on, advance, start)
    status = Status.where(limit.certified, Status.certified, Status.uncertified)
    status = Status.where(state.status == Status.reached, status, state.status)
    return eqx.tree_at(lambda s: s.status, state, status), path, limit


def limit(flow: Flow, data: Dataset, loss: Loss | None = None) -> Limit:
    """The limit direction of a flow on `data`: `flow.limit`, or if it has none, that of going on from its end.

    **Arguments** `flow`: what `integrate` returned; `loss`: the loss it was made with (default exponential), for going
    on. **Returns** a `Limit`, under jit and vmap too: failure is its `status`.

    **Raises** `ValueError` in float32, where 1e-10 is out of reach.
    """
    if flow.limit is not None:
        return flow.limit
    # A flow that stopped before all points were classified is not followed any further in the hope that they will be.
    found = integrate(flow.final, data, loss, max_steps=jnp.where(flow.separated, 200_000, 1)).limit
    assert found is not None  # as Until() asks for it
    return eqx.tree_at(
        lambda f: f.status, found, LimitStatus.where(flow.separated, found.status, LimitStatus.not_separated)
    )
