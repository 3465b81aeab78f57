"""Derivatives of a flow: of where it is at time τ, by the initial parameters, the inputs x and τ.

**Between events** the flow is smooth, and its derivative is that of the steps, at frozen step sizes and modes. Each is
repeated from its start, by the same solver, and differentiated.

**At an event** derivatives jump (`saltation.py`). For that the events have to be met one by one: `Problem.each`. They
may be few: passing x_i changes the derivative of u_j by a share |v_j| p_i ‖x̃_i‖²/|u̇_j·x̃_i| of itself, and those with a
share below rtol/1000 are still passed.

**Where there is none**: see `Sensitivity`.

**Memory and work.** Forward and reverse mode go over the recorded steps (`trace.py`), `SLOTS` states, and beyond that
many steps as many again while they go over a stretch between two states, which is integrated anew. Both are exactly
transposed to each other. Second derivatives are refused.
"""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gradflow.clarke import point_of
from gradflow.course import Course
from gradflow.data import Dataset
from gradflow.hybrid import Problem, State, misalignment
from gradflow.lift import from_lines
from gradflow.network import ReluNetwork
from gradflow.outcome import Flow, Sensitivity, Status
from gradflow.rosenbrock import Rodas5P
from gradflow.saltation import absent, judge_events, jump, starts_on_point
from gradflow.trace import Trace, stride
from gradflow.undefined import undefined

SLOTS = 1024  # states that are kept, and once more as many
_SAME = 1e-6  # relative difference up to which a stretch that was integrated anew counts as the same


class Change(eqx.Module):
    """What derivatives are taken of and by: the network, the points, a time, and all other numbers of a flow.

    At the start `x` is in the order of the data and `time` is τ; at the end `x` is in that of `Points`, and `time` the
    log of physical time. `other` has no derivative: it is NaN in forward mode where anything changes, and turns what is
    asked about it in reverse mode into NaN.
    """

    net: ReluNetwork
    x: Float[Array, " n"]
    time: Float[Array, ""]
    other: Float[Array, ""]


def check_solver(solver: diffrax.AbstractSolver) -> None:
    """**Raises** `ValueError` unless steps of `solver` can be differentiated exactly."""
    if not isinstance(solver, Rodas5P | diffrax.AbstractERK):
        raise ValueError(
            f"steps of {type(solver).__name__} are not differentiated: take the default solver, or an explicit "
            "Runge–Kutta method such as diffrax.Dopri8()"
        )


def sensed(course: Course) -> tuple[Course, Trace, Sensitivity]:
    """`course` (begun with `each`) followed to its end, its states, and whether it can be differentiated."""
    problem, start = course.problem, course.state

    def going(carry):
        return carry[0].status == Status.running

    def body(carry):
        before, path, trace, found = carry
        state = problem.attempt(before)
        accepted = state.accepted > before.accepted
        if path is not None:
            path = problem.record(path, state, accepted & (state.accepted % path.stride == 0))
        event = accepted & (state.events > before.events)
        found = Sensitivity.where(event & (found == Sensitivity.exists), judge_events(problem, before, state), found)
        return state, path, trace.with_state(state, accepted), found

    found = Sensitivity.where(starts_on_point(problem, start), Sensitivity.starts_on_point, Sensitivity.exists)
    trace = Trace.empty(start, SLOTS).with_state(start, jnp.array(True))
    state, path, trace, found = jax.lax.while_loop(going, body, (start, course.path, trace, found))
    at_time = (state.status == Status.reached) & (state.time >= problem.until.time.astype(state.time.dtype))
    found = Sensitivity.where(at_time, found, Sensitivity.ended_otherwise)
    found = Sensitivity.where(state.accepted < SLOTS**2, found, Sensitivity.too_long)
    course = eqx.tree_at(lambda c: (c.state, c.path), course, (state, path), is_leaf=lambda leaf: leaf is None)
    return course, trace, found


