"""The exact flow: closed forms, an independent integrator, invariances, and honest endings."""

import functools
import inspect

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from oracles import OnePoint, aligned_neuron_log_time, logistic_log_weight
from reference_flow import LongDouble, Reference

import gradflow as gf


def problem(seed, width=16, samples=12, switches=3):
    teacher, points, weights = jr.split(jr.key(seed), 3)
    data = gf.Teacher.random(teacher, 4, switches=switches).sample(points, samples)
    return gf.ReluNetwork.random(weights, width), data


def distance(a, b):
    """Largest difference of parameters over the largest parameter."""
    a, b = (np.concatenate(jax.tree.leaves(net)) for net in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


# --- closed forms ---------------------------------------------------------------------------------------------------


def test_one_aligned_neuron_follows_its_closed_form_to_log_loss_minus_1000():
    x, v = 0.7, 0.1
    reach = np.hypot(x, 1)
    net = gf.ReluNetwork([v * x / reach], [v / reach], [v])
    flow = gf.integrate(net, gf.Dataset([x], [1]), until=gf.Until(log_loss=-1000.0)).check()
    exact = aligned_neuron_log_time(x, reach * v**2, -float(flow.log_loss))
    assert flow.log_loss <= -1000
    assert float(flow.log_time) == pytest.approx(float(exact), rel=1e-6)  # the clock is held to rtol like any parameter
    assert float(flow.margin) == pytest.approx(reach / 2, rel=1e-9)


@pytest.mark.parametrize("loss", [gf.Exponential(), pytest.param(gf.Logistic(), marks=pytest.mark.slow)])
def test_one_point_many_neurons_some_of_which_die(loss):
    w, b, v = (0.5, -1.0, 0.3, 0.8, -0.6), (0.4, 1.5, -0.9, 0.2, 0.1), (0.2, -0.9, 0.7, -1.4, 0.3)
    oracle = OnePoint(0.7, w, b, v)
    deaths = [float(s) for s in oracle.deaths()]
    assert sum(0 < s < 2 for s in deaths) >= 1 and sum(s == 0 for s in deaths) >= 1
    s = 2.2
    until = gf.Until(time=float(oracle.rescaled_time(s)))
    flow = gf.integrate(gf.ReluNetwork(w, b, v), gf.Dataset([0.7], [1]), loss, until, rtol=1e-8, atol=1e-8).check()
    exact = np.array([[float(a) for a in part] for part in oracle.weights(s)])
    got = np.stack([flow.final.w, flow.final.b, flow.final.v])
    np.testing.assert_allclose(got, exact, atol=1e-6 * np.abs(exact).max())
    if isinstance(loss, gf.Logistic):
        assert float(flow.log_time) == pytest.approx(float(oracle.log_time(s, logistic_log_weight)), abs=1e-5)


SEEDS = (0, 1, 2, 3, 8)  # in one of which no breakpoint sticks; 3 and 8 amplify a perturbation tenfold


extended = pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="long double is no wider than double here")


@functools.cache
def exact(seed):
    """A problem, and its network at τ = 4 to 1e-16, with at least seven events on the way."""
    net, data = problem(seed, width=5, samples=8)
    reference = LongDouble(net.w, net.b, net.v, data.x, data.y)
    end = gf.ReluNetwork(*np.asarray(reference.run(4.0), float))
    assert reference.events >= 7
    return net, data, end, reference.slides


def error(seed, tolerance):
    net, data, end, _ = exact(seed)
    flow = gf.integrate(net, data, until=gf.Until(time=4.0), rtol=tolerance, atol=tolerance)
    return distance(flow.check().final, end)


@extended
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8, 1e-10])
def test_error_is_honest_through_crossings_and_slides(seed, tolerance):
    assert error(seed, tolerance) <= tolerance


@extended
@pytest.mark.parametrize("seed", SEEDS)
def test_error_converges(seed):
    tolerances = (1e-4, 1e-6, 1e-8, 1e-10)
    errors = [error(seed, tolerance) for tolerance in tolerances]
    assert errors[0] > errors[1] > 10 * errors[2] > 100 * errors[3]
    assert errors[3] < 1e-4 * errors[0]
    # In proportion to the tolerance, but for luck: one was 23 times better than it had to be.
    assert np.polyfit(np.log(tolerances), np.log(errors), 1)[0] > 0.9


@extended
def test_breakpoints_stick_in_the_reference():
    assert sum(exact(seed)[3] for seed in SEEDS) >= 4


@extended
def test_the_two_references_agree():
    net, data, end, _ = exact(1)
    reference = Reference(net.w, net.b, net.v, data.x, data.y)
    assert distance(gf.ReluNetwork(*reference.run(4.0)), end) < 1e-12


