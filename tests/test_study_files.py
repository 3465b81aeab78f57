"""A study on disk: everything kept, nothing overwritten, nothing lost; on the stand-in for the trial."""

# ruff: noqa: F811 (a test's argument is the fixture of that name)

import dataclasses
import json
import os

import jax
import jax.random as jr
import numpy as np
import pytest
from scipy.io import netcdf_file
from stand_in import KEY, first, fresh, same, traces, trial  # noqa: F401 (fixtures)

from gradflow import study
from gradflow.archive import VARIABLES, load
from gradflow.outcome import STATUSES
from gradflow.record import Record, Verdict
from gradflow.study import run_study
from gradflow.trial import Trial

# Files


def test_file_holds_everything(trial, tmp_path):
    dataset = run_study(trial, key=KEY, trials=5, path=tmp_path / "deep" / "down")
    loaded = load(tmp_path / "deep" / "down")
    assert loaded.identical(dataset)
    assert load(tmp_path / "deep" / "down" / "study.nc").identical(dataset)
    assert {name: variable.dtype for name, variable in loaded.items()} == {
        name: np.dtype(kind) for name, (kind, *_) in VARIABLES.items()
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