def repeat(problem: Problem, before: State, step, net: ReluNetwork, clock, x: Float[Array, " n"], balance):
    """The step from `before`, as a smooth function of the network, the clock, the points and the balance."""
    points = eqx.tree_at(lambda p: p.x, problem.points, x)
    field = eqx.tree_at(lambda f: f.points, problem.field(before), points).ready()
    y, zero = (net, net.lines, clock), jnp.zeros_like(step)
    terms = diffrax.ODETerm(field)

    def run(solver):
        if isinstance(solver, diffrax.AbstractERK):
            solver = dataclasses.replace(solver, scan_kind="bounded")  # differentiable in both modes

        def branch():
            memory = solver.init(terms, zero, step, y, None)
            return solver.step(terms, zero, step, y, None, memory, made_jump=True)[0]

        return branch

    still = jax.tree.map(jax.lax.stop_gradient, (before.net, field))
    new, lines, clock = problem.by_solver(field, before.net, still[1].weights(still[0].lines), step, run)
    new = from_lines(new, lines, balance, field.lifted)
    at = x[point_of(jnp.maximum(before.mode.ray, 0), x.shape[0])]
    along = (new.w - at * new.b) / (1 + at**2)
    slides = before.mode.sliding
    return ReluNetwork(jnp.where(slides, along, new.w), jnp.where(slides, -at * along, new.b), new.v), clock


class Record(eqx.Module):
    """All that derivatives need of a flow that was `sensed`."""

    problem: Problem
    data: Dataset
    start: State
    end: State
    trace: Trace
    found: Sensitivity

    @property
    def stride(self):
        return stride(self.end.accepted, self.trace.slots)

    def stretch(self, first) -> tuple[Trace, Bool[Array, ""]]:
        """All states from state `first`, one that is kept, to the next, in the order of their numbers; and whether that
        was reached again. For a stride of 1 nothing is done.
        """
        start = self.trace.state(first)
        last = jnp.minimum(first + self.stride, self.end.accepted)

        def body(carry):
            before, kept = carry
            state = self.problem.attempt(before)
            place = jnp.where(state.accepted > before.accepted, state.accepted - first, kept.slots)
            return state, Trace(jax.tree.map(lambda r, a: r.at[place].set(a, mode="drop"), kept.states, state))

        kept = Trace.empty(start, SLOTS + 1)  # of a stretch of SLOTS steps, both ends
        kept = Trace(jax.tree.map(lambda row, a: row.at[0].set(a), kept.states, start))
        going = self.stride > 1
        state, kept = jax.lax.while_loop(
            lambda c: going & (c[0].accepted < last) & (c[0].rejected <= self.end.rejected), body, (start, kept)
        )
        goal = self.at(last)
        off = jnp.max(
            jnp.stack(
                [
                    jnp.max(jnp.abs(a - b))
                    for a, b in zip(jax.tree.leaves(state.net), jax.tree.leaves(goal.net), strict=True)
                ]
            )
        )
        return kept, ~going | (off <= _SAME * jnp.sqrt(goal.net.squared_norm))

    def at(self, number) -> State:
        """State `number`, if it is kept or the last."""
        kept = self.trace.state(number - number % self.stride)
        return jax.tree.map(lambda a, b: jnp.where(number >= self.end.accepted, a, b), self.end, kept)

    def pair(self, kept: Trace, number) -> tuple[State, State]:
        """The states before and after step `number`, of the stretch `kept`."""

        def state(number, offset):
            own = jax.tree.map(lambda row: row[jnp.clip(offset, 0, kept.slots - 1)], kept.states)
            whole = self.at(number)
            use = (self.stride > 1) & (number < self.end.accepted)
            return jax.tree.map(lambda a, b: jnp.where(use, a, b), own, whole)

        offset = number % self.stride
        return state(number, offset), state(number + 1, offset + 1)


