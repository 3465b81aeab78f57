"""How limits and optima move with the data, against differences of limits and of optima."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from test_sensitivity import flat, problem

import gradflow as gf
from gradflow.implicit import moved
from gradflow.limit import on_data

PLACES = jnp.linspace(-3, 3, 61)


def limit_numbers(limit):
    return jnp.concatenate([limit.value[None], limit.multipliers, limit.network(PLACES)])


def limit_of(net, x, y):
    return gf.integrate(net, gf.Dataset(x, y)).limit


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_limit_moves_as_its_conditions_say(seed):
    net, x, y = problem(seed, width=16)
    found = limit_of(net, x, y).check()
    direction = jr.normal(jr.key(seed), x.shape)

    def difference(h):
        a, b = limit_of(net, x + h * direction, y), limit_of(net, x - h * direction, y)
        assert a.certified and b.certified
        return (limit_numbers(a) - limit_numbers(b)) / (2 * h)

    def numbers(x):
        return limit_numbers(on_data(found, gf.Dataset(x, y)))

    exact = (4 * difference(5e-5) - difference(1e-4)) / 3
    change = jax.jvp(numbers, (x,), (direction,))[1]
    for part in (slice(0, 1), slice(1, 1 + x.size), slice(1 + x.size, None)):
        np.testing.assert_allclose(change[part], exact[part], rtol=1e-6, atol=1e-6 * np.abs(exact[part]).max())
    weights = jr.normal(jr.key(9), exact.shape)
    gradient = jax.grad(lambda x: numbers(x) @ weights)(x)
    assert float(gradient @ direction) == pytest.approx(float(change @ weights), rel=1e-9)
    still, through = jax.grad(lambda net, x: gf.integrate(net, gf.Dataset(x, y)).limit.value, argnums=(0, 1))(net, x)
    np.testing.assert_allclose(through, jax.grad(lambda x: numbers(x)[0])(x), rtol=1e-9)
    assert np.all(flat(still) == 0)

    def beside(x):  # as in a batch, where every output has a weight
        flow = gf.integrate(net, gf.Dataset(x, y))
        return flow.limit.value + 0 * flow.log_loss + 0 * jnp.sum(flow.final.w)

    np.testing.assert_allclose(jax.grad(beside)(x), through, rtol=1e-12)


@pytest.mark.parametrize("y", [(1, 1, 1, 1), (1, 1, -1, -1), (1, -1, -1, 1), (1, -1, 1, -1)])
def test_optimum_moves_as_differences_say(y):
    x, y = jnp.array([-0.7, -0.2, 0.3, 0.9]), jnp.array(y, float)
    direction = jnp.array([0.3, -0.5, 0.8, 0.1])

    def optimum(x):
        return gf.max_margin(gf.Dataset(x, y))

    for function in (lambda f: f.value, lambda f: f.lower_bound, lambda f: f.network(jnp.linspace(-2.03, 2, 21))):

        def difference(h, function=function):
            return (function(optimum(x + h * direction)) - function(optimum(x - h * direction))) / (2 * h)

        exact = (4 * difference(5e-4) - difference(1e-3)) / 3
        change = jax.jvp(lambda x, function=function: function(optimum(x)), (x,), (direction,))[1]
        np.testing.assert_allclose(change, exact, rtol=1e-6, atol=1e-6 * max(1, np.abs(exact).max()))


@pytest.mark.parametrize("y", [(1, -1, -1, 1), (1, -1, 1, -1)])  # by the conditions, and by the closed form
def test_both_modes_give_the_optimum_one_derivative(y):
    """The other of the two formulas is computed too, and must not spoil it. The last two points are padding."""
    data = gf.Dataset([-0.7, -0.2, 0.3, 0.9, 2.0, 3.0], [*y, 1, 1]).padded(4)

    def numbers(x):
        best = gf.max_margin(eqx.tree_at(lambda d: d.x, data, x))
        return best.value + jnp.sum(best.network(jnp.linspace(-2.03, 2, 21)))

    backward, forward = jax.grad(numbers)(data.x), jax.jacfwd(numbers)(data.x)
    assert np.all(backward[:4] != 0) and np.all(backward[4:] == 0)
    np.testing.assert_allclose(backward, forward, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_conditions_and_closed_form_move_the_optimum_alike():
    """Two derivations: implicit differentiation of KKT conditions, and that of an explicit formula."""
    x, y = jnp.array([-0.9, -0.7, -0.2, 0.1, 0.3, 0.9]), jnp.array([1.0, -1, -1, 1, -1, 1])
    data = gf.Dataset(x, y)
    found = eqx.filter_jit(gf.max_margin)(data)
    direction = jr.normal(jr.key(0), x.shape)
    network, _, value = moved(found.network, found.multipliers, jnp.zeros(()), data, direction)
    _, change = eqx.filter_jit(eqx.filter_jvp)(lambda x: gf.max_margin(gf.Dataset(x, y)), (x,), (direction,))
    assert float(value) == pytest.approx(float(change.value), rel=1e-9)
    assert float(change.lower_bound) == pytest.approx(float(change.value), rel=1e-9)
    places = jnp.linspace(-2, 2, 41)

    def values(tangent):
        return jax.jvp(lambda net: net(places), (found.network,), (tangent,))[1]

    np.testing.assert_allclose(values(network), values(change.network), atol=1e-8 * float(value))


def test_a_limit_of_other_data_is_none():
    net, x, y = problem(0, width=16)
    flow = gf.integrate(net, gf.Dataset(x, y))
    other = gf.limit(flow, gf.Dataset(x + 0.01, y))
    assert other.status == gf.LimitStatus.not_stationary
    assert np.isnan(jax.grad(lambda x: gf.limit(flow, gf.Dataset(x, y)).value)(x + 0.01)).all()


def test_influence_predicts_what_a_moved_point_does():
    net, x, y = problem(0, width=16)
    data = gf.Dataset(x, y)
    limit = limit_of(net, x, y)
    found = gf.influence(limit, data)
    support = np.asarray(limit.multipliers > 0)
    assert np.all(np.asarray(found.value)[~support] == 0) and np.all(np.asarray(found.value)[support] != 0)
    i, h = int(np.argmax(np.abs(found.margin))), 1e-5
    after, before = limit_of(net, x.at[i].add(h), y), limit_of(net, x.at[i].add(-h), y)
    slope = (0.5 / after.value - 0.5 / before.value) / (2 * h)
    assert float(found.margin[i]) == pytest.approx(float(slope), rel=1e-5)
    bends = np.asarray(limit.network.v != 0)
    assert np.isfinite(found.moves[bends]).all() and np.isnan(found.moves[~bends]).all()
    knots = (np.asarray(after.knots) - np.asarray(before.knots)) / (2 * h)
    for place, move in zip(found.breakpoints[bends], found.moves[bends, i], strict=True):
        nearest = int(np.argmin(np.abs(np.asarray(limit.knots) - place)))
        assert float(move) == pytest.approx(float(knots[nearest]), rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_points_move_to_where_the_limit_is_worst():
    net, x, y = problem(0, width=16)
    start = limit_of(net, x, y).value / gf.max_margin(gf.Dataset(x, y)).value
    found = gf.worst_placement(net, gf.Dataset(x, y), steps=4, optimiser=optax.sgd(1e-3))
    assert float(found.ratios[0]) == pytest.approx(float(start)) and np.all(np.diff(found.ratios) > 0)
    assert float(found.ratio) == pytest.approx(float(found.ratios[-1])) and found.ratios.size > 1
    assert found.limit.certified and found.optimum.proved
    again = limit_of(net, found.data.x, y).value / gf.max_margin(found.data).value
    assert float(again) == pytest.approx(float(found.ratio), rel=1e-9)
