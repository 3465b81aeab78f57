"""Many trials: run in batches, kept in a labelled dataset, and resumed where they stopped.

Trial i depends on the study's key and i only, so the first n of 2n trials are the n trials of a smaller study, whatever
the batches, threads or interruptions: its verdicts are equal, and its numbers to the integration tolerance (a batch of
another size rounds differently). The number of trials is fixed beforehand. Stopping when the numbers look right would
spoil the intervals, except that of `confidence_sequence`.

A *sweep* is several studies, its cells, along one more dimension. A cell's key depends on the sweep's key and on what
the cell is, so cells are independent of each other, and adding some does not change the others. Cells of one loss and
one kind of input law share compiled programs, padded to the largest sizes among them.
"""

import dataclasses
import functools
import hashlib
import operator
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, as_completed, wait

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr

from gradflow.archive import (
    FILE,
    VARIABLES,
    assemble,
    gathered,
    key_from_json,
    load,
    previous,
    provenance,
    save,
    studies,
    sweep_name,
    write,
)
from gradflow.outcome import Flow
from gradflow.record import Record, Verdict
from gradflow.trial import Slots, Trial, draw, measure

_CHECKPOINT = 60.0  # seconds between saves of an unfinished study
_CPU_BATCH, _DEVICE_BATCH = 4, 1024

Progress = Callable[[int, dict[str, int]], None]


