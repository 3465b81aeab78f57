"""Probabilities from counted trials, with exact intervals."""

import dataclasses
import operator

from scipy.stats import beta


@dataclasses.dataclass(frozen=True)
class Probability:
    """An estimated probability and an interval around it.

    - `estimate`: successes over all trials, unresolved ones included;
    - `low`, `high`: the interval, both ends in [0, 1];
    - `confidence`: the least probability with which such an interval covers the true one.
    """

    estimate: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.estimate:.4f} [{self.low:.4f}, {self.high:.4f}] at {100 * self.confidence:g} %"


def estimate_probability(successes, resolved, confidence=0.99, *, unresolved=0) -> Probability:
    """The probability of success, from independent trials whose number was fixed beforehand.

    **Arguments**

    - `successes`: trials that ended in success;
    - `resolved`: trials that ended either way, successes included;
    - `confidence`: of the interval, strictly between 0 and 1;
    - `unresolved`: u, further trials that did not end either way.

    **Returns** a `Probability` over n = `resolved` + u trials, for s successes:

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
    successes = _count("successes", successes)
    resolved = _count("resolved", resolved)
    unresolved = _count("unresolved", unresolved)
    if successes > resolved:
        raise ValueError(f"{successes} successes do not fit into {resolved} resolved trials")
    trials = resolved + unresolved
    if trials == 0:
        raise ValueError("there are no trials to estimate a probability from")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    tail = (1 - confidence) / 2
    possible = successes + unresolved
    # At the ends of the range the tail to invert is empty, and the limit is the end itself.
    low = beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = beta.isf(tail, possible + 1, trials - possible) if possible < trials else 1.0
    return Probability(successes / trials, float(low), float(high), float(confidence))


def sample_size(width, confidence=0.99) -> int:
    """How many trials make the interval of `estimate_probability` no wider than `width`, whatever their outcome.

    The interval is widest when half of the trials succeed, with none unresolved. An unresolved trial adds about 1/n.

    **Raises** `ValueError` unless both arguments lie strictly between 0 and 1.

    >>> sample_size(0.05)
    2690
    """
    if not 0 < width < 1:
        raise ValueError(f"width must lie strictly between 0 and 1, got {width}")

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


def _count(name, value) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if count < 0:
        raise ValueError(f"{name} must not be negative, got {count}")
    return count
