"""Probabilities and quantiles from counted trials, with exact intervals: whatever the law, and for any number."""

import dataclasses
import math
import operator
from numbers import Real

import numpy as np
from scipy.special import betainccinv, betaincinv, betaln, xlog1py, xlogy


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimated number and an interval around it.

    - `estimate`: of a probability, successes over all trials, unresolved ones included;
    - `low`, `high`: the interval;
    - `confidence`: the least probability with which such an interval covers the true number.
    """

    estimate: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.estimate:.4f} [{self.low:.4f}, {self.high:.4f}] at {100 * self.confidence:g} %"


def estimate_probability(successes, resolved, confidence=0.99, *, unresolved=0) -> Estimate:
    """The probability of success, from independent trials whose number was fixed beforehand.

    **Arguments**

    - `successes`: trials that ended in success;
    - `resolved`: trials that ended either way, successes included;
    - `confidence`: of the interval, strictly between 0 and 1;
    - `unresolved`: u, further trials that did not end either way.

    **Returns** an `Estimate` over n = `resolved` + u trials, for s successes:

    - `estimate` s/n: an unresolved trial counts against the claim;
    - `low`, Clopper and Pearson's lower limit for s of n: every unresolved trial counted as a failure;
    - `high`, their upper limit for s + u of n: every unresolved trial counted as a success.

    Whatever the unresolved trials would have become, the interval for the true count lies inside this one, so it covers
    the true probability at least as often as `confidence` says; it does not depend on why they were left unresolved.

    **Raises** `ValueError` for counts that are not whole or negative, more successes than resolved trials, no trials at
    all, and a confidence outside (0, 1).

    Source: Clopper and Pearson (1934), doi:10.1093/biomet/26.4.404. Each limit is a quantile of a beta law, which
    inverts a binomial tail of probability (1 − `confidence`)/2.

    >>> print(estimate_probability(98, 100))
    0.9800 [0.9106, 0.9990] at 99 %
    """
    successes, trials, possible = _counts(successes, resolved, unresolved, confidence)
    tail = (1 - confidence) / 2
    # At the ends of the range the tail to invert is empty, and the limit is the end itself.
    low = betaincinv(successes, trials - successes + 1, tail) if successes else 0.0
    high = betainccinv(possible + 1, trials - possible, tail) if possible < trials else 1.0
    return Estimate(successes / trials, float(low), float(high), float(confidence))


def confidence_sequence(successes, resolved, confidence=0.99, *, unresolved=0) -> Estimate:
    """The same probability, with an interval that may be looked at as often as one likes, and stopped by.

    With probability at least `confidence` the intervals after 1, 2, 3, … trials *all* cover the true p: a study may be
    ended when its interval is narrow enough, or clear of what is asked, and gone on with if it is not. The price is an
    interval about 1.5 times as wide. Trials must be counted in the order of their numbers, as studies keep them; those
    that end first are not a fair sample.

    Arguments, unresolved trials and errors are as in `estimate_probability`.

    Source: Robbins (1970), doi:10.1214/aoms/1177696786; Howard, Ramdas, McAuliffe and Sekhon (2021),
    doi:10.1214/20-AOS1991. For the true p, the likelihood of the trials mixed over a uniform prior, over their
    likelihood under p, B(s + 1, n − s + 1)/(p^s (1 − p)^(n − s)), is a martingale that starts at 1, so that it ever
    reaches 1/α with probability α at most (Ville 1939). The interval is where it has not.

    >>> print(confidence_sequence(98, 100))
    0.9800 [0.8700, 0.9999] at 99 %
    """
    from scipy.optimize import brentq  # takes half as long to import as JAX

    successes, trials, possible = _counts(successes, resolved, unresolved, confidence)
    budget = -math.log1p(-confidence)

    def limit(count, end):
        """Where the martingale reaches 1/α between count/trials and `end`."""

        def excess(p):
            mixed = betaln(count + 1, trials - count + 1)
            return mixed - xlogy(count, p) - xlog1py(trials - count, -p) - budget

        share = count / trials
        if share == end or excess(end) <= 0:
            return end
        return float(brentq(excess, *sorted((share, end)), xtol=1e-15))  # pyright: ignore[reportArgumentType]

    return Estimate(successes / trials, limit(successes, 0.0), limit(possible, 1.0), float(confidence))


def estimate_quantile(values, quantile, confidence=0.99, *, unresolved=0) -> Estimate:
    """The smallest x with P(X ≤ x) ≥ `quantile`, from independent draws of X, whatever its law.

    **Arguments** `values`: the draws; `unresolved`: further ones of which nothing is known, taken as −∞ for the lower
    limit and as +∞ for the upper one. Their number must be fixed beforehand.

    **Returns** an `Estimate`; its ends are draws, or ±∞ where there are too few.

    **Raises** `ValueError` for no draws, NaN among them, and numbers outside (0, 1).

    Source: order statistics, David and Nagaraja (2003), section 7.1. The l-th smallest exceeds the quantile only if
    fewer than l draws are at or below it, whose number is binomial with probability `quantile` or more.

    >>> print(estimate_quantile(range(100), 0.5))
    49.0000 [36.0000, 63.0000] at 99 %
    """
    values = np.sort(np.asarray(values, float))
    unresolved = _count("unresolved", unresolved)
    trials = values.size + unresolved
    if values.ndim != 1 or not trials:
        raise ValueError("there are no draws to estimate a quantile from")
    if np.isnan(values).any():
        raise ValueError("a draw is NaN; count it as unresolved")
    _check_inside(quantile=quantile, confidence=confidence)
    from scipy.stats import binom  # takes as long to import as JAX

    tail = (1 - confidence) / 2
    rank = np.arange(trials + 1)
    first = int(np.sum(binom.cdf(rank, trials, quantile) <= tail))  # the largest l with P(fewer than l) ≤ tail
    last = trials + 1 - int(np.sum(binom.sf(rank, trials, quantile) <= tail)) + 1  # the smallest with P(u or more)
    pessimistic = np.concatenate([values, np.full(unresolved, np.inf)])
    optimistic = np.concatenate([np.full(unresolved, -np.inf), values])
    low = optimistic[first - 1] if first >= 1 else -np.inf
    high = pessimistic[last - 1] if last <= trials else np.inf
    middle = pessimistic[min(math.ceil(quantile * trials - 1e-9), trials) - 1]
    return Estimate(float(middle), float(low), float(high), float(confidence))


def quantile_sample_size(quantile, confidence=0.99) -> int:
    """How many draws it takes for both ends of `estimate_quantile` to be finite; unresolved ones take more.

    The upper end exists once all draws lie at or below the quantile with probability (1 − `confidence`)/2 at most, the
    lower one once all lie above it with no more.

    **Raises** `ValueError` unless both arguments lie strictly between 0 and 1.

    >>> quantile_sample_size(0.9)
    51
    """
    _check_inside(quantile=quantile, confidence=confidence)
    return math.ceil(math.log((1 - confidence) / 2) / math.log(max(quantile, 1 - quantile)))


def sample_size(width, confidence=0.99) -> int:
    """How many trials make the interval of `estimate_probability` no wider than `width`, whatever their outcome.

    The interval is widest when half of the trials succeed, with none unresolved. An unresolved trial adds about 1/n.

    **Raises** `ValueError` unless both arguments lie strictly between 0 and 1.

    >>> sample_size(0.05)
    2690
    """
    _check_inside(width=width)

    def enough(trials):
        found = estimate_probability(trials // 2, trials, confidence)
        return found.high - found.low <= width

    high = 1
    while not enough(high):
        high *= 2
    low = high // 2  # widths fall with the number of trials: by bisection
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _counts(successes, resolved, unresolved, confidence) -> tuple[int, int, int]:
    """Checked: successes, all trials, and how many may have succeeded."""
    successes = _count("successes", successes)
    resolved = _count("resolved", resolved)
    unresolved = _count("unresolved", unresolved)
    if successes > resolved:
        raise ValueError(f"{successes} successes do not fit into {resolved} resolved trials")
    trials = resolved + unresolved
    if trials == 0:
        raise ValueError("there are no trials to estimate a probability from")
    _check_inside(confidence=confidence)
    return successes, trials, successes + unresolved


def _count(name, value) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if count < 0:
        raise ValueError(f"{name} must not be negative, got {count}")
    return count


def _check_inside(**numbers) -> None:
    for name, number in numbers.items():
        if not isinstance(number, Real) or not 0 < float(number) < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {number!r}")
