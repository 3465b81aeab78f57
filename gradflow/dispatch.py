"""Where trials are run: in threads of this process, on all its devices, or by an executor, in tasks of its own.

A *family* is the missing trials of cells that share compiled programs.
"""

import functools
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from gradflow.engine import Engine, Work
from gradflow.lane import begin
from gradflow.trial import Slots, Trial
from gradflow.watch import Watch

_CPU_LANES = 8
_DEVICE_LANES = 8192  # from there on an H200 takes twice as long for twice as many
_TASK = 16  # trials that a task has for each lane
_IN_FLIGHT = 256  # tasks
_POLL = 0.1  # seconds


class Cell(NamedTuple):
    """Trials to run: their numbers, in arrays of these sizes."""

    index: int
    trial: Trial
    slots: Slots
    key: jax.Array
    numbers: np.ndarray


def lanes(cells: Sequence[Cell], batch: int | None, engines: int) -> int:
    """How many lanes an engine has for these cells: `batch`, or as many as suit the device and its memory, but no more
    than there is work for.
    """
    if batch is not None:
        return batch
    most = _CPU_LANES if jax.default_backend() == "cpu" else _DEVICE_LANES
    room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if room is not None:
        fit = room // (2 * max(lane_bytes(cell.slots) for cell in cells))
        most = max(1, min(most, 2 ** (int(fit).bit_length() - 1)))
    share = -(-sum(cell.numbers.size for cell in cells) // engines)
    return min(most, 2 ** (share - 1).bit_length())


def lane_bytes(slots: Slots) -> int:
    """What a lane takes in memory while a step is made: five Jacobians, and some vectors along points and neurons.

    An H200 at 8,192 lanes of the default trial took 100 kB each, where this says 133 kB.
    """
    positions = min(slots.samples, 2 * (slots.width + 1), 160)
    return 8 * (5 * positions**2 + 50 * (slots.samples + slots.width))


def group_of(width: int) -> int:
    """How many of so many lanes begin or are closed at once: on a CPU, one costs an eighth of eight."""
    return 1 if jax.default_backend() == "cpu" else max(1, width // 8)


def locally(families: Sequence[Sequence[Cell]], batch: int | None, watch: Watch) -> None:
    """Run all of it in this process. An exception, in whatever thread, ends the run at the end of a segment."""
    width = lanes([cell for family in families for cell in family], batch, threads())
    group = group_of(width)
    try:
        in_threads([_blocks(family, group) for family in families], width, group, watch)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise MemoryError(f"the device has no room for {width} trials at once: choose a smaller batch") from error
        raise


def threads() -> int:
    """How many engines this process has: one a device; a CPU, on which a call lets go of Python's lock, has cores."""
    devices = len(jax.local_devices())
    return max(os.cpu_count() or 1, devices) if jax.default_backend() == "cpu" else devices


def in_threads(queues: Sequence[Iterator[Work]], width: int, group: int, watch) -> None:
    """Run all work of each queue, whose lanes share their programs, in engines of so many lanes and one thread each."""
    devices, stop, failures = jax.local_devices(), threading.Event(), []
    queues = [_Shared(queue) for queue in queues]
    gates = [{device: threading.Lock() for device in devices} for _ in queues]
    engines = [Engine(width, group, watch.add, stop) for _ in range(threads())]

    def drive(engine: Engine, device) -> None:
        try:
            with jax.default_device(device):
                for queue, gate in zip(queues, gates, strict=True):
                    with gate[device]:  # the first one compiles
                        if not stop.is_set():
                            engine.prepare(queue)
                    engine.run()
        except BaseException as error:
            failures.append(error)
            stop.set()

    running = [
        threading.Thread(target=drive, args=(engine, devices[i % len(devices)])) for i, engine in enumerate(engines)
    ]
    for thread in running:
        thread.start()
    try:
        while any(thread.is_alive() for thread in running):
            for thread in running:
                thread.join(_POLL)
            watch.possible = sum(engine.possible for engine in engines)
            watch.look()
    finally:
        stop.set()
        for thread in running:
            thread.join()
        watch.possible = sum(engine.possible for engine in engines)
    for error in failures:
        raise error


def by_executor(executor: Executor, families: Sequence[Sequence[Cell]], batch: int | None, watch: Watch) -> None:
    """Run all of it in tasks of an executor."""
    tasks = (
        (cell, some)
        for family in families
        for cell in family
        for some in _split(cell.numbers, _TASK * lanes([cell], batch, 1))
    )
    running: dict[Future, int] = {}
    try:
        while True:
            while len(running) < _IN_FLIGHT and (task := next(tasks, None)) is not None:
                cell, numbers = task
                raw = str(jr.key_impl(cell.key)), np.asarray(jr.key_data(cell.key))
                future = executor.submit(_task, cell.trial.to_json(), cell.slots, raw, numbers, batch)
                running[future] = cell.index
            if not running:
                return
            ended, _ = wait(running, timeout=_POLL, return_when=FIRST_COMPLETED)
            for future in ended:
                index = running.pop(future)
                numbers, record, possible = future.result()
                watch.possible += possible
                watch.add(index, numbers, record)
            watch.look()
    except BrokenExecutor as error:
        raise RuntimeError(f"a worker of the executor died; its trials are run again if you go on: {error}") from error
    finally:
        for future in running:
            future.cancel()


def _task(trial_json: str, slots: Slots, raw: tuple[str, np.ndarray], numbers: np.ndarray, batch: int | None):
    """Some trials of one cell, in a worker: their numbers as they ended, their records, and for how many attempts its
    lanes made time.
    """
    if jnp.result_type(float) != jnp.float64:
        jax.config.update("jax_enable_x64", True)  # the worker is ours, and trials need it
    trial, found = Trial.from_json(trial_json), []
    cell = Cell(0, trial, slots, jr.wrap_key_data(jnp.asarray(raw[1]), impl=raw[0]), numbers)
    width = lanes([cell], batch, 1)
    group = group_of(width)
    engine = Engine(width, group, lambda _, numbers, record: found.append((numbers, record)), threading.Event())
    engine.prepare(_blocks([cell], group))
    engine.run()
    record = jax.tree.map(lambda *some: np.concatenate(some), *(record for _, record in found))
    return np.concatenate([numbers for numbers, _ in found]), record, engine.possible


def _blocks(family: Sequence[Cell], group: int) -> Iterator[Work]:
    for cell in family:
        sizes, values = cell.trial.sizes(cell.slots), cell.trial.values
        for some in _split(cell.numbers, group):
            yield Work(cell.index, some, functools.partial(begin, sizes, values, cell.key))


def _split(numbers: np.ndarray, most: int) -> Iterator[np.ndarray]:
    for start in range(0, numbers.size, most):
        yield numbers[start : start + most]


class _Shared:
    """An iterator that several threads can take from."""

    def __init__(self, iterator: Iterator[Work]):
        self.iterator, self.lock = iterator, threading.Lock()

    def __iter__(self):
        return self

    def __next__(self) -> Work:
        with self.lock:
            return next(self.iterator)