@pytest.mark.parametrize(("time", "log_loss"), [(30.0, -478), pytest.param(60.0, -612_875, marks=pytest.mark.slow)])
def test_stiff_flow_agrees_with_radau_between_events(time, log_loss):
    net, data = problem(1, width=6, samples=8)
    reference = Reference(net.w, net.b, net.v, data.x, data.y)
    end = gf.ReluNetwork(*reference.run(time, rtol=1e-10, method="Radau"))
    for tolerance in (1e-6, 1e-8):
        flow = gf.integrate(net, data, until=gf.Until(time=time), rtol=tolerance, atol=tolerance).check()
        assert distance(flow.final, end) <= tolerance and flow.log_loss < log_loss


# --- what the exact flow keeps
# ------------------------------------------------------------------------------------------


def test_loss_never_rises_and_balance_is_kept():
    net, data = problem(0)
    flow = gf.integrate(net, data, until=gf.Until(log_loss=-200.0), save=500)
    path = flow.path
    log_loss = np.asarray(path.log_loss[: int(path.count)])
    assert np.all(np.diff(log_loss) <= 1e-9 * np.abs(log_loss[1:]))
    assert flow.drift <= 1e-12 and flow.rise <= 1e-9
    np.testing.assert_allclose(flow.final.balance, net.balance, atol=1e-12 * float(flow.final.squared_norm))


def test_physical_time_follows_the_loss_late():
    net, data = problem(1)
    flow = gf.integrate(net, data, until=gf.Until(log_loss=-1000.0)).check()
    late = -float(flow.log_loss)
    # theory: log t ≈ Λ − log Λ − log(4γ) with Λ = log 1/L for the mean loss; corrections vanish like 1/Λ.
    predicted = late - np.log(late) - np.log(4 * float(flow.margin))
    assert float(flow.log_time) == pytest.approx(predicted, abs=0.01)


def test_symmetries():
    net, data = problem(2)
    until = gf.Until(time=5.0)
    plain = gf.integrate(net, data, until=until).final

    order = jr.permutation(jr.key(0), data.samples)
    shuffled = gf.integrate(net, gf.Dataset(data.x[order], data.y[order]), until=until).final
    assert distance(shuffled, plain) == 0

    neurons = jr.permutation(jr.key(1), net.width)
    permuted = gf.integrate(jax.tree.map(lambda a: a[neurons], net), data, until=until).final
    assert distance(permuted, jax.tree.map(lambda a: a[neurons], plain)) < 1e-9

    mirrored = gf.integrate(gf.ReluNetwork(-net.w, net.b, net.v), gf.Dataset(-data.x, data.y), until=until).final
    assert distance(gf.ReluNetwork(-mirrored.w, mirrored.b, mirrored.v), plain) < 1e-5

    flipped = gf.integrate(gf.ReluNetwork(net.w, net.b, -net.v), gf.Dataset(data.x, -data.y), until=until).final
    assert distance(gf.ReluNetwork(flipped.w, flipped.b, -flipped.v), plain) < 1e-9


def test_repeating_every_point_changes_nothing():
    net, data = problem(3)
    until = gf.Until(time=5.0)
    once = gf.integrate(net, data, until=until)
    twice = gf.integrate(net, gf.Dataset(jnp.tile(data.x, 2), jnp.tile(data.y, 2)), until=until)
    assert distance(twice.final, once.final) < 1e-5
    assert float(twice.log_time) == pytest.approx(float(once.log_time), abs=1e-5)
    assert float(twice.log_loss) == pytest.approx(float(once.log_loss), abs=1e-5)


@pytest.mark.slow
def test_zero_neurons_change_nothing():
    """Up to rounding: sums over neurons are products, which add in another order at another width."""
    net, data = problem(4)
    padded = jax.tree.map(lambda a: jnp.concatenate([a, jnp.zeros(3)]), net)
    until = gf.Until(time=5.0)
    a, b = gf.integrate(net, data, until=until), gf.integrate(padded, data, until=until)
    assert (a.steps, a.rejected, a.events) == (b.steps, b.rejected, b.events)
    assert distance(jax.tree.map(lambda p: p[: net.width], b.final), a.final) < 1e-12
    assert all(not jnp.any(p[net.width :]) for p in jax.tree.leaves(b.final))
    assert b.log_loss == pytest.approx(float(a.log_loss), rel=1e-12)
    assert b.margin == pytest.approx(float(a.margin), rel=1e-12)


