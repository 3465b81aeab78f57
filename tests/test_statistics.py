"""Exact intervals against SciPy's own, against exact binomial tails, and by how often they cover."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy.special import betaln
from scipy.stats import binom, binomtest

from gradflow.statistics import (
    Estimate,
    confidence_sequence,
    estimate_probability,
    estimate_quantile,
    quantile_sample_size,
    sample_size,
)


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
    assert str(Estimate(0.98, 0.91032, 0.99898, 0.99)) == "0.9800 [0.9103, 0.9990] at 99 %"


@pytest.mark.parametrize(("width", "confidence"), [(0.5, 0.9), (0.2, 0.99), (0.1, 0.95), (0.05, 0.99)])
def test_sample_size_is_the_least_that_is_enough_for_every_outcome(width, confidence):
    def widest(trials):
        found = [estimate_probability(s, trials, confidence) for s in range(trials + 1)]
        return max(p.high - p.low for p in found)

    n = sample_size(width, confidence)
    assert widest(n) <= width < widest(n - 1)


@pytest.mark.parametrize(
    ("width", "confidence"), [(0.0, 0.9), (1.0, 0.9), (0.1, 1.0), (float("nan"), 0.9), (0.1, "0.9")]
)
def test_sample_size_refuses_nonsense(width, confidence):
    with pytest.raises(ValueError, match="strictly between"):
        sample_size(width, confidence)


# Quantiles


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("trials", [5, 64, 257])
def test_quantile_limits_cover_exactly_as_often_as_they_say(quantile, trials):
    """For a continuous law the ranks decide: P(X_(l) > Q) and P(X_(u) < Q) are binomial tails."""
    found = estimate_quantile(np.arange(1, trials + 1), quantile, 0.99)
    low, high = found.low, found.high
    if np.isfinite(low):
        assert binom.cdf(low - 1, trials, quantile) <= 0.005 < binom.cdf(low, trials, quantile)
    else:
        assert binom.cdf(0, trials, quantile) > 0.005
    if np.isfinite(high):
        assert binom.sf(high - 1, trials, quantile) <= 0.005 < binom.sf(high - 2, trials, quantile)
    else:
        assert binom.sf(trials - 1, trials, quantile) > 0.005
    assert found.estimate == np.quantile(np.arange(1, trials + 1), quantile, method="inverted_cdf")
    finite = np.isfinite(found.low) and np.isfinite(found.high)
    assert finite == (trials >= quantile_sample_size(quantile, 0.99))


def test_quantiles_of_counts_are_covered():
    """A law with atoms, where order statistics are conservative: the quantile is the smallest x with P(X ≤ x) ≥ q."""
    rng = np.random.default_rng(0)
    draws = rng.geometric(0.4, (3000, 60))
    truth = 3  # P(X ≤ 2) = 0.64 < 0.7 ≤ P(X ≤ 3) = 0.784
    found = [estimate_quantile(row, 0.7, 0.9) for row in draws]
    assert np.mean([p.low <= truth <= p.high for p in found]) >= 0.9


def test_unresolved_draws_widen_a_quantile_whatever_they_are():
    values = np.arange(100.0)
    known = estimate_quantile(values, 0.5)
    open_ = estimate_quantile(values[10:], 0.5, unresolved=10)
    for guess in (-1e9, 55.0, 1e9):
        guessed = estimate_quantile([*values[10:], *[guess] * 10], 0.5)
        assert open_.low <= guessed.low and guessed.high <= open_.high
    assert known.high - known.low < open_.high - open_.low


@pytest.mark.parametrize(
    ("values", "quantile", "what"), [([], 0.5, "no draws"), ([1, np.nan], 0.5, "NaN"), ([1, 2], 1.0, "quantile must")]
)
def test_quantiles_of_nonsense_are_refused(values, quantile, what):
    with pytest.raises(ValueError, match=what):
        estimate_quantile(values, quantile)


# Looking as often as one likes


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_a_confidence_sequence_covers_at_all_times_at_once(p):
    """1,000 studies of 2,000 trials, looked at after every one: the exact interval would miss p in most of them."""
    rng = np.random.default_rng(7)
    confidence, budget = 0.9, np.log(10)
    n = np.arange(1, 2001)
    s = np.cumsum(rng.random((1000, 2000)) < p, axis=1)
    # The interval misses p where the martingale has reached 1/α.
    log_m = betaln(s + 1, n - s + 1) - s * np.log(p) - (n - s) * np.log1p(-p)
    assert np.mean((log_m >= budget).any(axis=1)) <= 0.1
    for i in (0, 5):  # and this is that interval
        for j in (0, 9, 500, 1999):
            found = confidence_sequence(int(s[i, j]), int(n[j]), confidence)
            assert (found.low <= p <= found.high) == (log_m[i, j] <= budget)
    tails = np.array([binom.cdf(s[:, j], n[j], p) for j in range(2000)])
    below = np.array([binom.sf(s[:, j] - 1, n[j], p) for j in range(2000)])
    assert np.mean((np.minimum(tails, below) < 0.05).any(axis=0)) > 0.3


def test_a_confidence_sequence_costs_little_and_has_the_same_ends():
    for s, n in ((0, 10), (10, 10), (500, 1000), (98, 100)):
        fixed, always = estimate_probability(s, n), confidence_sequence(s, n)
        assert always.low <= fixed.low and fixed.high <= always.high and always.estimate == fixed.estimate
        assert always.high - always.low < 1.7 * (fixed.high - fixed.low)
    assert confidence_sequence(0, 10).low == 0 and confidence_sequence(10, 10).high == 1
    open_ = confidence_sequence(90, 90, unresolved=10)
    assert open_.low == confidence_sequence(90, 100).low and open_.high == 1
