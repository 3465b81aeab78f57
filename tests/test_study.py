"""A study: the same trials however they are run, kept safely, and counted honestly.

What is about files, batches and counts is tested on a stand-in for the trial, which draws its record at random from the
key and compiles in no time; what is about numbers, on real trials that separate quickly.
"""

# ruff: noqa: F811 (a test's argument is the fixture of that name)

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import xarray as xr
from stand_in import KEY, QUICK, FakeLane, draw, first, fresh, same, traces, trial  # noqa: F401 (fixtures)

from gradflow import dispatch, engine, watch
from gradflow.archive import VARIABLES, key_from_json, load, studies
from gradflow.outcome import STATUSES, Status
from gradflow.record import Record, Verdict
from gradflow.statistics import confidence_sequence
from gradflow.store import Store
from gradflow.study import _shared_slots, replay, run_study, run_sweep
from gradflow.table import summary
from gradflow.trial import Trial

# Which trials there are


def test_trial_i_is_the_key_folded_with_i(trial):
    dataset = run_study(trial, key=KEY, trials=7, batch=3)
    for i in range(7):
        lane = FakeLane.begin(trial.loss, trial.values, *draw(trial.sizes(), trial.values, jr.fold_in(KEY, i)))
        lane, alone = lane.follow(10_000).close()
        assert lane.over
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


@pytest.mark.parametrize("segment", [1, 7, 1000])
def test_segments_change_nothing(trial, segment, monkeypatch):
    expected = run_study(trial, key=KEY, trials=30, batch=4)
    monkeypatch.setattr(engine, "SEGMENT", segment)
    assert same(run_study(trial, key=KEY, trials=30, batch=4), expected)


