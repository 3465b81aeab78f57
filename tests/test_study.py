"""A study: the same trials however they are run, kept safely, and counted honestly.

What is about files, batches and counts is tested on a stand-in for the trial, which draws its record at random from the
key and compiles in no time; what is about numbers, on real trials that separate quickly.
"""

import dataclasses
import functools
import itertools
import json
import os

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import xarray as xr
from scipy.io import netcdf_file

from gradflow import study
from gradflow.flow import Status
from gradflow.statistics import estimate_probability
from gradflow.study import claims, load, replay, run_study, summary
from gradflow.trial import STATUSES, Record, Trial, Verdict

QUICK = Trial(neurons=2, switches=1, width=32, samples=20, log_loss=-5, max_steps=2000)
KEY = jr.key(5)


# The stand-in

FAKE = dataclasses.replace(QUICK, samples=19, width=1000)  # sizes that no real trial has: compiled code is shared
_widths = itertools.count(1001)


@pytest.fixture
def traces(monkeypatch):
    """Puts the stand-in in place of the trial's record, and lists its traces."""
    traces = []

    def record(sizes, values, key):
        traces.append(sizes)
        bits = jr.bits(key, (len(Record._fields),), jnp.uint32)
        outcome = {}
        for i, (name, (kind, *_)) in enumerate(study._VARIABLES.items()):
            real = bits[i].astype(values.scale.dtype) / 2**32 * values.scale
            outcome[name] = real if kind is np.float64 else (bits[i] % 3).astype(kind)
        return Record(**outcome)

    monkeypatch.setattr(study, "record", record)
    return traces


@pytest.fixture
def trial(traces):
    """The stand-in trial; compiled once for each batch size, for all tests."""
    return FAKE


@pytest.fixture
def fresh(traces):
    """A stand-in trial that nothing has been compiled for, and its traces."""
    return dataclasses.replace(FAKE, width=next(_widths)), traces


def same(a: xr.Dataset, b: xr.Dataset) -> bool:
    """Equal in every variable, coordinate and meaning; provenance may differ."""
    return a.drop_attrs(deep=False).identical(b.drop_attrs(deep=False))


def first(dataset, trials):
    return dataset.isel(trial=slice(trials))


# Which trials there are


def test_trial_i_is_the_key_folded_with_i(trial):
    dataset = run_study(trial, key=KEY, trials=7, batch=3)
    one = jax.jit(lambda key: study.record(trial.sizes, trial.values, key))
    for i in range(7):
        alone = one(jr.fold_in(KEY, i))
        for name in Record._fields:
            assert dataset[name].values[i] == getattr(alone, name)
    assert len(np.unique(dataset["margin"])) == 7
    assert dataset["trial"].values.tolist() == list(range(7))


@pytest.mark.parametrize("batch", [1, 3, 4, 12, 50, None])
def test_batch_size_changes_nothing(trial, batch):
    assert same(run_study(trial, key=KEY, trials=12, batch=batch), run_study(trial, key=KEY, trials=12, batch=5))


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_change_nothing(trial, threads, monkeypatch):
    expected = run_study(trial, key=KEY, trials=30, batch=1)
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    assert same(run_study(trial, key=KEY, trials=30, batch=1), expected)


def test_order_of_completion_changes_nothing(trial, monkeypatch):
    expected = run_study(trial, key=KEY, trials=20, batch=2)
    monkeypatch.setattr(study, "as_completed", lambda futures: reversed(list(futures)))
    assert same(run_study(trial, key=KEY, trials=20, batch=2), expected)


def test_first_half_is_the_smaller_study(trial):
    assert same(first(run_study(trial, key=KEY, trials=24), 12), run_study(trial, key=KEY, trials=12))
    assert not same(run_study(trial, key=jr.key(6), trials=12), run_study(trial, key=KEY, trials=12))


def test_older_keys_are_the_same_keys(trial):
    assert same(run_study(trial, key=jr.PRNGKey(5), trials=3), run_study(trial, key=KEY, trials=3))


def test_one_trace_for_a_study_and_none_for_new_numbers(fresh):
    trial, traces = fresh
    run_study(trial, key=KEY, trials=50, batch=4)
    assert len(traces) == 1
    other = dataclasses.replace(trial, rtol=1e-5, scale=3.0, log_loss=-7, max_steps=5)
    assert run_study(other, key=jr.key(9), trials=9, batch=4)["margin"].max() > 1
    assert len(traces) == 1
    # The count can fail.
    run_study(trial, key=KEY, trials=50, batch=5)
    assert len(traces) == 2