def run_study(
    trial: Trial,
    *,
    key,
    trials,
    path: str | os.PathLike | None = None,
    batch=None,
    progress: Progress | None = None,
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
    file = None if path is None else pathlib.Path(path) / FILE
    (dataset,) = _run([(trial, _checked(key), file)], trials, batch, progress)
    return dataset


def run_sweep(
    cells: Iterable[Trial],
    *,
    key,
    trials,
    path: str | os.PathLike | None = None,
    batch=None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Run `trials` independent trials of each of several experiments.

    **Arguments** as in `run_study`, and

    - `cells`: the experiments, all different;
    - `path`: a directory to keep the sweep in: each cell as a study in a folder of its own, so that cells can be added
      and what is there is never run again, and all of it as `sweep-….nc`, named after its cells.

    **Returns** a dataset with the fields of `Record` along `cell` and `trial`, and what the cells are as coordinates of
    `cell`: `dataset.set_index(cell=["width", "samples"]).unstack("cell")` lays them out as a grid.

    **Raises** as `run_study` does, and `ValueError` for no cells and for equal ones.

    >>> cells = [Trial(width=k, samples=n) for k in (8, 16, 32) for n in (25, 50)]
    >>> dataset = run_sweep(cells, key=jax.random.key(0), trials=64)  # doctest: +SKIP
    """
    cells, key = list(cells), _checked(key)
    if not cells or len(set(cells)) < len(cells):
        raise ValueError(f"a sweep takes at least one cell, and no two that are equal; got {len(cells)}")
    folder = None if path is None else pathlib.Path(path)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a directory, and {folder} is a file")
    work = []
    for trial in cells:
        name = hashlib.sha256(trial.to_json().encode()).hexdigest()[:8]
        file = None if folder is None else folder / f"cell-{name}" / FILE
        work.append((trial, jr.fold_in(key, int(name, 16)), file))
    sweep = gathered(_run(work, trials, batch, progress), key)
    if folder is not None:
        file = folder / sweep_name(cells)
        if not file.exists() or load(file).sizes["trial"] < sweep.sizes["trial"]:
            write(sweep, file)
    return sweep


def replay(dataset: xr.Dataset, trial) -> Flow:
    """The trial that carries the number `trial` in `dataset`, run again as a `Flow` with 200 snapshots of its path.

    A cell of a sweep is a study: `replay(sweep.isel(cell=3), 17)`.

    **Raises** `ValueError` for a number that is not in the dataset, a sweep of several cells, and if JAX's float dtype
    is not the study's.
    """
    if len(cells := studies(dataset)) != 1:
        raise ValueError("this is a sweep: take one of its cells, such as sweep.isel(cell=0)")
    (dataset,) = cells
    if trial not in dataset.indexes["trial"]:
        raise ValueError(f"there is no trial {trial} in a dataset of {dataset.sizes['trial']} trials")
    dtype = str(jnp.result_type(float))
    if dataset.attrs["dtype"] != dtype:
        raise ValueError(
            f"this study was run in {dataset.attrs['dtype']} and JAX is set to {dtype}: see jax_enable_x64"
        )
    key = jr.fold_in(key_from_json(dataset.attrs["key"]), trial)
    return Trial.from_json(dataset.attrs["trial"]).flow(key, save=200)


@dataclasses.dataclass
class _Cell:
    """One study under way: what it was, if anything, and its finished batches by their first trial."""

    trial: Trial
    key: jax.Array
    file: pathlib.Path | None
    old: xr.Dataset | None
    stamp: dict[str, str]
    parts: dict[int, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    busy: float = 0.0  # seconds of threads
    saved: int = 0

    def dataset(self, seconds: float) -> xr.Dataset:
        return assemble(self.parts, self.stamp, self.old, seconds)

    def save(self, seconds: float) -> None:
        if self.file is not None and 0 in self.parts and len(self.parts) > self.saved:
            save(self.dataset(seconds), self.file)
            self.saved = len(self.parts)


def _run(
    work: Sequence[tuple[Trial, jax.Array, pathlib.Path | None]], trials, batch, progress: Progress | None
) -> list[xr.Dataset]:
    """The studies of several cells (trial, key, file)."""
    trials = _positive("trials", trials)
    on_cpu = jax.default_backend() == "cpu"
    batch = min(trials, _CPU_BATCH if on_cpu else _DEVICE_BATCH) if batch is None else _positive("batch", batch)
    values = [trial.values for trial, *_ in work]
    slots = _shared_slots([trial for trial, *_ in work], trials)
    cells = []
    for trial, key, file in work:
        old = None if file is None else previous(file, trial, key)
        cell = _Cell(trial, key, file, old, provenance(trial, key))
        if old is not None:
            cell.parts[0], cell.saved = {name: old[name].values[:trials] for name in VARIABLES}, 1
        cells.append(cell)
    if any(cell.parts for cell in cells):
        _report(progress, cells)
    done = [0 if cell.old is None else cell.old.sizes["trial"] for cell in cells]
    todo = [i for i in range(len(cells)) if done[i] < trials]
    for i in todo:
        if (file := cells[i].file) is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

    # A compiled call lets go of Python's lock, so that threads fill the cores of a CPU; other devices have a queue.
    pool = ThreadPoolExecutor((os.cpu_count() or 1) if on_cpu else 1)
    begun = saved = time.monotonic()
    futures: dict[Future, tuple[int, int]] = {}

    def submit(i: int, start: int) -> Future:
        wanted = range(start, min(start + batch, trials))
        future = pool.submit(_records, cells[i].trial.sizes(slots[i]), values[i], cells[i].key, wanted, batch)
        futures[future] = i, start
        return future

    def harvest(future: Future) -> None:
        i, start = futures.pop(future)
        cells[i].parts[start], busy = future.result()
        cells[i].busy += busy

    def seconds(cell: _Cell, now: float) -> float:
        """Its share of the time so far."""
        whole = sum(other.busy for other in cells)
        return (now - begun) * (cell.busy / whole if whole else 1 / len(cells))

    starts = {i: list(range(done[i], trials, batch)) for i in todo}
    programs: dict[object, int] = {}
    try:
        # Threads that found a program missing would each compile it: one batch of each comes first.
        for i in todo:
            _draws(cells[i].trial.sizes(slots[i]), values[i], cells[i].key, np.zeros(batch, np.uint32))
            programs.setdefault((slots[i], _kind(cells[i].trial)), i)
        wait([submit(i, starts[i].pop(0)) for i in programs.values()], return_when=FIRST_EXCEPTION)
        for i in todo:
            for start in starts[i]:
                submit(i, start)
        for future in as_completed(list(futures)):
            harvest(future)
            _report(progress, cells)
            if time.monotonic() - saved > _CHECKPOINT:
                saved = time.monotonic()
                for cell in cells:
                    cell.save(seconds(cell, saved))
    finally:
        # Batches begin in order, so those that were allowed to end are an unbroken run from trial 0.
        pool.shutdown(wait=True, cancel_futures=True)
        for future in list(futures):
            if not future.cancelled() and future.exception() is None:
                harvest(future)
        ended = time.monotonic()
        for cell in cells:
            cell.save(seconds(cell, ended))
    whole = [cell.old if done[i] >= trials else cell.dataset(seconds(cell, ended)) for i, cell in enumerate(cells)]
    return [dataset.isel(trial=slice(trials)) for dataset in whole]


def _shared_slots(cells: Sequence[Trial], trials: int) -> list[Slots]:
    """The sizes of each cell's arrays: the largest of those that share a program with it.

    Compiling costs as much as some 200 trials of the default size, so cells of n `trials` share a program as long as
    that makes none of them more than 1 + 200/n times as dear. What a step costs goes like the square of the positions
    in the Jacobian, and like the points and neurons.
    """

    def cost(slots: Slots) -> int:
        positions = max(min(slots.samples, 2 * (slots.width + 1), 160), 48)
        return positions**2 + 15 * (slots.samples + slots.width)

    found: list[Slots] = [trial.slots for trial in cells]
    left = sorted(range(len(cells)), key=lambda i: (-cost(cells[i].slots), i))
    while left:
        first, *others = left
        shared, group = cells[first].slots, [first]
        for i in others:
            wider = Slots(*map(max, zip(shared, cells[i].slots, strict=True)))
            least = min(cost(cells[j].slots) for j in (i, *group))
            if _kind(cells[i]) == _kind(cells[first]) and cost(wider) <= (1 + 200 / trials) * least:
                shared = wider
                group.append(i)
        for i in group:
            found[i] = shared
        left = [i for i in left if i not in group]
    return found


def _kind(trial: Trial):
    """What the code of a trial's flow and judgement depends on, besides sizes."""
    return trial.loss, type(trial.distribution)


@functools.partial(jax.jit, static_argnums=0)
def _draws(sizes, values, key, indices):
    return jax.vmap(lambda i: draw(sizes, values, jr.fold_in(key, i)))(indices)


@functools.partial(jax.jit, static_argnums=0)
def _measures(loss, values, drawn) -> Record:
    return jax.vmap(lambda *one: measure(loss, values, *one))(*drawn)


def _records(sizes, values, key, wanted: range, batch: int) -> tuple[dict[str, np.ndarray], float]:
    """One batch, padded with repeats of its last trial to the compiled size, and cut; and how long it took."""
    begun = time.monotonic()
    indices = np.minimum(np.arange(wanted.start, wanted.start + batch), wanted.stop - 1).astype(np.uint32)
    outcome = _measures(sizes.loss, values, _draws(sizes, values, key, indices))
    part = {
        name: np.asarray(getattr(outcome, name))[: len(wanted)].astype(kind) for name, (kind, *_) in VARIABLES.items()
    }
    return part, time.monotonic() - begun


def _report(progress: Progress | None, cells: list[_Cell]) -> None:
    if progress is not None:
        codes = np.concatenate([part["verdict"] for cell in cells for part in cell.parts.values()])
        progress(codes.size, {verdict.name: int(np.sum(codes == verdict.value)) for verdict in Verdict})


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
