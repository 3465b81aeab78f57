"""A study on disk: everything kept, nothing overwritten, nothing lost; on the stand-in for the trial."""

# ruff: noqa: F811 (a test's argument is the fixture of that name)

import dataclasses
import errno
import json
import os
import subprocess

import h5netcdf
import jax
import jax.random as jr
import numpy as np
import pytest
from stand_in import KEY, first, fresh, same, traces, trial  # noqa: F401 (fixtures)

from gradflow import archive, dispatch, engine, watch
from gradflow.archive import VARIABLES, load
from gradflow.outcome import STATUSES
from gradflow.record import Record, Verdict
from gradflow.store import Store
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
    manifest, part, whole = sorted(os.listdir(tmp_path / "deep" / "down"))
    assert (manifest, part[:16], whole) == ("manifest.json", "part-0000000000-", "study.nc")


def test_file_is_plain_netcdf_with_units_and_flags(trial, tmp_path):
    dataset = run_study(trial, key=KEY, trials=5, path=tmp_path)
    assert set(dataset.data_vars) == set(Record._fields)
    with h5netcdf.File(tmp_path / "study.nc") as file:
        assert {name: dimension.size for name, dimension in file.dimensions.items()} == {"trial": 5}
        for name in Record._fields:
            variable = file.variables[name]
            assert variable.attrs["units"] == "1" and len(variable.attrs["long_name"]) > 5
            np.testing.assert_array_equal(variable[:], dataset[name].values)
        for name, names in (("verdict", [v.name for v in Verdict]), ("status", STATUSES), ("separated", ["no", "yes"])):
            variable = file.variables[name]
            assert variable.attrs["flag_meanings"].split() == list(names)
            assert list(variable.attrs["flag_values"]) == list(range(len(names)))
            assert variable.attrs["flag_values"].dtype.kind == variable[:].dtype.kind == "i"
        assert Trial.from_json(file.attrs["trial"]) == trial


def test_provenance_is_complete(trial):
    attrs = run_study(trial, key=jr.key(7, impl="rbg"), trials=2).attrs
    assert Trial.from_json(attrs["trial"]) == trial
    assert json.loads(attrs["key"]) == {"impl": "rbg", "data": np.asarray(jr.key_data(jr.key(7, impl="rbg"))).tolist()}
    versions = json.loads(attrs["versions"])
    assert versions.keys() >= {"gradflow", "jax", "equinox", "diffrax", "numpy", "xarray", "python"}
    assert versions["jax"] == jax.__version__ and versions["numpy"] == np.__version__
    assert attrs["backend"] == jax.default_backend() and attrs["dtype"] == "float64"
    assert attrs["created"].endswith("+00:00") and attrs["seconds"] > 0


@pytest.fixture
def ran(monkeypatch):
    """The numbers of the trials that were run and kept, in the order in which they ended."""
    numbers, add = [], Store.add

    def spied(self, some, columns):
        numbers.extend(some.tolist())
        add(self, some, columns)

    monkeypatch.setattr(Store, "add", spied)
    return numbers


def test_smaller_study_is_extended_and_not_run_again(trial, tmp_path, ran):
    run_study(trial, key=KEY, trials=5, path=tmp_path, batch=2)
    assert sorted(ran) == list(range(5))
    whole = run_study(trial, key=KEY, trials=12, path=tmp_path, batch=2)
    assert sorted(ran) == list(range(12))
    assert same(whole, run_study(trial, key=KEY, trials=12))
    assert load(tmp_path).identical(whole)
    history = [line.split(" on ")[0].split(" ", 1)[1] for line in whole.attrs["history"].split("\n")]
    assert history == ["5 trials", "7 trials"]


def test_fewer_trials_are_read_and_nothing_is_written(fresh, tmp_path):
    trial, traces = fresh
    whole = run_study(trial, key=KEY, trials=9, path=tmp_path)
    before = contents(tmp_path)
    for trials in (9, 4):
        assert same(run_study(trial, key=KEY, trials=trials, path=tmp_path), first(whole, trials))
    assert len(traces) == 1 and contents(tmp_path) == before


