"""When an integration stops, how it ended, and what it found."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gradflow.limit import Limit
from gradflow.network import ReluNetwork, is_concrete


class Status(eqx.Enumeration):
    """How an integration ended. Printing a value gives its sentence."""

    running = "Still running."
    reached = "Reached what `until` asked for."
    certified = "The direction has settled, and its limit is certified."
    uncertified = (
        "All points are classified, but no limit could be certified, however far the flow went: see what `limit` says."
    )
    stalled = (
        "Stalled: the loss no longer falls, though it is positive: training failed, a true outcome. Another "
        "initialisation or a wider network may do better."
    )
    not_separable = "Some point carries both labels, so that no network classifies the data: remove one of them."
    step_limit = (
        "Stopped at `max_steps` before `until` was met. Raise `max_steps`, or ask for less; inputs and breakpoints of "
        "the order of 1 take the fewest steps."
    )
    precision = (
        "The float dtype cannot follow the flow any further: float32 past log loss −50, where margins and their "
        "differences in the weights of the points take more digits; float64 where margins are so large that their "
        "rounding decides between points. Use float64, smaller weights or inputs, or ask for less."
    )
    step_too_small = (
        "The step size fell below rounding: the tolerance is finer than the float dtype can meet. Loosen `rtol` and "
        "`atol`, or use float64."
    )
    non_finite = (
        "Weights or points are not finite, at the start or after a step. Check the initialisation and the data's scale."
    )


# The names of `Status` in the order of their codes in a record; Equinox's enumerations do not tell their own.
STATUSES = (
    "running",
    "reached",
    "certified",
    "uncertified",
    "stalled",
    "not_separable",
    "step_limit",
    "precision",
    "step_too_small",
    "non_finite",
)


class Sensitivity(eqx.Enumeration):
    """Whether the end of a flow can be differentiated; where not, derivatives are NaN. Printing a value gives its
    sentence.
    """

    not_asked = "No derivative was asked for."
    exists = "The derivative exists, and is computed."
    grazes = (
        "A breakpoint touched a data point at a speed of almost 0: the time of that has no derivative. Move the "
        "initialisation or the data a little."
    )
    starts_on_point = (
        "A breakpoint starts on a data point: derivatives differ on the two sides. Move the initialisation a little."
    )
    ends_on_event = (
        "A breakpoint meets a data point at the very end of the flow: derivatives differ on the two sides. Ask for a "
        "little more or less time."
    )
    ended_otherwise = "The flow did not end at the time that `until` asked for: see its status."
    too_long = "The flow took more accepted steps than can be gone back over: 1,048,576. Ask for less time."


_SETTLED = 0.3  # 1 and 0.3 give limits of the same value (`benchmarks/limits.py`), and later takes more steps


class Until(eqx.Module):
    """When to stop: at the first accepted step at which any of these holds.

    **Arguments** `time`: rescaled time τ (met exactly, but flows that almost stand still may pass it);
    `log_loss`: natural log of the mean loss, at or below; `norm`: ‖θ‖, at or above. With none of them, the flow stops
    when its limit is *certified* (`Limit`), in float64: first tried when the angle between θ and dθ/dτ has a tangent of
    at most `settled`, and then with ten times the ρ², again and again. The tangent is the relative KKT residual of θ
    for the natural multipliers. `settled` goes with nothing else. Values are traced: another number does not recompile.

    >>> import gradflow as gf
    >>> gf.Until(norm=50.0, log_loss=-100.0).certifies  # whichever comes first
    False
    """

    time: Float[Array, ""]
    log_loss: Float[Array, ""]
    norm: Float[Array, ""]
    settled: Float[Array, ""]
    certifies: bool = eqx.field(static=True)
    timed: bool = eqx.field(static=True)  # whether a time was given

    def __init__(self, time=None, log_loss=None, norm=None, *, settled=None):
        if settled is not None and not (time is None and log_loss is None and norm is None):
            raise ValueError("`settled` is used only without time, log_loss and norm: give one or the other")
        self.certifies = time is None and log_loss is None and norm is None
        self.timed = time is not None
        self.time = jnp.asarray(jnp.inf if time is None else time, float)
        self.log_loss = jnp.asarray(-jnp.inf if log_loss is None else log_loss, float)
        self.norm = jnp.asarray(jnp.inf if norm is None else norm, float)
        self.settled = jnp.asarray((_SETTLED if settled is None else settled) if self.certifies else -1.0, float)
        for name in ("time", "log_loss", "norm", "settled"):
            value = getattr(self, name)
            if value.ndim != 0 or (is_concrete(value) and np.isnan(np.asarray(value))):
                raise ValueError(f"until.{name} must be one number, got {value}")
        for name, given in (("time", time), ("norm", norm), ("settled", settled)):
            if given is not None and is_concrete(getattr(self, name)) and not np.asarray(getattr(self, name)) >= 0:
                raise ValueError(f"until.{name} must not be negative, got {given}; a log loss is `log_loss`")


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

    @classmethod
    def empty(cls, slots: int, net: ReluNetwork) -> "Path":
        """A path with `slots` empty slots for networks like `net`."""
        blank = jnp.full((slots,), jnp.nan, net.w.dtype)
        nets = jax.tree.map(lambda a: jnp.full((slots, *a.shape), jnp.nan, a.dtype), net)
        return cls(blank, blank, blank, blank, nets, jnp.zeros((), int), jnp.ones((), int))

    def with_row(self, due: Bool[Array, ""], time, log_time, log_loss, margin, net: ReluNetwork) -> "Path":
        """This path with one more snapshot, if `due`. A full one drops every second, and has twice the stride then."""
        slots = self.time.shape[0]
        full = due & (self.count == slots)
        count = jnp.where(full, slots // 2, self.count)

        def write(column, entry):
            halved = jnp.concatenate([column[::2], jnp.full_like(column[::2], jnp.nan)])
            column = jnp.where(full, halved, column)
            return column.at[count].set(jnp.where(due, entry, column[count]))

        columns = (self.time, self.log_time, self.log_loss, self.margin, self.network)
        time, log_time, log_loss, margin, net = jax.tree.map(write, columns, (time, log_time, log_loss, margin, net))
        stride = jnp.where(full, 2 * self.stride, self.stride)
        return Path(time, log_time, log_loss, margin, net, jnp.where(due, count + 1, count), stride)


class Entry(eqx.Module):
    """Where the late phase began: the first accepted step with mean loss below ℓ(0)/n, from which on all points are
    classified. `time` τ, `log_time`, and `network` there; NaN if that was never reached.
    """

    time: Float[Array, ""]
    log_time: Float[Array, ""]
    network: ReluNetwork


class Flow(eqx.Module):
    """The end of an integration. `print(flow)` reports it in words; `flow.check()` raises if it did not succeed.

    - `final`: the network θ(τ);
    - `status`: how it ended;
    - `time`: rescaled time τ; `log_time`: natural log of physical time t (−inf at t = 0);
    - `log_loss`: log of the mean loss; `margin`: γ = min_i q_i/‖θ‖²;
    - `separated`: whether the loss is below ℓ(0)/n, which proves perfect training accuracy from here on;
    - `residual`: tangent of the angle between θ and dθ/dτ, the relative KKT residual of θ for natural multipliers;
    - `drift`: max_j |Δ(v_j² − w_j² − b_j²)| since the start, over the final ‖θ‖²; 0 for the exact flow;
    - `rise`: the largest increase of log L in one step; ≤ 0 for the exact flow;
    - `fall`: the largest relative decrease of the smoothed margin ℓ⁻¹(nL)/‖θ‖² in one step of the late phase; ≤ 0 for
      the exact flow (Lyu and Li 2020), −inf without such steps;
    - `entry`: where the late phase began;
    - `steps`, `rejected`: accepted and rejected step attempts;
    - `events`: how often a breakpoint crossed a data point, stuck to one or came off one;
    - `sliding` (k,): the data point that each neuron's breakpoint sticks to at the end, NaN for none;
    - `inputs` (2,): the smallest and the largest x; `far`: whether at the start all breakpoints were more than their
      distance away from both, so that the network is one line on the data;
    - `sensitivity`: whether derivatives of its end exist, where they were asked for (`integrate`);
    - `path`: snapshots if `save` asked for them, else `None`;
    - `limit`: the limit of its direction, if `until` asked for that, else `None` (`gradflow.limit` finds it).
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
    rise: Float[Array, ""]
    fall: Float[Array, ""]
    entry: Entry
    steps: Int[Array, ""]
    rejected: Int[Array, ""]
    events: Int[Array, ""]
    sliding: Float[Array, " k"]
    inputs: Float[Array, " 2"]
    far: Bool[Array, ""]
    sensitivity: Sensitivity
    path: Path | None
    limit: Limit | None

    @property
    def success(self) -> Bool[Array, "..."]:
        """Whether the flow did what was asked: reached or certified."""
        return (self.status == Status.reached) | (self.status == Status.certified)

    def check(self) -> "Flow":
        """This flow, or a `RuntimeError` with the status's advice. For people; not for jit or vmap."""
        if not bool(self.success):
            raise RuntimeError(f"{Status[self.status]}{self._scaling()} ({self._numbers()})")
        return self

    def _scaling(self) -> str:
        """Advice on the scale of the inputs, if that is what the flow failed for."""
        if self.success or not self.far:
            return ""
        low, high = (float(x) for x in self.inputs)
        centre, half = f"{(low + high) / 2:.4g}", f"{(high - low) / 2:.3g}"
        return (
            f" At the start no breakpoint was near the data, {low:.6g} to {high:.6g}: give the network inputs of the "
            f"order of 1, such as gradflow.Dataset((x - {centre}) / {half}, y)."
        )

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
            f"Flow of {self.final.width} neuron{'s' * (self.final.width > 1)}: {Status[self.status]}{self._scaling()}\n"
            f"  {self._numbers()} ({self.rejected} rejected)\n"
            f"  {accuracy}; balancedness drift {self.drift:.1e}, KKT residual so far {self.residual:.1e}"
            + ("" if self.limit is None else f"\n{self.limit!r}")
        )
