"""A study as a labelled dataset, in memory and on disk.

A plain `xarray.Dataset` along the dimension `trial`, stamped with all it takes to run it again: its attributes `trial`,
`key` and `versions` are JSON. A file is written whole or not at all, a part at a time, and read back only if it is a
study.
"""

import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence

import h5netcdf
import h5py
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr

import gradflow
from gradflow.limit import LIMIT_STATUSES
from gradflow.outcome import STATUSES
from gradflow.record import Verdict
from gradflow.trial import Trial

FILE = "study.nc"
_ROWS = 2**16  # trials written at a time
_IN_MEMORY = 1_000_000  # trials, of about 230 bytes, that a dataset is read into memory with
Rows = Callable[[int | None, int, int], Mapping[str, np.ndarray]]
_ATTRIBUTES = {"trial", "key", "versions", "backend", "dtype", "created", "seconds", "lane_attempts", "history"}
_VERDICTS = {verdict.value: verdict.name for verdict in Verdict}
_BOOL = {0: "no", 1: "yes"}
# Attributes in which the studies of a sweep may differ.
_STAMPS = ("trial", "key", "versions", "backend", "dtype", "created", "seconds", "lane_attempts", "history")
# What the cells of a sweep are told apart by.
_SETTINGS = {
    "neurons": "teacher neurons r",
    "switches": "label switches of the teacher (-1: any)",
    "width": "network width k",
    "samples": "points n",
    "min_run": "least probability of a label run",
    "distribution": "law of the inputs",
    "scheme": "law of the initial weights",
    "scale": "factor of the initial weights",
    "loss": "loss of one margin",
}

# name: dtype (of both file and memory; netCDF 3 has no wider integer), long name, meanings of the codes.
VARIABLES: dict[str, tuple[type, str, dict[int, str] | None]] = {
    "verdict": (np.int8, "verdict on accuracy and regions", _VERDICTS),
    "status": (np.int32, "how the flow ended", dict(enumerate(STATUSES))),
    "limit_status": (np.int32, "what became of its limit", dict(enumerate(LIMIT_STATUSES))),
    "accuracy_verdict": (np.int8, "verdict on perfect training accuracy", _VERDICTS),
    "regions_verdict": (np.int8, "verdict on at most 32 r + 67 linear regions of the limit", _VERDICTS),
    "optimum_verdict": (np.int8, "verdict on the limit being the global optimum", _VERDICTS),
    "teacher_switches": (np.int32, "label switches of the teacher on the whole line", None),
    "sample_switches": (np.int32, "label switches m in the sorted sample", None),
    "covered_right": (np.int32, "least right-facing neurons of its sign in an interval of the teacher", None),
    "covered_left": (np.int32, "least left-facing neurons of its sign in an interval of the teacher", None),
    "survivors": (np.float64, "share of such neurons active on a point at entry of the late phase", None),
    "entry_time": (np.float64, "rescaled time tau at entry of the late phase", None),
    "entry_log_time": (np.float64, "natural log of physical time at entry of the late phase", None),
    "separated": (np.bool_, "whether the loss proves perfect training accuracy", _BOOL),
    "training_accuracy": (np.float64, "share of points with positive margin", None),
    "regions": (np.int32, "linear regions of the certified limit (0: none)", None),
    "pinned": (np.int32, "knots of the limit on data points", None),
    "crowded": (np.int32, "most knots of the limit in one run of equal labels", None),
    "value": (np.float64, "half the squared norm of the limit at minimum margin 1", None),
    "optimality": (np.float64, "margin of the limit over the largest possible", None),
    "kkt": (np.float64, "relative KKT residual of the limit", None),
    "optimum_proved": (np.bool_, "whether the largest possible margin is proved", _BOOL),
    "population_error": (np.float64, "probability of a wrong label, of the limit or else the final network", None),
    "time": (np.float64, "rescaled time tau at the end", None),
    "log_time": (np.float64, "natural log of physical time at the end", None),
    "log_loss": (np.float64, "natural log of the mean loss at the end", None),
    "law": (np.float64, "relative error of log time against its asymptotic law at the end", None),
    "margin": (np.float64, "normalised margin min_i q_i / rho^2 at the end", None),
    "residual": (np.float64, "tangent of the angle between theta and its velocity at the end", None),
    "drift": (np.float64, "largest drift of a balance v^2 - w^2 - b^2, over rho^2", None),
    "rise": (np.float64, "largest increase of log loss in a step", None),
    "fall": (np.float64, "largest relative decrease of the smoothed margin in a step of the late phase", None),
    "events": (np.int32, "crossings, slides and releases of breakpoints at points", None),
    "sliding": (np.int32, "neurons whose breakpoint sticks to a point at the end", None),
    "steps": (np.int32, "accepted steps", None),
    "rejected": (np.int32, "rejected step attempts", None),
}


class UnreadableError(ValueError):
    """A file that is damaged, or no netCDF."""