def test_progress_counts(trial):
    calls = []
    dataset = run_study(trial, key=KEY, trials=10, batch=4, progress=lambda *call: calls.append(call))
    assert sorted(done for done, _ in calls)[-1] == 10 and len(calls) == 3
    assert all(sum(counts.values()) == done for done, counts in calls)
    assert calls[-1][1] == {v.name: int((dataset["verdict"] == v.value).sum()) for v in Verdict}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(trials=0), "trials must be at least 1"),
        (dict(trials=2.5), "trials must be a whole number"),
        (dict(batch=0), "batch must be at least 1"),
        (dict(batch="all"), "batch must be a whole number"),
        (dict(key=0), "key must be a JAX random key"),
        (dict(key=jnp.zeros(3)), "key must be a JAX random key"),
        (dict(key=jr.split(jr.key(0), 4)), "takes one key"),
    ],
)
def test_nonsense_is_refused(fresh, change, message):
    trial, traces = fresh
    with pytest.raises(ValueError, match=message):
        run_study(trial, **{"key": KEY, "trials": 3} | change)
    assert not traces


def test_deep_log_loss_needs_float64(fresh, tmp_path):
    trial, traces = fresh
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(ValueError, match="needs float64"):
            run_study(dataclasses.replace(trial, log_loss=-60), key=jr.key(0), trials=2, path=tmp_path / "s")
    finally:
        jax.config.update("jax_enable_x64", True)
    assert not traces and not (tmp_path / "s").exists()


# Files


def test_file_holds_everything(trial, tmp_path):
    dataset = run_study(trial, key=KEY, trials=5, path=tmp_path / "deep" / "down")
    loaded = load(tmp_path / "deep" / "down")
    assert loaded.identical(dataset)
    assert load(tmp_path / "deep" / "down" / "study.nc").identical(dataset)
    assert {name: variable.dtype for name, variable in loaded.items()} == {
        name: np.dtype(kind) for name, (kind, *_) in study._VARIABLES.items()
    }
    assert os.listdir(tmp_path / "deep" / "down") == ["study.nc"]


def test_file_is_plain_netcdf_with_units_and_flags(trial, tmp_path):
    dataset = run_study(trial, key=KEY, trials=5, path=tmp_path)
    assert set(dataset.data_vars) == set(Record._fields)
    with netcdf_file(tmp_path / "study.nc", mmap=False) as file:
        assert file.dimensions == {"trial": 5}
        for name in Record._fields:
            variable = file.variables[name]
            assert variable.units == b"1" and len(variable.long_name) > 5
            np.testing.assert_array_equal(variable[:], dataset[name].values)
        for name, names in (("verdict", [v.name for v in Verdict]), ("status", STATUSES), ("separated", ["no", "yes"])):
            variable = file.variables[name]
            assert variable.flag_meanings.decode().split() == list(names)
            assert list(variable.flag_values) == list(range(len(names)))
            assert np.asarray(variable.flag_values).dtype.kind == variable[:].dtype.kind == "i"
        assert Trial.from_json(file.trial.decode()) == trial


def test_provenance_is_complete(trial):
    attrs = run_study(trial, key=jr.key(7, impl="rbg"), trials=2).attrs
    assert Trial.from_json(attrs["trial"]) == trial
    assert json.loads(attrs["key"]) == {"impl": "rbg", "data": np.asarray(jr.key_data(jr.key(7, impl="rbg"))).tolist()}
    versions = json.loads(attrs["versions"])
    assert versions.keys() >= {"gradflow", "jax", "equinox", "diffrax", "numpy", "xarray", "python"}
    assert versions["jax"] == jax.__version__ and versions["numpy"] == np.__version__
    assert attrs["backend"] == jax.default_backend() and attrs["dtype"] == "float64"
    assert attrs["created"].endswith("+00:00") and attrs["seconds"] > 0


