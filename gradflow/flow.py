"""Gradient flow, followed exactly through kinks, sliding and stiffness.

Gradient flow on the mean loss L is dθ/dt ∈ −∂L(θ), ∂ the Clarke subdifferential. Late in training L falls like
1/(t log t), so physical time runs to e^{1000} and beyond while the direction of θ still moves. In rescaled time τ, with
dτ/dt = e^s = mean_i(−ℓ'(q_i)),

    dθ/dτ = Σ_i p_i ∂q_i(θ),    q_i = y_i N(x_i),    p_i = −ℓ'(q_i) / Σ_l −ℓ'(q_l),

(the gradient flow of −log L for the exponential loss) any t is reached in moderate τ. Physical time is carried along as
the state c = log(1 + t/t₀), dc/dτ = exp(−c − s − log t₀), which starts at 0 and needs no exponential of a margin; the
unit t₀ = e^{−s}/max(max_i‖∂q_i‖², max_i‖x̃_i‖) is taken at the start, so that early times keep their digits on any scale
of data and weights.

**The loop.** The state holds θ, c and a *mode*: every neuron's activation pattern, and the data point that its
breakpoint sticks to, if any (`clarke.py`). Inside a mode the field is smooth and a Diffrax solver takes ordinary
steps. A step that would pass an event which matters (`events.py`) is rejected and taken again, by the solver itself,
so as to end on the event; there the mode is decided anew with the velocities on both sides. Steps are explicit where
nothing is stiff and the Jacobian is large, and where it has more parts than the stiff solver's linear algebra keeps.

**Failure.** Training that fails does not stop either, it becomes ever slower, and may succeed after all. Such flows are
followed on their own, slow time scale (`slow.py`): "stalled" means that they had not left a positive loss by t = e^496,
or by 1/L of the loss that was asked for; or that all forces cancel to 1e-10.

**Errors.** Each neuron is followed relative to itself, so that a flow from weights of 1e-100 is as accurate as one from
weights of 1: a step's error in its parameters is at most rtol times the sum of its present size, max(‖u‖, |v|), and the
smallest size that it has had (which falls by no more than half a step, so that a neuron that shrinks for ever does not
hold up the others), plus atol. In every margin that matters it is at most 1e-3, less where forces almost cancel; events
are met to a fifth of rtol ‖u_j‖, and releases to 0.3 √rtol of the force, which moves a breakpoint by O(rtol). A neuron
within rtol |v| of u = 0 is put on its way out (`origin.py`). v² − w² − b² is conserved in every mode and restored after
each step; what of it is rounding at the start, 8 eps of the neuron's squares, counts as 0. Weights down to 1e-150 keep
their squares; smaller ones are rounded.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.course import Course, default_solvers
from gradflow.data import Dataset
from gradflow.hybrid import FLOAT32_LOG_LOSS
from gradflow.limit import Limit, LimitStatus, on_data
from gradflow.loss import Exponential, Loss
from gradflow.network import ReluNetwork, is_concrete, is_whole
from gradflow.outcome import Flow, Until
from gradflow.sensitivity import check_solver, differentiated
from gradflow.undefined import undefined


def integrate(
    net: ReluNetwork,
    data: Dataset,
    loss: Loss | None = None,
    until: Until | None = None,
    *,
    rtol=1e-6,
    atol=0.0,
    solver: diffrax.AbstractSolver | None = None,
    save: int | None = None,
    max_steps: int | Array = 200_000,
) -> Flow:
    """Gradient flow on the mean loss, from `net`, on one dataset.

    **Arguments**

    - `net`, `data`: the initial network and the points, of one float dtype.
    - `loss`: default `Exponential()`.
    - `until`: when to stop; default `Until()`, until the limit of the direction is certified.
    - `rtol`, `atol`: error allowed in each parameter in one step, relative to its neuron (see the module's docstring)
        and absolute (units of θ); with the default, 0, it does not depend on the scale of the weights. Traced.
    - `solver`: any Diffrax solver with an error estimate, for all steps. Default: Rodas5P, and Tsit5 where too many
        points matter at once for its linear algebra.
    - `save`: the most snapshots to keep along the way (even, ≥ 2), in `flow.path`; default none.
    - `max_steps`: the most step attempts. Traced.

    **Returns** a `Flow`, under jit and vmap too: failure is its `status`, never an exception.

    **Raises**, before anything compiles: `TypeError` for an argument of the wrong kind; `ValueError` for mixed dtypes,
    tolerances out of range, an odd `save`, a solver without error estimate, batched weights or points (use
    `jax.vmap`), and in float32 for `Until()` and an `until.log_loss` below −50.

    >>> import jax
    >>> import gradflow as gf
    >>> net = gf.ReluNetwork.random(jax.random.key(1), width=8)
    >>> data = gf.Dataset([-1.0, -0.5, 0.5, 1.0], [1, -1, -1, 1])
    >>> flow = gf.integrate(net, data, until=gf.Until(time=2.0))
    >>> print(flow.status == gf.Status.reached, flow.time)
    True 2.0
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
    solvers = default_solvers() if solver is None else (_with_tolerances(solver, net, rtol, atol),)
    if net.w.ndim != 1 or data.x.ndim != 1:
        raise ValueError(
            f"integrate takes one network and one dataset, got weights of shape {net.w.shape} and points of shape "
            f"{data.x.shape}: map it over a batch with jax.vmap"
        )
    dtype = net.w.dtype
    if data.x.dtype != dtype:
        raise ValueError(f"the network is {dtype} and the data {data.x.dtype}: convert one of them")
    for name, value, sign in (("rtol", rtol, "positive"), ("atol", atol, ""), ("max_steps", max_steps, "positive")):
        least = np.nextafter(0, 1) if sign else 0
        if jnp.ndim(value) != 0 or (is_concrete(value) and not np.asarray(value) >= least):
            raise ValueError(f"{name} must be one {sign or 'non-negative'} number, got {value}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if is_concrete(value) and not np.asarray(value) < 1:
            raise ValueError(f"{name} must be below 1, got {value}: nothing would be left of the flow")
    if is_concrete(max_steps):
        if not is_whole(max_steps, 1):
            raise ValueError(f"max_steps must be a whole number, got {max_steps}")
        max_steps = min(int(max_steps), 2**31 - 1)
    if save is not None and (save != int(save) or save < 2 or save % 2):
        raise ValueError(f"save must be an even number of snapshots, at least 2, got {save}")
    low = is_concrete(until.log_loss) and -np.inf < np.asarray(until.log_loss) < FLOAT32_LOG_LOSS
    if dtype == jnp.float32 and (until.certifies or low):
        what = "a certified limit" if until.certifies else f"log loss {until.log_loss}"
        raise ValueError(
            f"{what} needs float64: call jax.config.update('jax_enable_x64', True) before making arrays, or ask for "
            f"less, such as Until(log_loss={FLOAT32_LOG_LOSS})"
        )
    save = None if save is None else int(save)
    tolerances = jnp.asarray(rtol, dtype), jnp.asarray(atol, dtype)
    return _integrate(net, data, loss, until, *tolerances, solvers, save, jnp.asarray(max_steps))


def _with_tolerances(solver: diffrax.AbstractSolver, net: ReluNetwork, rtol, atol) -> diffrax.AbstractSolver:
    """`solver`, whose root finder, if it has one that waits for the tolerances of the integration, gets them.

    It knows no neurons: what is absolute for it is relative to the largest. Tolerances have no derivative.
    """
    finder = getattr(solver, "root_finder", None)
    if finder is None or isinstance(finder.rtol, int | float | jax.Array):
        return solver
    tolerances = jax.lax.stop_gradient((rtol, atol + rtol * jnp.max(net.sizes)))
    return eqx.tree_at(
        lambda s: (s.root_finder.rtol, s.root_finder.atol, s.root_finder.norm), solver, (*tolerances, _max_norm)
    )


def _max_norm(y) -> Float[Array, ""]:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(y)]))