def test_batches_agree_with_single_runs():
    nets, datas = zip(*(problem(seed) for seed in range(3)), strict=True)

    def stack(items):
        return jax.tree.map(lambda *a: jnp.stack(a), *items)

    def run(net, data):
        return gf.integrate(net, data, until=gf.Until(time=3.0))

    batch = jax.vmap(run)(stack(nets), stack(datas))
    assert jnp.all(batch.status == gf.Status.reached)
    for i in range(3):
        single = run(nets[i], datas[i]).check()
        assert distance(jax.tree.map(lambda a, i=i: a[i], batch.final), single.final) < 1e-5


# --- endings
# ------------------------------------------------------------------------------------------------------------


def test_until_time_is_met_exactly_and_until_norm_at_the_first_step_past():
    net, data = problem(0)
    flow = gf.integrate(net, data, until=gf.Until(time=1.25))
    assert flow.time == 1.25 and flow.status == gf.Status.reached
    flow = gf.integrate(net, data, until=gf.Until(norm=12.0)).check()
    assert float(flow.final.squared_norm) >= 144


def test_default_runs_until_the_limit_is_certified():
    net, data = problem(1)
    flow = gf.integrate(net, data).check()
    assert flow.status == gf.Status.certified and flow.separated and flow.limit.certified
    assert "certified" in repr(flow) and repr(flow.limit) in repr(flow)
    assert eqx.tree_equal(gf.limit(flow, data), flow.limit)


def test_margin_ignores_the_slots_of_repeated_points():
    net, data = problem(1)
    twice = gf.Dataset(jnp.concatenate([data.x, data.x]), jnp.concatenate([data.y, data.y]))
    flow = gf.integrate(net, twice, until=gf.Until(time=2.0), save=8)
    margin = float(jnp.min(data.margins(flow.final)) / flow.final.squared_norm)
    assert float(flow.margin) == pytest.approx(margin, rel=1e-12)
    assert float(flow.path.margin[flow.path.count - 1]) == pytest.approx(margin, rel=1e-12)


def test_float32_stops_where_it_cannot_follow():
    net, data = (jax.tree.map(lambda a: a.astype(jnp.float32), a) for a in problem(1))
    with pytest.raises(ValueError, match="float64"):
        gf.integrate(net, data)
    flow = gf.integrate(net, data, until=gf.Until(norm=1e3))
    assert flow.status == gf.Status.precision and flow.log_loss < -50


unchecked = inspect.unwrap(gf.integrate)  # as users have it, without the type checks of the tests


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("net", (1.0, 2.0, 3.0)),
        ("data", ([0.0], [1.0])),
        ("loss", "logistic"),
        ("loss", gf.Logistic),
        ("loss", gf.Until(time=1.0)),
        ("until", -60.0),
        ("solver", "tsit5"),
        ("solver", diffrax.Tsit5),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(argument, wrong):
    net, data = problem(0)
    with pytest.raises(TypeError, match=f"{argument} must be a"):
        unchecked(**({"net": net, "data": data} | {argument: wrong}))


@pytest.mark.parametrize(
    ("argument", "wrong"), [("rtol", 1.0), ("atol", np.inf), ("rtol", np.ones(3)), ("max_steps", 2.5), ("save", 2.5)]
)
def test_numbers_out_of_range_are_named(argument, wrong):
    net, data = problem(0)
    with pytest.raises(ValueError, match=argument):
        unchecked(net, data, **{argument: wrong})


def test_a_batch_is_refused_with_the_way_to_do_it():
    net, data = problem(0)
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        gf.integrate(jax.tree.map(lambda a: jnp.stack([a, a]), net), data)


@pytest.mark.slow
def test_infinite_points_under_jit_are_a_status():
    net, data = problem(0)
    run = jax.jit(lambda x: gf.integrate(net, gf.Dataset(x, data.y), until=gf.Until(time=1.0)).status)
    assert run(data.x.at[0].set(jnp.inf)) == gf.Status.non_finite