@pytest.mark.parametrize(("batch", "fraction"), [(12, 8), (12, 3), (5, 2), (40, 1)])
def test_groups_change_nothing(trial, batch, fraction, monkeypatch):
    """As on a GPU, where lanes begin and are closed several at a time."""
    expected = run_study(trial, key=KEY, trials=50, batch=batch)
    monkeypatch.setattr(dispatch, "group_of", lambda width: max(1, width // fraction))
    assert same(run_study(trial, key=KEY, trials=50, batch=batch), expected)


@pytest.mark.parametrize(
    ("backend", "memory", "trials", "batch", "expected"),
    [
        ("cpu", None, 10_000, None, 8),
        ("cpu", None, 5, None, 4),  # two engines have work for three each
        ("cpu", None, 10_000, 100, 100),
        ("gpu", None, 10**6, None, 8192),
        ("gpu", 80 * 2**30, 10**6, None, 8192),
        ("gpu", 2**29, 10**6, None, 1024),
        ("gpu", 1000, 10**6, None, 1),
        ("gpu", 80 * 2**30, 3000, None, 2048),
    ],
)
def test_how_many_lanes(monkeypatch, backend, memory, trials, batch, expected):
    class Device:
        def memory_stats(self):
            return None if memory is None else {"bytes_limit": memory}

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    trial = Trial()
    cell = dispatch.Cell(0, trial, trial.slots, KEY, np.arange(trials))
    assert dispatch.lanes([cell], batch, 2) == expected


def test_lanes_are_kept_busy(trial):
    """Trials that take 1 to 362 attempts, 128 on average: a batch that waited for its slowest would use a third."""
    dataset = run_study(trial, key=KEY, trials=400, batch=4)
    useful = int(dataset["steps"].sum()) / dataset.attrs["lane_attempts"]
    assert 0.6 < useful <= 1
    assert f"; {useful:.0%} of the lanes' time" in summary(dataset)


def test_all_time_is_charged_whether_trials_end_or_not(trial, monkeypatch):
    """95 seconds of compiling, in which it is saved in vain three times, and 5 in which a trial ends."""
    clock = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    stores = [Store(trial, KEY, None, 1), Store(trial, KEY, None, 1)]
    watched = watch.Watch(stores, 1, None)
    record = Record(*(np.zeros(1, kind) for kind, *_ in VARIABLES.values()))
    for clock[0] in np.arange(5.0, 100, 5):
        watched.look()
    watched.possible = 40
    watched.add(0, np.array([0]), record._replace(steps=np.array([30])))
    watched.add(1, np.array([0]), record._replace(steps=np.array([8])))
    clock[0] = 100.0
    watched.close()
    spent = [[store.parts[0].seconds, store.parts[0].lane_attempts] for store in stores]
    np.testing.assert_allclose(spent, [[77.5, 31], [22.5, 9]])  # by 31 and 9 attempts, one more than steps


def test_first_half_is_the_smaller_study(trial):
    assert same(first(run_study(trial, key=KEY, trials=24), 12), run_study(trial, key=KEY, trials=12))
    assert not same(run_study(trial, key=jr.key(6), trials=12), run_study(trial, key=KEY, trials=12))


def test_older_keys_are_the_same_keys(trial):
    assert same(run_study(trial, key=jr.PRNGKey(5), trials=3), run_study(trial, key=KEY, trials=3))


def test_one_trace_for_a_study_and_none_for_new_numbers(fresh):
    trial, traces = fresh
    run_study(trial, key=KEY, trials=50, batch=4)
    assert len(traces) == len(traces.programs) == 1
    other = dataclasses.replace(trial, rtol=1e-5, scale=3.0, max_steps=5)
    assert run_study(other, key=jr.key(9), trials=9, batch=4)["margin"].max() > 1
    assert len(traces) == len(traces.programs) == 1
    # The count can fail.
    run_study(trial, key=KEY, trials=50, batch=5)
    assert len(traces.programs) == 2


def test_progress_counts(trial, monkeypatch):
    monkeypatch.setattr(dispatch, "_POLL", 0.001)
    calls = []
    dataset = run_study(trial, key=KEY, trials=300, batch=4, progress=calls.append)
    done = [now.done for now in calls]
    assert done == sorted(done) and done[-1] == 300 and len(set(done)) > 3
    assert all(sum(now.verdicts.values()) == now.done <= now.trials == 300 for now in calls)
    assert calls[-1].verdicts == {v.name: int((dataset["verdict"] == v.value).sum()) for v in Verdict}
    assert calls[-1].left == 0 and all(now.left > 0 for now in calls if now.done < 300)
    # The interval is that of the trials in the order of their numbers, as far as they have all ended.
    count = calls[-1].verdicts
    expected = confidence_sequence(count["holds"], count["holds"] + count["fails"], unresolved=count["unresolved"])
    assert calls[-1].interval == expected
    early = next(now.interval for now in calls if now.interval is not None)
    assert early.low <= expected.estimate <= early.high and early.high - early.low >= expected.high - expected.low


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(trials=0), "trials must be at least 1"),
        (dict(trials=2.5), "trials must be a whole number"),
        (dict(batch=0), "batch must be at least 1"),
        (dict(batch="all"), "batch must be a whole number"),
        (dict(executor=4), "executor must be a concurrent.futures.Executor"),
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


def test_studies_need_float64(fresh, tmp_path):
    trial, traces = fresh
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(ValueError, match="needs float64"):
            run_study(trial, key=jr.key(0), trials=2, path=tmp_path / "s")
    finally:
        jax.config.update("jax_enable_x64", True)
    assert not traces and not (tmp_path / "s").exists()


# Sweeps


def cells_around(trial):
    settings = ((900, 10, 1.0), (700, 10, 3.0), (900, 12, 0.5))
    return [dataclasses.replace(trial, width=k, samples=n, scale=s) for k, n, s in settings]


def test_a_cell_is_a_study_of_its_own(trial):
    cells = cells_around(trial)
    sweep = run_sweep(cells, key=KEY, trials=6, batch=4)
    assert dict(sweep.sizes) == {"cell": 3, "trial": 6}
    assert sweep["width"].values.tolist() == [900, 700, 900] and sweep["samples"].values.tolist() == [10, 10, 12]
    for cell, study_ in zip(cells, studies(sweep), strict=True):
        assert study_.attrs["trial"] == cell.to_json()
        key = key_from_json(study_.attrs["key"])
        assert same(study_, run_study(cell, key=key, trials=6))
    assert len(np.unique(sweep["margin"])) == 18  # no cell repeats another's numbers


def test_a_cell_does_not_depend_on_the_others(trial):
    cells = cells_around(trial)
    whole, part = run_sweep(cells, key=KEY, trials=5), run_sweep(cells[::-2], key=KEY, trials=5)
    for i, j in ((0, 1), (2, 0)):
        assert same(studies(whole)[i], studies(part)[j])
    other = run_sweep(cells, key=jr.key(6), trials=5)
    assert not np.isin(other["margin"].values, whole["margin"].values).any()


def test_cells_share_a_program_unless_it_is_dear(fresh):
    trial, traces = fresh
    cells = [dataclasses.replace(trial, neurons=4, width=k, samples=n) for k, n in ((16, 50), (32, 20), (8, 40))]
    run_sweep(cells, key=KEY, trials=6, batch=3)
    assert len(traces.programs) == 1 and {sizes.slots for sizes in traces} == {(4, 32, 50)}
    # The more trials, the more it matters what each of them costs: 160 positions are ten times as dear as 50.
    wide = dataclasses.replace(trial, neurons=4, width=300, samples=200)
    slots = [_shared_slots([*cells, wide], trials) for trials in (5, 500)]
    assert [len(set(found)) for found in slots] == [1, 2] and slots[1][-1] == wide.slots
    assert len(set(_shared_slots([dataclasses.replace(wide, loss="logistic"), wide], 5))) == 1  # sizes, not programs


def test_a_sweep_is_kept_cell_by_cell_and_grows(fresh, tmp_path):
    trial, _ = fresh
    cells = cells_around(trial)
    first_two = run_sweep(cells[:2], key=KEY, trials=4, path=tmp_path, batch=2)
    assert load(tmp_path)["margin"].equals(first_two["margin"])
    done = []
    whole = run_sweep(cells, key=KEY, trials=4, path=tmp_path, batch=2, progress=lambda now: done.append(now.done))
    assert done[0] == 8 and done[-1] == 12  # what is there is not run again
    assert same(whole.isel(cell=[0, 1]), first_two) and same(whole, run_sweep(cells, key=KEY, trials=4, batch=2))
    assert len(list(tmp_path.glob("cell-*/study.nc"))) == 3
    more = run_sweep(cells, key=KEY, trials=7, path=tmp_path, batch=2)
    assert same(more.isel(trial=slice(4)), whole)
    with pytest.raises(ValueError, match="another key"):
        run_sweep(cells, key=jr.key(0), trials=4, path=tmp_path)


def test_another_sweep_in_the_same_place_replaces_nothing(trial, tmp_path):
    cells = cells_around(trial)
    whole = run_sweep(cells, key=KEY, trials=6, path=tmp_path)
    fewer = run_sweep(cells, key=KEY, trials=2, path=tmp_path)
    assert same(fewer, whole.isel(trial=slice(2))) and load(tmp_path).sizes["trial"] == 6
    run_sweep(cells[:1], key=KEY, trials=6, path=tmp_path)
    with pytest.raises(ValueError, match="holds several"):
        load(tmp_path)
    assert sorted(load(file).sizes["cell"] for file in tmp_path.glob("sweep-*.nc")) == [1, 3]
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is a file"):
        run_sweep(cells, key=KEY, trials=6, path=tmp_path / "file")


def test_cells_keep_their_own_provenance(trial, tmp_path, monkeypatch):
    cells = cells_around(trial)
    run_sweep(cells[:1], key=KEY, trials=2, path=tmp_path)
    monkeypatch.setattr("gradflow.__version__", "9.9.9")
    versions = [
        json.loads(cell.attrs["versions"]) for cell in studies(run_sweep(cells, key=KEY, trials=2, path=tmp_path))
    ]
    assert [v["gradflow"] == "9.9.9" for v in versions] == [False, True, True]


def test_an_interrupted_sweep_keeps_what_it_has(trial, tmp_path):
    cells = cells_around(trial)

    def stop(now):
        if now.done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(cells, key=KEY, trials=1000, path=tmp_path, batch=2, progress=stop)
    kept = sum(load(file)["verdict"].size for file in tmp_path.glob("cell-*/study.nc"))
    assert kept >= 6
    with pytest.raises(ValueError, match="unfinished sweep"):
        load(tmp_path)
    assert same(run_sweep(cells, key=KEY, trials=1000, path=tmp_path), run_sweep(cells, key=KEY, trials=1000))


@pytest.mark.parametrize(
    ("cells", "message"),
    [([], "at least one cell"), ([QUICK, QUICK], "comes twice: Trial")],
)
def test_a_sweep_needs_different_cells(cells, message):
    with pytest.raises(ValueError, match=message):
        run_sweep(cells, key=KEY, trials=3)


# Again


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
    return run_study(QUICK, key=KEY, trials=8)  # as the command line does it: what is compiled serves both


def test_real_study_is_finite_and_consistent():
    dataset = real()
    assert not np.any(dataset["status"].values == STATUSES.index("running"))
    good = dataset["status"].values == STATUSES.index("certified")
    assert good.any() and (dataset["limit_status"].values[good] <= 1).all()
    assert (dataset["verdict"].values[good] == Verdict.holds.value).all()
    assert (dataset["regions"].values[good] >= 2).all() and (dataset["regions"].values[~good] == 0).all()
    assert (dataset["kkt"].values[good] <= 1e-10).all() and dataset["optimum_proved"].all()
    assert (dataset["optimality"].values[good] <= 1 + 1e-9).all()
    assert (dataset["entry_time"].values[good] < dataset["time"].values[good]).all()
    assert (dataset["fall"].values[good] <= 1e-8).all() and (dataset["drift"] <= 1e-8).all()
    assert (dataset["teacher_switches"] == 1).all()


def test_replay_is_the_very_same_trial():
    dataset = real()
    number = int(np.flatnonzero(dataset["status"].values == STATUSES.index("certified"))[-1])
    flow = replay(dataset, number)
    row = dataset.isel(trial=number)
    assert flow.status == Status.certified
    for name in ("time", "log_time", "log_loss", "margin", "residual"):
        np.testing.assert_allclose(getattr(flow, name), row[name], rtol=1e-4, err_msg=name)
    assert flow.path is not None and flow.path.time.shape == (200,)
    # A selection keeps its trials' numbers.
    assert replay(dataset.isel(trial=[number]), np.int64(number)).log_loss == flow.log_loss
