"""Claims about trials can turn out either way, and are wrong no more often than they say.

Every claim is fed planted studies that break it, that fulfil it and that leave it open.
"""

import dataclasses
import json

import numpy as np
import planted
import pytest
from scipy.stats import binom

from gradflow import claim as claims
from gradflow import scaling
from gradflow.archive import load, studies, sweep_name, write
from gradflow.design import around, thorough
from gradflow.outcome import STATUSES
from gradflow.statistics import Estimate, estimate_probability, estimate_quantile
from gradflow.table import claims as all_claims
from gradflow.table import summary
from gradflow.theory import generalisation_bound, region_bound
from gradflow.trial import Trial

TRIAL = Trial()
MANY = 400


def share(holds, fails, unresolved=0):
    return ["holds"] * holds + ["fails"] * fails + ["unresolved"] * unresolved


@pytest.mark.parametrize(
    ("low", "high", "least", "most", "verdict"),
    [
        (0.91, 0.95, 0.9, np.inf, "holds"),
        (0.89, 0.95, 0.9, np.inf, "undecided"),
        (0.80, 0.89, 0.9, np.inf, "contradicted"),
        (0.9, 1.1, -np.inf, 1.0, "undecided"),
        (1.01, np.inf, -np.inf, 1.0, "contradicted"),
        (-np.inf, 1.0, -np.inf, 1.0, "holds"),
        (-np.inf, np.inf, 0.0, 1.0, "undecided"),
    ],
)
def test_an_interval_decides(low, high, least, most, verdict):
    assert claims.decide(Estimate(0.5, low, high, 0.99), least, most) == verdict


ONE_CELL = {
    claims.training_succeeds: (
        dict(accuracy_verdict=share(398, 2)),
        dict(accuracy_verdict=share(300, 100)),
        dict(accuracy_verdict=share(300, 2, 98)),
    ),
    claims.regions_are_bounded: (
        dict(regions_verdict=share(398, 2)),
        dict(regions_verdict=share(300, 100)),
        dict(accuracy_verdict=share(300, 100)),  # where training failed there is no limit to count
    ),
    claims.training_succeeds_with_few_regions: (
        dict(accuracy_verdict=share(398, 2)),
        dict(accuracy_verdict=share(340, 60), regions_verdict=share(350, 50)),
        dict(accuracy_verdict=share(360, 0, 40), regions_verdict=share(360, 0, 40)),
    ),
    claims.regions_are_twice_the_least: (
        dict(regions=[8] * 398 + [9] * 2),
        dict(regions=[8] * 300 + [9] * 100),
        dict(regions=[8] * 360 + [9] * 40),
    ),
    claims.error_is_bounded: (
        dict(population_error=np.full(MANY, 0.1)),
        dict(population_error=[0.1] * 300 + [0.95] * 100),
        dict(accuracy_verdict=share(350, 0, 50)),
    ),
    claims.loss_follows_its_law: (
        dict(law=[1e-3] * 398 + [0.1] * 2),
        dict(law=[1e-3] * 300 + [0.1] * 100),
        dict(law=[1e-3] * 300 + [np.nan] * 100),
    ),
    claims.margin_never_falls: (
        dict(fall=[1e-9] * 398 + [1e-3] * 2),
        dict(fall=[1e-9] * 300 + [1e-3] * 100),
        dict(accuracy_verdict=share(300, 0, 100)),
    ),
    claims.limit_is_optimal: (
        dict(optimum_verdict=share(398, 2)),
        dict(optimum_verdict=share(300, 100)),
        dict(optimum_verdict=share(300, 0, 100)),
    ),
}
CASES = [
    pytest.param(claim, verdict, columns, id=f"{claim.__name__} {verdict}")
    for claim, cases in ONE_CELL.items()
    for verdict, columns in zip(("holds", "contradicted", "undecided"), cases, strict=True)
]


