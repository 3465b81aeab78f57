"""The sentences of the theory as statements about trials, each of which can turn out wrong.

A claim is a function from a study or a sweep to **holds**, **contradicted** or **undecided**, with the number it is
decided by and its exact interval. "With high probability" means with probability at least 1 − `delta`: the
theory names no such number, so it is a parameter here, and the table prints it.

**In several cells.** A statement about every cell is decided by the worst, and one that compares cells by all of them:
each interval then has confidence 1 − (1 − `confidence`)/cells, so that with probability `confidence` all of them cover
(Bonferroni). So a claim that is true is called contradicted, and one that is false is said to hold, with probability at
most 1 − `confidence`, for any number of trials (`tests/test_claims.py` counts it).

**Unresolved** trials count as failures for the lower end of an interval, as successes for the upper.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np
import xarray as xr

from gradflow.archive import studies
from gradflow.record import Verdict
from gradflow.statistics import Estimate, estimate_probability
from gradflow.theory import generalisation_bound, region_bound
from gradflow.trial import Trial

CONFIDENCE, DELTA = 0.99, 0.1
LAW = 0.01  # relative error of log t at which the loss follows its law
FALL = 1e-6  # relative decrease of a smoothed margin in one step that is an error of integration


class Claim(NamedTuple):
    """One claim, decided.

    - `name`: the statement;
    - `verdict`: `"holds"`, `"contradicted"` or `"undecided"`;
    - `measured`: the number that decides it, with its interval; `asked`: what that should be;
    - `holds`, `fails`, `unresolved`: trials behind it;
    - `note`: what to know about it.
    """

    name: str
    verdict: str
    measured: Estimate
    asked: str
    holds: int
    fails: int
    unresolved: int
    note: str

    def __str__(self) -> str:
        text = f"{self.name}: {self.verdict}, {self.measured}, asked {self.asked}; "
        text += f"{self.holds} hold, {self.fails} fail, {self.unresolved} unresolved"
        return f"{text} ({self.note})" if self.note else text


def check_levels(confidence: float, delta: float) -> None:
    """**Raises** `ValueError` unless both are probabilities that leave digits for what is computed from them."""
    for name, value in (("confidence", confidence), ("delta", delta)):
        if not isinstance(value, Real) or not 1e-9 <= value <= 1 - 1e-9:
            raise ValueError(f"{name} must lie strictly between 0 and 1, by 1e-9 at least, got {value!r}")


def decide(measured: Estimate, least: float = -math.inf, most: float = math.inf) -> str:
    """What an interval says about a number that should lie between `least` and `most`."""
    if measured.low >= least and measured.high <= most:
        return "holds"
    return "contradicted" if measured.high < least or measured.low > most else "undecided"


# In every cell


def training_succeeds(dataset: xr.Dataset, confidence=CONFIDENCE, delta=DELTA) -> Claim:
    """Gradient flow ends with perfect training accuracy (Safran, Vardi and Lee 2022, abstract)."""
    return probable("perfect training accuracy", dataset, coded("accuracy_verdict"), confidence, delta)


def regions_are_bounded(dataset: xr.Dataset, confidence=CONFIDENCE, delta=DELTA) -> Claim:
    """The limit has at most 32 r + 67 linear regions: a *reported* bound (`region_bound`).

    In a sweep, this is about the cells whose networks are wide enough to have more, if there are any.
    """
    cells = studies(dataset)
    wide = [cell for cell in cells if (trial := trial_of(cell)).width + 1 > region_bound(trial.neurons)]
    cells = wide or cells[:1]
    bounds = sorted({region_bound(trial_of(cell).neurons) for cell in cells})
    widths, neurons = (", ".join(str(getattr(trial_of(cell), name)) for cell in cells) for name in ("width", "neurons"))
    note = f"of the certified limit; 32 r + 67 = {', '.join(map(str, bounds))} is a reported bound"
    note += "" if wide else ", and vacuous"
    note += f"; here r = {neurons}, and a network of {widths} neurons can have a region more than neurons"
    claim = probable("at most 32r + 67 linear regions", cells, coded("regions_verdict"), confidence, delta, note)
    return claim if wide else _vacuous(claim)


def training_succeeds_with_few_regions(dataset: xr.Dataset, confidence=CONFIDENCE, delta=DELTA) -> Claim:
    """Both of these at once: the verdict of a trial."""
    return probable("both at once: a trial's verdict", dataset, coded("verdict"), confidence, delta)


def regions_are_twice_the_least(dataset: xr.Dataset, confidence=CONFIDENCE, delta=DELTA) -> Claim:
    """The limit has at most twice the linear regions that its labels force on it, or two more than switches.

    N has no more than one root in a region, so m label switches take m regions at least (one if m = 0), and the global
    optimum has just as many if m ≥ 3; it may have two more for fewer. Ours, from what the data show; not the paper's.
    """

    def counted(cell):
        certified = has_limit(cell)
        switches = cell["sample_switches"].values
        few = cell["regions"].values <= np.maximum(2 * switches, switches + 2)
        return certified & few, certified & ~few

    note = "of the certified limit; a sample with m switches needs m; our own law"
    return probable("at most max(2m, m + 2) regions", dataset, counted, confidence, delta, note)


def error_is_bounded(dataset: xr.Dataset, confidence=CONFIDENCE, delta=DELTA) -> Claim:
    """No limit has a population error above `generalisation_bound` for its regions and δ = `delta`.

    The bound is about classifiers that fit the sample, so trainings that failed have no part in this. In a sweep, it is
    about the cells of which the bound says something for 2 r + 2 regions, if there are any.
    """
    cells, most = studies(dataset), []
    trials = [trial_of(cell) for cell in cells]
    says = [float(generalisation_bound(2 * t.neurons + 2, t.samples, delta)) < 1 for t in trials]
    cells = [_trained(cell) for cell in [c for c, yes in zip(cells, says, strict=True) if yes] or cells[:1]]

    def counted(cell):
        certified = has_limit(cell)
        bound = np.asarray(generalisation_bound(cell["regions"].values, trial_of(cell).samples, delta))
        most.extend(bound[certified])
        low = cell["population_error"].values <= bound
        return certified & low, certified & ~low

    claim = probable("error within our VC bound", cells, counted, confidence, delta)
    sizes = ", ".join(str(n) for n in sorted({trial_of(cell).samples for cell in cells}))
    note = f"the bound is {min(most, default=math.nan):.2f} to {max(most, default=math.nan):.2f} at n = {sizes}"
    if any(b < 1 for b in most):
        few, many = (f(cell.sizes["trial"] for cell in cells) for f in (min, max))
        count = f"{few} to {many} in each of {len(cells)} cells" if len(cells) > 1 else f"{few} of them"
        return claim._replace(note=f"{note}; among trainings that did not fail, {count}")
    return _vacuous(claim._replace(note=f"{note}, and vacuous"))


def _vacuous(claim: Claim) -> Claim:
    """What could not have failed does not hold."""
    return claim._replace(verdict="undecided" if claim.verdict == "holds" else claim.verdict)


def loss_follows_its_law(dataset: xr.Dataset, confidence=CONFIDENCE, delta=DELTA, within=LAW) -> Claim:
    """At the end of training that succeeded, log t is within a share `within` of `loss_law`."""
    note = f"log t at the end, to {within:g} of itself"
    return _near("loss falls like 1/(t log t)", dataset, "law", within, confidence, delta, note)


def margin_never_falls(dataset: xr.Dataset, confidence=CONFIDENCE, delta=DELTA, within=FALL) -> Claim:
    """The smoothed margin never falls in the late phase (Lyu and Li 2020, Theorem 4.1), or by `within` in a step."""
    note = f"in any step of the late phase, to {within:g} of itself"
    return _near("smoothed margin never falls", dataset, "fall", within, confidence, delta, note)


def limit_is_optimal(dataset: xr.Dataset, confidence=CONFIDENCE, delta=DELTA) -> Claim:
    """The limit is the global maximum-margin classifier. Among trainings that did not fail: what those that did would
    have found, nobody can say. (The theory says KKT point, which need not be one.)
    """
    note = "where training did not fail, to 1e-8 in the margin"
    counted = coded("optimum_verdict")
    return probable("limit is the global optimum", _not_failed(dataset), counted, confidence, delta, note)


# Counting


class Tally(NamedTuple):
    holds: int
    fails: int
    unresolved: int


def trial_of(study: xr.Dataset) -> Trial:
    return Trial.from_json(study.attrs["trial"])


def has_limit(study: xr.Dataset) -> np.ndarray:
    return np.isin(study["limit_status"].values, (0, 1))


def coded(variable: str):
    def counted(study):
        codes = study[variable].values
        return codes == Verdict.holds.value, codes == Verdict.fails.value

    return counted


def tally(study: xr.Dataset, counted) -> Tally:
    holds, fails = (int(np.sum(which)) for which in counted(study))
    return Tally(holds, fails, study.sizes["trial"] - holds - fails)


def limits(study: xr.Dataset) -> Tally:
    """Trials with a certified limit, with failed training, and others."""
    certified = has_limit(study)
    return tally(study, lambda s: (certified, s["accuracy_verdict"].values == Verdict.fails.value))


def total(tallies) -> Tally:
    return Tally(*map(sum, zip(*tallies, strict=True)))


def estimated(tally: Tally, confidence) -> Estimate:
    if not sum(tally):
        return Estimate(math.nan, 0.0, 1.0, float(confidence))
    return estimate_probability(tally.holds, tally.holds + tally.fails, confidence, unresolved=tally.unresolved)


def least_of(parts: Sequence[Estimate], confidence) -> Estimate:
    """The smallest of several numbers whose intervals cover all at once."""
    return Estimate(
        min(p.estimate for p in parts), min(p.low for p in parts), min(p.high for p in parts), float(confidence)
    )


def probable(name, cells, counted, confidence, delta, note="") -> Claim:
    """A statement that should have probability 1 − `delta` in every cell, in as many trials as `counted` says."""
    tallies = [tally(cell, counted) for cell in (studies(cells) if isinstance(cells, xr.Dataset) else cells)]
    inner = 1 - (1 - confidence) / len(tallies)
    measured = least_of([estimated(tally, inner) for tally in tallies], confidence)
    return Claim(name, decide(measured, least=1 - delta), measured, f">= {1 - delta:g}", *total(tallies), note)


def _near(name, dataset, variable, within, confidence, delta, note) -> Claim:
    """That a number which the late phase has is at most `within`, among trainings that did not fail."""

    def counted(cell):
        value = cell[variable].values
        known = cell["separated"].values & np.isfinite(value)
        return known & (value <= within), known & (value > within)

    return probable(name, _not_failed(dataset), counted, confidence, delta, note)


def _not_failed(dataset: xr.Dataset) -> list[xr.Dataset]:
    """The cells, without trials whose training failed; those that may have are kept, and unresolved."""
    return [_trained(cell) for cell in studies(dataset)]


def _trained(cell: xr.Dataset) -> xr.Dataset:
    return cell.isel(trial=cell["accuracy_verdict"].values != Verdict.fails.value)
