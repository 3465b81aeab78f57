"""A study as a labelled dataset, in memory and on disk.

A plain `xarray.Dataset` along the dimension `trial`, stamped with all it takes to run it again: its attributes `trial`,
`key` and `versions` are JSON. A file is written whole or not at all, and read back only if it is a study.
"""

import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import platform
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr

from gradflow.limit import LIMIT_STATUSES
from gradflow.outcome import STATUSES
from gradflow.record import Verdict
from gradflow.trial import Trial

FILE = "study.nc"
_ATTRIBUTES = {"trial", "key", "versions", "backend", "dtype", "created", "seconds", "history"}
_VERDICTS = {verdict.value: verdict.name for verdict in Verdict}
_BOOL = {0: "no", 1: "yes"}
# Attributes in which the studies of a sweep may differ.
_STAMPS = ("trial", "key", "versions", "backend", "dtype", "created", "seconds", "history")
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


def assemble(parts, stamp: dict, old: xr.Dataset | None, seconds: float) -> xr.Dataset:
    """The unbroken run of finished trials from trial 0, with units, meanings and provenance."""
    columns, end = [], 0
    while end in parts:
        columns.append(parts[end])
        end += columns[-1]["verdict"].size
    variables = {}
    for name, (kind, long_name, meanings) in VARIABLES.items():
        attrs = {"long_name": long_name, "units": "1"}
        if meanings is not None:
            codes = np.array(list(meanings), np.int8 if kind is np.bool_ else kind)
            attrs |= {"flag_values": codes, "flag_meanings": " ".join(meanings.values())}
        variables[name] = ("trial", np.concatenate([column[name] for column in columns]), attrs)
    index = ("trial", np.arange(end, dtype=np.int32), {"long_name": "trial: key folded with this number", "units": "1"})
    first = 0 if old is None else old.sizes["trial"]
    line = f"{stamp['created']} trials {first} to {end - 1} on {stamp['backend']}, {stamp['versions']}"
    if old is not None:
        # A resumed study stays the study it was; what ran when, and with which versions, stands in its history.
        stamp = stamp | {"created": old.attrs["created"]}
        line, seconds = old.attrs["history"] + "\n" + line, seconds + float(old.attrs["seconds"])
    return xr.Dataset(variables, {"trial": index}, stamp | {"seconds": seconds, "history": line})


def provenance(trial: Trial, key) -> dict[str, str]:
    import gradflow  # not at the top: the package is still being imported then

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


def previous(file: pathlib.Path, trial: Trial, key) -> xr.Dataset | None:
    """The study in `file`, if there is one; it must be of the same trial, key and float dtype."""
    if file.parent.exists() and not file.parent.is_dir():
        raise ValueError(f"path must be a directory, and {file.parent} is a file")
    if not file.exists():
        return None
    old = load(file)
    wanted = {"trial": trial.to_json(), "key": key_to_json(key), "dtype": str(jnp.result_type(float))}
    for name, value in wanted.items():
        if old.attrs[name] != value:
            raise ValueError(
                f"{file} holds a study of another {name}; choose another path.\n"
                f"  there: {old.attrs[name]}\n  asked: {value}"
            )
    return old


def save(dataset: xr.Dataset, file: pathlib.Path) -> None:
    """Write a study, unless the file holds more of it already."""
    old = previous(file, Trial.from_json(dataset.attrs["trial"]), key_from_json(dataset.attrs["key"]))
    if old is None or old.sizes["trial"] <= dataset.sizes["trial"]:
        write(dataset, file)  # else another process got further with this very study in the meantime


def write(dataset: xr.Dataset, file: pathlib.Path) -> None:
    """Write `dataset` whole or not at all: under another name first, then flushed and renamed."""
    encoding = {name: {"_FillValue": None} for name in dataset.variables if dataset[name].dtype.kind not in "OSU"}
    content = bytes(dataset.to_netcdf(engine="scipy", format="NETCDF3_64BIT", encoding=encoding))
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> xr.Dataset:
    """The study or sweep kept in the directory `path` (or in the file `path`), in memory.

    **Raises** `FileNotFoundError` if there is none, and `ValueError`, naming files, if it is torn or neither, if the
    directory holds several, and for a sweep that is not finished.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        found = [*file.glob(FILE), *sorted(file.glob("sweep-*.nc"))]
        if len(found) > 1:
            raise ValueError(f"{file} holds several; load one of {', '.join(str(one) for one in found)}")
        if not found and any(file.glob(f"cell-*/{FILE}")):
            raise ValueError(f"{file} holds an unfinished sweep; run it again with the same cells, and it goes on")
        file = found[0] if found else file / FILE
    content = file.read_bytes()
    try:
        dataset = xr.load_dataset(io.BytesIO(content), engine="scipy")
    except Exception as error:  # whatever the reader trips over: a torn file fails in many ways
        raise ValueError(f"{file} cannot be read as netCDF; it is torn or something else: {error}") from error
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
        seconds=sum(float(cell.attrs["seconds"]) for cell in cells),
        **{name: cells[0].attrs[name] for name in ("versions", "backend", "dtype", "created")},
    )


def sweep_name(trials: Sequence[Trial]) -> str:
    """The file of a sweep of these cells: another sweep in the same directory has another one."""
    return f"sweep-{hashlib.sha256(' '.join(trial.to_json() for trial in trials).encode()).hexdigest()[:8]}.nc"


def studies(dataset: xr.Dataset) -> list[xr.Dataset]:
    """The cells of a sweep, or of a selection of cells or trials of it, as the studies they are; a study is its own
    only cell.

    **Raises** `ValueError` for a selection that leaves no cell, or no dimension `trial`, and for one laid out anew.
    """
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
