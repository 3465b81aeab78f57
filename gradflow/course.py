"""A flow under way: begun, followed to the end of a round, handed over to its limit, ended; `integrate` loops over it.

A flow that seeks its limit goes in rounds: until it has settled, then to ten times the ρ², and so on, until the limits
that two ends of rounds lead to agree (`limit.py`).
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.clarke import Field, Mode, Points, find_cell, point_of
from gradflow.data import Dataset
from gradflow.events import update
from gradflow.hybrid import Problem, State, misalignment
from gradflow.lift import lifts
from gradflow.limit import Candidate, Limit, candidate, judged
from gradflow.loss import Loss
from gradflow.network import ReluNetwork
from gradflow.outcome import Entry, Flow, Path, Sensitivity, Status, Until
from gradflow.rosenbrock import Rodas5P
from gradflow.slow import no_split

_RANK = 160  # positions kept in the Jacobian of the stiff solver: all of them up to 79 neurons, or 160 points
_ROUNDS = 6  # of ten times the ρ², until a limit is certified


def default_solvers() -> tuple[diffrax.AbstractSolver, ...]:
    """An explicit one, where nothing is stiff and the Jacobian large, and one for all the rest."""
    return diffrax.Tsit5(scan_kind="lax"), Rodas5P()


def _balance(net: ReluNetwork) -> Float[Array, " k"]:
    """v² − ‖u‖², 0 where it is rounding: an imbalance of 1e-17 would send a neuron that slides to the origin back."""
    rounding = 8 * jnp.finfo(net.w.dtype).eps * net.sizes**2
    return jnp.where(jnp.abs(net.balance) <= rounding, 0, net.balance)


def _far(net: ReluNetwork, data: Dataset) -> tuple[Float[Array, " 2"], Bool[Array, ""]]:
    """The smallest and the largest input, and whether no breakpoint is within their distance of them."""
    low, high = jnp.min(data.x), jnp.max(data.x)
    turns = net.w != 0
    knot = -net.b / jnp.where(turns, net.w, 1)
    near = turns & (net.v != 0) & (knot >= 2 * low - high) & (knot <= 2 * high - low)
    return jnp.stack([low, high]), (high > low) & ~jnp.any(near)


class Pursuit(eqx.Module):
    """The search for a limit: rounds that have ended, what the state at the end of the last one leads to, and `limit`,
    what that and the one before make of it.
    """

    round: Int[Array, ""]
    before: Candidate
    limit: Limit


class Course(eqx.Module):
    """One flow on its way. `over`: it is done, and `flow()` is final."""

    problem: Problem
    data: Dataset
    state: State
    path: Path | None
    pursuit: Pursuit | None
    over: Bool[Array, ""]

    @classmethod
    def begin(
        cls,
        net: ReluNetwork,
        data: Dataset,
        loss: Loss,
        until: Until,
        rtol: Float[Array, ""],
        atol: Float[Array, ""],
        solvers: tuple[diffrax.AbstractSolver, ...],
        save: int | None,
        max_steps: Int[Array, ""],
        each: bool = False,
    ) -> "Course":
        """At time 0. Arguments as in `gradflow.integrate`, checked there; `each`: derivatives will be asked for."""
        dtype, points = net.w.dtype, Points(data)
        cell = find_cell(net, points.x)
        mode = Mode(cell, jnp.full_like(cell, -1))
        zero, one, none = jnp.zeros((), dtype), jnp.ones((), dtype), jnp.zeros(cell.shape, bool)
        rank = min(data.x.shape[0], 2 * (net.width + 1), _RANK)

        initial = Field(points, loss, mode, no_split(points.x), lifts(net), zero, rank)
        weights = initial.weights(net.lines)
        largest = jnp.max(jnp.where(weights.p > 0, initial.squared_gradients(net), 0))
        reach = jnp.max(jnp.where(weights.p > 0, points.norm, 0))
        # The fastest rates at which margins change, and neurons relative to themselves.
        rate = jnp.maximum(largest, reach)
        inputs, far = _far(net, data)
        problem = Problem(
            points,
            loss,
            solvers,
            until,
            -weights.log_rate - jnp.log(rate),
            _balance(net),
            inputs,
            far,
            rtol,
            atol,
            max_steps,
            loss.log_separated(jnp.asarray(data.samples, dtype)),
            rank,
            each,
        )
        # Breakpoints that start on a point are decided like those that arrive there.
        start, mode, *_ = update(initial, net, weights, none, none, none, zero, problem.tolerance(one, net.sizes))
        speed = jnp.sqrt(initial.in_mode(mode).combine(start, weights.p).squared_norm)
        # A hundredth of the time in which θ, or the fastest margin, changes by its own size.
        first = 0.01 * jnp.minimum(jnp.sqrt(net.squared_norm) / jnp.where(speed > 0, speed, 1), 1 / rate)
        count = jnp.zeros((), int)
        never = jnp.full((), jnp.inf, dtype)
        state = problem.judge(
            State(
                start,
                zero,
                mode,
                initial.slow,
                zero,
                first,
                never,
                jnp.array(False),
                jnp.array(False),
                zero,
                one,
                net.sizes,
                weights.log_loss,
                zero - jnp.inf,
                zero,
                zero - jnp.inf,
                Entry(*jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), (zero, zero, net))),
                Status.running,
                count,
                count,
                count,
                zero,
            )
        )
        path = None if save is None else problem.record(Path.empty(save, net), state, jnp.array(True))
        pursuit = None
        if until.certifies:
            nothing = Candidate.none(data)
            pursuit = Pursuit(count, nothing, judged(nothing, nothing, jnp.array(False), data))
        return cls(problem, data, state, path, pursuit, jnp.array(False))

    @property
    def waits(self) -> Bool[Array, "*lanes"]:
        """Whether a round has ended, for `hand_over` to look at."""
        return ~self.over & (self.state.status != Status.running)

    def follow(self, attempts=2**31 - 1) -> "Course":
        """Until the round ends, or so many step attempts have been made."""
        problem, last = self.problem, self.attempts + attempts

        def going(state: State):
            return ~self.over & (state.status == Status.running) & (state.accepted + state.rejected < last)

        def body(carry):
            before, path = carry
            state = problem.attempt(before)
            if path is not None:
                due = (state.accepted > before.accepted) & (state.accepted % path.stride == 0)
                path = problem.record(path, state, due)
            return state, path

        state, path = jax.lax.while_loop(lambda c: going(c[0]), body, (self.state, self.path))
        return eqx.tree_at(lambda c: (c.state, c.path), self, (state, path), is_leaf=lambda leaf: leaf is None)

    @property
    def attempts(self) -> Int[Array, "*lanes"]:
        return self.state.accepted + self.state.rejected

    def hand_over(self) -> "Course":
        """What the end of a round leads to: the end of the flow, or of its search for a limit, or the next round.

        Where no round has ended nothing changes.
        """
        state, problem, pursuit = self.state, self.problem, self.pursuit
        assert pursuit is not None  # only a flow that seeks its limit goes in rounds
        separated = problem.separates(state.log_loss)
        reached = state.status == Status.reached
        now = candidate(state.net, sliding(state, problem.points), self.data, self.waits & separated & reached)
        limit = judged(pursuit.before, now, separated, self.data)
        again = self.waits & reached & ~limit.certified & (pursuit.round < _ROUNDS)
        ended = Status.where(limit.certified, Status.certified, Status.uncertified)
        ended = Status.where(reached, ended, state.status)
        status = Status.where(again, Status.running, ended)
        goal = jnp.where(again, jnp.sqrt(10 * state.net.squared_norm), problem.until.norm)
        settled = jnp.where(again, -1, problem.until.settled)
        found = Pursuit(pursuit.round + 1, now, limit)
        pursuit, status = jax.tree.map(
            lambda a, b: jnp.where(self.waits, a, b), (found, status), (pursuit, state.status)
        )
        return eqx.tree_at(
            lambda c: (c.problem.until.norm, c.problem.until.settled, c.state.status, c.pursuit, c.over),
            self,
            (goal, settled, status, pursuit, self.over | (self.waits & ~again)),
        )

    def flow(self) -> Flow:
        """How it stands."""
        problem, state, path = self.problem, self.state, self.path
        if path is not None:
            path = problem.record(path, state, state.time > path.time[path.count - 1])
        field = problem.field(state)
        weights = field.weights(state.net.lines)
        return Flow(
            final=state.net,
            status=state.status,
            time=state.time,
            log_time=problem.log_time(state.clock),
            log_loss=weights.log_loss,
            margin=problem.margin(weights, state.net),
            separated=problem.separates(weights.log_loss),
            residual=misalignment(state.net, field.combine(state.net, weights.p)),
            drift=jnp.max(jnp.abs(state.net.balance - problem.balance)) / state.net.squared_norm,
            rise=state.rise,
            fall=state.fall,
            entry=state.entry,
            steps=state.accepted,
            rejected=state.rejected,
            events=state.events,
            sliding=sliding(state, problem.points),
            inputs=problem.inputs,
            far=problem.far,
            sensitivity=Sensitivity.not_asked,
            path=path,
            limit=None if self.pursuit is None else self.pursuit.limit,
        )


def sliding(state: State, points: Points) -> Float[Array, " k"]:
    """The point that each neuron's breakpoint sticks to, NaN for none."""
    return jnp.where(state.mode.sliding, points.x[point_of(state.mode.ray, points.x.shape[0])], jnp.nan)