@pytest.mark.parametrize("after", [1, 60])
def test_interrupted_study_goes_on(trial, tmp_path, after, ran, monkeypatch):
    monkeypatch.setattr(dispatch, "_POLL", 0.001)
    done = []

    def interrupt(now):
        done.append(now.done)
        if now.done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="of 2000 trials have ended and are lost, as there is no path"):
        run_study(trial, key=KEY, trials=2000, batch=2, progress=interrupt)
    done.clear()
    ran.clear()
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt, match="of 2000 trials have ended and are kept; run the same again"):
            run_study(trial, key=KEY, trials=2000, path=tmp_path, batch=2, progress=interrupt)
        after += done[-1]
    first_has_ended = 0 in ran  # asked before the next study, which adds its own
    expected = run_study(trial, key=KEY, trials=2000)
    if first_has_ended:
        kept = load(tmp_path)  # up to the first that is missing, and that is right
        assert kept.sizes["trial"] < 2000 and same(kept, first(expected, kept.sizes["trial"]))
    else:
        with pytest.raises(ValueError, match="unfinished"):
            load(tmp_path)
    ran.clear()
    assert same(run_study(trial, key=KEY, trials=2000, path=tmp_path, batch=2), expected)
    # Whatever had been reported was kept, also if it was beyond a missing one.
    assert len(ran) == len(set(ran)) <= 2000 - done[-1]


def test_threads_that_outlive_an_interrupted_study_add_nothing_to_it(trial, tmp_path, monkeypatch):
    """Ctrl-C twice leaves threads behind, whose trials were counted and never saved: `study.nc` had rows of zeros."""
    watches = []
    begin = watch.Watch.__init__

    def keep(self, *arguments):
        begin(self, *arguments)
        watches.append(self)

    def stop(now):
        if now.done:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.Watch, "__init__", keep)
    with pytest.raises(KeyboardInterrupt):
        run_study(trial, key=KEY, trials=400, path=tmp_path, batch=2, progress=stop)
    (store,) = watches[0].stores
    there, late = store.done(400), store.missing(400)[:3]
    whole = run_study(trial, key=KEY, trials=400)
    record = Record(*(whole[name].values[late] if name in whole else np.zeros(late.size) for name in Record._fields))
    watches[0].add(0, late, record)
    store.write()
    assert store.done(400) == there and load(tmp_path).sizes["trial"] == store.prefix
    assert same(run_study(trial, key=KEY, trials=400, path=tmp_path), whole)


def test_a_trial_that_is_counted_and_in_no_part_is_an_error_and_not_a_row_of_zeros(trial):
    store = Store(trial, KEY, None, 3)
    store._count(np.arange(3), {"verdict": np.zeros(3, int)})
    with pytest.raises(RuntimeError, match="trial 0 has ended and is in no part"):
        store.rows(0, 3)


def test_progress_of_fewer_trials_than_there_are_speaks_of_those(trial, tmp_path):
    run_study(trial, key=KEY, trials=40, path=tmp_path)
    calls = []
    few = run_study(trial, key=KEY, trials=10, path=tmp_path, progress=calls.append)
    verdicts = few["verdict"].values
    assert calls[-1].done == calls[-1].trials == 10
    assert calls[-1].verdicts == {v.name: int(np.sum(verdicts == v.value)) for v in Verdict}


def test_a_failing_engine_loses_no_trial(trial, tmp_path, ran, monkeypatch):
    close = engine._close

    def failing(lanes, rows):
        if len(ran) > 6:
            raise RuntimeError("the device is on fire")
        return close(lanes, rows)

    monkeypatch.setattr(engine, "_close", failing)
    with pytest.raises(RuntimeError, match="on fire"):
        run_study(trial, key=KEY, trials=40, path=tmp_path, batch=2)
    monkeypatch.setattr(engine, "_close", close)
    assert same(run_study(trial, key=KEY, trials=40, path=tmp_path, batch=2), run_study(trial, key=KEY, trials=40))
    assert len(ran) == 40 + 40


