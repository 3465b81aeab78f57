"""The lifted coordinates: neurons from lines, the local blocks, and what they are for."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf
from gradflow.lift import Local, drive, from_lines, lifts

FREE = jnp.array([False])


def neuron(w, b, v):
    return gf.ReluNetwork([w], [b], [v])


@pytest.mark.parametrize("v", [1e-3, 0.6, -2.5, 2.5, 1e5])  # |v| far below, below, equal to and above ‖u‖
@pytest.mark.parametrize("size", [1e-100, 1.0, 1e100])
def test_a_neuron_is_found_from_its_line_and_its_invariant(v, size):
    net = neuron(1.5 * size, -2.0 * size, v * size)
    off = jax.tree.map(lambda a: a * (1 + 1e-7), net)
    found = from_lines(gf.ReluNetwork(off.w, net.b, net.v), net.lines, net.balance, lifts(net))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(net), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14 if v > 0.1 else 1e-6)
    scale = jnp.max(jnp.abs(jnp.stack(jax.tree.leaves(net)))) ** 2
    np.testing.assert_allclose(found.balance, net.balance, atol=1e-13 * scale)


def test_neurons_at_zero_stay_there_and_have_finite_derivatives():
    net = gf.ReluNetwork([0.0, 0.0, 1.0], [0.0, 0.0, 2.0], [0.0, 3.0, 0.0])
    found = from_lines(net, net.lines, net.balance, lifts(net))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(net), strict=True):
        np.testing.assert_array_equal(a, b)
    gradient = jax.grad(lambda net: jnp.sum(from_lines(net, net.lines, net.balance, lifts(net)).lines))(net)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_lines_move_with_their_neurons():
    net, z = gf.ReluNetwork.random(jr.key(0), 7, "he"), jr.normal(jr.key(1), (2, 7))
    velocity, lines = drive(net, z)
    np.testing.assert_allclose(lines, jax.jvp(lambda net: net.lines, (net,), (velocity,))[1], rtol=1e-13)
    np.testing.assert_allclose(jax.jvp(lambda net: net.balance, (net,), (velocity,))[1], 0, atol=1e-13)


@pytest.mark.parametrize("slides", [False, True])
def test_the_local_block_inverts_the_jacobian_and_answers_to_forces(slides):
    net, z, sigma = neuron(0.4, -0.8, 1.1), jnp.array([[0.3], [-0.7]]), jnp.array(2.7)
    tangent = jnp.array([[1.0], [-2.0]]) / jnp.sqrt(5.0)  # along u
    if slides:
        z = jnp.sum(z * tangent) * tangent
    local = Local(net, z, sigma, lifts(net), jnp.array([slides]), tangent)

    def flat(net, lines):
        return jnp.concatenate([net.w, net.b, net.v, lines[:, 0]])

    def velocity(y):
        return flat(*drive(gf.ReluNetwork(y[:1], y[1:2], y[2:3]), z))

    matrix = sigma * np.eye(5) - np.asarray(jax.jacfwd(velocity)(flat(net, net.lines)))
    right = jr.normal(jr.key(4), (5,))
    got = flat(*local.solve(gf.ReluNetwork(right[:1], right[1:2], right[2:3]), right[3:, None]))
    np.testing.assert_allclose(got, np.linalg.solve(matrix, right), rtol=1e-12)

    force = tangent if slides else jnp.array([[1.3], [0.2]])
    exact = np.linalg.solve(matrix, flat(*drive(net, force)))[3:]
    np.testing.assert_allclose(local.response().reshape(2, 2) @ force[:, 0], exact, rtol=1e-12)


@pytest.mark.parametrize("size", [1e-60, 1e-78, 1e-100, 1e-160, 1e-300])
@pytest.mark.parametrize("u", [(0.0, 0.0), (0.6, -0.8)])
def test_a_neuron_that_shrinks_for_ever_keeps_finite_errors(u, size):
    """One slid down its ray to 7e-78, where squares of squares are 0; its error became NaN, and no step was allowed."""
    net = neuron(u[0] * size, u[1] * size, size)
    change = jax.tree.map(lambda a: jnp.full_like(a, 1e-20 * size), net)
    settle = functools.partial(from_lines, balance=net.balance, lifted=lifts(net))
    found, error = jax.jvp(settle, (net, net.lines), (change, 1e-20 * net.lines))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(net), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    assert all(jnp.all(jnp.isfinite(leaf)) and jnp.all(jnp.abs(leaf) <= size) for leaf in jax.tree.leaves(error))