def push(record: Record, seed: Change) -> Change:
    """Forward: what the end makes of a change at the start."""
    problem, end, net = record.problem, record.end, record.start.net
    gone, moved = absent(net), jax.tree.map(lambda a: a != 0, seed.net)
    unknown = gone & (moved.w | moved.b | moved.v)
    seed_net = jax.tree.map(lambda a: jnp.where(gone, 0, a), seed.net)
    order, slot, real, repeated = _slots(problem, record.data)
    inputs = jnp.where(real, seed.x[order], 0)
    moving = jnp.zeros_like(inputs).at[slot].add(inputs)
    balance = jax.jvp(lambda net: _balance(net, gone), (net,), (seed_net,))[1]

    def step(kept, number, net, clock):
        before, after = record.pair(kept, number)
        primals = before.net, before.clock, problem.points.x, problem.balance
        net, clock = jax.jvp(
            lambda *args: repeat(problem, before, after.taken, *args), primals, (net, clock, moving, balance)
        )[1]
        return number + 1, jump(problem, before, after, net, moving), clock

    def stretch(carry):
        first, net, clock, sound = carry
        kept, same = record.stretch(first)
        last = jnp.minimum(first + record.stride, end.accepted)
        _, net, clock = jax.lax.while_loop(lambda c: c[0] < last, lambda c: step(kept, *c), (first, net, clock))
        return last, net, clock, sound & same

    start = (jnp.zeros_like(end.accepted), seed_net, jnp.zeros_like(end.clock), jnp.array(True))
    _, net, clock, sound = jax.lax.while_loop(lambda c: c[0] < end.accepted, stretch, start)
    velocity, rate = _velocity(problem, end)
    net = jax.tree.map(lambda a, b: a + b * seed.time, net, velocity)
    log_time = jax.jvp(problem.log_time, (end.clock,), (clock + rate * seed.time,))[1]
    anything = jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(seed)]))
    none = anything & (~sound | (record.found != Sensitivity.exists)) | jnp.any(repeated[slot] & (inputs != 0))
    lost = jnp.where(none, jnp.nan, 0)
    net = jax.tree.map(lambda a: jnp.where(unknown, jnp.nan, a + lost), net)
    return Change(net, moving, log_time + lost, jnp.where(anything, jnp.nan, 0))


def pull(record: Record, asked: Change) -> Change:
    """Reverse: the transpose of `push`."""
    problem, end, start = record.problem, record.end, record.start
    gone, counts = absent(start.net), jax.tree.map(lambda a: a != 0, asked.net)
    unknown = gone & (counts.w | counts.b | counts.v)
    velocity, rate = _velocity(problem, end)
    tick = jnp.where(asked.time == 0, 0, jax.vjp(problem.log_time, end.clock)[1](asked.time)[0])  # log 0 at time 0
    pairs = zip(jax.tree.leaves(velocity), jax.tree.leaves(asked.net), strict=True)
    time = rate * tick + sum(jnp.sum(a * b) for a, b in pairs)

    def step(kept, number, net, clock, own):
        before, after = record.pair(kept, number)
        x = problem.points.x
        net, at_event = jax.linear_transpose(lambda net, x: jump(problem, before, after, net, x), net, x)(net)
        primals = before.net, before.clock, x, problem.balance
        _, back = jax.vjp(lambda *args: repeat(problem, before, after.taken, *args), *primals)
        net, clock, in_step, balance = back((net, clock))
        return number - 1, net, clock, (own[0] + at_event + in_step, own[1] + balance)

    def stretch(carry):
        first, net, clock, own, sound = carry
        kept, same = record.stretch(first)
        last = jnp.minimum(first + record.stride, end.accepted)
        _, net, clock, own = jax.lax.while_loop(
            lambda c: c[0] >= first, lambda c: step(kept, *c), (last - 1, net, clock, own)
        )
        return first - record.stride, net, clock, own, sound & same

    last = jnp.where(end.accepted > 0, (end.accepted - 1) // record.stride * record.stride, -1)
    own = asked.x, jnp.zeros_like(problem.balance)
    carry = (last, asked.net, tick, own, jnp.array(True))
    _, net, _, (moving, balance), sound = jax.lax.while_loop(lambda c: c[0] >= 0, stretch, carry)
    more = jax.vjp(lambda net: _balance(net, gone), start.net)[1](balance)[0]
    net = jax.tree.map(lambda a, b: jnp.where(gone, jnp.where(unknown, jnp.nan, 0), a + b), net, more)
    order, slot, real, repeated = _slots(problem, record.data)
    inputs = jnp.where(real, moving[slot], 0)
    inputs = jnp.where(repeated[slot] & (inputs != 0), jnp.nan, inputs)
    anything = jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves((asked.net, asked.x, asked.time))]))
    none = anything & (~sound | (record.found != Sensitivity.exists)) | (asked.other != 0)
    lost = jnp.where(none, jnp.nan, 0)
    net = jax.tree.map(lambda a: a + lost, net)
    return Change(net, jnp.zeros_like(inputs).at[order].set(inputs) + lost, time + lost, jnp.zeros_like(time))