@pytest.mark.parametrize(("claim", "verdict", "columns"), CASES)
def test_every_claim_about_trials_can_turn_out_either_way(claim, verdict, columns):
    # n so large that the VC bound says something, and k that the bound on regions does.
    telling = {claims.error_is_bounded: dict(samples=1000), claims.regions_are_bounded: dict(width=1000)}
    trial = dataclasses.replace(TRIAL, **telling.get(claim, {}))
    assert claim(planted.study(trial, MANY, **columns)).verdict == verdict


def test_what_was_found_is_counted():
    found = claims.training_succeeds(planted.study(TRIAL, 10, accuracy_verdict=share(7, 2, 1)), 0.9, 0.2)
    assert (found.holds, found.fails, found.unresolved) == (7, 2, 1) and found.asked == ">= 0.8"
    assert found.measured == estimate_probability(7, 9, 0.9, unresolved=1)


def test_training_that_failed_is_no_part_of_what_the_late_phase_claims():
    study = planted.study(TRIAL, MANY, accuracy_verdict=share(200, 200), law=[1e-3] * 200 + [np.nan] * 200)
    found = claims.loss_follows_its_law(study)
    assert (found.holds, found.fails, found.unresolved, found.verdict) == (200, 0, 0, "holds")
    nothing = claims.loss_follows_its_law(planted.study(TRIAL, 5, accuracy_verdict=share(0, 5)))
    assert nothing.verdict == "undecided" and (nothing.measured.low, nothing.measured.high) == (0, 1)


def test_training_that_failed_is_within_no_bound():
    trial = dataclasses.replace(TRIAL, samples=1000)
    few = claims.error_is_bounded(planted.study(trial, MANY, accuracy_verdict=share(5, MANY - 5)))
    assert (few.holds, few.fails, few.unresolved, few.verdict) == (5, 0, 0, "undecided")
    assert "5 of them" in few.note


def test_a_vacuous_bound_is_called_vacuous():
    narrow = dataclasses.replace(TRIAL, neurons=4, width=194)
    wide = dataclasses.replace(narrow, width=195)
    assert region_bound(4) == 195
    notes = [claims.regions_are_bounded(planted.study(t, 5)).note for t in (narrow, wide)]
    assert "vacuous" in notes[0] and "194 neurons" in notes[0] and "195 is a reported bound" in notes[0]
    assert "vacuous" not in notes[1] and "195 is a reported bound" in notes[1]
    # In a sweep it is about the cells where it says something.
    mixed = planted.sweep(planted.study(narrow, 400), planted.study(wide, 400, regions_verdict=share(100, 300)))
    assert claims.regions_are_bounded(mixed).verdict == "contradicted"
    # What could not have failed does not hold.
    assert claims.regions_are_bounded(planted.study(narrow, MANY)).verdict == "undecided"
    assert claims.regions_are_bounded(planted.study(wide, MANY)).verdict == "holds"
    small = claims.error_is_bounded(planted.study(TRIAL, MANY))
    assert small.measured.low > 0.9 and small.verdict == "undecided"
    assert "vacuous" in small.note and float(generalisation_bound(4, 50, 0.1)) > 1


def test_the_worst_cell_decides():
    good, bad = planted.study(TRIAL, MANY), dataclasses.replace(TRIAL, width=8)
    bad = planted.study(bad, MANY, accuracy_verdict=share(100, 300))
    assert claims.training_succeeds(good).verdict == "holds"
    both = claims.training_succeeds(planted.sweep(good, bad))
    assert both.verdict == "contradicted" and both.measured.estimate == 0.25


# Between cells


def along_samples(probabilities, **columns):
    cells = []
    for n, p in zip((25, 50, 100), probabilities, strict=True):
        trial = dataclasses.replace(TRIAL, samples=n)
        here = {name: values[n] for name, values in columns.items()}
        cells.append(
            planted.study(trial, MANY, accuracy_verdict=share(round(p * MANY), MANY - round(p * MANY)), **here)
        )
    return planted.sweep(*cells)


