"""Many trials: run in batches, kept in one labelled dataset, and resumed where they stopped.

Trial i depends on the study's key and i only, so the first n of 2n trials are the n trials of a smaller study, whatever
the batches, threads or interruptions: its verdicts are equal, and its numbers to the integration tolerance (a batch of
another size rounds differently). The number of trials is fixed beforehand. Stopping when the numbers look right would
spoil the intervals.

The result is a plain `xarray.Dataset` along the dimension `trial`, stamped with all it takes to run it again. Its
attributes `trial`, `key` and `versions` are JSON.
"""

import datetime
import functools
import importlib.metadata
import io
import json
import operator
import os
import pathlib
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr

from gradflow.limit import LIMIT_STATUSES
from gradflow.outcome import STATUSES, Flow, Status
from gradflow.record import Record, Verdict
from gradflow.statistics import Probability, estimate_probability
from gradflow.theory import region_bound
from gradflow.trial import Trial, record

FILE = "study.nc"
_CHECKPOINT = 60.0  # seconds between saves of an unfinished study
_CPU_BATCH, _DEVICE_BATCH = 4, 1024
_ATTRIBUTES = {"trial", "key", "versions", "backend", "dtype", "created", "seconds", "history"}
_VERDICTS = {verdict.value: verdict.name for verdict in Verdict}
_BOOL = {0: "no", 1: "yes"}