@eqx.filter_jit
def _integrate(net, data, loss, until, rtol, atol, solvers, save, max_steps) -> Flow:
    return _flow(net, data, until, (rtol, atol), loss=loss, solvers=solvers, save=save, max_steps=max_steps)


@eqx.filter_custom_jvp
def _flow(net, data, until, tolerances, *, loss, solvers, save, max_steps) -> Flow:
    rtol, atol = tolerances
    course = Course.begin(net, data, loss, until, rtol, atol, solvers, save, max_steps)
    if not until.certifies:
        return course.follow().flow()
    moving, fixed = eqx.partition(course, eqx.is_array)

    def round_(moving):
        return eqx.filter(eqx.combine(moving, fixed).follow().hand_over(), eqx.is_array)

    return eqx.combine(jax.lax.while_loop(lambda moving: ~moving.over, round_, moving), fixed).flow()


@_flow.def_jvp
def _flow_jvp(primals, tangents, *, loss, solvers, save, max_steps):
    net, data, until, (rtol, atol) = primals
    seed_net, seed_data, seed_until, seed_tolerances = tangents
    fixed = (seed_data.y, seed_until.log_loss, seed_until.norm, seed_until.settled, seed_tolerances)
    if jax.tree.leaves(fixed):
        raise ValueError(
            "derivatives of a flow are by the initial parameters, the inputs x and until.time, and by nothing else"
        )
    if until.certifies:
        flow = _flow(*primals, loss=loss, solvers=solvers, save=save, max_steps=max_steps)
        # It ends with a step, which is no differentiable function of anything; its limit is.
        moves = jnp.concatenate(jax.tree.leaves((seed_net, seed_data.x)))
        out = jax.tree.map(lambda a: undefined(moves, a) if eqx.is_inexact_array(a) else None, flow)
        _, change = eqx.filter_jvp(on_data, (flow.limit, data), (jax.tree.map(lambda _: None, flow.limit), seed_data))
        return flow, eqx.tree_at(lambda f: f.limit, out, change)
    if not until.timed:
        raise ValueError(
            "a flow is differentiated at a time, Until(time=...), or in its limit, Until(): where another condition is "
            "met has no derivative"
        )
    for solver in solvers:
        check_solver(solver)
    course = Course.begin(net, data, loss, until, rtol, atol, solvers, save, max_steps, each=True)
    zero = jnp.zeros_like(net.w[0])
    return differentiated(
        course,
        jax.tree.map(lambda a, b: jnp.zeros_like(a) if b is None else b, net, seed_net, is_leaf=lambda x: x is None),
        jnp.zeros_like(data.x) if seed_data.x is None else seed_data.x,
        zero if seed_until.time is None else seed_until.time.astype(zero.dtype),
    )


