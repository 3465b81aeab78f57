"""Inputs at the edge of what a user may bring: against extended precision, or against steps that know no kinks."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from oracles import OnePoint
from reference_flow import LongDouble
from test_crossing import off, small_steps

import gradflow as gf

extended = pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="long double is no wider than double here")

# name: w, b, v, x, y, time
CASES = {
    "a point at 0": ([1.0, -0.7, 0.4], [-0.3, 0.2, 0.5], [1.1, -0.8, -0.6], [-0.6, 0.0, 0.5], [-1, 1, -1], 3.0),
    "points symmetric about 0": ([1.0, -0.9], [0.1, 0.3], [1.2, -0.8], [-0.8, -0.2, 0.2, 0.8], [-1, 1, 1, -1], 3.0),
    "w passes through 0": ([-0.05, 0.02], [1.0, 0.9], [1.1, -1.2], [-0.2, 0.4, 0.9], [-1, 1, 1], 1.0),
    "breakpoints far out": ([1e-7, -1e-7], [0.8, 0.5], [1.0, -1.0], [-0.5, 0.1, 0.7], [1, -1, 1], 2.0),
    "dead from the start": ([1.0, -1.0, 0.5], [-9.0, -9.0, 0.4], [1.0, 1.0, 0.8], [-0.5, 0.5], [-1, 1], 2.0),
    "a breakpoint starts on a point": ([1.0, -1.0], [-0.5, 0.7], [-1.1, 0.9], [-0.4, 0.5, 0.9], [-1, 1, 1], 2.0),
}


def case(name):
    w, b, v, x, y, time = CASES[name]
    return gf.ReluNetwork(w, b, v), gf.Dataset(np.array(x), np.array(y)), time


SLOW = ("points symmetric about 0", "breakpoints far out", "dead from the start")


@extended
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_odd_starts_agree_with_extended_precision(name):
    net, data, time = case(name)
    exact = np.asarray(LongDouble(net.w, net.b, net.v, data.x, data.y).run(time), float)
    for tolerance in (1e-6, 1e-9):
        flow = gf.integrate(net, data, until=gf.Until(time=time), rtol=tolerance, atol=tolerance).check()
        got = np.stack([flow.final.w, flow.final.b, flow.final.v])
        assert np.abs(got - exact).max() <= tolerance * np.abs(exact).max()


def test_w_does_pass_through_zero_there():
    net, data, time = case("w passes through 0")
    assert np.any(gf.integrate(net, data, until=gf.Until(time=time)).final.w * net.w < 0)


def draw(seed, n, k):
    teacher, sample, weights = jr.split(jr.key(seed), 3)
    data = gf.Teacher.random(teacher, 4, switches=4).sample(sample, n)
    return gf.ReluNetwork.random(weights, k), data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "k", "time"),
    [(50, 1, 0.5), (300, 512, 0.02), (5_000, 8, 0.1)],
)
def test_every_size_agrees_with_small_steps(n, k, time):
    net, data = draw(1, n, k)
    reference = jax.jit(small_steps)(net, data, time, 500)
    flow = gf.integrate(net, data, until=gf.Until(time=time)).check()
    assert off(flow.final, reference) <= 5e-6


def test_one_point_and_512_neurons_follow_their_closed_form():
    net, _ = draw(1, 1, 512)
    oracle, s = OnePoint(0.3, *(tuple(np.asarray(a).tolist()) for a in (net.w, net.b, net.v))), 0.4
    assert sum(0 < death < s for death in oracle.deaths()) > 20
    until = gf.Until(time=float(oracle.rescaled_time(s)))
    flow = gf.integrate(net, gf.Dataset([0.3], [1]), until=until).check()
    exact = np.array([[float(a) for a in part] for part in oracle.weights(s)])
    got = np.stack([flow.final.w, flow.final.b, flow.final.v])
    assert np.abs(got - exact).max() <= 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_a_network_that_fits_inputs_of_any_scale_is_trained(scale):
    net, data = draw(2, 10, 16)
    net, data = gf.ReluNetwork(net.w / scale, net.b, net.v), gf.Dataset(data.x * scale, data.y)
    flow = gf.integrate(net, data, until=gf.Until(log_loss=-1000.0))
    assert flow.status == gf.Status.reached
    assert flow.rise <= 1e-3 and flow.drift <= 1e-15


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_network_that_does_not_fit_the_scale_of_the_inputs_is_trained(scale):
    net, data = draw(2, 10, 16)
    data = gf.Dataset(data.x * scale, data.y)
    flow = gf.integrate(net, data, until=gf.Until(log_loss=-20.0), max_steps=20_000)
    assert flow.status == gf.Status.reached and flow.rise <= 1e-6


def test_flows_from_a_loss_of_e_to_the_thousands_end():
    """log t₀ ≈ −2,000: e^c is infinite before t is 1, and τ where a flow that stalls is given up."""

    def run(seed):
        net, data = draw(seed, 16, 8)
        until = gf.Until(log_loss=-1000.0)
        return gf.integrate(net, gf.Dataset(data.x * 1e3, data.y), until=until, max_steps=3_000)

    flows = jax.jit(jax.vmap(run))(jnp.arange(13))
    reached, stalled = flows.status == gf.Status.reached, flows.status == gf.Status.stalled
    assert jnp.all(reached | stalled) and jnp.any(jnp.isinf(flows.time)) and not jnp.any(jnp.isnan(flows.time))
    assert jnp.all(reached == (flows.log_loss <= -1000))


def test_one_class_and_one_point_reach_any_loss():
    net, data = draw(0, 10, 16)
    for y in (jnp.ones(10), -jnp.ones(10)):
        assert gf.integrate(net, gf.Dataset(data.x, y), until=gf.Until(log_loss=-1000.0)).status == gf.Status.reached
    single = gf.integrate(net, gf.Dataset(data.x[:1], data.y[:1]), until=gf.Until(log_loss=-1e6))
    assert single.status == gf.Status.reached
