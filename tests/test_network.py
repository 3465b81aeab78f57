"""The network and its initialisation schemes."""

from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from oracles import ExactNetwork, orthogonal_square_value
from scipy import stats

import gradflow as gf
from gradflow.network import SCHEMES

# Fixed keys; over random keys each statistical test below would fail once in a million runs.
FALSE_ALARM = 1e-6

NET = gf.ReluNetwork([1.0, -2.0, 0.5], [0.25, 1.0, -1.0], [2.0, -1.0, 4.0])


@pytest.mark.parametrize(
    "x",
    [0.3, 2, -1, [0.5, 1], [[1, 2], [3, 4]], np.arange(3), np.float32(0.5), np.zeros((2, 3, 1)), np.zeros(0)],
    ids=repr,
)
def test_call_keeps_the_shape_and_gives_the_sum(x):
    out = NET(x)
    assert out.shape == np.shape(x) and out.dtype == jnp.float64
    exact = ExactNetwork.of(NET.w, NET.b, NET.v)
    expected = [float(exact(Fraction(value))) for value in np.ravel(x).tolist()]
    np.testing.assert_allclose(np.ravel(out), expected, rtol=1e-15)


@pytest.mark.parametrize("differentiated", [jax.grad, jax.jacfwd])
def test_the_balance_of_neurons_at_zero_has_a_derivative(differentiated):
    """As of padding, where the norm of (w, b) has none."""
    net = gf.ReluNetwork([0.0, 0.0, 1.0], [0.0, 0.0, -2.0], [0.0, 3.0, 1.0])
    found = differentiated(lambda net: jnp.sum(net.balance))(net)
    for got, exact in zip(jax.tree.leaves(found), (-2 * net.w, -2 * net.b, 2 * net.v), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-15)


@pytest.mark.parametrize("factor", [1e-70, 0.5, 3.0, 1e70])
def test_two_homogeneous(factor):
    x = jnp.linspace(-3, 3, 7)
    np.testing.assert_allclose(NET.scaled(factor)(x), factor**2 * NET(x), rtol=1e-14)
    np.testing.assert_allclose(NET.scaled(factor).squared_norm, factor**2 * NET.squared_norm, rtol=1e-14)


def test_integers_lists_and_mixtures_become_floats():
    net = gf.ReluNetwork([1, 2], [0.5, 1.0], np.array([1, -1]))
    assert net.w.dtype == net.b.dtype == net.v.dtype == jnp.float64
    assert gf.ReluNetwork([1], [2], [3]).w.dtype == jnp.float64
    assert net.width == 2


def test_float32_is_kept():
    single = jnp.asarray([1.0, 2.0], jnp.float32)
    net = gf.ReluNetwork(single, [1, 2], single)
    assert net.w.dtype == net.b.dtype == net.v.dtype == net(0.5).dtype == jnp.float32
    assert net(np.linspace(0, 1, 3)).dtype == jnp.float32
    assert net.scaled(2.0).w.dtype == net.balance.dtype == jnp.float32
    for scheme in SCHEMES:
        drawn = gf.ReluNetwork.random(jr.key(0), 3, scheme=scheme, scale=2, dtype=jnp.float32)
        assert drawn.w.dtype == drawn.b.dtype == drawn.v.dtype == jnp.float32


@pytest.mark.parametrize(
    "w, b, v",
    [([1.0], [1.0, 2.0], [1.0]), (1.0, 1.0, 1.0), ([], [], []), ([[1.0]], [[1.0]], [[1.0]])],
)
def test_wrong_shapes_are_refused(w, b, v):
    with pytest.raises(ValueError, match=r"one shape \(k,\), k >= 1; got \("):
        gf.ReluNetwork(w, b, v)


def test_non_finite_weights_are_allowed():
    assert np.isnan(gf.ReluNetwork([np.nan], [0.0], [1.0])(1.0))


def test_unknown_schemes_and_widths_are_refused():
    with pytest.raises(
        ValueError, match="unknown scheme 'xavier'; choose one of 'balanced', 'gaussian', 'he', 'sphere'"
    ):
        gf.ReluNetwork.random(jr.key(0), scheme="xavier")
    with pytest.raises(ValueError, match="width must be a whole number of at least 1, got 0"):
        gf.ReluNetwork.random(jr.key(0), width=0)


def test_balance_keeps_its_digits_at_large_norm():
    w, b, v = [3e8, 1.0], [4e8, 2.0], [5e8 + 0.25, -2.0]
    exact = [(v**2 - w**2 - b**2) for w, b, v in zip(*(map(Fraction, a) for a in (w, b, v)), strict=True)]
    np.testing.assert_allclose(gf.ReluNetwork(w, b, v).balance, [float(e) for e in exact], rtol=1e-14)


