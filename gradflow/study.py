"""Many trials: run in batches, kept in a labelled dataset, and resumed where they stopped.

Trial i depends on the study's key and i only, so the first n of 2n trials are the n trials of a smaller study, whatever
the batches, threads, devices, executors or interruptions: its verdicts are equal, and its numbers to the integration
tolerance (a batch of another size rounds differently). The number of trials is fixed beforehand. Stopping when the
numbers look right would spoil the intervals, except that of `confidence_sequence`.

A *sweep* is several studies, its cells, along one more dimension. A cell's key depends on the sweep's key and on what
the cell is, so cells are independent of each other, and adding some does not change the others. Cells of one loss and
one kind of input law share compiled programs, padded to the largest sizes among them.

**Several processes** that `jax.distributed` has joined each take their share of the trials, and need a `path` that all
of them see.
"""

import functools
import hashlib
import operator
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor

import jax
import jax.numpy as jnp
import jax.random as jr
import xarray as xr
from jax.experimental import multihost_utils

from gradflow.archive import gathered, key_from_json, load, studies, sweep_name, write
from gradflow.dispatch import Cell, by_executor, locally
from gradflow.outcome import Flow
from gradflow.store import Store
from gradflow.trial import Slots, Trial
from gradflow.watch import Progress, Watch


def run_study(
    trial: Trial,
    *,
    key,
    trials,
    path: str | os.PathLike | None = None,
    batch=None,
    executor=None,
    progress: Callable[[Progress], None] | None = None,
) -> xr.Dataset:
    """Run `trials` independent trials.

    **Arguments**

    - `trial`: the experiment;
    - `key`: one JAX random key; trial i uses `jax.random.fold_in(key, i)`;
    - `trials`: how many, in total;
    - `path`: a directory to keep the study in, made if need be: as `study.nc` (netCDF) and the parts it is made of
      (`gradflow/store.py`). If it holds trials of the same study already, only what is missing is run. Finished trials
      are saved every half minute, and when the study is interrupted;
    - `batch`: trials that a compiled program holds at a time; one that ends makes room for the next. The default is 8
      on CPUs, where each core has a program of its own, and as many as fit in memory elsewhere, on each device;
    - `executor`: any `concurrent.futures.Executor`, such as a `ProcessPoolExecutor` or `client.get_executor()` of a
      Dask cluster, to run the trials in tasks of 16 batches each. The default is this process and all its devices;
    - `progress`: called now and then with a `Progress`.

    **Returns** a dataset with the fields of `Record` along `trial`. Its attribute `lane_attempts` says for how many
    step attempts the lanes of all batches made time; what share of them trials took is in `gradflow.summary`.

    **Raises** `ValueError`, before anything compiles, for bad counts or keys, in float32, for a `path` that holds
    another study, and for none when several processes share the study; `MemoryError` for a batch that does not fit;
    `OSError` if the disk is full; `RuntimeError` if a worker died. All of these leave a study that can be gone on with.
    Trials never raise: they end with a status.

    >>> import jax
    >>> import gradflow as gf
    >>> trial = gf.Trial(neurons=2, switches=1, width=32, samples=20)
    >>> dataset = gf.run_study(trial, key=jax.random.key(0), trials=8)
    >>> dataset.sizes["trial"]
    8
    """
    folder = None if path is None else pathlib.Path(path)
    _check_trials([trial])
    (store,) = _run([(trial, _checked(key), folder)], trials, batch, executor, progress)
    return store.dataset(trials)