@pytest.mark.parametrize(
    ("probabilities", "verdict"),
    [((0.99, 0.99, 0.985), "holds"), ((0.95, 0.9, 0.5), "contradicted"), ((0.95, 0.9, 0.87), "undecided")],
)
def test_independence_of_samples(probabilities, verdict):
    found = scaling.success_does_not_depend_on_samples(along_samples(probabilities))
    assert found.verdict == verdict
    assert found.measured.estimate == pytest.approx(max(probabilities) - min(probabilities), abs=2e-3)
    assert "samples 25" in found.note


@pytest.mark.parametrize(
    ("power", "verdict"), [(-1.2, "holds"), (-0.3, "contradicted"), (-0.75, "undecided"), (0.5, "contradicted")]
)
def test_how_the_error_falls(power, verdict):
    spread = np.linspace(0.5, 1.5, MANY)
    sweep = along_samples((1, 1, 1), population_error={n: 0.1 * spread * (n / 25) ** power for n in (25, 50, 100)})
    found = scaling.error_falls_with_samples(sweep)
    assert found.verdict == verdict and found.measured.estimate == pytest.approx(power)
    assert found.measured.low < power < found.measured.high


def along_neurons(regions=lambda r: 2 * r, success=lambda r, ratio: 1.0, ratios=(8,)):
    cells = []
    for r in (4, 8, 16):
        for ratio in ratios:
            trial = Trial(neurons=r, switches=r, width=ratio * r, samples=10 * r, min_run=0.01)
            good = round(success(r, ratio) * MANY)
            columns = dict(accuracy_verdict=share(good, MANY - good), regions=[regions(r)] * MANY)
            cells.append(planted.study(trial, MANY, **columns))
    return planted.sweep(*cells)


@pytest.mark.parametrize(
    ("regions", "verdict", "power"),
    [
        (lambda r: 2 * r, "holds", 1.0),
        (lambda r: r * r, "contradicted", 2.0),
        (lambda r: round(r**1.25), "holds", None),
    ],
)
def test_how_regions_grow(regions, verdict, power):
    found = scaling.regions_grow_linearly(along_neurons(regions))
    assert found.verdict == verdict
    if power:  # all trials have as many: quantiles are exact
        assert found.measured.low == found.measured.high == pytest.approx(power)
    assert f"{regions(16)} at neurons 16" in found.note


def test_few_trials_do_not_decide_how_regions_grow():
    sweep = along_neurons().isel(trial=slice(10))
    found = scaling.regions_grow_linearly(sweep)
    assert found.verdict == "undecided" and found.measured.high == np.inf
    assert "takes 57 certified limits or more" in found.note and "10 and 0 unresolved at neurons 4" in found.note
    assert "certified limits or more" not in scaling.regions_grow_linearly(along_neurons()).note


@pytest.mark.parametrize(
    ("success", "verdict"),
    [
        (lambda r, ratio: 0.99 if ratio >= 8 else 0.5, "holds"),  # one ratio is enough
        (lambda r, ratio: 0.99 if ratio >= r else 0.5, "contradicted"),  # k = r² is needed
        (lambda r, ratio: 0.9, "undecided"),
    ],
)
def test_whether_a_width_in_proportion_suffices(success, verdict):
    found = scaling.width_suffices(along_neurons(success=success, ratios=(4, 8)))
    assert found.verdict == verdict and "at 4 r" in found.note and "at 8 r" in found.note


def test_cells_that_do_not_compare_are_refused():
    odd = planted.sweep(planted.study(TRIAL, 9), planted.study(dataclasses.replace(TRIAL, samples=99, width=9), 9))
    for claim in (scaling.success_does_not_depend_on_samples, scaling.regions_grow_linearly, scaling.width_suffices):
        with pytest.raises(ValueError, match="cells"):
            claim(odd)
        with pytest.raises(ValueError, match="cells"):
            claim(planted.study(TRIAL, 9))
    assert scaling.family(odd, scaling.all_but("samples"), "samples") is None


