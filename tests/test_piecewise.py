"""Knots, regions and sign changes, against exact rational arithmetic."""

from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracles import ExactNetwork

import gradflow as gf

WIDTH = 6


@eqx.filter_jit
def shape_of(w, b, v, merge=0.0, drop=0.0):
    """(regions, knots, sign changes), the latter two padded with +inf."""
    net = gf.ReluNetwork(w, b, v)
    return gf.linear_regions(net, merge, drop), gf.knots(net, merge, drop), gf.sign_changes(net)


shapes_of = eqx.filter_jit(jax.vmap(shape_of))


def finite(padded):
    return np.asarray(padded)[np.isfinite(padded)]


def compiled(net, merge=0.0, drop=0.0):
    """The same, unpadded and compiled once per width."""
    regions, knots, roots = shape_of(net.w, net.b, net.v, jnp.asarray(merge), jnp.asarray(drop))
    return int(regions), finite(knots), finite(roots)


def check(weights, found):
    """Against the exact network of the same floats: equal counts, positions to rounding."""
    exact = ExactNetwork.of(*weights)
    regions, knots, roots = found
    assert int(regions) == exact.regions()
    for ours, expected in ((knots, exact.knots()), (roots, exact.sign_changes())):
        ours, expected = finite(ours), [float(position) for position in expected]
        assert len(ours) == len(expected)
        # Positions are quotients of the weights; weights below 21 and six terms leave 1e-12 ample room.
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


def random_weights(rng, count, slopes):
    """Integer weights with many zeros, coincidences, and in every second network a scaled twin that may cancel."""
    w = rng.choice(slopes, (count, WIDTH)).astype(float)
    b = rng.integers(-4, 5, (count, WIDTH)).astype(float)
    v = rng.integers(-3, 4, (count, WIDTH)).astype(float)
    twin = rng.random(count) < 0.5
    stretch = rng.choice([0.5, 1.0, 2.0, 3.0], count)
    w[twin, 1], b[twin, 1] = (w[:, 0] * stretch)[twin], (b[:, 0] * stretch)[twin]
    v[twin, 1] = (rng.choice([-1.0, 1.0], count) * v[:, 0])[twin]
    v[twin, 0] *= stretch[twin]
    return w, b, v


@pytest.mark.parametrize("slopes", [[-4, -2, -1, -0.5, 0, 0.5, 1, 2, 4], range(-7, 8)], ids=["dyadic", "integer"])
def test_random_networks_exactly(slopes):
    rng = np.random.default_rng(20)
    w, b, v = random_weights(rng, 600, list(slopes))
    regions, knots, roots = shapes_of(w, b, v)
    cancelled = 0
    for i in range(len(w)):
        weights = w[i], b[i], v[i]
        exact = ExactNetwork.of(*weights)
        cancelled += len(exact.knots()) < len(exact.breakpoints())
        check(weights, (regions[i], knots[i], roots[i]))
    assert cancelled > 100


@settings(max_examples=80, phases=[Phase.generate], deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(-4, 4), min_size=WIDTH, max_size=WIDTH),
    st.lists(st.integers(-6, 6), min_size=WIDTH, max_size=WIDTH),
    st.lists(st.integers(-3, 3), min_size=WIDTH, max_size=WIDTH),
)
def test_any_integer_network_exactly(w, b, v):
    weights = tuple(np.asarray(a, float) for a in (w, b, v))
    check(weights, shape_of(*weights))


