"""Cells, the field inside a mode and its resolvent, against dense arrays and automatic differentiation."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf
from gradflow.clarke import (
    Field,
    Mode,
    Points,
    active_cell,
    cell_range,
    find_cell,
    inactive_cell,
    solver_of_positive_definite,
)
from gradflow.lift import lifts
from gradflow.rosenbrock import dense_resolvent
from gradflow.sites import Sites
from gradflow.slow import Slow

LOSSES = (gf.Exponential(), gf.Logistic())


def setting(loss, slides=0, width=10, samples=9, rank=9, split=False):
    teacher, sample, weights = jr.split(jr.key(3), 3)
    data = gf.Teacher.random(teacher, 4, switches=3).sample(sample, samples)
    net, points = gf.ReluNetwork.random(weights, width), Points(data)
    slow = Slow((jnp.arange(samples) % 3 == 0) & split, jnp.array(-1.5), jnp.array(0.0))
    cell = find_cell(net, points.x)
    ray = jnp.where(jnp.arange(width) < slides, cell, -1).astype(cell.dtype)
    field = Field(points, loss, Mode(cell, ray), slow, lifts(net), jnp.array(0.3), rank)
    on = field.project(jnp.stack([net.w, net.b]))
    return field, gf.ReluNetwork(on[0], on[1], net.v), data


def pattern(field):
    low, high = field.mode.active(field.points.x.size)
    index = np.arange(field.points.x.size)[None]
    return (index >= np.asarray(low)[:, None]) & (index < np.asarray(high)[:, None])


@pytest.mark.parametrize("samples", [1, 2, 3, 8, 50])
def test_cells_are_the_activation_patterns(samples):
    net = gf.ReluNetwork.random(jr.key(0), 200)
    data = gf.Dataset(jr.normal(jr.key(1), (samples,)), jnp.ones(samples))
    points = Points(data)
    low, high = cell_range(find_cell(net, points.x), samples)
    index = np.arange(samples)[None]
    got = (index >= np.asarray(low)[:, None]) & (index < np.asarray(high)[:, None])
    np.testing.assert_array_equal(got, net.w[:, None] * points.x[None] + net.b[:, None] > 0)


def test_a_breakpoint_on_a_point_is_inactive_there_and_zero_neurons_are_dead():
    points = Points(gf.Dataset([-1.0, 0.0, 1.0], [1, 1, 1]))
    net = gf.ReluNetwork([1.0, -1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0, -2.0], [1.0] * 5)
    low, high = cell_range(find_cell(net, points.x), 3)
    active = [list(range(a, b)) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    assert active == [[2], [0], [], [0, 1, 2], []]


def test_neighbouring_cells_differ_by_the_point_of_their_ray():
    n = 5
    rays = jnp.arange(2 * n)
    for ray in rays.tolist():
        sets = []
        for cell in (inactive_cell(jnp.array(ray), n), active_cell(jnp.array(ray), n)):
            low, high = cell_range(cell, n)
            sets.append(set(range(int(low), int(high))))
        assert sets[1] - sets[0] == {ray % n} and sets[0] < sets[1]


def test_points_merge_repetitions():
    points = Points(gf.Dataset([2.0, 1.0, 2.0, 1.0, 2.0, 5.0], [1, -1, 1, -1, 1, 1]))
    np.testing.assert_array_equal(points.x[:3], [1.0, 2.0, 5.0])
    np.testing.assert_array_equal(points.y[:3], [-1, 1, 1])
    np.testing.assert_allclose(jnp.exp(points.log_count), [2, 3, 1, 0, 0, 0])
    assert np.all(np.diff(points.x[:4]) > 0) and not points.conflict


@pytest.mark.parametrize("loss", LOSSES)
def test_free_field_is_the_gradient_flow_of_the_mean_loss_in_rescaled_time(loss):
    field, net, data = setting(loss)
    velocity, lines, tick = field(0.0, (net, net.lines, jnp.array(0.2)), None)
    gradient = jax.grad(lambda net: loss.log_mean(data.margins(net)))(net)
    q = data.margins(net)
    rate = jnp.exp(loss.log_mean(q) - loss.log_mean_weight(q))
    for a, b in zip(jax.tree.leaves(velocity), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, -rate * b, atol=1e-13)
    np.testing.assert_allclose(lines, jax.jvp(lambda net: net.lines, (net,), (velocity,))[1], atol=1e-13)
    assert float(tick) == pytest.approx(float(jnp.exp(-0.2 - loss.log_mean_weight(q) - 0.3)))


@pytest.mark.parametrize("loss", LOSSES)
def test_sliding_field_is_the_gradient_flow_restricted_to_the_rays(loss):
    field, net, _ = setting(loss, slides=4)
    active = pattern(field).astype(float)

    def restricted(w, b, v):
        hidden = active * (w[:, None] * field.points.x[None] + b[:, None])
        return loss.log_mean(field.points.y * (v @ hidden))

    gradient = jax.grad(restricted, (0, 1, 2))(net.w, net.b, net.v)
    q = field.margins(net.lines)
    rate = jnp.exp(loss.log_mean(q) - loss.log_mean_weight(q))
    tangent = np.asarray(field.tangent())
    u = -float(rate) * np.stack(gradient[:2])
    along = (u * tangent).sum(0)[None] * tangent
    expected = np.where(np.asarray(field.mode.sliding)[None], along, u)
    velocity, *_ = field(0.0, (net, net.lines, jnp.array(0.0)), None)
    np.testing.assert_allclose(np.stack([velocity.w, velocity.b]), expected, atol=1e-13)
    # The breakpoint stays where it is.
    points = field.points.x[field.mode.ray % field.points.x.size]
    drift = (velocity.w * points + velocity.b)[:4]
    np.testing.assert_allclose(drift, 0, atol=1e-14)


def compare_resolvents(field, net):
    """With lines that need not be those of the neurons: inside a step they are not, quite."""
    y, sigma = (net, net.lines + 0.1 * field.project(net.lines[::-1]), jnp.array(0.2)), jnp.array(2.7)
    right = jax.tree.map(lambda a: jr.normal(jr.key(9), a.shape), net)
    u = field.project(jnp.stack([right.w, right.b]))
    lines = field.project(jr.normal(jr.key(10), u.shape))
    right = (gf.ReluNetwork(u[0], u[1], right.v), lines, jnp.array(0.7))
    got = field.resolvent(y, sigma)(right)
    exact = dense_resolvent(lambda y: field(0.0, y, None), y, sigma)(right)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("slides", [0, 4])
@pytest.mark.parametrize("split", [False, True])
def test_resolvent_inverts_the_jacobian(loss, slides, split):
    field, net, _ = setting(loss, slides, split=split)
    compare_resolvents(field, net)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("slides", [0, 2])
@pytest.mark.parametrize("split", [False, True])
def test_many_points_between_breakpoints_are_summed_over_two_sites(loss, slides, split):
    field, net, _ = setting(loss, slides, width=4, samples=60, rank=10, split=split)
    assert field.compresses and field.spread == 10
    compare_resolvents(field, net)


@pytest.mark.parametrize("loss", LOSSES)
def test_neglected_bounds_what_a_small_rank_leaves_out(loss):
    field, net, _ = setting(loss, rank=3)
    net = net.scaled(0.2)  # a small network spreads the sample weights
    y = (net, net.lines, jnp.array(0.2))
    sigma = jnp.array(1e6)  # (σI − J)^{−1} ≈ (I + J/σ)/σ: differences of resolvents show differences of J
    full = Field(field.points, loss, field.mode, field.slow, field.lifted, field.log_unit, 9)
    missing = field.stiffness(net, field.weights(net.lines))[1]
    for seed in range(5):
        change = jax.tree.map(lambda a, s=seed: jr.normal(jr.key(s), a.shape), net)
        right = (change, jax.jvp(lambda net: net.lines, (net,), (change,))[1], jnp.array(0.0))
        a, b = field.resolvent(y, sigma)(right)[0], full.resolvent(y, sigma)(right)[0]
        gap = jnp.sqrt(jax.tree.map(jnp.subtract, a, b).squared_norm) * sigma**2
        assert 0 < gap <= 1.01 * missing * jnp.sqrt(right[0].squared_norm)
    assert full.stiffness(net, full.weights(net.lines))[1] == 0


def test_squared_gradients_are_those_of_the_margins():
    field, net, data = setting(gf.Exponential())
    jacobian = jax.jacrev(data.margins)(net)
    exact = sum(jnp.sum(leaf**2, axis=1) for leaf in jax.tree.leaves(jacobian))
    np.testing.assert_allclose(field.squared_gradients(net), exact[jnp.argsort(data.x)], rtol=1e-12)


def test_stiff_systems_are_solved_to_rounding_where_their_forces_cancel():
    # Eigenvalues from 1 to 1e12, and a right-hand side that only the stiffest direction answers: the residual of an
    # explicit inverse is 1e4 times larger.
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))
    matrix = (basis * np.logspace(0, 12, 20)) @ basis.T
    matrix = (matrix + matrix.T) / 2 + 1e-3 * np.triu(matrix, 1)  # not quite symmetric
    solution = basis[:, -1] * 1e-6
    right = jnp.asarray(matrix @ solution)
    found = np.asarray(solver_of_positive_definite(jnp.asarray(matrix))(right))
    residual = np.abs(matrix @ found - right).max()
    assert residual <= 1e-14 * np.abs(matrix).max() * np.abs(found).max()


def test_squares_are_never_negative_where_no_neuron_is_active():
    """A running sum adds 1 and 1e-20 and takes both away again: −1e-20 is left."""
    sites = Sites(jnp.linspace(-1.0, 1.0, 4), jnp.zeros(2, int), jnp.array([1, 2]))
    moments = jnp.stack([jnp.zeros(2), jnp.zeros(2), jnp.zeros(2), jnp.array([1.0, 1e-20])])
    assert jnp.all(sites.over_neurons(moments)[3, 2:] < 0)  # else this tests nothing
    assert jnp.all(sites.squares(moments) >= 0)


def test_products_with_the_matrix_of_who_is_active_and_running_sums_agree():
    """Both against NumPy, with neurons active everywhere, nowhere and in between, and rows out of order."""
    rng = np.random.default_rng(3)
    x = np.sort(rng.normal(size=12))
    low, high = np.array([0, 0, 0, 4, 11, 0, 0, 7]), np.array([12, 0, 1, 12, 12, 9, 11, 12])
    active = (low[:, None] <= np.arange(12)) & (np.arange(12) < high[:, None])
    force, (slope, offset), matrix = rng.normal(size=12), rng.normal(size=(2, 8)), rng.normal(size=(4, 8))
    lifted = np.stack([x, np.ones(12)])
    gram = np.einsum("ai,abj,bl,ji,jl->il", lifted, matrix.reshape(2, 2, 8), lifted, active, active)
    kept = np.array([7, 2, 11, 0])
    running = Sites(jnp.asarray(x), jnp.asarray(low), jnp.asarray(high))
    assert running.active is None and running.ready().active is not None
    for sites in (running, running.ready()):
        lines = sites.lines(jnp.asarray([slope, offset]))
        np.testing.assert_allclose(lines, slope @ active * x + offset @ active, atol=1e-14)
        np.testing.assert_allclose(sites.pull(jnp.asarray(force)), (lifted * force) @ active.T, atol=1e-14)
        np.testing.assert_allclose(sites.gram(jnp.asarray(matrix), slice(None)), gram, atol=1e-13)
        some = sites.gram(jnp.asarray(matrix), jnp.asarray(kept))
        np.testing.assert_allclose(some, gram[np.ix_(kept, kept)], atol=1e-13)
