"""Derivatives through crossings, slides and releases, against differences of flows."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf
from gradflow import sensitivity
from gradflow.undefined import undefined

TIGHT = 1e-12  # of the flows that differences are taken of
STEPS = 1e-4 * jnp.array([1, 1 / 5, 1 / 20, 1 / 80])  # of these
FINE = 1e-10  # of those that are differentiated


def problem(seed, width=8, samples=16, frequency=5.0):
    """Inputs of labels that change often: breakpoints cross, stick and come off."""
    x = jnp.sort(jr.uniform(jr.key(seed + 100), (samples,), minval=-1, maxval=1))
    y = jnp.where(jnp.sin(frequency * x + seed) > 0, 1.0, -1.0)
    return gf.ReluNetwork.random(jr.key(seed), width), x, y


def ends(net, x, time, y, tolerance=FINE):
    """What can be differentiated of a flow, one number that cannot, and the flow."""
    flow = gf.integrate(net, gf.Dataset(x, y), until=gf.Until(time=time), rtol=tolerance, atol=tolerance)
    angle = jnp.arctan(flow.residual)
    return (*jax.tree.leaves(flow.final), flow.log_loss, flow.margin, flow.log_time, angle, flow.rise), flow


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def directions(net, x, key, count):
    """`count` directions of the network (relative), the inputs and the time."""
    a, b, c = jr.split(key, 3)
    parts = [
        leaf[None] * jr.normal(k, (count, leaf.size))
        for k, leaf in zip(jr.split(a, 3), (net.w, net.b, net.v), strict=True)
    ]
    return gf_batch(*parts), 0.1 * jr.normal(b, (count, x.size)), jr.normal(c, (count,))


def gf_batch(w, b, v):
    return jax.vmap(gf.ReluNetwork)(w, b, v)


@eqx.filter_jit
def differences(net, x, time, y, seeds):
    """Derivatives by Richardson's extrapolation of central differences, from the two of `STEPS` that agree best; how
    well they agree, relative to the largest; and events counted.
    """

    def at(seed, h):
        moved = jax.tree.map(lambda a, d: a + h * d, (net, x, time), seed)
        out, flow = ends(*moved, y, TIGHT)
        return flat(out)[:-1], flow.events

    signed = STEPS[:, None] * jnp.array([[1, -1, 0.5, -0.5]])
    values, events = jax.vmap(lambda seed: jax.vmap(jax.vmap(lambda h: at(seed, h)))(signed))(seeds)
    wide = (values[:, :, 0] - values[:, :, 1]) / (2 * STEPS[None, :, None])
    near = (values[:, :, 2] - values[:, :, 3]) / STEPS[None, :, None]
    found = (4 * near - wide) / 3
    size = jnp.max(jnp.abs(found[:, -1]), axis=1)
    apart = jnp.max(jnp.abs(found[:, 1:] - found[:, :-1]), axis=2) / size[:, None]
    best = jnp.argmin(apart, axis=1)
    return found[jnp.arange(len(best)), best + 1], jnp.min(apart, axis=1), events[0, 0, 0]


@eqx.filter_jit
def forward(net, x, time, y, seeds):
    def one(seed):
        (_, flow), (change, _) = jax.jvp(lambda *a: ends(*a, y), (net, x, time), seed)
        return flat(change), flow

    return jax.vmap(one)(seeds)


@eqx.filter_jit
def backward(net, x, time, y, weights):
    """Gradients of weighted sums of the ends."""

    def one(weight):
        return jax.grad(lambda *a: flat(ends(*a, y)[0]) @ weight, argnums=(0, 1, 2))(net, x, time)

    return jax.vmap(one)(weights)


def compare(seed, time, count, **sizes):
    """Errors of derivatives in `count` directions, relative to the largest in each direction; whether differences tell
    that much; and how many events the flow had.
    """
    net, x, y = problem(seed, **sizes)
    seeds = directions(net, x, jr.key(1000 + seed), count)
    time = jnp.asarray(time)
    exact, unsure, events = differences(net, x, time, y, seeds)
    found, flow = forward(net, x, time, y, seeds)
    assert np.isnan(found[:, -1]).all()
    found = found[:, :-1]
    assert np.all(flow.sensitivity == gf.Sensitivity.exists), flow.sensitivity
    errors = np.abs(found - exact).max(axis=1) / np.abs(exact).max(axis=1)
    weights = jr.normal(jr.key(2000 + seed), (2, exact.shape[1]))
    gradients = backward(net, x, time, y, jnp.pad(weights, ((0, 0), (0, 1))))
    by_gradient = sum(
        jnp.einsum("gp,dp->gd", g.reshape(len(weights), -1), d.reshape(count, -1))
        for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(seeds), strict=True)
    )
    by_change = weights @ found.T
    np.testing.assert_allclose(by_gradient, by_change, rtol=1e-9, atol=1e-9 * np.abs(by_change).max())
    return errors, np.asarray(unsure) <= 1e-6, int(events)


@pytest.mark.parametrize("seed, time", [pytest.param(0, 0.02, marks=pytest.mark.slow), (1, 20.0)])
def test_derivatives_agree_with_differences_of_flows(seed, time):
    errors, told, events = compare(seed, time, 6)
    assert told.all() and errors.max() <= 1e-6
    assert events == 0 if time < 1 else events > 10


SIZES = {"width": 20, "samples": 30, "frequency": 8.0}, {"width": 32, "samples": 50, "frequency": 9.0}


@pytest.mark.slow
def test_a_thousand_directions_through_up_to_a_hundred_events():
    counts, every = [], []
    small, large, largest = {}, SIZES[0], SIZES[1]
    for seed in range(50):
        sizes = small if seed % 2 else large if seed < 44 else largest
        errors, told, events = compare(seed, float(0.01 * 10 ** (3.3 * seed / 49)), 20, **sizes)
        print(
            f"{seed}: {events} events, largest error {errors.max():.1e}, {told.sum()} of 20 differences tell that much"
        )
        every.append(np.where(told, errors, np.nan))
        counts.append(events)
    assert min(counts) == 0 and max(counts) >= 100
    assert np.nanmax(every) <= 1e-6 and np.isnan(every).mean() <= 0.02


@pytest.mark.slow
def test_without_jumps_derivatives_are_wrong(monkeypatch):
    """What every adjoint does that knows nothing of events."""
    net, x, y = problem(1)
    seeds = directions(net, x, jr.key(0), 6)
    right, _ = forward(net, x, jnp.asarray(3.0), y, seeds)
    monkeypatch.setattr(sensitivity, "jump", lambda problem, before, after, change, x: change)
    eqx.clear_caches()
    jax.clear_caches()
    wrong, _ = forward(net, x, jnp.asarray(3.0), y, seeds)
    right, wrong = right[:, :-1], wrong[:, :-1]
    assert np.abs(wrong - right).max() > 0.05 * np.abs(right).max()
    monkeypatch.undo()
    eqx.clear_caches()
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("slots", [32, 16])  # strides of 8, and of as many steps as there are slots
def test_long_flows_are_gone_over_in_stretches(slots, monkeypatch):
    net, x, y = problem(1)
    seeds, weights = directions(net, x, jr.key(0), 6), jr.normal(jr.key(1), (2, 29)).at[:, -1].set(0)
    expected = forward(net, x, jnp.asarray(3.0), y, seeds)[0], backward(net, x, jnp.asarray(3.0), y, weights)
    monkeypatch.setattr(sensitivity, "SLOTS", slots)
    eqx.clear_caches()
    jax.clear_caches()
    found, flow = forward(net, x, jnp.asarray(3.0), y, seeds)
    again = backward(net, x, jnp.asarray(3.0), y, weights)
    assert 4 * 32 < int(flow.steps[0]) < slots**2
    found, first = found[:, :-1], expected[0][:, :-1]
    np.testing.assert_allclose(found, first, rtol=1e-7, atol=1e-7 * np.abs(found).max())
    np.testing.assert_allclose(flat(again), flat(expected[1]), rtol=1e-7, atol=1e-7 * np.abs(flat(again)).max())
    monkeypatch.undo()
    eqx.clear_caches()
    jax.clear_caches()


# --- where there is no derivative -----------------------------------------------------------------------------------


def status_and_change(net, x, y, time, seed=None):
    """The status, and changes in six directions, by the program that the tests above have compiled."""
    seeds = directions(net, x, jr.key(0), 6) if seed is None else seed
    change, flow = forward(net, x, jnp.asarray(time), y, seeds)
    return gf.Sensitivity[jax.tree.map(lambda a: a[0], flow.sensitivity)], change


def test_a_breakpoint_that_starts_on_a_point():
    net, x, y = problem(1)
    net = eqx.tree_at(lambda n: n.b, net, net.b.at[2].set(-net.w[2] * x[5]))
    found, change = status_and_change(net, x, y, 0.1)
    assert "starts on a data point" in found and np.isnan(change[:, :-2]).all()  # the angle is right there


def test_absent_neurons_change_nothing_and_have_no_derivative_of_their_own():
    net, x, y = problem(1)
    net = jax.tree.map(lambda a: a.at[-1].set(0), net)
    seeds = directions(jax.tree.map(jnp.ones_like, net), x, jr.key(0), 6)
    _, change = status_and_change(net, x, y, 0.5, seeds)
    still = (jax.tree.map(lambda a: a.at[:, -1].set(0), seeds[0]), *seeds[1:])
    _, expected = status_and_change(net, x, y, 0.5, still)
    own = np.zeros(change.shape[1], bool)
    own[[7, 15, 23]] = True
    assert np.isnan(change[:, own]).all() and np.all(expected[:, own] == 0)
    own[-1] = True
    np.testing.assert_array_equal(change[:, ~own], expected[:, ~own])
    weights = jnp.where(own, 0, 1.0)[None] * jr.normal(jr.key(0), (2, own.size))
    gradient, *_ = backward(net, x, jnp.asarray(0.5), y, weights)
    assert np.isfinite(flat(gradient)).all() and np.all(gradient.w[:, -1] == 0)


def test_points_that_occur_twice_cannot_be_moved_apart():
    net, x, y = problem(1)
    x, y = x.at[4].set(x[3]), y.at[4].set(y[3])
    weights = jr.normal(jr.key(0), (2, 29)).at[:, -1].set(0)
    _, gradient, _ = backward(net, x, jnp.asarray(0.5), y, weights)
    twice = np.isin(np.arange(16), (3, 4))
    assert np.isnan(gradient[:, twice]).all() and np.isfinite(gradient[:, ~twice]).all()
    net_seed, x_seed, time_seed = directions(net, x, jr.key(0), 6)
    seeds = net_seed, x_seed.at[:, 3:5].set(0), time_seed
    assert np.isfinite(status_and_change(net, x, y, 0.5, seeds)[1][:, :-1]).all()
    assert np.isnan(status_and_change(net, x, y, 0.5, (net_seed, x_seed, time_seed))[1][:, :24]).all()


def verge(of, low, high):
    """Where the integer function `of` of one number changes, to rounding."""
    first = of(low)
    assert first != of(high)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if of(middle) == first else (low, middle)
    return low, high


@pytest.mark.slow
def test_no_derivative_between_two_courses():
    """Between flows with different numbers of events is one that grazes a point, or meets one at its end."""
    net, x, y = problem(1)
    seeds, time = directions(net, x, jr.key(0), 6), jnp.asarray(3.0)

    def run(shift):
        return forward(eqx.tree_at(lambda n: n.b, net, net.b.at[7].add(shift)), x, time, y, seeds)

    statuses = set()
    shifts = np.linspace(-0.6, 0.6, 13)
    events = [int(run(shift)[1].events[0]) for shift in shifts]
    for a, b, first, second in zip(shifts, shifts[1:], events, events[1:], strict=False):
        if first != second:
            for shift in verge(lambda s: int(run(s)[1].events[0]), a, b):
                change, flow = run(shift)
                found = jax.tree.map(lambda a: a[0], flow.sensitivity)
                statuses.add(gf.Sensitivity[found])
                assert np.isnan(change[:, :24]).all() == bool(found != gf.Sensitivity.exists)
    print(statuses)
    assert len(statuses) > 1


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True,
    reason="where every event is met, a neuron that rests at w = b = 0 is met for ever",
)
@pytest.mark.parametrize("seed", [158, 178, 233])
def test_a_neuron_that_does_not_pass_the_origin_straight(seed):
    _, x, y = problem(seed)
    net = gf.ReluNetwork.random(jr.key(seed), 8, "gaussian")
    (_, flow), _ = jax.jvp(lambda t: ends(net, x, t, y, 1e-6), (jnp.asarray(8.0),), (jnp.ones(()),))
    assert flow.sensitivity == gf.Sensitivity.exists


# --- misuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda n, d: gf.integrate(n, d, until=gf.Until(log_loss=-5.0)).log_loss, "differentiated at a time"),
        (lambda n, d: gf.integrate(n, d, until=gf.Until(time=1.0), solver=diffrax.Kvaerno5()).margin, "Kvaerno5"),
    ],
)
def test_misuse_is_refused(change, message):
    net, x, y = problem(1)
    with pytest.raises(ValueError, match=message):
        jax.grad(change)(net, gf.Dataset(x, y))


def test_nothing_else_is_differentiated():
    net, x, y = problem(1)
    for function in (
        lambda a: gf.integrate(net, gf.Dataset(x, y), until=gf.Until(time=1.0), rtol=a).margin,
        lambda a: gf.integrate(net, gf.Dataset(x, y), until=gf.Until(time=1.0, norm=a)).margin,
    ):
        with pytest.raises(ValueError, match="by the initial parameters"):
            jax.grad(function)(jnp.asarray(0.1))
    with pytest.raises(ValueError, match="by the inputs"):
        jax.grad(lambda y: gf.max_margin(gf.Dataset(x, y)).value)(y)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        jax.hessian(lambda t: gf.integrate(net, gf.Dataset(x, y), until=gf.Until(time=t)).log_loss)(1.0)


def test_numbers_without_derivative_say_so():
    """Forward, `compare` looks at them; this is in reverse."""
    net, x, y = problem(1)
    asked = backward(net, x, jnp.asarray(0.5), y, jnp.zeros((2, 29)).at[:, -1].set(1.0))
    assert np.isnan(flat(asked)).all()


def test_at_time_zero_nothing_has_moved():
    net, x, y = problem(1)
    asked = backward(net, x, jnp.asarray(0.0), y, jnp.zeros((2, 29)).at[:, 24].set(1.0))
    plain = jax.grad(lambda net, x: gf.Exponential().log_mean(y * net(x)), argnums=(0, 1))(net, x)
    for found, exact in zip(jax.tree.leaves(asked[:2]), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(found[0], exact, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_a_time_that_was_not_met_has_no_derivative():
    net, x, y = problem(1)

    def end(t):
        flow = gf.integrate(net, gf.Dataset(x, y), until=gf.Until(time=t), max_steps=3)
        return flow.time, flow

    slope, flow = jax.grad(end, has_aux=True)(5.0)
    assert flow.status == gf.Status.step_limit and np.isnan(slope)


def test_what_has_no_derivative_taints_what_looks_at_it_and_nothing_else():
    def numbers(x):
        return undefined_at(x), x[0]

    @jax.custom_jvp
    def undefined_at(x):
        return jnp.zeros(3)

    undefined_at.defjvp(lambda primals, tangents: (undefined_at(*primals), undefined(tangents[0], jnp.zeros(3))))
    x = jnp.ones(2)
    assert np.isnan(jax.jvp(numbers, (x,), (jnp.array([1.0, -1.0]),))[1][0]).all()
    assert np.isnan(jax.grad(lambda x: numbers(x)[0] @ jnp.array([1.0, -1.0, 0.0]))(x)).all()
    for looks_away in (
        lambda x: jnp.sum(jax.vmap(lambda x: numbers(x)[1])(x[None])),
        lambda x: 0 * numbers(x)[0][0] + numbers(x)[1],
    ):
        np.testing.assert_array_equal(jax.grad(looks_away)(x), [1, 0])
