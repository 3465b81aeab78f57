"""Gradient flow, integrated in rescaled time.

Gradient flow on the mean loss L is dθ/dt = −∂L(θ). Late in training L falls like 1/(t log t), so physical time runs to
e^{1000} and beyond while the direction of θ still moves. In rescaled time τ, with dτ/dt = e^s = mean_i(−ℓ'(q_i)),

    dθ/dτ = Σ_i p_i ∂q_i(θ),    q_i = y_i N(x_i),    p_i = −ℓ'(q_i) / Σ_l −ℓ'(q_l),

(the gradient flow of −log L for the exponential loss) everything stays of order ρ² = ‖θ‖². Physical time is carried along as
the state c = log(1 + t/t₀), dc/dτ = exp(−c − s − log t₀), which starts at 0 and needs no exponential of a margin; the
unit t₀ = e^{−s}/max_i‖∂q_i‖² is taken at the start, so that early times keep their digits on any scale of the data.

**What this integrator does and does not.** It treats the right-hand side as if it were smooth: max(0, ·)' = 0 at 0, and
the error estimate of the Diffrax solver alone decides the step. Where a breakpoint sticks to a data point the true
(Clarke) flow slides along a discontinuity; there the steps become tiny, and a run that cannot be finished in `max_steps`
says so. It is never extrapolated.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from gradflow.data import Dataset
from gradflow.loss import Exponential, Loss
from gradflow.network import ReluNetwork, is_concrete

FLOAT32_LOG_LOSS = -50.0  # past it, float32 cannot resolve the direction: margins of 50 and their differences in p


class Status(eqx.Enumeration):
    """How an integration ended. Printing a value gives its sentence."""

    running = "Still running."
    reached = "Reached what `until` asked for."
    settled = "The direction has settled: velocity and position are parallel to the tolerance of `until`."
    stalled = (
        "Stalled at a stationary point with positive loss: training failed, a true outcome. Another initialisation or a "
        "wider network may do better."
    )
    step_limit = (
        "Stopped at `max_steps` before `until` was met. Raise `max_steps`, ask for less, or expect a breakpoint that "
        "sticks to a data point."
    )
    step_too_small = (
        "The step size fell below rounding: a breakpoint sticks to a data point, or the tolerance is finer than the float "
        "dtype. Loosen `rtol` and `atol`, or use float64."
    )
    non_finite = (
        "The weights are not finite, at the start or after a step. Check the initialisation and the data's scale."
    )


class Until(eqx.Module):
    """When to stop: at the first accepted step at which any of these holds.

    **Arguments** `time`: rescaled time τ (met exactly); `log_loss`: natural log of the mean loss, at or below; `norm`: ‖θ‖,
    at or above. With none of them, the flow stops when its direction has settled: when the angle between θ and dθ/dτ,
    whose tangent is the relative KKT residual of θ for the natural multipliers, has a tangent of at most `settled`. That
    is asked for only if nothing else is. Values are traced: another number does not recompile.
    """

    time: Float[Array, ""]
    log_loss: Float[Array, ""]
    norm: Float[Array, ""]
    settled: Float[Array, ""]

    def __init__(self, time=None, log_loss=None, norm=None, *, settled=None):
        if settled is not None and not (time is None and log_loss is None and norm is None):
            raise ValueError("`settled` is used only without time, log_loss and norm: give one or the other")
        settles = time is None and log_loss is None and norm is None
        self.time = jnp.asarray(jnp.inf if time is None else time, float)
        self.log_loss = jnp.asarray(-jnp.inf if log_loss is None else log_loss, float)
        self.norm = jnp.asarray(jnp.inf if norm is None else norm, float)
        self.settled = jnp.asarray((1e-3 if settled is None else settled) if settles else -1.0, float)
        for name in ("time", "log_loss", "norm", "settled"):
            value = getattr(self, name)
            if value.ndim != 0 or (is_concrete(value) and bool(jnp.isnan(value))):
                raise ValueError(f"until.{name} must be one number, got {value}")


class Path(eqx.Module):
    """Snapshots along a flow, evenly spread over its accepted steps, S slots of which the first `count` are filled.

    `time` τ, `log_time`, `log_loss`, `margin`, each (S,); `network` with weights (S, k). Empty slots are NaN.
    `stride` is the number of accepted steps from one to the next; the last filled slot is the end of the flow.
    """

    time: Float[Array, " S"]
    log_time: Float[Array, " S"]
    log_loss: Float[Array, " S"]
    margin: Float[Array, " S"]
    network: ReluNetwork
    count: Int[Array, ""]
    stride: Int[Array, ""]


class Flow(eqx.Module):
    """The end of an integration. `print(flow)` reports it in words; `flow.check()` raises if it did not succeed.

    - `final`: the network θ(τ);
    - `status`: how it ended;
    - `time`: rescaled time τ; `log_time`: natural log of physical time t (−inf at t = 0);
    - `log_loss`: log of the mean loss; `margin`: γ = min_i q_i/‖θ‖²;
    - `separated`: whether the loss is below ℓ(0)/n, which proves perfect training accuracy from here on;
    - `residual`: tangent of the angle between θ and dθ/dτ, the relative KKT residual of θ for natural multipliers;
    - `drift`: max_j |Δ(v_j² − w_j² − b_j²)| since the start, over the final ‖θ‖²; 0 for the exact flow;
    - `steps`, `rejected`: accepted and rejected step attempts;
    - `path`: snapshots if `save` asked for them, else `None`.
    """

    final: ReluNetwork
    status: Status
    time: Float[Array, ""]
    log_time: Float[Array, ""]
    log_loss: Float[Array, ""]
    margin: Float[Array, ""]
    separated: Bool[Array, ""]
    residual: Float[Array, ""]
    drift: Float[Array, ""]
    steps: Int[Array, ""]
    rejected: Int[Array, ""]
    path: Path | None

    @property
    def success(self) -> Bool[Array, ""]:
        """Whether the flow did what was asked: reached or settled."""
        return (self.status == Status.reached) | (self.status == Status.settled)

    def check(self) -> "Flow":
        """This flow, or a `RuntimeError` with the status's advice. For people; not for jit or vmap."""
        if not bool(self.success):
            raise RuntimeError(f"{Status[self.status]} ({self._numbers()})")
        return self

    def _numbers(self) -> str:
        return (
            f"time {self.time:.6g}, log time {self.log_time:.6g}, log loss {self.log_loss:.6g}, "
            f"margin {self.margin:.6g}, {self.steps} steps"
        )

    def __repr__(self) -> str:
        if not is_concrete(self.time) or self.time.ndim:
            return super().__repr__()
        accuracy = "all points classified, for good" if self.separated else "not (yet) provably all points classified"
        return (
            f"Flow of {self.final.width} neurons: {Status[self.status]}\n"
            f"  {self._numbers()} ({self.rejected} rejected)\n"
            f"  {accuracy}; balancedness drift {self.drift:.1e}, KKT residual {self.residual:.1e}"
        )