def assembled(columns: Mapping[str, np.ndarray], numbers: np.ndarray, stamp: Mapping[str, object]) -> xr.Dataset:
    """A study of trials with these numbers: its columns with units, meanings and provenance."""
    variables = {}
    for name, (kind, long_name, meanings) in VARIABLES.items():
        attrs: dict[str, object] = {"long_name": long_name, "units": "1"}
        if meanings is not None:
            codes = np.array(list(meanings), np.int8 if kind is np.bool_ else kind)
            attrs |= {"flag_values": codes, "flag_meanings": " ".join(meanings.values())}
        variables[name] = ("trial", np.asarray(columns[name], kind), attrs)
    attrs = {"long_name": "trial: key folded with this number", "units": "1"}
    index = ("trial", np.asarray(numbers, np.int32), attrs)
    return xr.Dataset(variables, {"trial": index}, stamp)


def provenance(trial: Trial, key) -> dict[str, str]:
    packages = ("jax", "equinox", "diffrax", "numpy", "scipy", "xarray")
    versions = {"gradflow": gradflow.__version__} | {name: importlib.metadata.version(name) for name in packages}
    return {
        "title": "gradflow study",
        "trial": trial.to_json(),
        "key": key_to_json(key),
        "versions": json.dumps(versions | {"python": platform.python_version()}),
        "backend": jax.default_backend(),
        "dtype": str(jnp.result_type(float)),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def key_to_json(key) -> str:
    return json.dumps({"impl": str(jr.key_impl(key)), "data": np.asarray(jr.key_data(key)).tolist()})


def key_from_json(text: str):
    content = json.loads(text)
    return jr.wrap_key_data(jnp.asarray(content["data"], jnp.uint32), impl=content["impl"])


def publish(file: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    """A file that is there whole or not at all, whatever happens: `fill` writes it under another name, then it is
    flushed to the disk and renamed.

    **Raises** `OSError` that says what to do, when the disk is full for instance.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        fill(partial)
        _flush(partial)
        os.replace(partial, file)
        _flush(file.parent)
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}. What was saved before is whole; run the same again"
        raise OSError(error.errno, f"{what} when that is mended, and it goes on", str(file)) from error
    finally:
        partial.unlink(missing_ok=True)


def _flush(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(dataset: xr.Dataset, file: pathlib.Path, trials: int | None = None, rows: Rows | None = None) -> None:
    """Write a study or a sweep as netCDF 4.

    With `rows`, it is one of so many `trials`, of which `dataset` holds the first few, and `rows(cell, first, last)`
    gives the columns of more: some thousands at a time are held in memory, however many there are.
    """
    trials = dataset.sizes["trial"] if trials is None else trials

    def given(cell, first, last):
        some = dataset if cell is None else dataset.isel(cell=cell)
        return {name: some[name].values[first:last] for name in VARIABLES if name in some}

    rows = given if rows is None else rows

    def fill(partial: pathlib.Path) -> None:
        with h5netcdf.File(partial, "w") as out:
            out.dimensions = {str(name): size for name, size in dataset.sizes.items()} | {"trial": trials}
            for name, variable in dataset.variables.items():
                flags = {"dtype": "bool"} if variable.dtype == np.bool_ else {}
                kind = {"U": h5py.string_dtype(), "b": np.int8}.get(variable.dtype.kind, variable.dtype)
                made = out.create_variable(str(name), tuple(map(str, variable.dims)), kind)
                made.attrs.update(variable.attrs | flags)
                if "trial" not in variable.dims:
                    made[...] = variable.values.astype(object if variable.dtype.kind == "U" else kind)
            out.attrs.update({str(name): value for name, value in dataset.attrs.items()})
            if others := sorted(str(name) for name in dataset.coords if name not in dataset.dims):
                out.attrs["coordinates"] = " ".join(others)
            out.variables["trial"][:] = np.arange(trials, dtype=np.int32)
            for cell in range(dataset.sizes["cell"]) if "cell" in dataset.dims else (None,):
                for first in range(0, trials, _ROWS):
                    last = min(first + _ROWS, trials)
                    for name, column in rows(cell, first, last).items():
                        where = (slice(first, last),) if cell is None else (cell, slice(first, last))
                        out.variables[name][where] = column.astype(
                            np.int8 if column.dtype == np.bool_ else column.dtype
                        )

    publish(file, fill)


def load(path: str | os.PathLike) -> xr.Dataset:
    """The study or sweep kept in the directory `path` (or in the file `path`): in memory up to a million trials, beyond
    that read as it is needed.

    **Raises** `FileNotFoundError` if there is none, and `ValueError`, naming files, if it is torn or neither, if the
    directory holds several, and for one of which nothing has been put together yet. An interrupted study is read up to
    the first trial that is missing; those that ended first would be no fair sample.

    >>> import tempfile
    >>> import jax
    >>> import gradflow as gf
    >>> trial = gf.Trial(neurons=2, switches=1, width=32, samples=20)
    >>> folder = tempfile.mkdtemp()
    >>> dataset = gf.run_study(trial, key=jax.random.key(0), trials=8, path=folder)
    >>> gf.load(folder).equals(dataset)
    True
    """
    file = pathlib.Path(path)
    if file.is_dir():
        found = [*file.glob(FILE), *sorted(file.glob("sweep-*.nc"))]
        if len(found) > 1:
            raise ValueError(f"{file} holds several; load one of {', '.join(str(one) for one in found)}")
        if not found and any(file.glob(f"cell-*/{FILE}")):
            raise ValueError(f"{file} holds an unfinished sweep; run it again with the same cells, and it goes on")
        if not found and any(file.glob("part-*.nc")):
            raise ValueError(
                f"{file} holds an unfinished study; run it again with the same trial and key, and it goes on"
            )
        if not found:
            raise FileNotFoundError(errno.ENOENT, "there is no study", str(file / FILE))
        file = found[0]
    elif not file.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no study", str(file))
    try:
        dataset = xr.open_dataset(file)
        if dataset.sizes.get("trial", 0) * dataset.sizes.get("cell", 1) <= _IN_MEMORY:
            dataset = dataset.load()
            dataset.close()
    except Exception as error:  # whatever the reader trips over: a torn file fails in many ways
        raise UnreadableError(f"{file} cannot be read as netCDF; it is torn or something else: {error}") from error
    several = "cell" in dataset.dims
    found = dataset.attrs.keys() | {str(name).removeprefix("study_") for name in dataset.coords}
    lacks = (VARIABLES.keys() - dataset.data_vars.keys()) | (_ATTRIBUTES - found)
    if lacks or dataset["verdict"].dims != (("cell", "trial") if several else ("trial",)):
        raise ValueError(f"{file} is not a gradflow study, or one of another version: it lacks {sorted(lacks)}")
    return dataset


def gathered(cells: Sequence[xr.Dataset], key) -> xr.Dataset:
    """Studies of one size along the dimension `cell`; what differs between them becomes coordinates of `cell`."""
    sweep = xr.concat([cell.drop_attrs(deep=False) for cell in cells], "cell")
    trials = [Trial.from_json(cell.attrs["trial"]) for cell in cells]
    for name, note in _SETTINGS.items():
        values = [getattr(trial, name) for trial in trials]
        if name == "switches":
            values = [-1 if value is None else value for value in values]
        elif name == "distribution":
            values = [json.dumps(json.loads(trial.to_json())[name]) for trial in trials]
        sweep = sweep.assign_coords({name: ("cell", np.array(values), {"long_name": note, "units": "1"})})
    for name in _STAMPS:
        sweep = sweep.assign_coords({f"study_{name}": ("cell", np.array([cell.attrs[name] for cell in cells]))})
    return sweep.assign_attrs(
        title="gradflow sweep",
        key=key_to_json(key),
        **{name: sum(float(cell.attrs[name]) for cell in cells) for name in ("seconds", "lane_attempts")},
        **{name: cells[0].attrs[name] for name in ("versions", "backend", "dtype", "created")},
    )


def sweep_name(trials: Sequence[Trial]) -> str:
    """The file of a sweep of these cells: another sweep in the same directory has another one."""
    return f"sweep-{hashlib.sha256(' '.join(trial.to_json() for trial in trials).encode()).hexdigest()[:8]}.nc"


def studies(dataset: xr.Dataset) -> list[xr.Dataset]:
    """The cells of a sweep, or of a selection of cells or trials of it, as the studies they are; a study is its own
    only cell.

    **Raises** `ValueError` for a selection that leaves no cell, or no dimension `trial`, and for one laid out anew.

    >>> import jax
    >>> import gradflow as gf
    >>> trial = gf.Trial(neurons=2, switches=1, width=32, samples=20)
    >>> dataset = gf.run_study(trial, key=jax.random.key(0), trials=8)
    >>> len(gf.studies(dataset))  # of a sweep: its cells
    1
    """
    if not isinstance(dataset, xr.Dataset):
        raise ValueError(f"a study or sweep is an xarray.Dataset, such as gradflow.load gives, and not {dataset!r}")
    if "trial" not in dataset.dims or dataset.sizes.get("cell") == 0:
        raise ValueError("this is no study or sweep: keep the dimension trial, such as isel(trial=[3]), and some cell")
    if "cell" in dataset.dims:
        return [study for i in range(dataset.sizes["cell"]) for study in studies(dataset.isel(cell=i))]
    if "trial" in dataset.attrs:
        return [dataset]
    if "study_trial" not in dataset.coords or dataset["study_trial"].ndim:
        raise ValueError("these are not the cells of a sweep; take it as run_sweep returned it")
    stamp = {name: dataset[f"study_{name}"].item() for name in _STAMPS}
    study = dataset.drop_vars([*_SETTINGS, *(f"study_{name}" for name in _STAMPS)])
    return [study.assign_attrs(title="gradflow study", **stamp)]