def test_cells_are_judged_at_the_confidence_of_all_together():
    """Bonferroni: each of the cells that a claim compares has its share of 1 − confidence."""
    counts = {25: 380, 50: 372, 100: 360}
    sweep = along_samples([counts[n] / MANY for n in (25, 50, 100)])
    parts = [estimate_probability(s, MANY, 1 - 0.01 / 3) for s in counts.values()]
    found = scaling.success_does_not_depend_on_samples(sweep).measured
    low, high = [p.low for p in parts], [p.high for p in parts]
    assert (found.low, found.high) == (max(0, max(low) - min(high)), max(high) - min(low))
    worst = claims.training_succeeds(sweep).measured
    assert (worst.low, worst.high) == (min(low), min(high))

    widths = along_neurons(success=lambda r, ratio: 0.9, ratios=(4, 8))
    expected = estimate_probability(360, MANY, 1 - 0.01 / 6)
    found = scaling.width_suffices(widths).measured
    assert (found.low, found.high) == (expected.low, expected.high)

    error = np.linspace(0.01, 0.4, MANY)
    falls = scaling.error_falls_with_samples(along_samples((1, 1, 1), population_error={n: error for n in counts}))
    end = estimate_quantile(error, 0.9, 1 - 0.01 / 2)
    assert falls.measured.low == pytest.approx(float(np.log(end.low / end.high) / np.log(4)))
    regions = np.arange(1, MANY + 1)
    sweep = planted.sweep(
        *(planted.study(Trial(neurons=r, switches=r, width=8 * r, samples=10 * r, min_run=0.01), MANY, regions=regions)
          for r in (4, 8))
    )  # fmt: skip
    end = estimate_quantile(regions, 0.9, 1 - 0.01 / 2)
    assert scaling.regions_grow_linearly(sweep).measured.high == pytest.approx(np.log2(end.high / end.low))


def test_unresolved_trials_widen_what_is_said_of_quantiles():
    error = np.linspace(0.01, 0.4, MANY)
    sure = scaling.error_falls_with_samples(
        along_samples((1, 1, 1), population_error={n: error for n in (25, 50, 100)})
    )
    cells = []
    for n in (25, 50, 100):
        outcome = ["holds"] * (MANY - 20) + ["unresolved"] * 10 + ["fails"] * 10
        trial = dataclasses.replace(TRIAL, samples=n)
        cells.append(planted.study(trial, MANY, population_error=error, accuracy_verdict=outcome))
    open_ = scaling.error_falls_with_samples(planted.sweep(*cells))
    end = estimate_quantile(error[:-20], 0.9, 1 - 0.01 / 2, unresolved=10)
    assert open_.measured.low == pytest.approx(float(np.log(end.low / end.high) / np.log(4)))
    assert open_.measured.low < sure.measured.low
    lost = planted.study(TRIAL, MANY, limit_status=[0] * 100 + [3] * 300, optimum_verdict=share(100, 0, 300))
    assert claims.limit_is_optimal(lost).verdict == "undecided" and claims.limit_is_optimal(lost).unresolved == 300


@pytest.mark.parametrize("switches", [0, 1, 2, 3, 4, 5, None])
@pytest.mark.parametrize("min_run", [0.05, 0.09])
def test_every_claim_can_be_decided_around_any_trial(switches, min_run):
    """A default of this design once compared cells with other switches, and gave up on 2 switches by a last digit."""
    for trial in (Trial(switches=switches, min_run=min_run), Trial(5, 40, 50, switches, min_run)):
        for design, number in ((around, 7), (thorough, 31)):
            cells = design(trial)
            assert cells[0] == trial and len(set(cells)) == len(cells) <= number
            if switches is not None:
                assert {c.switches for c in cells if c.neurons == trial.neurons} == {switches}
                assert (switches == 0) == all(c.switches == 0 for c in cells)
            sweep = planted.sweep(*(planted.study(cell, 2, population_error=0.01) for cell in cells))
            assert len(all_claims(sweep)) == 12