def test_a_batch_that_does_not_fit_says_so(trial, monkeypatch):
    def failing(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 TB")

    monkeypatch.setattr(engine, "_follow", failing)
    with pytest.raises(MemoryError, match="no room for 16 trials at once: choose a smaller batch"):
        run_study(trial, key=KEY, trials=40, batch=16)


def test_unfinished_study_is_saved_on_the_way(trial, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_CHECKPOINT", 0.0)
    monkeypatch.setattr(dispatch, "_POLL", 0.001)
    parts = []
    look = lambda now: parts.append(len(list(tmp_path.glob("part-*.nc"))))  # noqa: E731
    whole = run_study(trial, key=KEY, trials=300, path=tmp_path, batch=1, progress=look)
    assert 0 in parts and len(set(parts)) > 3 and not (tmp_path / ".study.nc").exists()
    assert same(whole, run_study(trial, key=KEY, trials=300)) and load(tmp_path).identical(whole)


def test_an_unfinished_study_that_was_killed_says_how_to_go_on(trial, tmp_path):
    whole = run_study(trial, key=KEY, trials=9, path=tmp_path)
    (tmp_path / "study.nc").unlink()  # as if it had been killed before it could write it
    with pytest.raises(ValueError, match="unfinished study; run it again with the same trial and key"):
        load(tmp_path)
    assert run_study(trial, key=KEY, trials=9, path=tmp_path).identical(whole)


def test_another_study_is_never_overwritten(trial, tmp_path):
    run_study(trial, key=KEY, trials=3, path=tmp_path)
    before = contents(tmp_path)
    other = dataclasses.replace(trial, rtol=1e-5)
    with pytest.raises(ValueError, match="another trial") as caught:
        run_study(other, key=KEY, trials=30, path=tmp_path)
    assert all(text in str(caught.value) for text in (trial.to_json(), other.to_json(), "manifest.json"))
    with pytest.raises(ValueError, match="another key") as caught:
        run_study(trial, key=jr.key(77), trials=30, path=tmp_path)
    assert "77]" in str(caught.value) and "5]" in str(caught.value)
    assert contents(tmp_path) == before
    manifest = json.loads(before["manifest.json"]) | {"dtype": "float32"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="another dtype"):
        run_study(trial, key=KEY, trials=30, path=tmp_path)


def test_two_processes_on_one_study_lose_nothing(trial, tmp_path):
    """The other one ran the same trials, and more, while this one was at it."""

    def meanwhile(now):
        if now.done == 4 and (tmp_path / "b").exists():
            for part in (tmp_path / "b").glob("part-*.nc"):
                os.rename(part, tmp_path / "a" / part.name)

    whole = run_study(trial, key=KEY, trials=9, path=tmp_path / "b")
    (tmp_path / "a").mkdir()
    assert same(run_study(trial, key=KEY, trials=4, path=tmp_path / "a", progress=meanwhile), first(whole, 4))
    assert same(run_study(trial, key=KEY, trials=9, path=tmp_path / "a"), whole)


def test_damaged_parts_are_named_and_run_again(trial, tmp_path, ran):
    run_study(trial, key=KEY, trials=3, path=tmp_path)
    whole = run_study(trial, key=KEY, trials=8, path=tmp_path)
    (part,) = tmp_path.glob("part-0000000003-*.nc")
    content = part.read_bytes()
    flipped = [bytearray(content) for _ in range(3)]
    for i, damaged in zip((100, len(content) // 2, len(content) - 1), flipped, strict=True):
        damaged[i] ^= 1
    for damaged in (b"", content[:1000], content[:-1], content + b"0", *flipped, b"something else"):
        part.write_bytes(damaged)
        ran.clear()
        with pytest.warns(UserWarning, match=rf"{part.name} is damaged: renamed to .*\.torn"):
            assert same(run_study(trial, key=KEY, trials=8, path=tmp_path), whole)
        assert sorted(ran) == [3, 4, 5, 6, 7]
        assert part.with_name(f"{part.name}.torn").read_bytes() == damaged
        for extra in tmp_path.glob("part-0000000003-*.nc"):
            extra.unlink()
        part.write_bytes(content)


@pytest.mark.parametrize("change", [dict(rtol=1e-5), None], ids=["trial", "key"])
def test_parts_of_another_study_are_refused(trial, tmp_path, change):
    other = trial if change is None else dataclasses.replace(trial, **change)
    run_study(trial, key=KEY, trials=3, path=tmp_path / "a")
    run_study(other, key=jr.key(6) if change is None else KEY, trials=5, path=tmp_path / "b")
    (part,) = (tmp_path / "b").glob("part-*.nc")
    os.rename(part, tmp_path / "a" / part.name)
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match=f"{part.name} belongs to a study of another"):
        run_study(trial, key=KEY, trials=3, path=tmp_path / "a")
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"trial": "{}"}'])
def test_a_damaged_manifest_is_refused(trial, tmp_path, content):
    run_study(trial, key=KEY, trials=3, path=tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        run_study(trial, key=KEY, trials=3, path=tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"without the manifest\.json of its study"):
        run_study(trial, key=KEY, trials=3, path=tmp_path)


def test_a_torn_dataset_is_refused_and_made_anew_from_its_parts(trial, tmp_path, ran):
    expected = run_study(trial, key=KEY, trials=3, path=tmp_path)
    ran.clear()
    whole = (tmp_path / "study.nc").read_bytes()
    for content in [whole[:cut] for cut in range(0, len(whole), 9973)] + [whole[:-1], b"not netCDF at all\n" * 50]:
        (tmp_path / "study.nc").write_bytes(content)
        with pytest.raises(ValueError, match=r"study\.nc"):
            load(tmp_path)
    with pytest.warns(UserWarning, match=r"study\.nc is damaged: renamed"):
        assert run_study(trial, key=KEY, trials=3, path=tmp_path).identical(expected)
    assert (tmp_path / "study.nc.torn").read_bytes() == content and not ran


@pytest.mark.parametrize("drop", ["verdict", "margin", "key"])
def test_files_of_something_else_are_refused(trial, tmp_path, drop):
    dataset = run_study(trial, key=KEY, trials=3, path=tmp_path)
    _ = dataset.attrs.pop("key") if drop == "key" else dataset.__delitem__(drop)
    (tmp_path / "study.nc").write_bytes(bytes(dataset.to_netcdf(engine="scipy")))
    with pytest.raises(ValueError, match=f"not a gradflow study.*{drop}"):
        run_study(trial, key=KEY, trials=3, path=tmp_path)


def test_leftovers_of_a_crash_are_not_data(trial, tmp_path):
    (tmp_path / ".study.nc.1234.partial").write_bytes(b"half a file")
    with pytest.raises(FileNotFoundError):
        load(tmp_path)
    assert run_study(trial, key=KEY, trials=3, path=tmp_path).identical(load(tmp_path))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_is_a_clear_error_and_the_study_goes_on(trial, tmp_path, monkeypatch, step):
    run_study(trial, key=KEY, trials=3, path=tmp_path)
    before = contents(tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(
            OSError, match=r"No space left on device\. What was saved before is whole; run the same again"
        ):
            run_study(trial, key=KEY, trials=6, path=tmp_path)
    assert contents(tmp_path) == before
    assert same(run_study(trial, key=KEY, trials=6, path=tmp_path), run_study(trial, key=KEY, trials=6))


def test_a_disk_that_is_really_full(trial, tmp_path, monkeypatch):
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    monkeypatch.setattr(watch, "_CHECKPOINT", 0.1)
    try:
        with pytest.raises(
            OSError, match=r"No space left on device\. What was saved before is whole; run the same again"
        ):
            run_study(trial, key=KEY, trials=6000, path=tmp_path)
        kept = Store(trial, KEY, tmp_path, 6000)  # every part is whole
        assert kept.parts and kept.done(6000) < 6000
        subprocess.run(["mount", "-o", "remount,size=30m", str(tmp_path)], check=True)
        assert same(run_study(trial, key=KEY, trials=6000, path=tmp_path), run_study(trial, key=KEY, trials=6000))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_path_that_is_a_file_is_refused(trial, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="taken is a file"):
        run_study(trial, key=KEY, trials=3, path=tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_dataset_is_written_some_rows_at_a_time(trial, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_ROWS", 7)
    monkeypatch.setattr(archive, "_IN_MEMORY", 10)
    asked, rows = [], Store.rows

    def spied(self, first, last):
        asked.append(last - first)
        return rows(self, first, last)

    monkeypatch.setattr(Store, "rows", spied)
    for trials in (9, 30):
        found = run_study(trial, key=KEY, trials=trials, path=tmp_path)
    assert max(asked) == 7
    assert not isinstance(found["margin"].variable._data, np.ndarray)  # read when it is needed
    assert same(found, run_study(trial, key=KEY, trials=30))


def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}
