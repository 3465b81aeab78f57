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
from gradflow.length import length
from gradflow.lift import drive, from_lines, lifts
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
_PLUNGE = 50.0  # fall of log dτ/dt in one step, beyond which the solver's clock may overflow
_SHRINKS = 0.5  # by how much the scale of a neuron's error falls in one step, at most
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
    blocked: Bool[Array, ""]  # whether that was the error of θ, not of the clock
    noise: Float[Array, ""]  # what errors of the margins make of the forces (`events.py`)
    force: Float[Array, ""]  # the largest ‖z_j‖ over max_i‖x̃_i‖, which bounds it
    least: Float[Array, " k"]  # the smallest size that every neuron has had (`Tolerance`)
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
    inputs: Float[Array, " 2"]
    far: Bool[Array, ""]
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
        return Field(self.points, self.loss, state.mode, state.slow, lifts(state.net), self.log_unit, self.rank)

    def tolerance(self, force, least) -> Tolerance:
        """What a step may be wrong by. An error δq of the margins puts forces wrong by up to δq of the largest: it must
        stay small against what they add up to, which is little near a stationary point.
        """
        return Tolerance(self.rtol, self.atol, self.margin_tolerance * jnp.minimum(1, 200 * force), least, self.each)

    @property
    def margin_tolerance(self) -> Float[Array, ""]:
        """What one step may make of a margin whose sample matters: forces are wrong by as much, relatively."""
        return jnp.minimum(_MARGIN, _FINER * self.rtol)

    def attempt(self, state: State) -> State:
        """One step attempt: rejected for its error, rejected to try for an event again, or accepted up to one."""
        field, dtype = self.field(state).ready(), state.time.dtype
        tolerance = self.tolerance(state.force, state.least)
        start = field.weights(state.net.lines)
        until = self.until.time.astype(dtype)
        remaining = jnp.where(jnp.isfinite(until), (until - state.time) * jnp.exp(-start.log_factor), jnp.inf)
        step = jnp.minimum(jnp.minimum(state.step, state.cap), remaining)
        y, nodes, error, clock_error = self.advance(field, state, start, step)
        new, clock = jax.tree.map(lambda a: a[-1], (nodes, y[2]))
        end = field.weights(new.lines)
        # What the solver makes of the clock is of no use then.
        plunges = ~state.slow.holds & (start.log_rate - end.log_rate > _PLUNGE)
        clock_error = jnp.where(plunges, 0, clock_error)
        ratio, noise, of_clock = self.error_ratio(field, state, new, clock, error, clock_error, end, tolerance)
        sound = ratio <= 1
        outlook = look_ahead(field, nodes, start, end, step, noise, tolerance)
        early = sound & (outlook.share <= 1)
        lands = early & outlook.lands & self.quartic
        taken = jnp.where(lands, outlook.share, 1)
        net, lines, tick = jax.tree.map(lambda a: jnp.tensordot(lagrange(taken), a, 1), y)
        landed = from_lines(net, lines, self.balance, field.lifted)
        new, clock = jax.tree.map(lambda a, b: jnp.where(lands, a, b), (landed, tick), (new, clock))
        end = field.weights(new.lines)
        clock = self.clock_after_plunge(field, state, new, start, end, clock, plunges)
        kicked = ReluNetwork(new.w + outlook.kick[0], new.b + outlook.kick[1], new.v)
        net, mode, events, astray = update(
            field, kicked, end, outlook.passed, outlook.arrives, outlook.enters, noise, tolerance
        )
        net = from_lines(net, net.lines, self.balance, field.lifted)
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
            ~sound & ~of_clock,
            jnp.where(accept, noise, state.noise),
            state.force,
            jnp.where(accept, jnp.clip(net.sizes, _SHRINKS * state.least, state.least), state.least),
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

    def clock_after_plunge(self, field: Field, state: State, new, start: Weights, end: Weights, clock, plunges):
        """The clock after a step in which the rate dτ/dt = e^s fell by more than e^{−50}, as at losses of e^1000s: t is
        then made up at the end of the step, at the rate at which s falls, t = (e^{−s} − e^{−s₀})/|ds/dτ|.
        """

        def pass_(pair):
            velocity, _ = drive(new, field.pull(end.p))
            falls = jnp.sum(end.c * field.respond(new, velocity))
            log_ticks = -end.log_rate - self.log_unit - jnp.log(jnp.where(falls > 0, falls, 1))
            log_ticks += jnp.log(-jnp.expm1(jnp.minimum(end.log_rate - start.log_rate, -1e-3)))
            return jnp.array(False), jnp.where(plunges, jnp.logaddexp(state.clock, log_ticks), pair[1])

        # A loop, as `cond` would run for every lane of a batch.
        return jax.lax.while_loop(lambda pair: pair[0], pass_, (plunges, clock))[1]

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
                nets = jax.vmap(lambda net, lines: from_lines(net, lines, self.balance, field.lifted))(*later[:2])
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
        """Largest error over what is allowed, infinite for NaN; the noise of forces; whether it is the clock's error.

        Parameters are held to what `Tolerance` allows their neuron, in the maximum norm, which does not dilute when
        dead or zero-padded neurons are added. Margins are held to 1e-3 absolutely where their sample matters: an error
        δq turns into a relative error δq of p, and δq ≈ ρ² · rtol would make p noise at late times.
        """
        allowed = jnp.maximum(tolerance.size(state.net), tolerance.size(new))
        absent = allowed == 0  # a neuron of zeros, which stays one
        sizes = [
            jnp.max(jnp.where(absent, jnp.where(leaf == 0, 0, jnp.inf), jnp.abs(leaf) / jnp.where(absent, 1, allowed)))
            for leaf in jax.tree.leaves(error)
        ]
        # In a slow phase time spans hundreds of decades: a hundredth of the accuracy will do.
        clock_error = jnp.where(state.slow.holds, 0.01, 1) * jnp.abs(clock_error)
        of_clock = clock_error / (tolerance.rtol * (1 + state.clock))
        share = jnp.minimum(1, end.p * jnp.sum(jnp.exp(self.points.log_count)))
        change = jnp.abs(field.respond(new, error))
        held = self.margin_tolerance * jnp.minimum(1, 300 * state.force)
        # Rounding of the parameters alone moves margins by as much.
        held = jnp.maximum(held, 16 * jnp.finfo(end.q.dtype).eps * field.squared_gradients(new))
        margins = jnp.max(change * share / held)
        of_net = jnp.max(jnp.stack([*sizes, margins]))
        ratio = jnp.maximum(of_net, of_clock)
        noise = jnp.maximum(jnp.sum(end.c * change * jnp.sqrt(self.points.squared_norm)), 0.5 * state.noise)
        return jnp.where(jnp.isnan(ratio), jnp.inf, ratio), noise, of_net <= 1

    def judge(self, state: State) -> State:
        """The status after an attempt."""
        field, until, dtype = self.field(state), self.until, state.time.dtype
        weights = field.weights(state.net.lines)
        z = field.pull(weights.p)
        velocity, _ = drive(state.net, z)
        rho = jnp.sqrt(state.net.squared_norm)
        separated = self.separates(weights.log_loss)
        met = (
            (jnp.isfinite(until.time) & (state.time >= until.time.astype(dtype)))  # τ may overflow
            | (weights.log_loss <= until.log_loss.astype(dtype))
            | (rho >= until.norm.astype(dtype))
        )
        met |= separated & (misalignment(state.net, velocity) <= until.settled.astype(dtype))
        squared = jnp.where(weights.p > 0, field.squared_gradients(state.net), 0)
        fastest = jnp.sqrt(jnp.max(squared))
        pace, force = self.relative_speeds(state, weights, velocity, z)
        # In a slow phase all forces are small by choice. Rounding of margins, eps ‖∂q_i‖², makes noise of them, of
        # which at most ten times as much is taken for a standstill.
        small = jnp.where(state.slow.holds, jnp.exp(state.slow.log_size), 1)
        eps = float(jnp.finfo(dtype).eps)
        rounding = 8 * eps * (1 + jnp.sum(weights.c * (1 - weights.p) * squared))
        # Where it is of the order of 1, it decides between points that all but share the least margin.
        coarse = (dtype == jnp.float32) & (weights.log_loss < FLOAT32_LOG_LOSS) | (~separated & (rounding > 1))
        least = max(_STANDSTILL, 100 * eps)
        still = pace <= jnp.maximum(least * small, jnp.minimum(rounding, 10 * least))
        # A flow that separates reaches log loss −Λ at t ≈ e^Λ: one that has not by then has failed.
        long = jnp.clip(-until.log_loss.astype(dtype), 23, forever(dtype))
        stalled = ~separated & (still | (weights.log_factor >= long))
        # To an event it may be less: that is decided there. At the start, too, where only the clock moves.
        tiny = state.blocked & (state.step * pace * jnp.max(self.points.norm) <= 0.1 * eps)
        # p may be 0 and 1 by rounding just then, which does not show how coarse margins are.
        coarse |= tiny & ~separated & (8 * eps * fastest**2 > 1)
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
            lambda s: (s.slow, s.force, s.log_loss, s.rise, s.smoothed, s.fall, s.entry, s.status),
            state,
            (slow, force, weights.log_loss, rise, smoothed, fall, entry, status),
        )

    def relative_speeds(self, state: State, weights: Weights, velocity: ReluNetwork, z: Float[Array, "2 k"]):
        """The largest speed of a neuron relative to its own size, and the largest force ‖z_j‖ on one, which is no less,
        both over max_i‖x̃_i‖, which bounds them.

        Not ‖dθ/dτ‖: a neuron of 1e-30 that grows will be what matters. One that is balanced and slides towards the
        origin will not, however long.
        """
        net = state.net
        size, speed = (length(length(n.w, n.b), n.v) for n in (net, velocity))
        shrinks = state.mode.sliding & (net.v * velocity.v < 0) & (self.balance == 0)
        relative = jnp.where(shrinks | (size == 0), 0, speed / jnp.where(size == 0, 1, size))
        over = 1 / jnp.max(jnp.where(weights.p > 0, self.points.norm, 0))
        return jnp.max(relative) * over, jnp.max(jnp.where(shrinks | (size == 0), 0, length(*z))) * over

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
        # log of t₀ (eᶜ − eᵇ) from b to c, as eᶜ alone may overflow; τ itself is infinite where it does.
        ticks = jnp.maximum(jnp.where(slow, clock - state.clock, 1), jnp.finfo(step.dtype).tiny)
        log_ticks = self.log_unit + state.clock + ticks + jnp.log(-jnp.expm1(-ticks))
        return jnp.where(slow, jnp.exp(jnp.where(slow, log_ticks + end.log_rate, 0)), step)

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
