"""Neurons at the origin of the (w, b) plane: where they leave it, against small steps in the plane."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf
from gradflow.clarke import Field, Mode, Points, find_cell
from gradflow.lift import lifts
from gradflow.origin import leave_origin
from gradflow.slow import no_split


def plane(seed, samples, width):
    """Points with weights of their own, and neurons of length 1e-9, none of which moves the margins."""
    x, y, net = jr.split(jr.key(seed), 3)
    data = gf.Dataset(jr.uniform(x, (samples,), minval=-1.0), jr.rademacher(y, (samples,)))
    points, net = Points(data), gf.ReluNetwork.random(net, width)
    net = gf.ReluNetwork(1e-9 * net.w, 1e-9 * net.b, jnp.sign(net.v))
    mode = Mode(find_cell(net, points.x), jnp.full((width,), -1, jnp.int32))
    field = Field(points, gf.Exponential(), mode, no_split(points.x), lifts(net), jnp.zeros(()), samples)
    return points, net, mode, field.weights(net.lines)


def in_small_steps(points, net, weights, steps=40_000):
    """Where u̇ = v z(u) leads in the time in which it could go 400 times its own length, and how it moves in the last
    tenth of that, by Euler's method.
    """
    x, force = np.asarray(points.x), np.asarray(weights.p * points.y)
    u, v = np.stack([net.w, net.b]), np.asarray(net.v)
    step, late = 400 * 1e-9 / steps, u
    for i in range(steps):
        active = u[0][:, None] * x[None] + u[1][:, None] > 0
        z = np.stack([(active * (force * x)[None]).sum(axis=1), (active * force[None]).sum(axis=1)])
        u = u + step * v[None] * z
        late = u if i == steps * 9 // 10 else late
    return u, u - late


@pytest.mark.parametrize(("seed", "samples"), [(0, 1), (1, 2), (2, 3), (3, 5), (4, 8), (5, 8)])
def test_neurons_leave_the_origin_where_small_steps_lead(seed, samples):
    points, net, mode, weights = plane(seed, samples, 24)
    out, new = leave_origin(points, net, weights, mode, jnp.ones(24, bool))
    far, last = in_small_steps(points, net, weights)
    length = np.hypot(*far)
    stays = np.asarray(new.resting | (new.cell == samples) & ~new.sliding)
    # Those that leave go on in the direction in which they were put; dead ones and resting ones stay where they were.
    here = np.stack([out.w, out.b])
    aligned = np.sum(here * last, axis=0) / np.where(stays, 1, np.hypot(*here) * np.hypot(*last))
    assert np.all(aligned[~stays & (length > 2e-8)] > 0.97)
    assert np.all(length[stays] < 3e-9)
    assert np.mean(stays | (length > 2e-8)) > 0.9 and not np.all(stays)


def test_others_are_left_alone():
    points, net, mode, weights = plane(3, 5, 24)
    out, new = leave_origin(points, net, weights, mode, jnp.arange(24) < 3)
    for a, b in ((out.w, net.w), (out.b, net.b), (new.cell, mode.cell), (new.ray, mode.ray)):
        np.testing.assert_array_equal(a[3:], b[3:])
