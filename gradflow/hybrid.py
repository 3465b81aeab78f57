"""The loop behind `integrate`: one step attempt after another, whatever the mode, the stiffness or the time scale.

An attempt is one step of a Diffrax solver in the present mode. It is rejected for its error, or accepted up to the
first event that matters: that point is taken from the solver's dense output where this is as good as the step's own
error estimate, a quartic of order 4, and else by a shorter step. Then the mode is decided anew, invariants are
restored, the time scale is chosen (`slow.py`) and the status is judged. All lanes of a batch do the same work.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.clarke import Field, Mode, Points, Weights
from gradflow.events import NODES, Tolerance, lagrange, look_ahead, update
from gradflow.lift import from_lines
from gradflow.loss import Loss
from gradflow.network import ReluNetwork
from gradflow.outcome import Entry, Path, Status, Until
from gradflow.rosenbrock import Rodas5P
from gradflow.slow import Slow, forever

_MARGIN = 1e-3  # error allowed in one step in a margin whose sample matters
_FINER = 1e3  # times rtol, if that is less
FLOAT32_LOG_LOSS = -50.0  # past it, float32 cannot resolve the direction: margins of 50 and their differences in p
_SMALL = 66  # positions in the Jacobian up to which the stiff solver takes all steps: no dearer there in a batch
_NEGLIGIBLE = 0.02  # step times the norm of what the Jacobian leaves out, for the stiff solver to be used
_QUARTIC = (diffrax.Tsit5, diffrax.Dopri5, Rodas5P)  # their dense output is a quartic, of order 4
_AGAIN = 0.4  # of the step, at most, after two in a row that were too long: near kinks errors fall slowly at first
_STANDSTILL = 1e-10  # ‖dθ/dτ‖ over max_i‖∂q_i‖, which bounds it, below which a flow that has not separated has stalled


class State(eqx.Module):
    """What goes on from one step attempt to the next."""

    net: ReluNetwork
    clock: Float[Array, ""]  # c = log(1 + t/t₀)
    mode: Mode
    slow: Slow
    time: Float[Array, ""]
    step: Float[Array, ""]  # what error control proposes
    cap: Float[Array, ""]  # the next attempt is to end here, on an event
    shrunk: Bool[Array, ""]  # whether the last attempt was rejected for its error
    noise: Float[Array, ""]  # what errors of the margins make of the forces (`events.py`)
    pace: Float[Array, ""]  # ‖dθ/dτ‖ over max_i‖∂q_i‖, which bounds it
    log_loss: Float[Array, ""]
    rise: Float[Array, ""]  # of log L in one step, at most
    smoothed: Float[Array, ""]  # γ̃ = ℓ⁻¹(nL)/ρ²
    fall: Float[Array, ""]  # of γ̃ in one step of the late phase, over γ̃, at most
    entry: Entry
    status: Status
    accepted: Int[Array, ""]
    rejected: Int[Array, ""]
    events: Int[Array, ""]
    taken: Float[Array, ""]  # the length of the last accepted step


class Problem(eqx.Module):
    """What stays the same over an integration."""

    points: Points
    loss: Loss
    solvers: tuple[diffrax.AbstractSolver, ...]  # one, or (explicit, stiff)
    until: Until
    log_unit: Float[Array, ""]  # log t₀
    balance: Float[Array, " k"]  # v² − w² − b² at the start
    rtol: Float[Array, ""]
    atol: Float[Array, ""]
    max_steps: Int[Array, ""]
    log_separated: Float[Array, ""]
    rank: int = eqx.field(static=True)
    each: bool = eqx.field(static=True)  # derivatives are asked for: every event is met, and no slow phase held

    def separates(self, log_loss: Float[Array, ""]) -> Bool[Array, ""]:
        """Whether the loss proves all margins positive, beyond rounding: with one dead point, q = 0, and all others
        fitted it tends to ℓ(0)/n itself, and was seen 7e-14 below.
        """
        return log_loss < self.log_separated - jnp.sqrt(jnp.finfo(log_loss.dtype).eps)

    def field(self, state: State) -> Field:
        return Field(self.points, self.loss, state.mode, state.slow, self.log_unit, self.rank)

    def tolerance(self, pace) -> Tolerance:
        """What a step may be wrong by. An error δq of the margins puts forces wrong by up to δq of the largest: it must
        stay small against what they add up to, which is little near a stationary point.
        """
        return Tolerance(self.rtol, self.atol, self.margin_tolerance * jnp.minimum(1, 200 * pace), self.each)

    @property
    def margin_tolerance(self) -> Float[Array, ""]:
        """What one step may make of a margin whose sample matters: forces are wrong by as much, relatively."""
        return jnp.minimum(_MARGIN, _FINER * self.rtol)

    def attempt(self, state: State) -> State:
        """One step attempt: rejected for its error, rejected to try for an event again, or accepted up to one."""
        field, dtype = self.field(state).ready(), state.time.dtype
        tolerance = self.tolerance(state.pace)
        start = field.weights(state.net.lines)
        remaining = (self.until.time.astype(dtype) - state.time) * jnp.exp(-start.log_factor)
        step = jnp.minimum(jnp.minimum(state.step, state.cap), remaining)
        y, nodes, error, clock_error = self.advance(field, state, start, step)
        new, clock = jax.tree.map(lambda a: a[-1], (nodes, y[2]))
        end = field.weights(new.lines)
        ratio, noise = self.error_ratio(field, state, new, clock, error, clock_error, end, tolerance)
        sound = ratio <= 1
        outlook = look_ahead(field, nodes, start, end, step, noise, tolerance)
        early = sound & (outlook.share <= 1)
        lands = early & outlook.lands & self.quartic
        taken = jnp.where(lands, outlook.share, 1)
        net, lines, tick = jax.tree.map(lambda a: jnp.tensordot(lagrange(taken), a, 1), y)
        landed = from_lines(net, lines, self.balance)
        new, clock = jax.tree.map(lambda a, b: jnp.where(lands, a, b), (landed, tick), (new, clock))
        end = field.weights(new.lines)
        kicked = ReluNetwork(new.w + outlook.kick[0], new.b + outlook.kick[1], new.v)
        net, mode, events, astray = update(field, kicked, end, outlook.passed, outlook.arrives, noise, tolerance)
        net = from_lines(net, net.lines, self.balance)
        lands &= ~astray
        accept = sound & (~early | lands)

        # The error of both methods behaves like h⁵. A step that was just found too long does not grow again.
        most = jnp.where(state.shrunk, jnp.where(sound, 1.0, _AGAIN), 5.0)
        factor = jnp.clip(0.9 * jnp.maximum(ratio, 1e-10) ** -0.2, 0.2, most)
        proposal = jnp.where(
            sound, jnp.maximum(step * factor, jnp.where(step < state.step, state.step, 0)), step * factor
        )

        proposal = jnp.where(early, state.step, proposal)
        proposal = jnp.where(sound, jnp.minimum(proposal, step * outlook.growth), proposal)

        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)

        state = State(
            keep(net, state.net),
            keep(clock, state.clock),
            keep(mode, state.mode),
            state.slow,
            jnp.where(accept, state.time + self.passed(state, clock, step * taken, end), state.time),
            proposal,
            jnp.where(early & ~lands, step * outlook.share, jnp.inf),
            ~sound,
            jnp.where(accept, noise, state.noise),
            state.pace,
            state.log_loss,
            state.rise,
            state.smoothed,
            state.fall,
            state.entry,
            state.status,
            jnp.where(accept, state.accepted + 1, state.accepted),
            jnp.where(accept, state.rejected, state.rejected + 1),
            jnp.where(accept, state.events + events, state.events),
            jnp.where(accept, step * taken, state.taken),
        )
        return self.judge(state)

    def advance(self, field: Field, state: State, weights: Weights, step):
        """One step of the fitting solver: its unknowns at the five `NODES` of the step, the network there, and the
        errors of the last network and of the clock.
        """
        y, zero = (state.net, state.net.lines, state.clock), jnp.zeros_like(step)
        terms = diffrax.ODETerm(field)

        def run(solver):
            def branch():
                # The flow is autonomous: steps start at 0, so that one below the rounding of τ still moves θ.
                memory = solver.init(terms, zero, step, y, None)
                new, error, dense, _, _ = solver.step(terms, zero, step, y, None, memory, made_jump=True)
                if error is None:
                    raise ValueError(f"{type(solver).__name__} gives no error estimate; wrap it in diffrax.HalfSolver")
                dense = solver.interpolation_cls(t0=zero, t1=step, **dense)
                inner = jax.vmap(dense.evaluate)(step * jnp.asarray(NODES[1:-1], step.dtype))
                wrong = jax.tree.map(jnp.add, new, error)
                later = jax.tree.map(lambda a, b, c: jnp.concatenate([a, b[None], c[None]]), inner, new, wrong)
                nets = jax.vmap(lambda net, lines: from_lines(net, lines, self.balance))(*later[:2])
                at_nodes, nodes = jax.tree.map(
                    lambda a, b: jnp.concatenate([a[None], b[:-1]]), (y, state.net), (later, nets)
                )
                return at_nodes, nodes, jax.tree.map(lambda a: a[-1] - a[-2], nets), error[2]

            return branch

        return self.by_solver(field, state.net, weights, step, run)

    def by_solver(self, field: Field, net: ReluNetwork, weights: Weights, step, run):
        """`run(solver)()` of the solver that fits a step from `net`."""
        if len(self.solvers) == 1:
            return run(self.solvers[0])()
        explicit, stiff = self.solvers
        if field.spread <= _SMALL:
            return run(stiff)()
        stiffness, neglected = field.stiffness(net, weights)
        return jax.lax.cond((step * stiffness > 1) & (step * neglected <= _NEGLIGIBLE), run(stiff), run(explicit))

    @property
    def quartic(self) -> bool:
        """Whether a step can be cut short on its dense output."""
        return all(isinstance(solver, _QUARTIC) for solver in self.solvers)

    def error_ratio(self, field: Field, state: State, new, clock, error, clock_error, end: Weights, tolerance):
        """Largest error over what is allowed, infinite for NaN.

        Parameters are held to atol + rtol · size of their neuron, in the maximum norm, which does not dilute when dead
        or zero-padded neurons are added. Margins are held to 1e-3 absolutely where their sample matters: an error δq
        turns into a relative error δq of p, and δq ≈ ρ² · rtol would make p noise at late times.
        """
        allowed = jnp.maximum(tolerance.size(state.net), tolerance.size(new))
        sizes = [jnp.max(jnp.abs(leaf) / allowed) for leaf in jax.tree.leaves(error)]
        # In a slow phase time spans hundreds of decades: a hundredth of the accuracy will do.
        clock_error = jnp.where(state.slow.holds, 0.01, 1) * jnp.abs(clock_error)
        sizes.append(clock_error / (tolerance.atol + tolerance.rtol * jnp.maximum(state.clock, clock)))
        share = jnp.minimum(1, end.p * jnp.sum(jnp.exp(self.points.log_count)))
        change = jnp.abs(field.respond(new, error))
        margins = jnp.max(change * share) / (self.margin_tolerance * jnp.minimum(1, 300 * state.pace))
        ratio = jnp.max(jnp.stack([*sizes, margins]))
        noise = jnp.maximum(jnp.sum(end.c * change * jnp.sqrt(self.points.squared_norm)), 0.5 * state.noise)
        return jnp.where(jnp.isnan(ratio), jnp.inf, ratio), noise

    def judge(self, state: State) -> State:
        """The status after an attempt."""
        field, until, dtype = self.field(state), self.until, state.time.dtype
        weights = field.weights(state.net.lines)
        velocity = field.combine(state.net, weights.p)
        speed, rho = jnp.sqrt(velocity.squared_norm), jnp.sqrt(state.net.squared_norm)
        separated = self.separates(weights.log_loss)
        met = (
            (jnp.isfinite(until.time) & (state.time >= until.time.astype(dtype)))  # τ may overflow
            | (weights.log_loss <= until.log_loss.astype(dtype))
            | (rho >= until.norm.astype(dtype))
        )
        met |= separated & (misalignment(state.net, velocity) <= until.settled.astype(dtype))
        coarse = (dtype == jnp.float32) & (weights.log_loss < FLOAT32_LOG_LOSS)
        fastest = jnp.sqrt(jnp.max(jnp.where(weights.p > 0, field.squared_gradients(state.net), 0)))
        pace = speed / jnp.where(fastest > 0, fastest, 1)
        # In a slow phase all forces are small by choice.
        still = ~state.slow.holds & (pace <= max(_STANDSTILL, 100 * float(jnp.finfo(dtype).eps)))
        # A flow that separates reaches log loss −Λ at t ≈ e^Λ: one that has not by then has failed.
        long = jnp.clip(-until.log_loss.astype(dtype), 23, forever(dtype))
        stalled = ~separated & (still | (weights.log_factor >= long))
        tiny = (
            state.step * speed <= 0.1 * jnp.finfo(dtype).eps * rho
        )  # to an event it may be less: that is decided there
        status = Status.running
        for condition, outcome in (
            (state.accepted + state.rejected >= self.max_steps, Status.step_limit),
            (tiny, Status.step_too_small),
            (stalled, Status.stalled),
            (coarse, Status.precision),
            (met, Status.reached),
            (self.points.conflict, Status.not_separable),
            (
                ~(
                    jnp.all(jnp.isfinite(self.points.x))
                    & jnp.isfinite(rho)
                    & jnp.isfinite(weights.log_loss)
                    & jnp.isfinite(fastest)
                ),
                Status.non_finite,
            ),
        ):
            status = Status.where(condition, outcome, status)
        slow = state.slow if self.each else state.slow.after_step(weights.log_p, jnp.where(separated, 1, pace))
        rise = jnp.maximum(state.rise, weights.log_loss - state.log_loss)
        smoothed = self.loss.inverse(weights.log_loss - self.log_separated + self.loss.log_at_zero) / rho**2
        entered = ~jnp.isnan(state.entry.time)
        fall = jnp.where(entered, jnp.maximum(state.fall, 1 - smoothed / state.smoothed), state.fall)
        now = Entry(state.time, self.log_time(state.clock), state.net)
        entry = jax.tree.map(lambda a, b: jnp.where(separated & ~entered, a, b), now, state.entry)
        return eqx.tree_at(
            lambda s: (s.slow, s.pace, s.log_loss, s.rise, s.smoothed, s.fall, s.entry, s.status),
            state,
            (slow, pace, weights.log_loss, rise, smoothed, fall, entry, status),
        )

    def record(self, path: Path, state: State, due) -> Path:
        """`path` with the present state in its next slot, if `due`."""
        weights = self.field(state).weights(state.net.lines)
        margin = self.margin(weights, state.net)
        return path.with_row(due, state.time, self.log_time(state.clock), weights.log_loss, margin, state.net)

    def margin(self, weights: Weights, net: ReluNetwork) -> Float[Array, ""]:
        """γ = min_i q_i/‖θ‖²; slots that repeated points leave free have no margin."""
        return jnp.min(jnp.where(self.points.log_count > -jnp.inf, weights.q, jnp.inf)) / net.squared_norm

    def passed(self, state: State, clock, step, end: Weights):
        """The τ that an accepted step took. In a slow phase the clock tells it: dτ = e^s dt, and s stands still."""
        if self.points.x.shape[0] == 1:
            return step
        slow = state.slow.holds
        # t₀ (eᶜ − eᵇ) from b to c; eᶜ alone may overflow where margins start at −1000.
        ticks = jnp.expm1(jnp.where(slow, clock - state.clock, 0))
        return jnp.where(slow, ticks * jnp.exp(jnp.where(slow, self.log_unit + state.clock + end.log_rate, 0)), step)

    def log_time(self, clock):
        """log t. Below log(1 + t/t₀) = 1 by expm1, beyond by the form that cannot overflow."""
        late = clock > 1
        small = jnp.log(jnp.expm1(jnp.where(late, 1, clock)))
        return self.log_unit + jnp.where(late, clock + jnp.log(-jnp.expm1(-jnp.where(late, clock, 1))), small)


def misalignment(net: ReluNetwork, velocity: ReluNetwork) -> Float[Array, ""]:
    """Tangent of the angle between θ and dθ/dτ (+inf unless it is below a right angle)."""
    inner = sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(net), jax.tree.leaves(velocity), strict=True))
    share = inner / net.squared_norm
    across = jax.tree.map(lambda a, b: a - share * b, velocity, net)
    along = share * jnp.sqrt(net.squared_norm)
    return jnp.where(along > 0, jnp.sqrt(across.squared_norm) / jnp.where(along > 0, along, 1), jnp.inf)