@pytest.mark.parametrize(
    "w, b, v, knots, roots",
    [
        # A tent with its feet at ±1: three knots, no sign change.
        ([1, 1, 1], [1, 0, -1], [1, -2, 1], [-1, 0, 1], []),
        # Two neurons facing apart make |x|: their bends add up, whichever way they face.
        ([1, -1], [0, 0], [1, 1], [0], []),
        # relu(x) − relu(−x) = x: the bends cancel.
        ([1, -1], [0, 0], [1, -1], [], [0]),
        # The same bend at 1/3 by different weights, cancelling up to rounding.
        ([3, 1, -7], [-1, -1 / 3, 7 / 3], [1, -3, 0], [], []),
        # N = −relu(−x) left of 0, 0 on [0, 7/3], relu(3x − 7): the sign change is at the right end.
        ([-1, 3], [0, -7], [-1, 1], [0, 7 / 3], [7 / 3]),
        # Neurons that do not bend only shift: 2 + relu(x) … and N = −1 + relu(x).
        ([0, 1], [1, 0], [-1, 1], [0], [1]),
        # Nothing bends at all.
        ([0, 0], [1, -1], [1, 1], [], []),
        # Zero output weights are no knots.
        ([1, 2], [1, 1], [1, 0], [-1], []),
        # One straight line through the outer pieces on each side.
        ([1, -1], [-1, -1], [1, 1], [-1, 1], []),
        ([-1, 1, 1], [-1, -1, 0], [-1, 3, 0], [-1, 1], [1]),
    ],
)
def test_hand_made_networks(w, b, v, knots, roots):
    # Filled up with zero neurons, so that one compilation serves all.
    net = gf.ReluNetwork(*(np.pad(np.asarray(a, float), (0, WIDTH - len(a))) for a in (w, b, v)))
    regions, found_knots, found_roots = compiled(net)
    np.testing.assert_allclose(found_knots, knots, atol=1e-15)
    np.testing.assert_allclose(found_roots, roots, atol=1e-15)
    assert regions == len(knots) + 1


def test_the_piecewise_form_is_the_network():
    net = gf.ReluNetwork.random(jr.key(1), 7)
    form = gf.Piecewise(net)
    exact = ExactNetwork.of(net.w, net.b, net.v)
    assert (np.diff(form.breakpoints) > 0).all()
    np.testing.assert_allclose(form.values, [float(exact(Fraction(float(t)))) for t in form.breakpoints], atol=1e-13)
    np.testing.assert_allclose(form.slope_right - form.slope_left, form.changes.sum(), rtol=1e-13)
    far = 1e6
    np.testing.assert_allclose(form.slope_right, net(far + 1) - net(far), rtol=1e-8)
    np.testing.assert_allclose(form.slope_left, net(-far) - net(-far - 1), rtol=1e-8)
    np.testing.assert_allclose(form.constant, net(0.0))


def generic(key, width=16):
    net = gf.ReluNetwork(*np.asarray(jr.normal(key, (3, width))))
    return net, ExactNetwork.of(net.w, net.b, net.v)


@pytest.mark.parametrize("seed", range(4))
def test_tolerances_do_not_matter_over_many_decades(seed):
    """From 0 up to the smallest gap (merge) and the smallest slope change (drop), a generic count stays put."""
    net, exact = generic(jr.key(seed))
    gap = min(float(t - s) for s, t in zip(exact.knots(), exact.knots()[1:], strict=False))
    changes = [abs(float(v * w)) for v, w in zip(exact.v, exact.w, strict=True)]
    share = min(changes) / sum(changes)
    for merge in (0.0, *10.0 ** np.arange(-300, -5, 20), 0.99 * gap):
        assert compiled(net, merge=min(merge, 0.99 * gap))[0] == 17
    for drop in (0.0, *10.0 ** np.arange(-300, -5, 20), 0.99 * share):
        assert compiled(net, drop=min(drop, 0.99 * share))[0] == 17
    # And just above, they do.
    assert compiled(net, merge=1.01 * gap)[0] == compiled(net, drop=1.01 * share)[0] == 16
    assert compiled(net, merge=1e300)[0] <= 2 and compiled(net, drop=1.0)[0] == 1


def test_clusters_merge_to_their_weighted_mean():
    """Bends of 1 at 0 and 3 at 1e-3 count once, at 7.5e-4; bends of 1 and −1 around 5 count not at all."""
    net = gf.ReluNetwork([1.0, 1.0, 1.0, 1.0], [0.0, -1e-3, -5.0, -5.001], [1.0, 3.0, 1.0, -1.0])
    np.testing.assert_allclose(gf.knots(net, merge=0.01), [7.5e-4], rtol=1e-12)
    assert int(gf.linear_regions(net, merge=0.01)) == 2
    assert int(gf.linear_regions(net)) == 5
    # Half of the last pair more: what is left of the run is small, and `drop` decides.
    net = eqx.tree_at(lambda net: net.v, net, net.v.at[3].set(-1.06))
    assert int(gf.linear_regions(net, merge=0.01)) == 3
    assert int(gf.linear_regions(net, merge=0.01, drop=0.02)) == 2


