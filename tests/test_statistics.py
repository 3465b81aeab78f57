"""Exact intervals against SciPy's own, against exact binomial tails, and by how often they cover."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from gradflow.statistics import Probability, estimate_probability, sample_size


def tail_at_least(successes, trials, p: Fraction) -> Fraction:
    """P(X ≥ successes) for X binomial, in exact arithmetic."""
    return sum(comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(successes, trials + 1))


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99, 0.999999])
@pytest.mark.parametrize(
    "successes, trials", [(0, 1), (1, 1), (0, 40), (40, 40), (1, 40), (39, 40), (17, 40), (4090, 4096)]
)
def test_interval_is_scipys(successes, trials, confidence):
    found = estimate_probability(successes, trials, confidence)
    expected = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    assert found.estimate == successes / trials
    assert found.confidence == confidence
    # SciPy finds the roots numerically, with absolute tolerance 2e-12.
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("successes, trials", [(1, 3), (7, 10), (10, 10), (0, 10), (199, 200), (100, 300)])
def test_limits_invert_exact_tails(successes, trials):
    confidence = 0.99
    found = estimate_probability(successes, trials, confidence)
    tail = (1 - confidence) / 2
    if successes:
        assert float(tail_at_least(successes, trials, Fraction(found.low))) == pytest.approx(tail, rel=1e-9)
    else:
        assert found.low == 0
    if successes < trials:
        below = 1 - tail_at_least(successes + 1, trials, Fraction(found.high))
        assert float(below) == pytest.approx(tail, rel=1e-9)
    else:
        assert found.high == 1


def coverage(interval, trials, p) -> float:
    """How often an interval covers p, exactly: by summing over all outcomes."""
    ends = [interval(s, trials) for s in range(trials + 1)]
    return sum(binom.pmf(s, trials, p) for s, (low, high) in enumerate(ends) if low <= p <= high)


def clopper_pearson(successes, trials):
    found = estimate_probability(successes, trials, 0.9)
    return found.low, found.high


def wald(successes, trials):
    share = successes / trials
    reach = 1.6449 * (share * (1 - share) / trials) ** 0.5
    return share - reach, share + reach


def test_coverage_is_at_least_the_confidence():
    grid = np.linspace(0.01, 0.99, 50)
    assert min(coverage(clopper_pearson, 30, p) for p in grid) >= 0.9
    # The check can fail: the textbook interval does not cover.
    assert min(coverage(wald, 30, p) for p in grid) < 0.9


@pytest.mark.parametrize("hidden", ["successes", "failures", "either"])
def test_coverage_by_simulation_with_unresolved_trials(hidden):
    """Unresolved trials chosen by their outcome, the worst case: the interval must cover all the same.

    4000 intervals at 99 %: more misses than the 1e-6 quantile allows fail the test, a false-alarm rate below 1e-6.
    """
    random = np.random.default_rng(7)
    trials, p, repeats, confidence = 60, 0.8, 4000, 0.99
    misses = 0
    for successes in random.binomial(trials, p, repeats):
        failures = trials - successes
        lost_successes = random.binomial(successes, 0.2) if hidden != "failures" else 0
        lost_failures = random.binomial(failures, 0.5) if hidden != "successes" else 0
        lost = int(lost_successes + lost_failures)
        found = estimate_probability(int(successes - lost_successes), trials - lost, confidence, unresolved=lost)
        misses += not found.low <= p <= found.high
    assert misses <= binom.isf(1e-6, repeats, 1 - confidence)


def test_unresolved_trials_only_widen_and_count_against():
    plain = estimate_probability(90, 95)
    some = estimate_probability(90, 95, unresolved=5)
    assert some.estimate == 0.9 < plain.estimate
    for became in range(6):
        resolved = estimate_probability(90 + became, 100)
        assert some.low <= resolved.low <= resolved.high <= some.high
    assert some.low == estimate_probability(90, 100).low
    assert some.high == estimate_probability(95, 100).high
    # With every trial unresolved, nothing is known and the estimate is the worst.
    nothing = estimate_probability(0, 0, unresolved=4)
    assert (nothing.estimate, nothing.low, nothing.high) == (0, 0, 1)


def test_numpy_counts_are_fine():
    assert estimate_probability(np.int64(3), np.int32(5)) == estimate_probability(3, 5)
    assert isinstance(estimate_probability(np.int64(3), np.int32(5)).low, float)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(successes=-1, resolved=5), "successes must not be negative"),
        (dict(successes=6, resolved=5), "6 successes do not fit into 5"),
        (dict(successes=0, resolved=0), "no trials"),
        (dict(successes=1.0, resolved=5), "successes must be a whole number"),
        (dict(successes=1, resolved=5.5), "resolved must be a whole number"),
        (dict(successes=1, resolved=5, unresolved=-1), "unresolved must not be negative"),
        (dict(successes=1, resolved=5, confidence=0.0), "confidence"),
        (dict(successes=1, resolved=5, confidence=1.0), "confidence"),
        (dict(successes=1, resolved=5, confidence=99.0), "confidence"),
        (dict(successes=1, resolved=5, confidence=float("nan")), "confidence"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_probability(**arguments)


def test_prints_in_words():
    assert str(Probability(0.98, 0.91032, 0.99898, 0.99)) == "0.9800 [0.9103, 0.9990] at 99 %"


@pytest.mark.parametrize(("width", "confidence"), [(0.5, 0.9), (0.2, 0.99), (0.1, 0.95), (0.05, 0.99)])
def test_sample_size_is_the_least_that_is_enough_for_every_outcome(width, confidence):
    def widest(trials):
        found = [estimate_probability(s, trials, confidence) for s in range(trials + 1)]
        return max(p.high - p.low for p in found)

    n = sample_size(width, confidence)
    assert widest(n) <= width < widest(n - 1)


@pytest.mark.parametrize(("width", "confidence"), [(0.0, 0.9), (1.0, 0.9), (0.1, 1.0), (float("nan"), 0.9)])
def test_sample_size_refuses_nonsense(width, confidence):
    with pytest.raises(ValueError, match="strictly between"):
        sample_size(width, confidence)
