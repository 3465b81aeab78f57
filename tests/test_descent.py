"""Discretised training against its own formula, and against the flow as steps become short."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradflow as gf
from gradflow.descent import OBJECTIVES


@pytest.fixture(scope="module")
def start():
    teacher, data, net = jax.random.split(jax.random.key(2), 3)
    data = gf.Teacher.random(teacher, 3, switches=2).sample(data, 9)
    return gf.ReluNetwork.random(net, width=5), data


def by_hand(net, x, y, rate, scaled):
    """One step of gradient descent on the mean exponential loss, or its log, in NumPy."""
    w, b, v = (np.asarray(a) for a in (net.w, net.b, net.v))
    inner = np.outer(x, w) + b
    hidden = np.maximum(inner, 0)
    value = np.exp(-y * (hidden @ v)) / x.size
    force = y * value / (value.sum() if scaled else 1)
    on = (inner > 0).T
    return w + rate * v * (on @ (force * x)), b + rate * v * (on @ force), v + rate * (force @ hidden)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_that_of_its_formula(start, objective):
    net, data = start
    found = gf.descend(net, data, optax.sgd(0.1), 1, objective=objective).check()
    expected = by_hand(net, np.asarray(data.x), np.asarray(data.y), 0.1, objective == "log_loss")
    for a, b in zip((found.final.w, found.final.b, found.final.v), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    q = data.margins(found.final)
    np.testing.assert_allclose(found.log_loss, np.log(np.mean(np.exp(-q))), rtol=1e-12)
    np.testing.assert_allclose(found.margin, np.min(q) / found.final.squared_norm, rtol=1e-12)


def test_short_steps_follow_the_flow(start):
    """Euler's method is of order 1 where no breakpoint meets a point: a tenth of the step, a tenth of the error."""
    net, data = start
    time = 0.2
    flow = gf.integrate(net, data, until=gf.Until(time=time), rtol=1e-10, atol=1e-10).check()
    exact = flow.final
    assert flow.events == 0

    def error(steps):
        found = gf.descend(net, data, optax.sgd(time / steps), steps, objective="log_loss").final
        off = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), found, exact)
        return max(map(float, jax.tree.leaves(off)))

    coarse, fine = error(1_000), error(10_000)
    assert fine < 1e-6 and 0.099 < fine / coarse < 0.101


def test_descent_of_the_loss_itself_runs_in_physical_time(start):
    net, data = start
    found = gf.descend(net, data, optax.sgd(1e-4), 20_000)
    exact = gf.integrate(net, data, until=gf.Until(time=20.0), save=512).check().path
    count = int(exact.count)
    log_loss = np.interp(np.log(2.0), exact.log_time[1:count], exact.log_loss[1:count])
    np.testing.assert_allclose(found.log_loss, log_loss, atol=1e-3)


def test_a_batch_of_all_points_is_descent_and_keys_decide(start):
    net, data = start
    whole = gf.descend(net, data, optax.sgd(0.01), 50)
    shuffled = gf.descend(net, data, optax.sgd(0.01), 50, batch=9, key=jax.random.key(0))
    np.testing.assert_allclose(shuffled.final.w, whole.final.w, rtol=1e-10)
    one, again, other = (
        gf.descend(net, data, optax.sgd(0.01), 50, batch=2, key=jax.random.key(key)).final.w for key in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert jnp.max(jnp.abs(one - other)) > 1e-6


def test_a_batch_is_an_unbiased_sample(start):
    """The mean of a first step over 4,000 keys is that of all points, to five standard errors."""
    net, data = start
    step = jax.vmap(lambda key: gf.descend(net, data, optax.sgd(1.0), 1, batch=3, key=key).final.v)
    found = np.asarray(step(jax.random.split(jax.random.key(0), 4_000)))
    error = np.std(found, axis=0) / np.sqrt(4_000)
    whole = gf.descend(net, data, optax.sgd(1.0), 1).final.v
    assert np.all(np.abs(np.mean(found, axis=0) - whole) <= 5 * error + 1e-12)


def test_divergence_is_a_value_and_stops(start):
    net, data = start
    found = gf.descend(net, data, optax.sgd(1e6), 10_000)
    assert found.status == gf.DescentStatus.diverged and found.steps < 10_000 and "smaller" in repr(found)
    with pytest.raises(RuntimeError, match="smaller learning rate"):
        found.check()


def test_snapshots_run_from_start_to_end(start):
    net, data = start
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam takes powers of floats to integers
        path = gf.descend(net, data, optax.adam(1e-3), 1000, save=16).path
    count = int(path.count)
    assert path.time[0] == 0 and path.time[count - 1] == 1000 and count <= 16
    assert np.all(np.diff(path.time[:count]) > 0) and np.isnan(path.time[count:]).all()
    np.testing.assert_array_equal(path.network.w[0], net.w)


def test_batches_of_descents(start):
    net, data = start
    nets = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), net)
    momentum = optax.sgd(1e-2, momentum=0.9)
    found = jax.jit(jax.vmap(lambda net: gf.descend(net, data, momentum, 20)))(nets)
    single = gf.descend(net.scaled(2), data, momentum, 20)
    np.testing.assert_allclose(found.log_loss[1], single.log_loss, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "margin"}, "objective"),
        ({"batch": 2}, "key"),
        ({"key": jax.random.key(0)}, "batch"),
        ({"batch": 10, "key": jax.random.key(0)}, "from 1 to 9"),
        ({"save": 3}, "even"),
        ({"steps": -1}, "steps"),
    ],
)
def test_bad_input_is_refused(start, options, words):
    net, data = start
    with pytest.raises(ValueError, match=words):
        gf.descend(net, data, optax.sgd(0.1), **({"steps": 10} | options))
    with pytest.raises(ValueError, match="padding"):
        gf.descend(net, data.padded(3), optax.sgd(0.1), 10)


def test_a_descent_that_diverges_ends_its_path_once(start):
    found = gf.descend(*start, optax.sgd(1e6), 1000, save=16)
    assert found.status == gf.DescentStatus.diverged and np.issubdtype(found.steps.dtype, np.integer)
    assert np.all(np.diff(np.asarray(found.path.time)[: int(found.path.count)]) > 0)