def test_the_thorough_sweep_has_the_sizes_it_promises():
    cells = thorough(TRIAL)
    of = {kind: scaling.family(planted.sweep(*(planted.study(c, 1) for c in cells)), kind, along)
          for kind, along in ((scaling.all_but("samples"), "samples"), (scaling.proportional, "neurons"))}  # fmt: skip
    samples, neurons = of.values()
    assert sorted(samples["samples"].values.tolist()) == [25, 50, 100, 200]
    assert sorted(neurons["neurons"].values.tolist()) == [4, 6, 8]
    assert (neurons["width"] == 8 * neurons["neurons"]).all()
    assert {cell.scheme for cell in cells} == {"balanced", "gaussian", "he", "sphere"}
    assert any(cell.width + 1 > region_bound(cell.neurons) for cell in cells)


def test_which_cells_are_compared_does_not_depend_on_their_order():
    """Cells that differ in min_run too: the first of them counts, and the others are refused by the claim itself."""

    def cell(r, k, min_run, good):
        trial = Trial(neurons=r, switches=r, width=k, samples=10 * r, min_run=min_run)
        return planted.study(trial, MANY, accuracy_verdict=share(good, MANY - good))

    cells = [cell(4, 16, 0.01, 400), cell(8, 32, 0.01, 400), cell(4, 32, 0.01, 400), cell(8, 64, 0.01, 400)]
    with_another = planted.sweep(*cells, cell(4, 16, 0.02, 0))
    assert [c.measured for c in all_claims(with_another)] == [c.measured for c in all_claims(planted.sweep(*cells))]
    with pytest.raises(ValueError, match="cells must differ"):
        scaling.width_suffices(with_another)


def test_selections_that_are_no_sweep_say_so():
    sweep = planted.sweep(*(planted.study(dataclasses.replace(TRIAL, width=k), 3) for k in (8, 16)))
    grid = sweep.set_index(cell=["width", "samples"]).unstack("cell")
    for odd in (sweep.isel(cell=[]), sweep.isel(trial=0), grid):
        with pytest.raises(ValueError, match="sweep"):
            summary(odd)
    with pytest.raises(ValueError, match="by 1e-9 at least"):
        summary(sweep, delta=1e-17)


# How often they are wrong


def wrong(decides, p, trials, confidence=0.9):
    """How often a claim about a probability p is decided wrongly, exactly: by summing over all outcomes."""
    return sum(binom.pmf(s, trials, p) for s in range(trials + 1) if decides(s, trials, confidence))


@pytest.mark.parametrize("trials", [20, 64, 256])
@pytest.mark.parametrize("delta", [0.1, 0.3])
def test_false_alarms_about_a_probability_are_as_rare_as_stated(trials, delta):
    """At the border, where it is hardest: P = 1 − δ is called contradicted, or just below it called to hold."""

    def verdict(s, n, confidence):
        return claims.decide(estimate_probability(s, n, confidence), least=1 - delta)

    assert wrong(lambda *a: verdict(*a) == "contradicted", 1 - delta, trials) <= 0.05
    assert wrong(lambda *a: verdict(*a) == "holds", 1 - delta - 1e-12, trials) <= 0.05
    # And not by being idle: half a δ away, 256 trials decide.
    if trials == 256:
        assert wrong(lambda *a: verdict(*a) == "holds", 1 - delta / 2, trials) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [0, 3])
