"""Claims that compare cells of a sweep: what does not depend on n, what grows like r, what falls like 1/n.

"Independent of" means up to a probability of `allowed`, "at most linearly" with an exponent up to 1 + `slack`: the
theory names no such numbers, and the table prints them. Exponents are those of quantiles, between the two ends of a
sweep; no law in between is assumed, and the intervals are exact whatever the distribution (`estimate_quantile`).
"""

import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import xarray as xr

from gradflow.archive import studies
from gradflow.claim import (
    CONFIDENCE,
    DELTA,
    Claim,
    coded,
    decide,
    estimated,
    has_limit,
    least_of,
    limits,
    tally,
    total,
    trial_of,
)
from gradflow.record import Verdict
from gradflow.statistics import Estimate, estimate_quantile, quantile_sample_size
from gradflow.trial import Trial

ALLOWED = 0.1  # difference between probabilities that are called independent of something
SLACK = 0.25  # of an exponent


def success_does_not_depend_on_samples(sweep: xr.Dataset, confidence=CONFIDENCE, allowed=ALLOWED) -> Claim:
    """At fixed width, the probability of perfect training accuracy varies by at most `allowed` between sample sizes.

    **Raises** `ValueError` unless the cells differ in `samples`, and in nothing else.
    """
    cells = _in_order(sweep, "samples", all_but("samples"))
    tallies = [tally(cell, coded("accuracy_verdict")) for cell in cells]
    spread = [estimated(tally, 1 - (1 - confidence) / len(cells)) for tally in tallies]
    low, high = [p.low for p in spread], [p.high for p in spread]
    middle = [p.estimate for p in spread]
    measured = Estimate(
        max(middle) - min(middle), max(0.0, max(low) - min(high)), max(high) - min(low), float(confidence)
    )
    note = _along(cells, "samples", [f"{p:.3f}" for p in middle])
    verdict = decide(measured, most=allowed)
    return Claim("success does not depend on n", verdict, measured, f"range <= {allowed:g}", *total(tallies), note)


def width_suffices(sweep: xr.Dataset, confidence=CONFIDENCE, delta=DELTA) -> Claim:
    """Some width c r, with one c for all r, gives perfect training accuracy with probability 1 − `delta`: one of those
    that the sweep has at most r. (It cannot speak of larger ones.)

    The number is the largest over these ratios of the smallest probability over r, at the confidence of all cells.

    **Raises** `ValueError` unless the cells differ in r, with n in proportion, and in k, with some k/r at several r.
    """
    ratios: dict[Fraction, dict[int, xr.Dataset]] = {}
    cells = studies(sweep)
    for cell in cells:
        trial = trial_of(cell)
        ratios.setdefault(Fraction(trial.width, trial.neurons), {})[trial.neurons] = cell
    sizes = max(map(set, ratios.values()), key=len)
    kinds = {proportional_but_width(trial_of(cell)) for cell in cells}
    if len(kinds) > 1 or len(sizes) < 2 or sum(map(len, ratios.values())) < len(cells):
        raise ValueError("the cells must differ in r, with n in proportion, and in k, with some k/r at several r")
    whole = {c: [group[r] for r in sorted(sizes)] for c, group in ratios.items() if sizes <= group.keys()}
    inner = 1 - (1 - confidence) / sum(len(group) for group in whole.values())
    found = {}
    for ratio, group in sorted(whole.items()):
        tallies = [tally(cell, coded("accuracy_verdict")) for cell in group]
        found[ratio] = least_of([estimated(tally, inner) for tally in tallies], confidence), tallies
    parts = [p for p, _ in found.values()]
    measured = Estimate(
        max(p.estimate for p in parts), max(p.low for p in parts), max(p.high for p in parts), float(confidence)
    )
    best = max(found, key=lambda ratio: found[ratio][0].low)
    shares = ", ".join(f"{p.estimate:.2f} at {float(ratio):g} r" for ratio, (p, _) in found.items())
    note = f"least over r = {', '.join(map(str, sorted(sizes)))}, by k: {shares}"
    verdict = decide(measured, least=1 - delta)
    name = f"a width of up to {float(max(found)):g} r suffices"
    return Claim(name, verdict, measured, f">= {1 - delta:g}", *total(found[best][1]), note)


