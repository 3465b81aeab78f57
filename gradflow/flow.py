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
so as to end on the event; there the mode is decided anew with the velocities on both sides. Where p spreads over more
points than the stiff solver's linear algebra keeps, steps are explicit.

**Errors.** A step's error is at most atol + rtol · size in every parameter and 1e-3 in every margin that matters;
events are met to half of rtol ‖u_j‖. v_j² − w_j² − b_j² is conserved in every mode and restored after each step.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gradflow.clarke import Field, Mode, Points, Weights, find_cell
from gradflow.data import Dataset
from gradflow.events import NODES, Tolerance, look_ahead, update
from gradflow.loss import Exponential, Loss
from gradflow.network import ReluNetwork, is_concrete
from gradflow.outcome import Flow, Path, Status, Until
from gradflow.rosenbrock import Rodas4

_RANK = 64  # points kept in the Jacobian of the stiff solver, all of them up to that many
_NEGLIGIBLE = 0.02  # step times the norm of what the Jacobian leaves out, for the stiff solver to be used
# ‖dθ/dτ‖ over max_i‖∂q_i‖, which bounds it, below which a flow that has not separated has stalled. At 1e-6, one in
# sixteen such flows of default trials was only passing a saddle.
_STANDSTILL = 1e-10
FLOAT32_LOG_LOSS = -50.0  # past it, float32 cannot resolve the direction: margins of 50 and their differences in p


class _State(eqx.Module):
    """What goes on from one step attempt to the next."""

    net: ReluNetwork
    clock: Float[Array, ""]  # c = log(1 + t/t₀)
    mode: Mode
    time: Float[Array, ""]
    step: Float[Array, ""]  # what error control proposes
    cap: Float[Array, ""]  # the next attempt is to end here, on an event
    status: Status
    accepted: Int[Array, ""]
    rejected: Int[Array, ""]
    events: Int[Array, ""]