def test_false_alarms_between_cells_are_as_rare_as_stated(hidden):
    """300 sweeps in which all is as it may just be, at 90 % confidence; the `hidden` largest values are unresolved."""
    rng = np.random.default_rng(1)
    trials, sweeps, alarms = 64, 300, {"independent": 0, "width": 0, "linear": 0}

    def outcome(p):
        return np.where(rng.random(trials) < p, 1, 2)

    for _ in range(sweeps):
        along_n = [
            planted.study(dataclasses.replace(TRIAL, samples=n), trials, accuracy_verdict=outcome(p))
            for n, p in ((25, 0.95), (50, 0.9), (100, 0.85))  # a range of 0.1 is allowed
        ]
        found = scaling.success_does_not_depend_on_samples(planted.sweep(*along_n), 0.9)
        alarms["independent"] += found.verdict == "contradicted"
        along_r = []
        for r, factor in ((4, 1.0), (8, 2**1.25)):  # the exponent 1.25 is allowed
            trial = Trial(neurons=r, switches=r, width=8 * r, samples=10 * r, min_run=0.01)
            regions = np.round(100 * factor * rng.geometric(0.3, trials))
            verdict = outcome(0.9)  # and so is P = 0.9
            verdict[np.argsort(regions)[trials - hidden :]] = 0
            along_r.append(planted.study(trial, trials, regions=regions, accuracy_verdict=verdict))
        sweep = planted.sweep(*along_r)
        alarms["linear"] += scaling.regions_grow_linearly(sweep, 0.9, 0.7).verdict == "contradicted"
        alarms["width"] += scaling.width_suffices(sweep, 0.9).verdict == "contradicted"
    # 10 % and three standard errors are 15.2 %.
    assert all(count <= 0.152 * sweeps for count in alarms.values()), alarms


# All of them


def test_all_claims_of_a_designed_sweep():
    sweep = planted.sweep(*(planted.study(trial, 50, population_error=0.01) for trial in around(TRIAL)))
    found = all_claims(sweep)
    assert len(found) == 12 and all(claim.verdict in ("holds", "contradicted", "undecided") for claim in found)
    assert len(all_claims(studies(sweep)[0])) == 8
    text = summary(sweep, confidence=0.95)
    assert "95 % interval" in text and "350 trials in 7 cells" in text
    rows = text.split("\n")[: 1 + len(found)]
    assert len({len(row) for row in rows}) == 1
    for claim, row in zip(found, rows[1:], strict=True):
        assert (row.startswith(claim.name) and claim.name + ": " in text) or not claim.note
    assert "trial 7 of cell 2 (r = 4, k = 32, n = 100)" not in text
    status = np.full(50, STATUSES.index("certified"))
    status[7] = STATUSES.index("step_limit")
    odd = planted.sweep(planted.study(TRIAL, 50), planted.study(around(TRIAL)[2], 50, status=status))
    assert "1 x step limit" in summary(odd) and "    trial 7 of cell 1 (r = 4, k = 32, n = 100)\n" in summary(odd)
    assert "    trial 7\n" in summary(studies(odd)[1])
    assert len(thorough(TRIAL)) == len(set(thorough(TRIAL))) == 31 and thorough(TRIAL)[0] == TRIAL


def test_a_claim_depends_on_the_outcome_and_its_cells_do_not():
    cells = around(TRIAL)
    good = planted.sweep(*(planted.study(t, 9) for t in cells))
    bad = planted.sweep(*(planted.study(t, 9, accuracy_verdict=share(0, 9)) for t in cells))
    kind = scaling.all_but("samples")
    chosen = [scaling.family(s, kind, "samples").coords["samples"].values.tolist() for s in (good, bad)]
    assert chosen[0] == chosen[1] == [50, 25, 100]


def test_a_sweep_is_kept_and_taken_apart(tmp_path):
    laws = [dataclasses.replace(TRIAL, switches=None, min_run=0.1), TRIAL]
    sweep = planted.sweep(*(planted.study(trial, 6) for trial in laws))
    write(sweep, tmp_path / sweep_name(laws))
    again = load(tmp_path)
    for found in (sweep, again, again.isel(cell=[1, 0]).isel(cell=[1, 0])):
        assert [claims.trial_of(study) for study in studies(found)] == laws
    (one,) = studies(again.isel(cell=1))
    assert claims.trial_of(one) == TRIAL and one["verdict"].dims == ("trial",)
    assert one.attrs["key"] == studies(sweep)[1].attrs["key"] and json.loads(one.attrs["key"])
    assert again["switches"].values.tolist() == [-1, 4]
    grid = again.set_index(cell=["switches", "min_run"]).unstack("cell")
    assert grid["verdict"].sel(switches=4, min_run=0.05).sizes == {"trial": 6}