def test_coincidences_up_to_rounding_are_coincidences():
    """The pair (w, b, v), (sw, sb, ∓v/s) bends at one point, which s = 0.1 … 10 puts a rounding or two apart."""
    rng = np.random.default_rng(8)
    apart = 0
    for _ in range(200):
        w, b, v = rng.standard_normal((3, WIDTH))
        s = rng.uniform(0.1, 10)
        w[1], b[1], v[1] = s * w[0], s * b[0], -v[0] / s
        apart += b[1] / w[1] != b[0] / w[0]
        assert compiled(gf.ReluNetwork(w, b, v))[0] == WIDTH - 1
        v[1] *= -1
        assert compiled(gf.ReluNetwork(w, b, v))[0] == WIDTH
    assert apart > 50


def test_merging_chains_gaps_not_distances():
    net = gf.ReluNetwork(np.ones(5), -0.1 * np.arange(5), np.ones(5))
    assert int(gf.linear_regions(net, merge=0.11)) == 2
    assert int(gf.linear_regions(net, merge=0.09)) == 6


@pytest.mark.parametrize("seed", range(3))
def test_zero_neurons_change_nothing(seed):
    net, _ = generic(jr.key(seed), 5)
    regions, knots, roots = compiled(net)
    for pad in ((0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (2.0, 1.0, 0.0), (0.0, -1.0, 3.0)):
        padded = gf.ReluNetwork(*(jnp.append(a, p) for a, p in zip((net.w, net.b, net.v), pad, strict=True)))
        found = compiled(padded)
        assert found[0] == regions
        np.testing.assert_allclose(found[1], knots, rtol=1e-15)
        np.testing.assert_allclose(found[2], roots, rtol=1e-13)


@pytest.mark.parametrize("seed", range(4))
def test_reflection_scaling_and_order(seed):
    """x ↦ −x, x ↦ x/s, larger θ and reordered neurons move knots and roots as they must, and keep their number."""
    net, _ = generic(jr.key(seed))
    _, knots, roots = compiled(net)
    moved = [
        (gf.ReluNetwork(-net.w, net.b, net.v), -knots[::-1], -roots[::-1]),
        (gf.ReluNetwork(net.w / 1e6, net.b, net.v), 1e6 * knots, 1e6 * roots),
        (gf.ReluNetwork(net.w * 1e6, net.b, net.v), 1e-6 * knots, 1e-6 * roots),
        (net.scaled(1e6), knots, roots),
        (net.scaled(1e-6), knots, roots),
        (jax.tree.map(lambda a: a[::-1], net), knots, roots),
        (gf.ReluNetwork(net.w, net.b, -net.v), knots, roots),
    ]
    for other, expected_knots, expected_roots in moved:
        _, found_knots, found_roots = compiled(other)
        np.testing.assert_allclose(found_knots, expected_knots, rtol=1e-14)
        np.testing.assert_allclose(found_roots, expected_roots, rtol=1e-9)


def test_jit_and_vmap_agree_with_one_at_a_time():
    rng = np.random.default_rng(3)
    weights = random_weights(rng, 600, [-2, -1, 0, 1, 2])
    batched = shapes_of(*weights)
    for i in range(12):
        net = gf.ReluNetwork(*(a[i] for a in weights))
        assert int(gf.linear_regions(net)) == int(batched[0][i])
        np.testing.assert_allclose(gf.knots(net), finite(batched[1][i]), rtol=1e-15)
        np.testing.assert_allclose(gf.sign_changes(net), finite(batched[2][i]), rtol=1e-13, atol=1e-15)
        assert batched[1].shape[1] == WIDTH and batched[2].shape[1] == WIDTH + 1


def test_breakpoints_beyond_every_float_do_not_count():
    net = gf.ReluNetwork([1e-300, 1.0], [1e300, 0.0], [1.0, 1.0])
    np.testing.assert_array_equal(gf.knots(net), [0.0])


def test_a_failed_network_does_not_pass_for_a_simple_one():
    nan = gf.ReluNetwork(*np.full((3, 4), np.nan))
    assert int(gf.linear_regions(nan)) == 5
    assert np.isnan(gf.knots(nan)).all() and np.isnan(gf.sign_changes(nan)).all()
    partly = gf.ReluNetwork([1.0, 1.0], [0.0, 1.0], [1.0, np.nan])
    assert int(gf.linear_regions(partly)) == 3