def regions_grow_linearly(sweep: xr.Dataset, confidence=CONFIDENCE, quantile=1 - DELTA, slack=SLACK) -> Claim:
    """The linear regions of the limit are O(r): from the smallest to the largest r of the sweep their `quantile` among
    certified limits grows with an exponent of at most 1 + `slack`.

    **Raises** `ValueError` unless the cells differ in r, with k and n in proportion.
    """
    cells = _in_order(sweep, "neurons", proportional)
    ends = [quantile_of(cell, "regions", quantile, 1 - (1 - confidence) / 2) for cell in (cells[0], cells[-1])]
    measured, more = _exponent(cells, "neurons", ends, confidence), np.ptp([trial_of(cell).neurons for cell in cells])
    low, high = ((a - b) / more for a, b in ((ends[1].low, ends[0].high), (ends[1].high, ends[0].low)))
    slope = f"{(ends[1].estimate - ends[0].estimate) / more:.2f} [{low:.2f}, {high:.2f}]"
    least = [float(np.mean(np.maximum(cell["sample_switches"].values, 1))) for cell in (cells[0], cells[-1])]
    found = [f"{quantile_of(cell, 'regions', quantile, confidence).estimate:g}" for cell in cells]
    note = f"{quantile:g} quantile among certified limits, {_along(cells, 'neurons', found)}; {slope} more for each "
    note += f"teacher neuron, where the least possible grows by {(least[1] - least[0]) / more:.2f}"
    note += _why_open(cells, "neurons", measured, quantile)
    verdict = decide(measured, most=1 + slack)
    name = "linear regions grow like r"
    return Claim(name, verdict, measured, f"exponent <= {1 + slack:g}", *total(map(limits, cells)), note)


def error_falls_with_samples(sweep: xr.Dataset, confidence=CONFIDENCE, quantile=1 - DELTA, slack=SLACK) -> Claim:
    """The population error is O(1/n): from the smallest to the largest n of the sweep its `quantile` among certified
    limits has an exponent of at most −1 + `slack`.

    **Raises** `ValueError` unless the cells differ in `samples`, and in nothing else.
    """
    cells = _in_order(sweep, "samples", all_but("samples"))
    ends = [quantile_of(cell, "population_error", quantile, 1 - (1 - confidence) / 2) for cell in (cells[0], cells[-1])]
    measured = _exponent(cells, "samples", ends, confidence)
    found = [quantile_of(cell, "population_error", quantile, confidence).estimate for cell in cells]
    scaled = [
        f"{q * trial_of(cell).samples / trial_of(cell).neurons:.2f}" for q, cell in zip(found, cells, strict=True)
    ]
    note = f"{quantile:g} quantile among certified limits, in r/n: {_along(cells, 'samples', scaled)}"
    note += _why_open(cells, "samples", measured, quantile)
    verdict = decide(measured, most=slack - 1)
    name = "population error falls like 1/n"
    return Claim(name, verdict, measured, f"exponent <= {slack - 1:g}", *total(map(limits, cells)), note)


# Which cells