def limit(flow: Flow, data: Dataset, loss: Loss | None = None) -> Limit:
    """The limit direction of a flow on `data`: `flow.limit`, or if it has none, that of going on from its end.

    It can be differentiated by `data.x`, in both modes, through the KKT conditions that it satisfies (`implicit.py`);
    by the initialisation its derivative is 0, and it is NaN where there is none.

    **Arguments** `flow`: what `integrate` returned; `loss`: the loss it was made with (default exponential), for going
    on. **Returns** a `Limit`, under jit and vmap too: failure is its `status`.

    **Raises** `ValueError` in float32, where 1e-10 is out of reach.

    >>> import jax
    >>> import gradflow as gf
    >>> net = gf.ReluNetwork.random(jax.random.key(1), width=8)
    >>> data = gf.Dataset([-1.0, -0.5, 0.5, 1.0], [1, -1, -1, 1])
    >>> flow = gf.integrate(net, data)
    >>> bool(gf.limit(flow, data).check().certified)
    True
    """
    found, flow, still = flow.limit, *jax.tree.map(jax.lax.stop_gradient, eqx.filter((flow, data), eqx.is_array))
    if found is None:
        # A flow that stopped before all points were classified is not followed any further in the hope that they will.
        found = integrate(flow.final, still, loss, max_steps=jnp.where(flow.separated, 200_000, 1)).limit
        assert found is not None  # as Until() asks for it
        status = LimitStatus.where(flow.separated, found.status, LimitStatus.not_separated)
        found = eqx.tree_at(lambda f: f.status, found, status)
    return on_data(jax.tree.map(jax.lax.stop_gradient, found), data)
