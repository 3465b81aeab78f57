"""What the theory speaks of, on networks made by hand and against plain counting."""

import itertools
import math

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf
from gradflow.limit import Limit, LimitStatus
from gradflow.theory import coverage, helpers, loss_law, placed_knots, survivors

# +1 on (−1, −0.5), −1 on (−0.5, 0.5), +1 on (0.5, 1): labels of 2 (|x| − 0.5).
TEACHER = gf.Teacher(gf.ReluNetwork([1.0, -1, 1, -1], [0, 0, 1.0, 1.0], [2.0, 2, -0.5, -0.5]))


def network(places, facings, signs):
    w = jnp.asarray(facings, float)
    return gf.ReluNetwork(w, -w * jnp.asarray(places), jnp.asarray(signs, float))


def test_the_teacher_is_what_it_says():
    np.testing.assert_allclose(TEACHER.switches, [-0.5, 0.5])
    assert TEACHER(jnp.zeros(())) == -1


def test_coverage_counts_helpers_in_the_emptiest_interval_by_facing():
    # Right-facing: 2, 1, 1 helpers in the three intervals; left-facing: 1, 0, 1. The others have the wrong sign of v,
    # or lie outside the support.
    places = [-0.9, -0.7, 0.1, 0.8, -0.6, 0.7, 0.0, 2.0]
    net = network(places, [1, 1, 1, 1, -1, -1, -1, 1], [1, 1, -1, 1, 1, 1, 1, 1])
    assert helpers(net, TEACHER).tolist() == [True] * 6 + [False, True]
    assert coverage(net, TEACHER, jnp.array([-1.0, 1.0])).tolist() == [1, 0]
    # Without the middle interval in the support, one interval is left.
    assert coverage(net, TEACHER, jnp.array([0.55, 1.0])).tolist() == [1, 1]


def test_coverage_against_plain_counting():
    for key in jr.split(jr.key(0), 20):
        a, b = jr.split(key)
        teacher, net = gf.Teacher.random(a, 4, switches=4), gf.ReluNetwork.random(b, 40)
        w, bias, v = (np.asarray(c) for c in (net.w, net.b, net.v))
        cuts = [-1.0, *np.asarray(teacher.switches), 1.0]
        least = []
        for facing in (1, -1):
            counts = []
            for low, high in itertools.pairwise(cuts):
                label = float(teacher(jnp.asarray(0.5 * (low + high))))
                inside = (-bias / w > low) & (-bias / w < high)
                counts.append(int(np.sum(inside & (np.sign(w) == facing) & (np.sign(v) == label))))
            least.append(min(counts))
        assert coverage(net, teacher, jnp.array([-1.0, 1.0])).tolist() == least


def test_survivors_are_helpers_that_still_see_a_point():
    net = network([-0.7, 0.1, 0.8, 0.0], [1, 1, 1, 1], [1, -1, 1, 1])  # three helpers
    data = gf.Dataset([-0.8, 0.2, 0.6], [1, -1, 1])
    assert survivors(net, net, TEACHER, data) == pytest.approx(2 / 3)  # the one at 0.8 sees nothing
    assert survivors(net, gf.ReluNetwork(net.w, net.b, -net.v), TEACHER, data) == 0
    lost = gf.ReluNetwork(*(jnp.full(4, jnp.nan),) * 3)
    assert np.isnan(survivors(net, lost, TEACHER, data))


def test_a_survivor_that_slides_on_its_last_point_sees_nothing_whatever_rounding_makes_of_it():
    """Two batch sizes once gave 12 and 13 survivors of 18 for one trial."""
    net = gf.ReluNetwork([1.0], [0.7], [1.0])
    data = gf.Dataset([-0.7, 0.7], [-1.0, 1.0])
    for b, share in ((-0.7, 0), (np.nextafter(-0.7, 0), 0), (np.nextafter(-0.7, -1), 0), (-0.7 + 1e-9, 1)):
        assert survivors(net, gf.ReluNetwork([1.0], [b], [1.0]), TEACHER, data) == share


def test_knots_are_placed_on_points_and_in_runs():
    # Runs −0.9…−0.5 (+1), −0.2…0.3 (−1), 0.6…0.9 (+1).
    data = gf.Dataset([-0.9, -0.5, -0.2, 0.0, 0.3, 0.6, 0.9], [1, 1, -1, -1, -1, 1, 1])
    zero = jnp.zeros(())
    # Whether a knot that sits on the end of a run is a little inside or outside of it is a matter of rounding: two
    # batch sizes once counted differently in a fifth of all trials.
    for off in (0.0, 1e-12, -1e-12):
        places = [-0.7, -0.35, -0.2 + off, 0.1, 0.3 - off, 0.75, 3.0]
        net = network(places, [1.0] * 7, [1, -1, 1, 1, -1, 1, 1])
        limit = Limit(net, jnp.zeros(7), zero, zero, jnp.asarray(1e-10), zero, LimitStatus.certified)
        pinned, crowded = placed_knots(limit, data)
        assert (int(pinned), int(crowded)) == (2, 3), off


def test_region_and_width_bounds():
    assert [gf.region_bound(r) for r in (1, 4)] == [99, 195]
    # Ten intervals of probability 1/20 each: the union bound itself.
    k = gf.sufficient_width(10, 0.05, 0.01)
    assert 10 * math.exp(-0.05 * k) <= 0.01 < 10 * math.exp(-0.05 * (k - 1))
    for wrong in ((0, 0.1, 0.1), (3, 0.0, 0.1), (3, 0.1, 1.0)):
        with pytest.raises(ValueError, match="intervals"):
            gf.sufficient_width(*wrong)


def test_a_sufficient_width_suffices():
    """Drawn 4,000 times: the share of misses is below δ, but for a false alarm at a rate of 1e-9 (binomial tail)."""
    delta, intervals, trials = 0.1, 8, 4000
    k = gf.sufficient_width(intervals, 1 / 16, delta)
    home = np.asarray(jr.randint(jr.key(0), (trials, k), 0, 16))
    missed = np.mean([len(set(row[row < intervals])) < intervals for row in home])
    assert 0.02 < missed < delta + 6 * math.sqrt(delta / trials)


def test_generalisation_bound_is_the_formula_and_falls_with_n():
    d, n = 6, 1000
    value = 2 / n * (d * math.log2(2 * math.e * n / d) + math.log2(2 * d * (d + 1) / 0.01))
    assert float(gf.generalisation_bound(5, n)) == pytest.approx(value)
    values = [float(gf.generalisation_bound(5, n)) for n in (50, 500, 5000, 50_000)]
    assert values == sorted(values, reverse=True) and values[0] > 1 > values[1]


def test_loss_law_holds_late_and_would_notice_one_over_t():
    data = gf.Dataset([-0.5, 0.5], [-1, 1])
    flow = gf.integrate(gf.ReluNetwork.random(jr.key(0), 16), data, until=gf.Until(log_loss=-300.0))
    assert loss_law(flow.log_loss, flow.log_time, flow.margin, 2) < 1e-3
    # L ~ 1/t would put log t at Λ.
    assert abs(-flow.log_loss / flow.log_time - 1) > 5e-3
