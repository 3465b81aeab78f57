"""The claim table of a study or a sweep, and its main numbers, as text."""

import numpy as np
import xarray as xr

from gradflow.archive import studies
from gradflow.claim import (
    CONFIDENCE,
    DELTA,
    Claim,
    check_levels,
    error_is_bounded,
    has_limit,
    limit_is_optimal,
    loss_follows_its_law,
    margin_never_falls,
    regions_are_bounded,
    regions_are_twice_the_least,
    training_succeeds,
    training_succeeds_with_few_regions,
    trial_of,
)
from gradflow.outcome import STATUSES, Status
from gradflow.scaling import (
    alike,
    all_but,
    error_falls_with_samples,
    family,
    proportional,
    proportional_but_width,
    regions_grow_linearly,
    success_does_not_depend_on_samples,
    width_suffices,
)

_DECIDED = ("certified", "stalled")  # what other flows did is worth a look at each of them


def claims(dataset: xr.Dataset, confidence=CONFIDENCE, delta=DELTA) -> list[Claim]:
    """Every claim that a study or a sweep can decide, each at this confidence.

    In a sweep, statements about one experiment are about its first cell (bounds about those cells where they say
    something), and each of the others about the most cells that it can compare, those with the first if there is a
    choice. Which cells these are does not depend on the outcome, and the notes tell.

    >>> import jax
    >>> import gradflow as gf
    >>> trial = gf.Trial(neurons=2, switches=1, width=32, samples=20)
    >>> dataset = gf.run_study(trial, key=jax.random.key(0), trials=8)
    >>> gf.claims(dataset)[0].name
    'perfect training accuracy'
    """
    check_levels(confidence, delta)
    first, *others = studies(dataset)
    found = [
        training_succeeds(first, confidence, delta),
        regions_are_bounded(dataset, confidence, delta),
        training_succeeds_with_few_regions(first, confidence, delta),
        regions_are_twice_the_least(first, confidence, delta),
        error_is_bounded(dataset, confidence, delta),
        loss_follows_its_law(first, confidence, delta),
        margin_never_falls(first, confidence, delta),
    ]
    if has_limit(first).any():
        found.append(limit_is_optimal(first, confidence, delta))
    if others:
        bounds = ("at most 32r + 67 linear regions", "error within our VC bound")
        found = [
            c if c.name in bounds else c._replace(note="; ".join(filter(None, (_title(first), c.note)))) for c in found
        ]
    if (sizes := family(dataset, all_but("samples"), "samples")) is not None:
        found.append(success_does_not_depend_on_samples(sizes, confidence))
        found.append(error_falls_with_samples(sizes, confidence, 1 - delta))
    if (neurons := family(dataset, proportional, "neurons")) is not None:
        found.append(regions_grow_linearly(neurons, confidence, 1 - delta))
        widths = alike(dataset, proportional_but_width, trial_of(studies(neurons)[0]))
        found.append(width_suffices(widths, confidence, delta))
    return found


def summary(dataset: xr.Dataset, confidence=CONFIDENCE, delta=DELTA) -> str:
    """The claim table of a study or a sweep, and the main numbers of its first cell, as text.

    >>> import jax
    >>> import gradflow as gf
    >>> trial = gf.Trial(neurons=2, switches=1, width=32, samples=20)
    >>> dataset = gf.run_study(trial, key=jax.random.key(0), trials=8)
    >>> print(gf.summary(dataset).splitlines()[0])  # doctest: +ELLIPSIS
    claim ... verdict ... number  99 % interval      asked ...
    """
    table = claims(dataset, confidence, delta)
    interval = f"{100 * confidence:g} % interval"
    lines = [
        f"{'claim':<38}{'verdict':<14}{'number':>8}  {interval:<18} {'asked':<18}"
        f"{'holds':>7}{'fails':>7}{'unresolved':>12}"
    ]
    for claim in table:
        p = claim.measured
        limits = f"[{p.low:.3f}, {p.high:.3f}]"
        lines.append(
            f"{claim.name:<38}{claim.verdict:<14}{p.estimate:>8.3f}  {limits:<18} {claim.asked:<18}"
            f"{claim.holds:>7}{claim.fails:>7}{claim.unresolved:>12}"
        )
    lines += [f"  {claim.name}: {claim.note}" for claim in table if claim.note]
    lines += ["", *_numbers(studies(dataset)[0]), ""]
    status = dataset["status"].values
    for code, count in zip(*np.unique(status, return_counts=True), strict=True):
        lines.append(f"{count} x {STATUSES[code].replace('_', ' ')}. {Status[getattr(Status, STATUSES[code])]}")
        if STATUSES[code] not in _DECIDED:
            lines.append(f"    {_where(dataset, code)}")
    cells = f" in {len(studies(dataset))} cells" if "cell" in dataset.dims else ""
    attempts = int(np.sum(dataset["steps"].values, dtype=int) + np.sum(dataset["rejected"].values, dtype=int))
    useful = attempts / max(float(dataset.attrs["lane_attempts"]), 1.0)
    seconds = float(dataset.attrs["seconds"])
    time = f"{seconds:.1f} s, compiling included"
    lines.append(f"{status.size} trials{cells} in {time}; {useful:.0%} of the lanes' time went into them")
    return "\n".join(lines)


def _where(dataset: xr.Dataset, code) -> str:
    """The trials that ended with a status, as `replay` takes them."""
    found = []
    for i, study in enumerate(studies(dataset)):
        cell = f" of cell {i} ({_title(study)})"
        numbers = study["trial"].values[study["status"].values == code]
        found += [f"trial {number}{cell if 'cell' in dataset.dims else ''}" for number in numbers]
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _title(study: xr.Dataset) -> str:
    trial = trial_of(study)
    return f"r = {trial.neurons}, k = {trial.width}, n = {trial.samples}"


def _numbers(study: xr.Dataset) -> list[str]:
    """Medians and 90 % quantiles of what a study found."""
    certified = has_limit(study)
    everywhere = np.ones_like(certified)
    lines = [f"{_title(study):<38}{'median':>11}{'90 %':>11}  over"]
    for label, name, over in (
        ("linear regions", "regions", certified),
        ("margin over the best", "optimality", certified),
        ("population error", "population_error", certified),
        ("log loss at the end", "log_loss", certified),
        ("step attempts", "steps", everywhere),
    ):
        numbers = study[name].values + (study["rejected"].values if name == "steps" else 0)
        numbers = numbers[over & np.isfinite(numbers)]
        median, high = np.quantile(numbers, (0.5, 0.9)) if numbers.size else (np.nan, np.nan)
        which = "certified limits" if over is certified else "trials"
        lines.append(f"{label:<38}{median:>11.4g}{high:>11.4g}  {numbers.size} {which}")
    return lines