def run_sweep(
    cells: Iterable[Trial],
    *,
    key,
    trials,
    path: str | os.PathLike | None = None,
    batch=None,
    executor=None,
    progress: Callable[[Progress], None] | None = None,
) -> xr.Dataset:
    """Run `trials` independent trials of each of several experiments.

    **Arguments** as in `run_study`, and

    - `cells`: the experiments, all different;
    - `path`: a directory to keep the sweep in: each cell as a study in a folder of its own, so that cells can be added
      and what is there is never run again, and all of it as `sweep-….nc`, named after its cells.

    **Returns** a dataset with the fields of `Record` along `cell` and `trial`, and what the cells are as coordinates of
    `cell`: `dataset.set_index(cell=["width", "samples"]).unstack("cell")` lays them out as a grid, if that tells them
    apart.

    **Raises** as `run_study` does, and `ValueError` for no cells and for equal ones.

    >>> import jax
    >>> import gradflow as gf
    >>> cells = [gf.Trial(neurons=2, switches=1, width=32, samples=n) for n in (10, 20)]
    >>> sweep = gf.run_sweep(cells, key=jax.random.key(0), trials=8)
    >>> sweep["regions"].shape
    (2, 8)
    """
    cells, key = list(cells), _checked(key)
    _check_trials(cells)
    if not cells:
        raise ValueError("a sweep takes at least one cell")
    if twice := [cell for i, cell in enumerate(cells) if cell in cells[:i]]:
        raise ValueError(f"the cells of a sweep must differ, and this one comes twice: {twice[0]}")
    folder = None if path is None else pathlib.Path(path)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a directory, and {folder} is a file")
    work = []
    for trial in cells:
        name = hashlib.sha256(trial.to_json().encode()).hexdigest()[:8]
        work.append((trial, jr.fold_in(key, int(name, 16)), None if folder is None else folder / f"cell-{name}"))
    stores = _run(work, trials, batch, executor, progress)
    if folder is None:
        return gathered([store.dataset(trials) for store in stores], key)
    file = folder / sweep_name(cells)
    if jax.process_index() == 0 and not (file.exists() and load(file).sizes["trial"] >= trials):
        empty = gathered([store.slice(0, 0) for store in stores], key)
        write(empty, file, trials, lambda cell, first, last: stores[cell or 0].rows(first, last))
    _meet("written")
    return load(file).isel(trial=slice(trials))


def replay(dataset: xr.Dataset, trial) -> Flow:
    """The trial that carries the number `trial` in `dataset`, run again as a `Flow` with up to 200 snapshots.

    A cell of a sweep is a study: `replay(sweep.isel(cell=3), 17)`.

    **Raises** `ValueError` for a number that is not in the dataset, a sweep of several cells, and if JAX's float dtype
    is not the study's.

    >>> import jax
    >>> import gradflow as gf
    >>> trial = gf.Trial(neurons=2, switches=1, width=32, samples=20)
    >>> dataset = gf.run_study(trial, key=jax.random.key(0), trials=8)
    >>> bool(gf.replay(dataset, trial=3).status == gf.Status.certified)
    True
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


def _run(
    work: Sequence[tuple[Trial, jax.Array, pathlib.Path | None]],
    trials,
    batch,
    executor,
    progress: Callable[[Progress], None] | None,
) -> list[Store]:
    """The studies of several cells (trial, key, folder), with all their trials."""
    trials = _positive("trials", trials)
    batch = None if batch is None else _positive("batch", batch)
    if executor is not None and not isinstance(executor, Executor):
        raise ValueError(f"executor must be a concurrent.futures.Executor, got {executor!r}")
    if progress is not None and not callable(progress):
        raise ValueError(f"progress must be a function of a gradflow.Progress, got {progress!r}")
    if jax.process_count() > 1 and (executor is not None or any(folder is None for *_, folder in work)):
        raise ValueError("several processes share a study through its path: give one that all of them see, no executor")
    for trial, *_ in work:
        _ = trial.values  # raises in float32
    stores = [Store(*one, trials) for one in work]
    slots = _shared_slots([trial for trial, *_ in work], trials)
    families: dict[object, list[Cell]] = {}
    for i, (store, (trial, key, _)) in enumerate(zip(stores, work, strict=True)):
        mine = store.missing(trials)
        mine = mine[mine % jax.process_count() == jax.process_index()]
        if mine.size:
            families.setdefault((slots[i], _kind(trial)), []).append(Cell(i, trial, slots[i], key, mine))
    watch = Watch(stores, trials, progress)
    try:
        watch.look()
        if families:
            run = locally if executor is None else functools.partial(by_executor, executor)
            run(list(families.values()), batch, watch)
            watch.look()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: {watch.advice}") from None
    finally:
        watch.close()
        if jax.process_count() == 1:
            for store in stores:
                store.write()
    _meet("run")
    if jax.process_count() > 1:
        stores = [Store(*one, trials) for one in work]  # with what the others have run
        if jax.process_index() == 0:
            for store in stores:
                store.write()
        _meet("kept")
    return stores


def _meet(what: str) -> None:
    """Wait for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"gradflow study {what}")


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


def _check_trials(cells) -> None:
    for cell in cells:
        if not isinstance(cell, Trial):
            raise ValueError(f"an experiment is a gradflow.Trial, such as Trial(width=64), and not {cell!r}")


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