class _State(eqx.Module):
    """What goes on from one step attempt to the next."""

    net: ReluNetwork
    clock: Array  # c = log(1 + t/t₀)
    time: Array
    step: Array
    status: Status
    accepted: Array
    rejected: Array
    after_rejection: Array
    solver_state: PyTree


class _Problem(eqx.Module):
    """What stays the same over an integration."""

    data: Dataset
    loss: Loss
    solver: diffrax.AbstractSolver
    until: Until
    log_unit: Array  # log t₀
    rtol: Array
    atol: Array
    max_steps: Array

    def field(self, time, y, args):
        """The right-hand side d(θ, c)/dτ."""
        net, clock = y
        velocity, q = _velocity(net, self.data, self.loss)
        return velocity, jnp.exp(-clock - self.loss.log_mean_weight(q) - self.log_unit)

    def attempt(self, state: _State) -> _State:
        """One step attempt, accepted or not."""
        y, dtype = (state.net, state.clock), state.time.dtype
        step = jnp.minimum(state.step, self.until.time.astype(dtype) - state.time)
        # The flow is autonomous: steps start at 0, so that one below the rounding of τ still moves θ.
        new, error, _, solver_state, _ = self.solver.step(
            diffrax.ODETerm(self.field),
            jnp.zeros_like(step),
            step,
            y,
            None,
            state.solver_state,
            made_jump=False,
        )
        if error is None:
            raise ValueError(f"{type(self.solver).__name__} gives no error estimate; wrap it in diffrax.HalfSolver")
        ratio = self._error_ratio(y, new, error)
        accept = ratio <= 1
        order = self.solver.error_order(diffrax.ODETerm(self.field)) or self.solver.order(diffrax.ODETerm(self.field))
        factor = 0.9 * jnp.maximum(ratio, 1e-10) ** (-1 / order)
        # No growth straight after a rejection: the step that failed is still near.
        largest = jnp.where(accept & ~state.after_rejection, 5.0, jnp.where(accept, 1.0, 0.9)).astype(dtype)
        keep = jax.tree.map(lambda a, b: jnp.where(accept, a, b), (new, solver_state), (y, state.solver_state))
        (net, clock), solver_state = keep
        # A last step cut short by `until.time` says nothing against the longer one.
        following = step * jnp.clip(factor, 0.2, largest)
        following = jnp.where(accept, jnp.maximum(following, jnp.where(step < state.step, state.step, 0)), following)
        state = _State(
            net,
            clock,
            jnp.where(accept, state.time + step, state.time),
            following,
            state.status,
            jnp.where(accept, state.accepted + 1, state.accepted),
            jnp.where(accept, state.rejected, state.rejected + 1),
            ~accept,
            solver_state,
        )
        return self.judge(state, accept)

    def _error_ratio(self, old, new, error):
        """Largest |error| / (atol + rtol · size) over all parameters, infinite for NaN.

        The maximum, unlike the root mean square, does not dilute when dead or zero-padded neurons are added.
        """
        worst = jax.tree.map(
            lambda e, a, b: jnp.max(jnp.abs(e) / (self.atol + self.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)))),
            error,
            old,
            new,
        )
        ratio = jnp.max(jnp.stack(jax.tree.leaves(worst)))
        return jnp.where(jnp.isnan(ratio), jnp.inf, ratio)

    def judge(self, state: _State, accepted) -> _State:
        """The status after an attempt."""
        velocity, q = _velocity(state.net, self.data, self.loss)
        until, dtype = self.until, state.time.dtype
        log_loss = self.loss.log_mean(q)
        speed = jnp.sqrt(velocity.squared_norm)
        rho = jnp.sqrt(state.net.squared_norm)
        separated = log_loss < self.loss.log_separated(self.data.samples)
        met = (
            (state.time >= until.time.astype(dtype))
            | (log_loss <= until.log_loss.astype(dtype))
            | (rho >= until.norm.astype(dtype))
        )
        settled = separated & (_misalignment(state.net, velocity) <= until.settled.astype(dtype))
        # Velocities below the integration error of the fastest possible motion are no motion.
        fastest = jnp.max(jnp.sqrt(_squared_gradients(state.net, self.data)))
        stalled = ~separated & (speed <= self.rtol * fastest)
        tiny = state.step * speed <= jnp.finfo(dtype).eps * rho
        status = Status.running
        for condition, outcome in (
            (state.accepted + state.rejected >= self.max_steps, Status.step_limit),
            (~accepted & tiny, Status.step_too_small),
            (stalled, Status.stalled),
            (settled, Status.settled),
            (met, Status.reached),
            (~(jnp.isfinite(rho) & jnp.isfinite(log_loss)), Status.non_finite),
        ):
            status = Status.where(condition, outcome, status)
        return eqx.tree_at(lambda s: s.status, state, status)

    def record(self, path: Path, state: _State, due) -> Path:
        """`path` with the present state written into its next slot, if `due`."""
        q = self.data.margins(state.net)
        slots = path.time.shape[0]
        # A full path drops every second snapshot, and takes them half as often from then on.
        full = due & (path.count == slots)
        thin = lambda a: jnp.where(full, jnp.concatenate([a[::2], jnp.full_like(a[::2], jnp.nan)]), a)
        row = (
            state.time,
            self.log_unit + jnp.log(jnp.expm1(state.clock)),
            self.loss.log_mean(q),
            jnp.min(q) / state.net.squared_norm,
            state.net,
        )
        rows = (path.time, path.log_time, path.log_loss, path.margin, path.network)
        count = jnp.where(full, slots // 2, path.count)
        rows = jax.tree.map(lambda a, b: thin(a).at[count].set(jnp.where(due, b, thin(a)[count])), rows, row)
        return Path(*rows, jnp.where(due, count + 1, count), jnp.where(full, 2 * path.stride, path.stride))


def _velocity(net: ReluNetwork, data: Dataset, loss: Loss) -> tuple[ReluNetwork, Float[Array, " n"]]:
    """dθ/dτ = Σ_i p_i ∂q_i, with max(0, ·)' = 0 at 0, and the margins q."""
    inner = net.w[:, None] * data.x[None, :] + net.b[:, None]
    hidden = jnp.maximum(inner, 0)
    q = data.y * (net.v @ hidden)
    force = loss.weights(q) * data.y
    active = (inner > 0).astype(force.dtype)
    return ReluNetwork(net.v * (active @ (force * data.x)), net.v * (active @ force), hidden @ force), q


def _squared_gradients(net: ReluNetwork, data: Dataset) -> Float[Array, " n"]:
    """‖∂q_i‖² for every point."""
    inner = net.w[:, None] * data.x[None, :] + net.b[:, None]
    active = (inner > 0).astype(inner.dtype)
    return jnp.sum(jnp.maximum(inner, 0) ** 2, axis=0) + (1 + data.x**2) * (net.v**2 @ active)


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
    max_steps: int = 200_000,
) -> Flow:
    """Gradient flow on the mean loss, from `net`, on one dataset.

    **Arguments**

    - `net`, `data`: the initial network and the points, of one float dtype.
    - `loss`: default `Exponential()`.
    - `until`: when to stop; default `Until()`, until the direction has settled.
    - `rtol`, `atol`: error allowed in each parameter in one step, relative and absolute (units of θ). Traced.
    - `solver`: any Diffrax solver with an error estimate; default `diffrax.Tsit5()`.
    - `save`: the most snapshots to keep along the way (even, ≥ 2), in `flow.path`; default none.
    - `max_steps`: the most step attempts. Traced.

    **Returns** a `Flow`, under jit and vmap too: failure is its `status`, never an exception.

    **Raises** `ValueError`, before anything compiles, for mixed dtypes, tolerances that are not positive, an odd `save`,
    a solver without error estimate, and for `until.log_loss` below −50 in float32.
    """
    loss = Exponential() if loss is None else loss
    until = Until() if until is None else until
    solver = diffrax.Tsit5(scan_kind="lax") if solver is None else solver
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
    return _integrate(net, data, loss, until, *tolerances, solver, save, jnp.asarray(max_steps))


