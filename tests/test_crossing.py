"""Crossings passed many at a time, against gradient flow stepped with no notion of a crossing at all."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import gradflow as gf


def problem(key, n, k):
    teacher, sample, weights = jr.split(jr.key(key), 3)
    data = gf.Teacher.random(teacher, 4, switches=4).sample(sample, n)
    return gf.ReluNetwork.random(weights, k), data


def small_steps(net, data, time, steps):
    """dθ/dτ = −∇ log L by the classical Runge–Kutta method; a step that a kink falls into is wrong by O(h²)."""

    def velocity(net):
        return jax.grad(lambda net: -jax.nn.logsumexp(-data.y * jax.vmap(net)(data.x)))(net)

    def move(net, h, velocity):
        return jax.tree.map(lambda a, b: a + h * b, net, velocity)

    h = time / steps

    def step(_, net):
        a = velocity(net)
        b = velocity(move(net, h / 2, a))
        c = velocity(move(net, h / 2, b))
        d = velocity(move(net, h, c))
        return jax.tree.map(lambda y, a, b, c, d: y + h / 6 * (a + 2 * b + 2 * c + d), net, a, b, c, d)

    return jax.lax.fori_loop(0, steps, step, net)


def off(a, b):
    sizes = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b) / (1 + jnp.abs(b))), a, b)
    return float(max(jax.tree.leaves(sizes)))


@pytest.mark.parametrize(("key", "n", "k"), [(0, 400, 32), pytest.param(1, 1000, 16, marks=pytest.mark.slow)])
def test_a_thousand_points_are_passed_within_the_tolerance(key, n, k):
    net, data = problem(key, n, k)
    reference = jax.jit(small_steps)(net, data, 0.2, 5_000)
    for rtol in (1e-4, 1e-6):
        flow = gf.integrate(net, data, until=gf.Until(time=0.2), rtol=rtol, atol=rtol)
        assert flow.status == gf.Status.reached
        assert off(flow.final, reference) <= rtol
        if rtol == 1e-4:
            assert flow.events > 2 * (flow.steps + flow.rejected)


def test_a_breakpoint_sticks_where_the_circle_of_cells_closes():
    # Left-facing, at the last point: the way there leads through the seam, and it was once taken for harmless.
    teacher, sample, weights = jr.split(jr.key(1), 3)
    data = gf.Teacher.random(teacher, 4, switches=3).sample(sample, 8)
    net = gf.ReluNetwork.random(weights, 12)
    net = gf.ReluNetwork(0 * net.w, jnp.abs(net.b), net.v)
    flow = gf.integrate(net, data, until=gf.Until(time=0.5), rtol=1e-8, atol=1e-8)
    assert flow.events <= 4 and flow.steps < 200