def test_derivative_is_zero_at_the_kink():
    net = gf.ReluNetwork([1.0, -2.0], [-1.0, 2.0], [3.0, 5.0])
    assert jax.grad(net)(jnp.asarray(1.0)) == 0
    gradient = jax.grad(lambda net: net(1.0))(net)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_orthogonal_points_with_the_square_loss():
    """O3: Runge-Kutta on the gradient of ½ Σ (N(x_i) − y_i)². Each neuron sits exactly on the other point's kink."""
    x, y = jnp.asarray([-0.5, 2.0]), jnp.asarray([1.5, -2.0])
    size, steps, end = 0.25, 400, 1.2
    direction = jnp.stack([jnp.asarray([-0.5, 1.0]) * size, jnp.asarray([1.0, 0.5]) * size])
    net = gf.ReluNetwork(direction[:, 0], direction[:, 1], jnp.sign(y) * jnp.hypot(direction[:, 0], direction[:, 1]))
    velocity = jax.grad(lambda net: -0.5 * jnp.sum((net(x) - y) ** 2))

    def step(_, net):
        h = end / steps

        def shift(a, b, c):
            return jax.tree.map(lambda p, q: p + c * h * q, a, b)

        k1 = velocity(net)
        k2 = velocity(shift(net, k1, 0.5))
        k3 = velocity(shift(net, k2, 0.5))
        k4 = velocity(shift(net, k3, 1.0))
        slope = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
        return shift(net, slope, 1.0)

    final = jax.jit(lambda net: jax.lax.fori_loop(0, steps, step, net))(net)
    starts = [abs(float(value)) for value in net(x)]
    exact = [float(orthogonal_square_value(*point, end)) for point in zip(x.tolist(), y.tolist(), starts, strict=True)]
    np.testing.assert_allclose(final(x), exact, rtol=1e-8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_wider_network_contains_the_narrower_one(scheme):
    narrow = gf.ReluNetwork.random(jr.key(3), 5, scheme=scheme)
    wide = gf.ReluNetwork.random(jr.key(3), 8, scheme=scheme)
    assert np.array_equal(wide.w[:5], narrow.w) and np.array_equal(wide.b[:5], narrow.b)
    factor = (5 / 8) ** 0.5 if scheme == "he" else 1.0
    np.testing.assert_allclose(wide.v[:5], factor * narrow.v, rtol=0 if factor == 1 else 1e-15)
    assert len(np.unique(wide.w)) == 8
    assert not np.array_equal(gf.ReluNetwork.random(jr.key(4), 5, scheme=scheme).w, narrow.w)


WIDTH = 4000


@pytest.mark.parametrize("scheme", ["balanced", "gaussian", "he", "sphere"])
def test_the_law_of_a_scheme(scheme):
    """Kolmogorov-Smirnov per marginal, correlation between them, and fair signs, each at FALSE_ALARM."""
    net = gf.ReluNetwork.random(jr.key(11), WIDTH, scheme=scheme)
    w, b, v = (np.asarray(a) for a in (net.w, net.b, net.v))

    def follows(sample, law):
        assert stats.kstest(sample, law).pvalue > FALSE_ALARM

    def unrelated(first, second):
        assert stats.pearsonr(first, second).pvalue > FALSE_ALARM

    if scheme == "sphere":
        np.testing.assert_allclose(np.hypot(w, b), 1, rtol=1e-15)
        follows(np.arctan2(b, w), stats.uniform(-np.pi, 2 * np.pi).cdf)
    else:
        follows(w, stats.norm.cdf)
        follows(b, stats.norm.cdf)
        unrelated(w, b)
    if scheme in ("balanced", "sphere"):
        assert np.abs(net.balance).max() <= 4e-15 * np.max(v**2)
        assert stats.binomtest(int(np.sum(v > 0)), WIDTH).pvalue > FALSE_ALARM
        unrelated(np.sign(v), w)
        unrelated(np.sign(v), b)
    else:
        follows(v, stats.norm(scale=(2 / WIDTH) ** 0.5 if scheme == "he" else 1).cdf)
        unrelated(v, w)
        unrelated(v, b)


def test_scale_multiplies_every_parameter_and_may_be_traced():
    one = gf.ReluNetwork.random(jr.key(0), 4)
    draw = eqx.filter_jit(
        eqx.debug.assert_max_traces(lambda scale: gf.ReluNetwork.random(jr.key(0), 4, scale=scale), max_traces=1)
    )
    for scale in (0.5, 1e-3):
        scaled = draw(jnp.asarray(scale))
        for a, c in zip(jax.tree.leaves(scaled), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a, scale * c, rtol=1e-15)


def test_jit_and_vmap_agree_with_one_at_a_time():
    keys = jr.split(jr.key(5), 3)
    x = jnp.linspace(-2, 2, 5)

    def run(key):
        return gf.ReluNetwork.random(key, 4)(x)

    batched = jax.jit(jax.vmap(run))(keys)
    np.testing.assert_allclose(batched, np.stack([run(key) for key in keys]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_padding_adds_zero_neurons_and_changes_no_other(scheme):
    plain = gf.ReluNetwork.random(jax.random.key(2), 5, scheme, 1.5)
    # One compilation for every width, also where the law depends on it.
    padded = jax.jit(lambda width: gf.ReluNetwork.random(jax.random.key(2), width, scheme, 1.5, slots=9))(
        jnp.asarray(5)
    )
    for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a[:5], b, rtol=1e-15)
        assert not a[5:].any() and a.shape == (9,)
    with pytest.raises(ValueError, match="at most 9"):
        gf.ReluNetwork.random(jax.random.key(2), 10, slots=9)


def test_concrete_numbers_are_checked_inside_a_trace():
    def drawn(width, scheme):
        return lambda: gf.ReluNetwork.random(jr.key(0), width, scheme)

    net = jax.lax.switch(1, [drawn(jnp.asarray(3), scheme) for scheme in ("he", "sphere")])
    assert jnp.allclose(net.v**2, 1)
    for width in (0, 2.5, jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="whole number"):
            jax.jit(drawn(jnp.asarray(width), "he"))()