def test_smaller_study_is_extended_and_not_run_again(trial, tmp_path):
    run_study(trial, key=KEY, trials=5, path=tmp_path, batch=2)
    rewrite(tmp_path, lambda dataset: dataset["margin"].values.__setitem__(2, 123.0))
    calls = []
    whole = run_study(trial, key=KEY, trials=12, path=tmp_path, batch=2, progress=lambda done, _: calls.append(done))
    assert calls[0] == 5 and calls[-1] == 12 and len(calls) == 1 + 4
    assert whole["margin"].values[2] == 123
    whole["margin"].values[2] = float(run_study(trial, key=KEY, trials=3)["margin"][2])
    assert same(whole, run_study(trial, key=KEY, trials=12))
    assert load(tmp_path).sizes["trial"] == 12
    history = [line.split(" on ")[0] for line in whole.attrs["history"].split("\n")]
    assert [line[line.index("trials") :] for line in history] == ["trials 0 to 4", "trials 5 to 11"]


def test_fewer_trials_are_read_and_nothing_is_written(fresh, tmp_path):
    trial, traces = fresh
    whole = run_study(trial, key=KEY, trials=9, path=tmp_path)
    before = (tmp_path / "study.nc").read_bytes()
    for trials in (9, 4):
        assert same(run_study(trial, key=KEY, trials=trials, path=tmp_path), first(whole, trials))
    assert len(traces) == 1 and (tmp_path / "study.nc").read_bytes() == before