def one_neuron(w, b, v, x, y):
    """Of the size of `problem`, for which there is a program: with zero neurons and repeated points, both harmless."""
    net = gf.ReluNetwork(*(jnp.zeros(16).at[0].set(a) for a in (w, b, v)))
    return net, gf.Dataset(np.repeat(x, 12 // len(x)), np.repeat(y, 12 // len(y)))


def test_a_dead_network_stalls():
    flow = gf.integrate(*one_neuron(1.0, -9.0, 1.0, [-0.5, 0.5], [-1, 1]))
    assert flow.status == gf.Status.stalled and not flow.success
    with pytest.raises(RuntimeError, match="failed"):
        flow.check()


def test_training_that_cannot_succeed_stalls():
    # One neuron cannot fit − + −: it ends at a stationary point with positive loss.
    flow = gf.integrate(*one_neuron(1.0, 0.5, 1.2, [-1.0, 0.0, 1.0], [-1, 1, -1]), max_steps=20_000)
    assert flow.status == gf.Status.stalled


def test_step_limit_and_non_finite_are_values():
    net, data = problem(0)
    assert gf.integrate(net, data, max_steps=5).status == gf.Status.step_limit
    broken = gf.ReluNetwork(net.w.at[0].set(jnp.nan), net.b, net.v)
    flow = gf.integrate(broken, data)
    assert flow.status == gf.Status.non_finite and flow.steps + flow.rejected == 0


@pytest.mark.slow
def test_conflicting_points_inside_a_batch_are_a_status():
    net, _ = problem(0)
    xs, ys = jnp.array([[0.0, 1.0], [0.5, 0.5]]), jnp.array([[1.0, -1.0], [1.0, -1.0]])
    flows = jax.vmap(lambda x, y: gf.integrate(net, gf.Dataset(x, y), until=gf.Until(time=0.1)))(xs, ys)
    np.testing.assert_array_equal(flows.status == gf.Status.reached, [True, False])
    np.testing.assert_array_equal(flows.status == gf.Status.not_separable, [False, True])


def test_float32_works_as_far_as_it_can_and_says_where_it_stops():
    net, data = problem(1)
    net, data = jax.tree.map(lambda a: a.astype(jnp.float32), (net, data))
    flow = gf.integrate(net, data, until=gf.Until(log_loss=-20.0), rtol=1e-4, atol=1e-4)
    assert flow.success and flow.final.w.dtype == jnp.float32
    with pytest.raises(ValueError, match="float64"):
        gf.integrate(net, data, until=gf.Until(log_loss=-100.0))


# --- the door
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [
        *(
            pytest.param(solver, marks=pytest.mark.slow)
            for solver in (diffrax.Tsit5(scan_kind="lax"), diffrax.Dopri8())
        ),
        diffrax.Kvaerno5(),
    ],
)
def test_users_may_pass_a_diffrax_solver(solver):
    net, data = problem(2)
    until = gf.Until(time=2.0)
    default = gf.integrate(net, data, until=until)
    other = gf.integrate(net, data, until=until, solver=solver).check()
    assert distance(other.final, default.final) < 1e-4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(rtol=0.0), "rtol"),
        (dict(atol=-1.0), "atol"),
        (dict(max_steps=0), "max_steps"),
        (dict(save=3), "save"),
        (dict(solver=diffrax.Euler()), "HalfSolver"),
    ],
)
def test_bad_options_are_refused(kwargs, message):
    net, data = problem(0)
    with pytest.raises(ValueError, match=message):
        gf.integrate(net, data, **kwargs)


def test_mixed_dtypes_are_refused():
    net, data = problem(0)
    with pytest.raises(ValueError, match="float32"):
        gf.integrate(jax.tree.map(lambda a: a.astype(jnp.float32), net), data)


def test_until_is_checked():
    with pytest.raises(ValueError, match="settled"):
        gf.Until(time=1.0, settled=1e-3)
    with pytest.raises(ValueError, match="norm"):
        gf.Until(norm=float("nan"))
    with pytest.raises(ValueError, match=r"time must not be negative.*log_loss"):
        gf.Until(time=-5.0)
    net, data = problem(0)
    with pytest.raises(TypeError, match="Until"):
        gf.integrate(net, data, until=-5.0)  # type: ignore[arg-type]


def test_other_tolerances_and_limits_do_not_recompile():
    net, data = problem(0)

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def run(rtol, until, max_steps):
        return gf.integrate(net, data, until=until, rtol=rtol, max_steps=max_steps).time

    run(jnp.asarray(1e-5), gf.Until(time=0.5), jnp.asarray(100))
    run(jnp.asarray(1e-6), gf.Until(time=0.4, log_loss=-1.0), jnp.asarray(200))


def test_path_holds_snapshots_from_start_to_end():
    net, data = problem(1)
    flow = gf.integrate(net, data, until=gf.Until(log_loss=-50.0), save=20)
    path, count = flow.path, int(flow.path.count)
    assert 10 <= count <= 20 and path.network.w.shape == (20, 16)
    assert path.time[0] == 0 and path.log_time[0] == -jnp.inf
    assert np.all(np.diff(path.time[:count]) > 0)
    assert path.time[count - 1] == flow.time and path.log_loss[count - 1] == flow.log_loss
    np.testing.assert_array_equal(path.network.w[count - 1], flow.final.w)
    assert np.all(np.isnan(path.time[count:]))