def family(sweep: xr.Dataset, kind: Callable[[Trial], object], along: str) -> xr.Dataset | None:
    """The most cells of one `kind` with different values of `along`, those with the first cell if there is a choice;
    none if there are not two.
    """
    trials = [trial_of(cell) for cell in studies(sweep)]
    groups: dict[object, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(kind(trial), []).append(trial)
    most = max(groups.values(), key=lambda group: len({getattr(trial, along) for trial in group}))
    several = len({getattr(trial, along) for trial in most}) > 1
    return alike(sweep, kind, most[0]) if several else None


def alike(sweep: xr.Dataset, kind: Callable[[Trial], object], trial: Trial) -> xr.Dataset:
    """The cells of the kind that `trial` is; of several with the same r, k and n the first."""
    found: dict[tuple[int, int, int], int] = {}
    for i, cell in enumerate(studies(sweep)):
        if kind(other := trial_of(cell)) == kind(trial):
            found.setdefault((other.neurons, other.width, other.samples), i)
    return sweep.isel(cell=list(found.values()))


def all_but(*names: str) -> Callable[[Trial], object]:
    """What a trial is, but for these settings."""

    def kind(trial: Trial):
        return tuple((k, str(v)) for k, v in json.loads(trial.to_json()).items() if k not in names)

    return kind


def proportional_but_width(trial: Trial):
    """What a trial is, but for r and the runs of its labels, with n relative to r."""
    rest = all_but("neurons", "switches", "min_run", "width", "samples")(trial)
    return rest, Fraction(trial.samples, trial.neurons), trial.switches is None, trial.switches == 0


def proportional(trial: Trial):
    """The same, with k relative to r too."""
    return proportional_but_width(trial), Fraction(trial.width, trial.neurons)


def _in_order(cells: xr.Dataset | list[xr.Dataset], along: str, kind) -> list[xr.Dataset]:
    """The cells by `along`, which must be all that they differ in."""
    cells = sorted(
        studies(cells) if isinstance(cells, xr.Dataset) else cells, key=lambda c: getattr(trial_of(c), along)
    )
    kinds, values = {kind(trial_of(cell)) for cell in cells}, {getattr(trial_of(cell), along) for cell in cells}
    if len(kinds) > 1 or len(values) < max(len(cells), 2):
        raise ValueError(f"at least two cells are needed that differ in {along}, and in nothing else")
    return cells


# Quantiles and exponents


def quantile_of(study: xr.Dataset, variable: str, quantile, confidence) -> Estimate:
    """Of certified limits; what may have had one is unresolved."""
    certified, failed = has_limit(study), study["accuracy_verdict"].values == Verdict.fails.value
    unresolved = int(np.sum(~certified & ~failed))
    if not certified.any() and not unresolved:
        return Estimate(math.nan, -math.inf, math.inf, confidence)
    return estimate_quantile(study[variable].values[certified], quantile, confidence, unresolved=unresolved)


def _exponent(cells, along: str, ends: Sequence[Estimate], confidence) -> Estimate:
    """How a positive number grows from the first cell to the last, as a power of `along`."""
    first, last = ends
    reach = math.log(getattr(trial_of(cells[-1]), along) / getattr(trial_of(cells[0]), along))

    def power(a, b):
        if math.isnan(a) or math.isnan(b):
            return math.nan
        if a == b and (a <= 0 or a == math.inf):
            return math.nan  # 0 over 0, or nothing known of either
        if a <= 0 or b == math.inf:
            return -math.inf
        return math.inf if b <= 0 or a == math.inf else math.log(a / b) / reach

    low, high = power(last.low, first.high), power(last.high, first.low)
    return Estimate(power(last.estimate, first.estimate), low, high, float(confidence))


def _why_open(cells, along: str, measured: Estimate, quantile) -> str:
    """What to do about an exponent whose interval has no end, or nothing if it has both."""
    if math.isfinite(measured.low) and math.isfinite(measured.high):
        return ""
    few = quantile_sample_size(quantile, 1 - (1 - measured.confidence) / 2)
    counts = [limits(cell) for cell in (cells[0], cells[-1])]
    have = _along([cells[0], cells[-1]], along, [f"{c.holds} and {c.unresolved} unresolved" for c in counts])
    return f"; an interval with two ends takes {few} certified limits or more, the fewer unresolved: {have}"


def _along(cells, name: str, values) -> str:
    return ", ".join(f"{v} at {name} {getattr(trial_of(cell), name)}" for v, cell in zip(values, cells, strict=True))
