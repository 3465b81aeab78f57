"""The laws of the input."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import mpmath
import numpy as np
import pytest
from oracles import normal_mass
from scipy import stats

import gradflow as gf
from gradflow.distribution import DISTRIBUTIONS

# Fixed keys; over random keys each Kolmogorov-Smirnov test below would fail once in a million runs.
FALSE_ALARM = 1e-6

LAWS = {
    "uniform": gf.Uniform(-1.0, 1.0),
    "uniform, shifted": gf.Uniform(1e4, 1e4 + 2.0),
    "normal": gf.TruncatedNormal(),
    "normal, upper tail": gf.TruncatedNormal(mean=-1.0, std=0.5, low=1.0, high=3.0),
    "normal, lower tail": gf.TruncatedNormal(mean=5.0, std=0.5, low=1.0, high=2.5),
    "normal, wide": gf.TruncatedNormal(mean=0.5, std=0.1, low=-3.0, high=40.0),
    "histogram": gf.Histogram([-2.0, -1.0, 0.5, 1.0, 4.0], [1.0, 0.0, 5.0, 2.0]),
    "histogram, empty ends": gf.Histogram([0.0, 1.0, 2.0, 3.0], [0.0, 3.0, 0.0]),
}
laws = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


def panels(law):
    """Ends of intervals on which the density is smooth, short enough for eight Gauss points each."""
    if isinstance(law, gf.Histogram):
        return np.asarray(law.edges)
    low, high = (float(end) for end in law.support)
    return np.linspace(low, high, 2 if isinstance(law, gf.Uniform) else 400)


@laws
def test_density_integrates_to_the_cdf(law):
    ends = panels(law)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    x = 0.5 * (ends[1:] + ends[:-1])[:, None] + 0.5 * np.diff(ends)[:, None] * nodes
    masses = (np.asarray(law.density(jnp.asarray(x))) * weights).sum(axis=1) * 0.5 * np.diff(ends)
    np.testing.assert_allclose(np.cumsum(masses), law.cdf(jnp.asarray(ends[1:])), rtol=0, atol=1e-11)
    assert float(law.cdf(jnp.asarray(ends[0]))) == 0 and float(law.cdf(jnp.asarray(ends[-1]))) == pytest.approx(
        1, abs=1e-15
    )


@laws
def test_outside_the_support_there_is_nothing(law):
    low, high = law.support
    outside = jnp.stack([jnp.asarray(-jnp.inf), low - 1, high + 1, jnp.asarray(jnp.inf)])
    np.testing.assert_array_equal(law.density(outside), 0)
    np.testing.assert_allclose(law.cdf(outside), [0, 0, 1, 1], rtol=1e-15)


@laws
def test_the_ends_of_the_support_are_met_exactly(law):
    """However it is compiled: programs for one number, for many and for a known law round differently."""
    low, high = law.support
    x = jnp.stack([jnp.asarray(-jnp.inf), low - 1, low, high, high + 1, jnp.asarray(jnp.inf)])
    for cdf in (jax.jit(lambda x: law.cdf(x)), functools.partial(eqx.filter_jit(lambda law, x: law.cdf(x)), law)):
        np.testing.assert_array_equal(cdf(x), [0, 0, 0, 1, 1, 1])
        np.testing.assert_array_equal([cdf(one) for one in x], [0, 0, 0, 1, 1, 1])
    ends = [low, high]
    if isinstance(law, gf.Histogram):  # ends at the outermost masses
        bins = np.flatnonzero(law.masses)
        ends = [law.edges[bins[0]], law.edges[bins[-1] + 1]]
    quantile = jax.jit(lambda u: law.quantile(u))
    np.testing.assert_array_equal(quantile(jnp.asarray([0.0, 1.0])), ends)
    np.testing.assert_array_equal([quantile(jnp.asarray(u)) for u in (0.0, 1.0)], ends)


@laws
@pytest.mark.parametrize("name", ["density", "cdf", "quantile"])
def test_derivatives_exist_at_the_ends_and_beyond(law, name):
    low, high = law.support
    places = [0.0, 1e-20, 1.0] if name == "quantile" else [-jnp.inf, low - 1, low, high, high + 1, jnp.inf]

    def total(law, x):
        return jnp.sum(getattr(law, name)(x))

    x = jnp.stack([jnp.asarray(place) for place in places])
    outside = jnp.where((x < low) | (x > high), x, jnp.inf)
    for mode in (jax.grad, jax.jacfwd):
        found, there = map(eqx.filter_jit(mode(total, argnums=(0, 1))), (law, law), (x, outside))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        assert name == "quantile" or all(np.all(leaf == 0) for leaf in jax.tree.leaves(there))


@laws
def test_quantile_inverts_the_cdf(law):
    u = jnp.concatenate([jnp.linspace(0, 1, 1001), jnp.asarray([1e-12, 1 - 1e-12])])
    x = law.quantile(u)
    low, high = law.support
    assert ((x >= low) & (x <= high)).all()
    assert (jnp.diff(x[:1001]) >= 0).all()
    # A shift by 1e4 leaves 1e-12 of the position, hence of the probability.
    np.testing.assert_allclose(law.cdf(x), u, rtol=0, atol=2e-12)


@laws
def test_samples_follow_the_law(law):
    x = law.sample(jr.key(7), 4000)
    assert x.shape == (4000,)
    assert stats.kstest(np.asarray(x), lambda x: np.asarray(law.cdf(jnp.asarray(x)))).pvalue > FALSE_ALARM
    if isinstance(law, gf.Histogram):
        assert (law.density(x) > 0).all()


@laws
def test_a_larger_sample_contains_the_smaller_one(law):
    large, small = law.sample(jr.key(1), 9), law.sample(jr.key(1), 4)
    np.testing.assert_array_equal(large[:4], small)
    assert not np.array_equal(law.sample(jr.key(2), 4), small)


@pytest.mark.parametrize(
    "mean, std, low, high",
    [(0, 1, -2, 2), (0, 1, 8, 9), (0, 1, -9, -8), (0, 1, 30, 31), (3, 0.1, -1, 1), (-2, 0.25, -2, 6), (0, 1, -1, 30)],
)
def test_truncated_normal_in_the_far_tail(mean, std, low, high):
    """CDF and density against mpmath. In the tail ndtr itself carries some z² roundings, hence 1e-12."""
    law = gf.TruncatedNormal(mean, std, low, high)
    x = np.linspace(low, high, 23)[1:-1]
    with mpmath.workdps(40):

        def z(x):
            return (mpmath.mpf(float(x)) - mean) / mpmath.mpf(std)

        mass = normal_mass(z(low), z(high))
        cdf = [float(normal_mass(z(low), z(point)) / mass) for point in x]
        density = [float(mpmath.npdf(z(point)) / mpmath.mpf(std) / mass) for point in x]
    np.testing.assert_allclose(law.cdf(jnp.asarray(x)), cdf, rtol=0, atol=1e-12)
    # In absolute terms, of the largest density: deep in its own tail a density has no digits to lose.
    np.testing.assert_allclose(law.density(jnp.asarray(x)), density, rtol=0, atol=1e-12 * max(density))
    u = jnp.linspace(0.01, 0.99, 25)
    np.testing.assert_allclose(law.cdf(law.quantile(u)), u, rtol=0, atol=1e-11)


def test_histogram_takes_numpy_counts():
    counts, edges = np.histogram([0.0, 0.1, 0.2, 0.9, 1.0], bins=4)
    law = gf.Histogram(edges, counts)
    np.testing.assert_allclose(law.masses, counts / 5)
    np.testing.assert_allclose(law.density(jnp.asarray([0.1, 0.3, 0.6, 0.9, 1.0])), [2.4, 0, 0, 1.6, 1.6])
    np.testing.assert_allclose(law.quantile(jnp.asarray([0.0, 0.3, 0.8, 1.0])), [0, 0.125, 0.875, 1], rtol=1e-14)


def test_histogram_never_draws_an_empty_bin():
    # 0, and the probability at which a gap lies, are where it could.
    ends, gap = LAWS["histogram, empty ends"], LAWS["histogram"]
    np.testing.assert_array_equal(ends.quantile(jnp.asarray([0.0, 1.0])), [1.0, 2.0])
    assert (gap.density(gap.quantile(jnp.asarray([0.0, 0.125, 0.75]))) > 0).all()
    masses = jnp.where(jr.bernoulli(jr.key(1), 0.5, (5000,)), jr.uniform(jr.key(0), (5000,)), 0)
    many = gf.Histogram(jnp.arange(5001.0), masses)
    np.testing.assert_array_equal(np.diff(many.cdf(many.edges))[masses == 0], 0)
    assert (many.density(many.quantile(many.cdf(many.edges[:-1]))) > 0).all()


def test_uniform_takes_integers_and_float32():
    assert gf.Uniform(0, 2).low.dtype == jnp.float64
    assert gf.Uniform(jnp.asarray(0), jnp.asarray(2)).low.dtype == jnp.float64
    single = gf.Uniform(jnp.asarray(0.0, jnp.float32), 2)
    assert single.high.dtype == single.sample(jr.key(0), 3).dtype == jnp.float32
    assert gf.Uniform().support == (-1, 1)


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (1.0, 0.0), (-np.inf, 0.0), (0.0, np.nan), (0.0, np.inf)])
def test_bad_intervals_are_refused(low, high):
    for law in (gf.Uniform, lambda low, high: gf.TruncatedNormal(low=low, high=high)):
        with pytest.raises(ValueError, match="an interval needs finite low < high, got"):
            law(low, high)


@pytest.mark.parametrize("mean, std", [(0.0, 0.0), (0.0, -1.0), (np.nan, 1.0), (0.0, np.inf)])
def test_bad_normals_are_refused(mean, std):
    with pytest.raises(ValueError, match="mean must be finite and std positive"):
        gf.TruncatedNormal(mean, std)


def test_an_interval_of_no_probability_is_refused():
    with pytest.raises(ValueError, match="probability is 0 in floating point; move the interval"):
        gf.TruncatedNormal(low=48.0, high=49.0)


@pytest.mark.parametrize(
    "edges, masses, message",
    [
        ([0.0, 1.0], [1.0, 1.0], "2 masses need one more edges"),
        ([0.0], [], "0 masses need one more edges"),
        ([[0.0, 1.0]], [1.0], "1 masses need one more edges"),
        ([0.0, 1.0], 1.0, "masses need one more edges"),
        ([0.0, 0.0, 1.0], [1.0, 1.0], "strictly ascending"),
        ([0.0, np.inf], [1.0], "edges must be finite"),
        ([0.0, 1.0], [0.0], "not all zero"),
        ([0.0, 1.0, 2.0], [1.0, -1.0], "non-negative"),
        ([0.0, 1.0], [np.nan], "finite"),
    ],
)
def test_bad_histograms_are_refused(edges, masses, message):
    with pytest.raises(ValueError, match=message):
        gf.Histogram(edges, masses)


def test_laws_work_under_jit_and_vmap_with_traced_parameters():
    @eqx.filter_jit
    def middle(law):
        return law.quantile(law.cdf(jnp.asarray(0.25))), law.sample(jr.key(0), 2)

    for law in (gf.Uniform(), gf.TruncatedNormal(), gf.Histogram([-1.0, 0.0, 1.0], [1.0, 2.0])):
        position, sample = middle(law)
        assert float(position) == pytest.approx(0.25, abs=1e-15)
        np.testing.assert_allclose(sample, law.sample(jr.key(0), 2), rtol=1e-14)
    ends = jax.vmap(lambda high: gf.Uniform(0.0, high).quantile(jnp.asarray(0.5)))(jnp.asarray([1.0, 2.0]))
    np.testing.assert_allclose(ends, [0.5, 1.0])


def test_the_table_is_complete():
    assert set(DISTRIBUTIONS.values()) == {type(law) for law in LAWS.values()} == set(gf.Distribution.__subclasses__())
