"""The KKT residual, against networks worked out by hand and rational arithmetic; each of its parts can fail alone."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conic import exact_residual

import gradflow as gf

ROOT = np.sqrt(2.0)


def residual(x, y, net, multipliers):
    net = gf.ReluNetwork(*(jnp.array(a, float) for a in (net if isinstance(net, tuple) else jax.tree.leaves(net))))
    data = gf.Dataset(np.array(x, float), np.array(y, float))
    found = float(gf.kkt_residual(net, data, jnp.array(multipliers, float)))
    exact = exact_residual(net, data.x, data.y, multipliers)
    assert found == pytest.approx(exact, rel=1e-12, abs=1e-15)
    return found


def test_one_point_is_best_served_by_a_neuron_along_it():
    # u ∥ x̃ = (3, 4)/4, ‖u‖ = v, v² ‖x̃‖ = 1, λ = 1/‖x̃‖.
    v = np.sqrt(0.8)
    assert residual([0.75], [1], ([0.6 * v], [0.8 * v], [v]), [0.8]) <= 1e-15


def test_a_network_that_classifies_nothing_spoils_no_derivative():
    net = gf.ReluNetwork([0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    data = gf.Dataset([-1.0, 1.0], [1, -1])
    assert float(gf.kkt_residual(net, data)) == np.inf
    found = jax.grad(lambda net: jnp.minimum(gf.kkt_residual(net, data), 1.0))(net)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(found))


def test_fractional_activations_count_between_zero_and_one_only():
    # Breakpoints on both points, and u = v z would need activations of −1/√2 there: with these everything else holds.
    c = 2**0.25
    net = ([1, -c / ROOT], [0, c / ROOT], [1, c])
    assert residual([0, 1], [1, 1], net, [ROOT, 1]) > 0.3


def test_a_breakpoint_beside_a_point_is_not_on_it():
    # Two points of different labels: each neuron ends on the other's point. 10⁻⁶ beside it the activation is 0 or 1.
    data = gf.Dataset(np.array([-0.1, 0.3]), np.array([-1, 1]))
    limit = gf.integrate(gf.ReluNetwork.random(jr.key(0), 8), data).limit.check()
    net = limit.network
    on = jnp.argmax(jnp.abs(net.v))
    moved = gf.ReluNetwork(net.w, net.b.at[on].multiply(1 + 1e-6), net.v)
    assert residual(data.x, data.y, net, limit.multipliers) <= 1e-10
    assert residual(data.x, data.y, moved, limit.multipliers) > 1e-2


def test_multipliers_must_not_be_negative():
    # x = 1, 2 with λ = (2, −1) pull along (0, 1): both margins are 1 and θ = Σ λ ∂q.
    assert residual([1, 2], [1, 1], ([0], [1], [1]), [2, -1]) == pytest.approx(1 / 3)


def test_multipliers_belong_to_points_with_the_least_margin():
    # All of λ on x = 1, where the margin is twice that at x = 0, keeps θ = Σ λ ∂q.
    v = 2**0.25
    net = ([v / ROOT], [v / ROOT], [v])
    assert residual([0, 1], [1, 1], net, [0, 1 / ROOT]) == pytest.approx(1)


def test_neurons_must_be_balanced_and_along_their_force():
    v = np.sqrt(0.8)
    for net in (([0.3 * v], [0.4 * v], [2 * v]), ([0.8 * v], [0.6 * v], [v])):
        assert residual([0.75], [1], net, [0.8]) > 0.1


def test_a_network_that_misses_a_point_has_no_residual():
    data = gf.Dataset(np.array([-1.0, 1.0]), np.array([-1, 1]))
    assert gf.kkt_residual(gf.ReluNetwork(np.ones(1), np.zeros(1), np.ones(1)), data) == jnp.inf


def test_natural_multipliers_leave_the_angle_between_position_and_velocity():
    data = gf.Dataset(np.array([-0.7, -0.2, 0.4, 0.9]), np.array([1, -1, -1, 1]))
    flow = gf.integrate(gf.ReluNetwork.random(jr.key(3), 16), data, until=gf.Until(log_loss=-30.0))
    if flow.separated:
        q = data.margins(flow.final)
        lam = jax.nn.softmax(-q) * flow.final.squared_norm / (2 * jnp.sum(jax.nn.softmax(-q) * q))
        scaled = flow.final.scaled(1 / jnp.sqrt(jnp.min(q)))
        assert gf.kkt_residual(flow.final, data) == pytest.approx(float(gf.kkt_residual(scaled, data, lam)), rel=1e-9)