def _balance(net: ReluNetwork, gone: Bool[Array, " k"]) -> Float[Array, " k"]:
    safe = jax.tree.map(lambda a: jnp.where(gone, 1, a), net)
    return jnp.where(gone, 0, safe.balance)


def _slots(problem: Problem, data: Dataset):
    """The order of the data, the slot in `Points` of each in that order, which are data, which slots hold several."""
    order = jnp.argsort(data.x)
    x = data.x[order]
    slot = jnp.cumsum(jnp.concatenate([jnp.zeros((1,), int), (x[1:] != x[:-1]).astype(int)]))
    return order, slot, data.real[order], problem.points.log_count > 0


def _velocity(problem: Problem, end: State) -> tuple[ReluNetwork, Float[Array, ""]]:
    """dθ/dτ and the rate of the clock at the end."""
    velocity, _, rate = problem.field(end)(0, (end.net, end.net.lines, end.clock), None)
    return velocity, rate


def differentiated(
    course: Course, net: ReluNetwork, x: Float[Array, " n"], time: Float[Array, ""]
) -> tuple[Flow, Flow]:
    """`course` (begun with `each`) at its end, and its tangent for those of the initial network, the inputs and the
    time: by `push`, transposed by `pull`, and once only.
    """
    done, trace, found = sensed(course)
    problem, state = done.problem, done.state
    record = Record(problem, done.data, course.state, state, trace, found)
    # Second derivatives would have to go through all of the above; a linear solve would take them for zero.
    record = jax.tree.map(lambda leaf: _once(leaf) if eqx.is_array(leaf) else leaf, record)
    # Its transpose needs every part to be a linear function of what is differentiated by.
    seed = Change(net, x, time, jnp.zeros_like(time))
    whole = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(seed))
    seed = jax.tree.map(lambda leaf: jnp.where(jnp.array(False), whole, leaf), seed)
    change = jax.lax.custom_linear_solve(
        lambda change: change, seed, lambda _, b: push(record, b), lambda _, b: pull(record, b)
    )

    def ends(net, x):
        field = eqx.tree_at(lambda f: f.points.x, problem.field(state), x)
        weights = field.weights(net.lines)
        speed = field.combine(net, weights.p)
        return weights.log_loss, problem.margin(weights, net), misalignment(net, speed)

    # Absent neurons, whose own change is unknown, have no part in them to first order.
    known = jax.tree.map(lambda a: jnp.where(absent(state.net), 0, a), change.net)
    numbers = jax.jvp(ends, (state.net, problem.points.x), (known, change.x))[1]
    flow = eqx.tree_at(lambda f: f.sensitivity, done.flow(), found)
    out = jax.tree.map(lambda a: undefined(change.other[None], a) if eqx.is_inexact_array(a) else None, flow)
    time = jnp.where(found == Sensitivity.exists, time, undefined(time[None], time))
    return flow, eqx.tree_at(
        lambda f: (f.final, f.time, f.log_time, f.log_loss, f.margin, f.residual),
        out,
        (change.net, time, change.time, *numbers),
    )


@jax.custom_jvp
def _once(leaf):
    return leaf


@_once.defjvp
def _once_jvp(primals, tangents):
    raise NotImplementedError("second derivatives of a flow are not available: differentiate it once")