@pytest.mark.parametrize("after", [1, 3])
def test_interrupted_study_goes_on(trial, tmp_path, after):
    calls = []

    def interrupt(done, counts):
        calls.append(done)
        if len(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(trial, key=KEY, trials=400, path=tmp_path, batch=2, progress=interrupt)
    kept = load(tmp_path)
    # At least what had been reported was kept, and what was kept is right.
    assert calls[-1] <= kept.sizes["trial"]
    whole = run_study(trial, key=KEY, trials=400)
    assert same(kept, first(whole, kept.sizes["trial"]))
    assert same(run_study(trial, key=KEY, trials=400, path=tmp_path, batch=2), whole)


def test_a_failing_batch_loses_no_other(trial, tmp_path, monkeypatch):
    records = study._records

    def failing(run, values, key, wanted, batch):
        if wanted.start == 6:
            raise RuntimeError("out of memory")
        return records(run, values, key, wanted, batch)

    monkeypatch.setattr(study, "_records", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_study(trial, key=KEY, trials=20, path=tmp_path, batch=2)
    # Later batches may be done too, but without the missing one they are no prefix.
    assert load(tmp_path).sizes["trial"] == 6


def test_unfinished_study_is_saved_on_the_way(trial, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_CHECKPOINT", 0.0)
    sizes = []

    def look(done, counts):
        sizes.append(load(tmp_path).sizes["trial"] if (tmp_path / "study.nc").exists() else 0)

    run_study(trial, key=KEY, trials=10, path=tmp_path, batch=1, progress=look)
    assert sizes[0] == 0 and 0 < sizes[-1] < 10 and load(tmp_path).sizes["trial"] == 10


def test_another_study_is_never_overwritten(trial, tmp_path):
    run_study(trial, key=KEY, trials=3, path=tmp_path)
    before = (tmp_path / "study.nc").read_bytes()
    other = dataclasses.replace(trial, rtol=1e-5)
    with pytest.raises(ValueError, match="another trial") as caught:
        run_study(other, key=KEY, trials=30, path=tmp_path)
    assert all(text in str(caught.value) for text in (trial.to_json(), other.to_json(), "study.nc"))
    with pytest.raises(ValueError, match="another key") as caught:
        run_study(trial, key=jr.key(77), trials=30, path=tmp_path)
    assert "77]" in str(caught.value) and "5]" in str(caught.value)
    assert (tmp_path / "study.nc").read_bytes() == before
    rewrite(tmp_path, lambda dataset: dataset.attrs.update(dtype="float32"))
    with pytest.raises(ValueError, match="another dtype"):
        run_study(trial, key=KEY, trials=30, path=tmp_path)


def test_a_larger_study_from_elsewhere_is_not_replaced(trial, tmp_path):
    """Two processes on one study: whoever got further stays."""

    def meanwhile(done, counts):
        if not (tmp_path / "a" / "study.nc").exists():
            (tmp_path / "a").mkdir(exist_ok=True)
            os.rename(tmp_path / "b" / "study.nc", tmp_path / "a" / "study.nc")

    run_study(trial, key=KEY, trials=9, path=tmp_path / "b")
    assert run_study(trial, key=KEY, trials=4, path=tmp_path / "a", progress=meanwhile).sizes["trial"] == 4
    assert load(tmp_path / "a").sizes["trial"] == 9


def test_torn_files_are_refused(trial, tmp_path):
    run_study(trial, key=KEY, trials=3, path=tmp_path)
    whole = (tmp_path / "study.nc").read_bytes()
    contents = [whole[:cut] for cut in range(0, len(whole), 211)] + [whole[:-1], b"not netCDF at all\n" * 50]
    for content in contents:
        (tmp_path / "study.nc").write_bytes(content)
        with pytest.raises(ValueError, match=r"study\.nc"):
            load(tmp_path)
    with pytest.raises(ValueError, match=r"study\.nc"):
        run_study(trial, key=KEY, trials=3, path=tmp_path)
    assert (tmp_path / "study.nc").read_bytes() == contents[-1]


@pytest.mark.parametrize("drop", ["verdict", "margin", "key"])
def test_files_of_something_else_are_refused(trial, tmp_path, drop):
    run_study(trial, key=KEY, trials=3, path=tmp_path)
    rewrite(tmp_path, lambda dataset: dataset.attrs.pop("key") if drop == "key" else dataset.__delitem__(drop))
    with pytest.raises(ValueError, match=f"not a gradflow study.*{drop}"):
        run_study(trial, key=KEY, trials=3, path=tmp_path)


def test_leftovers_of_a_crash_are_not_data(trial, tmp_path):
    (tmp_path / ".study.nc.1234.partial").write_bytes(b"half a file")
    with pytest.raises(FileNotFoundError):
        load(tmp_path)
    assert run_study(trial, key=KEY, trials=3, path=tmp_path).identical(load(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".study.nc.1234.partial", "study.nc"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_file(trial, tmp_path, monkeypatch, step):
    run_study(trial, key=KEY, trials=3, path=tmp_path)
    before = (tmp_path / "study.nc").read_bytes()

    def crash(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, crash)
    with pytest.raises(OSError, match="no space"):
        run_study(trial, key=KEY, trials=6, path=tmp_path)
    assert (tmp_path / "study.nc").read_bytes() == before and os.listdir(tmp_path) == ["study.nc"]


def test_path_that_is_a_file_is_refused(trial, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="taken is a file"):
        run_study(trial, key=KEY, trials=3, path=tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def rewrite(path, edit):
    """Tamper with a study on disk."""
    dataset = load(path)
    edit(dataset)
    content = dataset.to_netcdf(engine="scipy", format="NETCDF3_64BIT")
    (path / "study.nc").write_bytes(bytes(content))


# Counting


def planted(trial, accuracy, regions, status="reached") -> xr.Dataset:
    """A study whose verdicts are written by hand."""
    count = len(accuracy)
    dataset = run_study(trial, key=KEY, trials=count)
    for name, values in (("accuracy_verdict", accuracy), ("regions_verdict", regions)):
        dataset[name].values[:] = [Verdict[value].value for value in values]
    both = np.stack([dataset["accuracy_verdict"].values, dataset["regions_verdict"].values])
    fails, holds = (both == Verdict.fails.value).any(0), (both == Verdict.holds.value).all(0)
    dataset["verdict"].values[:] = np.where(fails, 2, np.where(holds, 1, 0))
    dataset["status"].values[:] = STATUSES.index(status)
    return dataset


def test_claims_count(trial):
    accuracy = ["holds"] * 7 + ["fails"] * 2 + ["unresolved"]
    regions = ["holds"] * 5 + ["unresolved"] * 4 + ["fails"]
    found = claims(planted(trial, accuracy, regions), confidence=0.9)
    assert [claim.name for claim in found] == [
        "perfect training accuracy",
        "at most 32r+67 effective regions",
        "both: trial verdict",
    ]
    assert [(c.holds, c.fails, c.unresolved) for c in found] == [(7, 2, 1), (5, 1, 4), (5, 3, 2)]
    assert found[0].probability == estimate_probability(7, 9, 0.9, unresolved=1)
    assert found[1].probability == estimate_probability(5, 6, 0.9, unresolved=4)
    assert found[2].probability == estimate_probability(5, 8, 0.9, unresolved=2)


def test_unresolved_trials_count_against_every_claim(trial):
    good = claims(planted(trial, ["holds"] * 20, ["holds"] * 20))
    worse = claims(planted(trial, ["holds"] * 19 + ["unresolved"], ["holds"] * 18 + ["unresolved"] * 2))
    for before, after in zip(good, worse, strict=True):
        assert before.probability.estimate == 1 and before.probability.high == 1
        assert after.probability.estimate < 1 and after.probability.low < before.probability.low
        # What is not known could have held.
        assert after.probability.high == 1


def test_vacuous_bound_is_called_vacuous(trial):
    narrow = dataclasses.replace(trial, neurons=4, width=194)
    wide = dataclasses.replace(narrow, width=195)
    notes = [claims(run_study(t, key=KEY, trials=2))[1].note for t in (narrow, wide)]
    assert "vacuous" in notes[0] and "195 regions" in notes[0] and "195 is a reported bound" in notes[0]
    assert "vacuous" not in notes[1] and "195 is a reported bound" in notes[1]


def test_summary_says_it_all(trial):
    dataset = planted(trial, ["holds"] * 8 + ["unresolved"] * 2, ["holds"] * 8 + ["unresolved"] * 2)
    dataset["status"].values[8] = STATUSES.index("step_limit")
    dataset["population_error"].values[:] = np.linspace(0, 0.9, 10)
    dataset["population_error"].values[9] = np.nan
    dataset["steps"].values[:] = np.arange(10)
    text = summary(dataset, confidence=0.95)
    lines = text.split("\n")
    p = estimate_probability(8, 8, 0.95, unresolved=2)
    assert lines[1].split()[3:] == ["0.8000", f"[{p.low:.4f},", f"{p.high:.4f}]", "8", "0", "2"]
    assert "95 % interval" in lines[0] and max(map(len, lines[:4])) == min(map(len, lines[:4]))
    numbers = {line[:34].strip(): line[34:].split()[:3] for line in lines}
    assert numbers["steps"] == ["4.5", "8.1", "10"]
    # The trial at its step limit and the one that is NaN are no part of this; the line says over how many it is.
    assert numbers["population error"] == ["0.35", "0.63", "8"]
    for name, count in (("reached", 9), ("step_limit", 1)):
        assert f"{count} x {name}: {Status[getattr(Status, name)]}" in lines
    assert "stalled" not in text
    assert lines[-1].startswith("10 trials in ")


def test_summary_of_a_study_where_nothing_ended(trial):
    text = summary(planted(trial, ["unresolved"] * 3, ["unresolved"] * 3, status="step_limit"))
    assert "0 trials that met their log loss" in text and "3 x step_limit" in text


def test_replay_refuses_what_is_not_there(trial):
    dataset = run_study(trial, key=KEY, trials=3)
    for number in (3, -1):
        with pytest.raises(ValueError, match=f"no trial {number} in a dataset of 3"):
            replay(dataset, number)
    dataset.attrs["dtype"] = "float32"
    with pytest.raises(ValueError, match="run in float32 and JAX is set to float64"):
        replay(dataset, 0)


# Real trials


@functools.cache
def real() -> xr.Dataset:
    return run_study(QUICK, key=KEY, trials=8, batch=4)


def test_real_study_is_finite_and_consistent():
    dataset = real()
    assert not np.any(dataset["status"].values == STATUSES.index("running"))
    reached = dataset["status"].values == STATUSES.index("reached")
    assert reached.any()
    assert (dataset["log_loss"].values[reached] <= -5).all()
    assert (dataset["verdict"].values[reached] == Verdict.holds.value).all()
    assert (dataset["regions_low"] <= dataset["regions"]).all() and (
        dataset["regions"] <= dataset["regions_high"]
    ).all()
    assert (dataset["switches"] == 1).all()


def test_real_study_does_not_depend_on_batches():
    """Another batch size rounds differently: verdicts and counts are equal, numbers agree to 1e-4."""
    dataset, other = first(real(), 3), run_study(QUICK, key=KEY, trials=3, batch=3)
    for name, (kind, *_) in study._VARIABLES.items():
        a, b = dataset[name].values, other[name].values
        if kind is np.float64:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9, err_msg=name)
        elif name not in ("steps", "rejected"):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_replay_is_the_very_same_trial():
    dataset = real()
    number = int(np.flatnonzero(dataset["status"].values == STATUSES.index("reached"))[-1])
    flow = replay(dataset, number)
    row = dataset.isel(trial=number)
    assert flow.status == Status.reached
    for name in ("time", "log_time", "log_loss", "margin", "residual"):
        np.testing.assert_allclose(getattr(flow, name), row[name], rtol=1e-4, err_msg=name)
    assert flow.path is not None and flow.path.time.shape == (200,)
    # A selection keeps its trials' numbers.
    assert replay(dataset.isel(trial=[number]), np.int64(number)).log_loss == flow.log_loss