# name: dtype (of both file and memory; netCDF 3 has no wider integer), long name, meanings of the codes.
_VARIABLES: dict[str, tuple[type, str, dict[int, str] | None]] = {
    "verdict": (np.int8, "verdict on accuracy and regions", _VERDICTS),
    "status": (np.int32, "how the flow ended", dict(enumerate(STATUSES))),
    "limit_status": (np.int32, "what became of its limit", dict(enumerate(LIMIT_STATUSES))),
    "accuracy_verdict": (np.int8, "verdict on perfect training accuracy", _VERDICTS),
    "regions_verdict": (np.int8, "verdict on at most 32 r + 67 linear regions of the limit", _VERDICTS),
    "optimum_verdict": (np.int8, "verdict on the limit being the global optimum", _VERDICTS),
    "switches": (np.int32, "label switches of the teacher on the whole line", None),
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


def run_study(
    trial: Trial,
    *,
    key,
    trials,
    path: str | os.PathLike | None = None,
    batch=None,
    progress: Callable[[int, dict[str, int]], None] | None = None,
) -> xr.Dataset:
    """Run `trials` independent trials.

    **Arguments**

    - `trial`: the experiment;
    - `key`: one JAX random key; trial i uses `jax.random.fold_in(key, i)`;
    - `trials`: how many, in total;
    - `path`: a directory to keep the study in, made if need be, as the file `study.nc` (netCDF). If it holds a study of
      the same trial and key already, only what is missing is run. Finished trials are saved every minute and when the
      study is interrupted (Ctrl-C waits for the batches under way);
    - `batch`: trials in one compiled call, which takes as long as its slowest trial. The default is small on CPUs,
      where several calls run at once in threads, and large elsewhere;
    - `progress`: called as `progress(done, counts)` whenever a batch is done, with the number of finished trials and a
      mapping that says how many hold, fail and are unresolved.

    **Returns** a dataset with the fields of `Record` along `trial`.

    **Raises** `ValueError`, before anything compiles, for bad counts or keys, in float32, and for a
    `path` that holds another study or a file that cannot be read. Trials never raise: they end with a status.

    >>> trial = Trial(neurons=2, switches=1, width=32, samples=20)
    >>> dataset = run_study(trial, key=jax.random.key(0), trials=64)  # doctest: +SKIP
    """
    trials = _positive("trials", trials)
    on_cpu = jax.default_backend() == "cpu"
    batch = min(trials, _CPU_BATCH if on_cpu else _DEVICE_BATCH) if batch is None else _positive("batch", batch)
    values, key = trial.values, _checked(key)
    file = None if path is None else pathlib.Path(path) / FILE
    old = None if file is None else _previous(file, trial, key)
    parts: dict[int, dict[str, np.ndarray]] = {}
    if old is not None:
        parts[0] = {name: old[name].values[:trials] for name in _VARIABLES}
        _report(progress, parts)
        if old.sizes["trial"] >= trials:
            return old.isel(trial=slice(trials))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    begun, stamp = time.monotonic(), _provenance(trial, key)

    # Compiled once, here: threads that found it missing would each compile it.
    run = _batch.lower(trial.sizes, values, key, np.zeros(batch, np.uint32)).compile()
    # A compiled call lets go of Python's lock, so that threads fill the cores of a CPU; other devices have a queue.
    pool = ThreadPoolExecutor((os.cpu_count() or 1) if on_cpu else 1)
    saved = time.monotonic()
    starts = range(0 if old is None else old.sizes["trial"], trials, batch)
    futures = {pool.submit(_records, run, values, key, range(a, min(a + batch, trials)), batch): a for a in starts}
    try:
        for future in as_completed(futures):
            parts[futures[future]] = future.result()
            _report(progress, parts)
            if file is not None and time.monotonic() - saved > _CHECKPOINT and 0 in parts:
                saved = time.monotonic()
                _save(_dataset(parts, stamp, old, saved - begun), file)
    finally:
        # Batches begin in order, so those that were allowed to end are an unbroken run from trial 0.
        pool.shutdown(wait=True, cancel_futures=True)
        over = [future for future in futures if not future.cancelled() and future.exception() is None]
        parts.update({futures[future]: future.result() for future in over})
        seconds = time.monotonic() - begun
        if file is not None and 0 in parts:
            _save(_dataset(parts, stamp, old, seconds), file)
    return _dataset(parts, stamp, old, seconds)


@functools.partial(jax.jit, static_argnums=0)
def _batch(sizes, values, key, indices) -> Record:
    return jax.vmap(lambda i: record(sizes, values, jr.fold_in(key, i)))(indices)


def _records(run, values, key, wanted: range, batch: int) -> dict[str, np.ndarray]:
    """One batch, padded with repeats of its last trial to the compiled size, and cut."""
    indices = np.minimum(np.arange(wanted.start, wanted.start + batch), wanted.stop - 1).astype(np.uint32)
    outcome = run(values, key, indices)
    return {
        name: np.asarray(getattr(outcome, name))[: len(wanted)].astype(kind) for name, (kind, *_) in _VARIABLES.items()
    }


def _report(progress, parts) -> None:
    if progress is not None:
        codes = np.concatenate([part["verdict"] for part in parts.values()])
        progress(codes.size, {verdict.name: int(np.sum(codes == verdict.value)) for verdict in Verdict})


def _dataset(parts, stamp: dict, old: xr.Dataset | None, seconds: float) -> xr.Dataset:
    """The unbroken run of finished trials from trial 0, with units, meanings and provenance."""
    columns, end = [], 0
    while end in parts:
        columns.append(parts[end])
        end += columns[-1]["verdict"].size
    variables = {}
    for name, (kind, long_name, meanings) in _VARIABLES.items():
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


def _provenance(trial: Trial, key) -> dict[str, str]:
    import gradflow  # not at the top: the package is still being imported then

    packages = ("jax", "equinox", "diffrax", "numpy", "scipy", "xarray")
    versions = {"gradflow": gradflow.__version__} | {name: importlib.metadata.version(name) for name in packages}
    return {
        "title": "gradflow study",
        "trial": trial.to_json(),
        "key": _key_to_json(key),
        "versions": json.dumps(versions | {"python": platform.python_version()}),
        "backend": jax.default_backend(),
        "dtype": str(jnp.result_type(float)),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _key_to_json(key) -> str:
    return json.dumps({"impl": str(jr.key_impl(key)), "data": np.asarray(jr.key_data(key)).tolist()})


def _key_from_json(text: str):
    content = json.loads(text)
    return jr.wrap_key_data(jnp.asarray(content["data"], jnp.uint32), impl=content["impl"])


def _checked(key):
    """`key` as one typed key; keys of the older kind, two raw integers, are taken too."""
    try:
        key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jr.wrap_key_data(key)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"key must be a JAX random key such as jax.random.key(0), got {key!r}") from error
    if key.shape != ():
        raise ValueError(f"a study takes one key and makes its own for each trial, got keys of shape {key.shape}")
    return key


def _positive(name: str, value) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if not 1 <= number < 2**31:
        raise ValueError(f"{name} must be at least 1 and below 2^31, got {number}")
    return number


def _previous(file: pathlib.Path, trial: Trial, key) -> xr.Dataset | None:
    """The study in `file`, if there is one; it must be of the same trial, key and float dtype."""
    if file.parent.exists() and not file.parent.is_dir():
        raise ValueError(f"path must be a directory, and {file.parent} is a file")
    if not file.exists():
        return None
    old = load(file)
    wanted = {"trial": trial.to_json(), "key": _key_to_json(key), "dtype": str(jnp.result_type(float))}
    for name, value in wanted.items():
        if old.attrs[name] != value:
            raise ValueError(
                f"{file} holds a study of another {name}; choose another path.\n"
                f"  there: {old.attrs[name]}\n  asked: {value}"
            )
    return old


def _save(dataset: xr.Dataset, file: pathlib.Path) -> None:
    """Write `dataset` whole or not at all: under another name first, then flushed and renamed."""
    previous = _previous(file, Trial.from_json(dataset.attrs["trial"]), _key_from_json(dataset.attrs["key"]))
    if previous is not None and previous.sizes["trial"] > dataset.sizes["trial"]:
        return  # another process got further with this very study in the meantime
    encoding = {name: {"_FillValue": None} for name in dataset.variables}
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
    """The study kept in the directory `path` (or in the file `path`), in memory.

    **Raises** `FileNotFoundError` if there is none, and `ValueError`, naming the file, if it is torn or not a study.
    """
    file = pathlib.Path(path)
    file = file / FILE if file.is_dir() else file
    content = file.read_bytes()
    try:
        dataset = xr.load_dataset(io.BytesIO(content), engine="scipy")
    except Exception as error:  # whatever the reader trips over: a torn file fails in many ways
        raise ValueError(f"{file} cannot be read as netCDF; it is torn or something else: {error}") from error
    lacks = (_VARIABLES.keys() - dataset.data_vars.keys()) | (_ATTRIBUTES - dataset.attrs.keys())
    if lacks or dataset["verdict"].dims != ("trial",):
        raise ValueError(f"{file} is not a gradflow study, or one of another version: it lacks {sorted(lacks)}")
    return dataset


def replay(dataset: xr.Dataset, trial) -> Flow:
    """The trial that carries the number `trial` in `dataset`, run again as a `Flow` with 200 snapshots of its path.

    **Raises** `ValueError` for a number that is not in the dataset, and if JAX's float dtype is not the study's.
    """
    if trial not in dataset.indexes["trial"]:
        raise ValueError(f"there is no trial {trial} in a dataset of {dataset.sizes['trial']} trials")
    dtype = str(jnp.result_type(float))
    if dataset.attrs["dtype"] != dtype:
        raise ValueError(
            f"this study was run in {dataset.attrs['dtype']} and JAX is set to {dtype}: see jax_enable_x64"
        )
    key = jr.fold_in(_key_from_json(dataset.attrs["key"]), trial)
    return Trial.from_json(dataset.attrs["trial"]).flow(key, save=200)


class Claim(NamedTuple):
    """One claim, counted: trials by verdict, the probability that it holds, and what to know about it."""

    name: str
    holds: int
    fails: int
    unresolved: int
    probability: Probability
    note: str


def claims(dataset: xr.Dataset, confidence: float = 0.99) -> list[Claim]:
    """The claims that a study decides. Unresolved trials count against each; see `estimate_probability`.

    The last one is about the trials with a certified limit only, and left out if there are none: what training that
    failed would have found, nobody can say.
    """
    trial = Trial.from_json(dataset.attrs["trial"])
    bound = region_bound(trial.neurons)
    regions = f"of the certified limit; 32 r + 67 = {bound} is a reported bound"
    if trial.width + 1 <= bound:
        regions += f", and vacuous: {trial.width} neurons have at most {trial.width + 1} regions"
    certified = np.isin(dataset["limit_status"].values, (0, 1))
    everywhere = np.ones_like(certified)
    rows = (
        ("perfect training accuracy", "accuracy_verdict", everywhere, "proved by the loss"),
        ("at most 32r+67 linear regions", "regions_verdict", everywhere, regions),
        ("both: trial verdict", "verdict", everywhere, ""),
        ("limit is the global optimum", "optimum_verdict", certified, "among certified limits, to 1e-8 in the margin"),
    )
    found = []
    for name, variable, over, note in rows:
        codes = dataset[variable].values[over]
        if not codes.size:
            continue
        holds, fails, open_ = (
            int(np.sum(codes == v.value)) for v in (Verdict.holds, Verdict.fails, Verdict.unresolved)
        )
        probability = estimate_probability(holds, holds + fails, confidence, unresolved=open_)
        found.append(Claim(name, holds, fails, open_, probability, note))
    return found


def summary(dataset: xr.Dataset, confidence: float = 0.99) -> str:
    """The claim table and the main numbers of a study, as text."""
    table = claims(dataset, confidence)
    interval = f"{100 * confidence:g} % interval"
    lines = [f"{'claim':<34}{'probability':>11}  {interval:<18}{'holds':>8}{'fails':>8}  {'unresolved':>10}"]
    for name, holds, fails, open_, p, _ in table:
        lines.append(f"{name:<34}{p.estimate:>11.4f}  [{p.low:.4f}, {p.high:.4f}]  {holds:>8}{fails:>8}  {open_:>10}")
    lines += [f"  {claim.name}: {claim.note}" for claim in table if claim.note]
    status = dataset["status"].values
    certified = np.isin(dataset["limit_status"].values, (0, 1))
    everywhere = np.ones_like(certified)
    lines += ["", f"{'':<34}{'median':>11}{'90 %':>11}  over"]
    for label, name, over in (
        ("linear regions", "regions", certified),
        ("margin over the best", "optimality", certified),
        ("population error", "population_error", certified),
        ("log loss at the end", "log_loss", certified),
        ("step attempts", "steps", everywhere),
    ):
        numbers = dataset[name].values + (dataset["rejected"].values if name == "steps" else 0)
        numbers = numbers[over & np.isfinite(numbers)]
        median, high = np.quantile(numbers, (0.5, 0.9)) if numbers.size else (np.nan, np.nan)
        which = "certified limits" if over is certified else "trials"
        lines.append(f"{label:<34}{median:>11.4g}{high:>11.4g}  {numbers.size} {which}")
    lines.append("")
    for code, count in zip(*np.unique(status, return_counts=True), strict=True):
        lines.append(f"{count} x {STATUSES[code].replace('_', ' ')}. {Status[getattr(Status, STATUSES[code])]}")
    lines.append(f"{dataset.sizes['trial']} trials in {float(dataset.attrs['seconds']):.1f} s")
    return "\n".join(lines)