@eqx.filter_jit
def _integrate(net, data, loss, until, rtol, atol, solver, save, max_steps) -> Flow:
    velocity, q = _velocity(net, data, loss)
    dtype, largest = net.w.dtype, jnp.max(_squared_gradients(net, data))
    safe = jnp.where(largest > 0, largest, 1)
    log_unit = -loss.log_mean_weight(q) - jnp.log(safe)
    problem = _Problem(data, loss, solver, until, log_unit, rtol, atol, max_steps)
    zero = jnp.zeros((), dtype)
    speed = jnp.sqrt(velocity.squared_norm)
    # A hundredth of the time in which θ, or the fastest margin, changes by its own size.
    first = 0.01 * jnp.minimum(jnp.sqrt(net.squared_norm) / jnp.where(speed > 0, speed, 1), 1 / safe)
    count = jnp.zeros((), int)
    terms = diffrax.ODETerm(problem.field)
    solver_state = solver.init(terms, zero, first, (net, zero), None)
    state = _State(net, zero, zero, first, Status.running, count, count, jnp.array(False), solver_state)
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

    state = problem.judge(state, jnp.array(True))
    state, path = jax.lax.while_loop(lambda carry: carry[0].status == Status.running, body, (state, path))
    if path is not None:
        path = problem.record(path, state, state.time > path.time[path.count - 1])
    velocity, q = _velocity(state.net, data, loss)
    log_loss = loss.log_mean(q)
    scale = state.net.squared_norm
    return Flow(
        final=state.net,
        status=state.status,
        time=state.time,
        log_time=log_unit + jnp.log(jnp.expm1(state.clock)),
        log_loss=log_loss,
        margin=jnp.min(q) / scale,
        separated=log_loss < loss.log_separated(data.samples),
        residual=_misalignment(state.net, velocity),
        drift=jnp.max(jnp.abs(state.net.balance - net.balance)) / scale,
        steps=state.accepted,
        rejected=state.rejected,
        path=path,
    )