class _Problem(eqx.Module):
    """What stays the same over an integration."""

    points: Points
    loss: Loss
    solvers: tuple[diffrax.AbstractSolver, ...]  # one, or (explicit, stiff)
    until: Until
    log_unit: Float[Array, ""]  # log t₀
    balance: Float[Array, " k"]  # v² − w² − b² at the start
    tolerance: Tolerance
    max_steps: Int[Array, ""]
    log_separated: float = eqx.field(static=True)
    rank: int = eqx.field(static=True)

    def field(self, mode: Mode) -> Field:
        return Field(self.points, self.loss, mode, self.log_unit, self.rank)

    def attempt(self, state: _State) -> _State:
        """One step attempt: rejected for its error, rejected to land on an event instead, or accepted."""
        field, dtype = self.field(state.mode), state.time.dtype
        step = jnp.minimum(jnp.minimum(state.step, state.cap), self.until.time.astype(dtype) - state.time)
        start = field.weights(state.net)
        new, clock, error, clock_error, nodes = self.advance(field, state, start, step)
        end = field.weights(new)
        ratio = self.error_ratio(field, state, new, clock, error, clock_error, end)
        sound = ratio <= 1
        outlook = look_ahead(field, nodes, start, end, step, self.tolerance)
        early = sound & (outlook.share <= 1)
        accept = sound & ~early
        net, mode, events = update(field, new, end, outlook.passed, outlook.released, self.tolerance)
        net = _rebalanced(net, self.balance)

        # The error of both methods behaves like h⁴ or better; no growth after an error rejection of this very step.
        factor = jnp.clip(0.9 * jnp.maximum(ratio, 1e-10) ** -0.25, 0.2, 5.0)
        proposal = jnp.where(
            sound, jnp.maximum(step * factor, jnp.where(step < state.step, state.step, 0)), step * factor
        )

        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)

        state = _State(
            keep(net, state.net),
            keep(clock, state.clock),
            keep(mode, state.mode),
            jnp.where(accept, state.time + step, state.time),
            jnp.where(early, state.step, proposal),
            jnp.where(early, step * outlook.share, jnp.inf),
            state.status,
            jnp.where(accept, state.accepted + 1, state.accepted),
            jnp.where(accept, state.rejected, state.rejected + 1),
            jnp.where(accept, state.events + events, state.events),
        )
        return self.judge(state)

    def advance(self, field: Field, state: _State, weights: Weights, step):
        """One step of the fitting solver, and the network at the five nodes of the step."""
        y, zero = (state.net, state.clock), jnp.zeros_like(step)
        terms = diffrax.ODETerm(field)

        def run(solver):
            def branch():
                # The flow is autonomous: steps start at 0, so that one below the rounding of τ still moves θ.
                memory = solver.init(terms, zero, step, y, None)
                (new, clock), error, dense, _, _ = solver.step(terms, zero, step, y, None, memory, made_jump=True)
                if error is None:
                    raise ValueError(f"{type(solver).__name__} gives no error estimate; wrap it in diffrax.HalfSolver")
                dense = solver.interpolation_cls(t0=zero, t1=step, **dense)
                inner = [dense.evaluate(step * jnp.asarray(s, step.dtype))[0] for s in NODES[1:-1]]
                nodes = jax.tree.map(lambda *a: jnp.stack(a), state.net, *inner, new)
                return new, clock, *error, nodes

            return branch

        if len(self.solvers) == 1:
            return run(self.solvers[0])()
        explicit, stiff = self.solvers
        if self.rank >= self.points.x.shape[0]:
            return run(stiff)()
        exact = step * field.neglected(state.net, weights) <= _NEGLIGIBLE
        return jax.lax.cond(exact, run(stiff), run(explicit))

    def error_ratio(self, field: Field, state: _State, new, clock, error, clock_error, end: Weights):
        """Largest error over what is allowed, infinite for NaN.

        Parameters are held to atol + rtol · size in the maximum norm, which does not dilute when dead or zero-padded
        neurons are added. Margins are held to 1e-3 absolutely where their sample matters: an error δq turns into a
        relative error δq of p, and δq ≈ ρ² · rtol would make p noise at late times.
        """
        tolerance = self.tolerance
        sizes = jax.tree.map(
            lambda e, a, b: jnp.max(
                jnp.abs(e) / (tolerance.atol + tolerance.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)))
            ),
            (error, clock_error),
            (state.net, state.clock),
            (new, clock),
        )
        share = jnp.minimum(1, end.p * jnp.sum(jnp.exp(self.points.log_count)))
        margins = jnp.max(jnp.abs(field.respond(new, error)) * share) / tolerance.margin
        ratio = jnp.max(jnp.stack([*jax.tree.leaves(sizes), margins]))
        return jnp.where(jnp.isnan(ratio), jnp.inf, ratio)

    def judge(self, state: _State) -> _State:
        """The status after an attempt."""
        field, until, dtype = self.field(state.mode), self.until, state.time.dtype
        weights = field.weights(state.net)
        velocity = field.combine(state.net, weights.p)
        speed, rho = jnp.sqrt(velocity.squared_norm), jnp.sqrt(state.net.squared_norm)
        separated = weights.log_loss < self.log_separated
        met = (
            (state.time >= until.time.astype(dtype))
            | (weights.log_loss <= until.log_loss.astype(dtype))
            | (rho >= until.norm.astype(dtype))
        )
        settled = separated & (_misalignment(state.net, velocity) <= until.settled.astype(dtype))
        fastest = jnp.sqrt(jnp.max(jnp.where(weights.p > 0, field.squared_gradients(state.net), 0)))
        stalled = ~separated & (speed <= max(_STANDSTILL, 100 * float(jnp.finfo(dtype).eps)) * fastest)
        tiny = jnp.minimum(state.step, state.cap) * speed <= 0.1 * jnp.finfo(dtype).eps * rho
        status = Status.running
        for condition, outcome in (
            (state.accepted + state.rejected >= self.max_steps, Status.step_limit),
            (tiny, Status.step_too_small),
            (stalled, Status.stalled),
            (settled, Status.settled),
            (met, Status.reached),
            (self.points.conflict, Status.not_separable),
            (~(jnp.isfinite(rho) & jnp.isfinite(weights.log_loss) & jnp.isfinite(fastest)), Status.non_finite),
        ):
            status = Status.where(condition, outcome, status)
        return eqx.tree_at(lambda s: s.status, state, status)

    def record(self, path: Path, state: _State, due) -> Path:
        """`path` with the present state written into its next slot, if `due`."""
        weights = self.field(state.mode).weights(state.net)
        slots = path.time.shape[0]
        # A full path drops every second snapshot, and takes them half as often from then on.
        full = due & (path.count == slots)
        row = (
            state.time,
            self.log_time(state.clock),
            weights.log_loss,
            jnp.min(weights.q) / state.net.squared_norm,
            state.net,
        )
        count = jnp.where(full, slots // 2, path.count)

        def write(column, entry):
            halved = jnp.concatenate([column[::2], jnp.full_like(column[::2], jnp.nan)])
            column = jnp.where(full, halved, column)
            return column.at[count].set(jnp.where(due, entry, column[count]))

        columns = (path.time, path.log_time, path.log_loss, path.margin, path.network)
        time, log_time, log_loss, margin, network = jax.tree.map(write, columns, row)
        stride = jnp.where(full, 2 * path.stride, path.stride)
        return Path(time, log_time, log_loss, margin, network, jnp.where(due, count + 1, count), stride)

    def log_time(self, clock):
        """log t. Below log(1 + t/t₀) = 1 by expm1, beyond by the form that cannot overflow."""
        late = clock > 1
        small = jnp.log(jnp.expm1(jnp.where(late, 1, clock)))
        return self.log_unit + jnp.where(late, clock + jnp.log(-jnp.expm1(-jnp.where(late, clock, 1))), small)


def _rebalanced(net: ReluNetwork, balance: Float[Array, " k"]) -> ReluNetwork:
    """`net` put back on the invariants v_j² − ‖u_j‖² = `balance`, by one Newton step u(1 + ε), v(1 − ε).

    Both scale along themselves, so breakpoints and modes stay; ε is of the size of the step's error (Hairer, Lubich and
    Wanner 2006, IV.4: projection keeps the order).
    """
    norm = jnp.hypot(net.w, net.b)
    size = net.v**2 + norm**2
    epsilon = 0.5 * ((net.v - norm) * (net.v + norm) - balance) / jnp.where(size > 0, size, 1)
    return ReluNetwork(net.w * (1 + epsilon), net.b * (1 + epsilon), net.v * (1 - epsilon))


def _misalignment(net: ReluNetwork, velocity: ReluNetwork) -> Float[Array, ""]:
    """Tangent of the angle between θ and dθ/dτ (+inf unless it is below a right angle)."""
    inner = sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(net), jax.tree.leaves(velocity), strict=True))
    share = inner / net.squared_norm
    across = jax.tree.map(lambda a, b: a - share * b, velocity, net)
    along = share * jnp.sqrt(net.squared_norm)
    return jnp.where(along > 0, jnp.sqrt(across.squared_norm) / jnp.where(along > 0, along, 1), jnp.inf)


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
    max_steps=200_000,
) -> Flow:
    """Gradient flow on the mean loss, from `net`, on one dataset.

    **Arguments**

    - `net`, `data`: the initial network and the points, of one float dtype.
    - `loss`: default `Exponential()`.
    - `until`: when to stop; default `Until()`, until the direction has settled.
    - `rtol`, `atol`: error allowed in each parameter in one step, relative and absolute (units of θ). Traced.
    - `solver`: any Diffrax solver with an error estimate, for all steps. Default: Rodas4, and Tsit5 where too many
        points matter at once for its linear algebra.
    - `save`: the most snapshots to keep along the way (even, ≥ 2), in `flow.path`; default none.
    - `max_steps`: the most step attempts. Traced.

    **Returns** a `Flow`, under jit and vmap too: failure is its `status`, never an exception.

    **Raises** `ValueError`, before anything compiles, for mixed dtypes, tolerances that are not positive, an odd
    `save`, a solver without error estimate, and for `until.log_loss` below −50 in float32.
    """
    loss = Exponential() if loss is None else loss
    until = Until() if until is None else until
    solvers = (diffrax.Tsit5(scan_kind="lax"), Rodas4()) if solver is None else (_with_tolerances(solver, rtol, atol),)
    dtype = net.w.dtype
    if data.x.dtype != dtype:
        raise ValueError(f"the network is {dtype} and the data {data.x.dtype}: convert one of them")
    for name, value in (("rtol", rtol), ("atol", atol), ("max_steps", max_steps)):
        if is_concrete(value) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if save is not None and (save < 2 or save % 2):
        raise ValueError(f"save must be an even number of snapshots, at least 2, got {save}")
    if dtype == jnp.float32 and is_concrete(until.log_loss) and until.log_loss < FLOAT32_LOG_LOSS:
        if until.log_loss > -jnp.inf:
            raise ValueError(
                f"log loss {until.log_loss} needs float64: call jax.config.update('jax_enable_x64', True) before "
                f"making arrays, or ask for {FLOAT32_LOG_LOSS} at most"
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
    tolerance = Tolerance(rtol, atol)
    cell = find_cell(net, points)
    mode = Mode(cell, jnp.full_like(cell, -1))
    zero, none = jnp.zeros((), dtype), jnp.zeros(cell.shape, bool)
    rank = min(data.samples, _RANK)

    initial = Field(points, loss, mode, zero, rank)
    weights = initial.weights(net)
    largest = jnp.max(jnp.where(weights.p > 0, initial.squared_gradients(net), 0))
    safe = jnp.where(largest > 0, largest, 1)
    log_unit = -weights.log_rate - jnp.log(safe)
    problem = _Problem(
        points,
        loss,
        solvers,
        until,
        log_unit,
        net.balance,
        tolerance,
        max_steps,
        loss.log_separated(data.samples),
        rank,
    )
    # Breakpoints that start on a point are decided like those that arrive there.
    start, mode, _ = update(problem.field(mode), net, weights, none, none, tolerance)
    speed = jnp.sqrt(problem.field(mode).combine(start, weights.p).squared_norm)
    # A hundredth of the time in which θ, or the fastest margin, changes by its own size.
    first = 0.01 * jnp.minimum(jnp.sqrt(net.squared_norm) / jnp.where(speed > 0, speed, 1), 1 / safe)
    count = jnp.zeros((), int)
    far = jnp.full((), jnp.inf, dtype)
    state = problem.judge(_State(start, zero, mode, zero, first, far, Status.running, count, count, count))

    path = None
    if save is not None:
        empty = jnp.full((save,), jnp.nan, dtype)
        empty_net = jax.tree.map(lambda a: jnp.full((save, *a.shape), jnp.nan, dtype), net)
        path = Path(empty, empty, empty, empty, empty_net, count, jnp.ones((), int))
        path = problem.record(path, state, jnp.array(True))

    def body(carry):
        before, path = carry
        state = problem.attempt(before)
        if path is not None:
            due = (state.accepted > before.accepted) & (state.accepted % path.stride == 0)
            path = problem.record(path, state, due)
        return state, path

    state, path = jax.lax.while_loop(lambda carry: carry[0].status == Status.running, body, (state, path))
    if path is not None:
        path = problem.record(path, state, state.time > path.time[path.count - 1])
    field = problem.field(state.mode)
    weights = field.weights(state.net)
    scale = state.net.squared_norm
    return Flow(
        final=state.net,
        status=state.status,
        time=state.time,
        log_time=problem.log_time(state.clock),
        log_loss=weights.log_loss,
        margin=jnp.min(weights.q) / scale,
        separated=weights.log_loss < problem.log_separated,
        residual=_misalignment(state.net, field.combine(state.net, weights.p)),
        drift=jnp.max(jnp.abs(state.net.balance - net.balance)) / scale,
        steps=state.accepted,
        rejected=state.rejected,
        events=state.events,
        sliding=jnp.where(state.mode.sliding, points.x[state.mode.ray % data.samples], jnp.nan),
        path=path,
    )
