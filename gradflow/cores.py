"""Processes that keep to one core each: the fastest way through many trials on a CPU.

XLA hands the many small operations of a step attempt to whatever thread is free. Two batches in one process so wander
between the cores, and wait for each other's threads; a process that may use one core only runs everything in order.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


def cores(count=None) -> ProcessPoolExecutor:
    """An executor of spawned processes, each bound to a core of its own.

    **Arguments** `count`: how many processes; all cores that this one may use by default.

    **Returns** a `ProcessPoolExecutor`, to be closed after use. As it spawns, a script that uses it must be under
    `if __name__ == "__main__":`. Each process compiles for itself, unless there is a compilation cache.

    **Raises** `ValueError` for a count that is not positive or more than there are cores, `NotImplementedError` where
    the system cannot bind processes to cores (it takes Linux).

    >>> import gradflow as gf
    >>> with gf.cores(1) as executor:
    ...     len(executor.submit(os.sched_getaffinity, 0).result())
    1
    """
    if not hasattr(os, "sched_setaffinity"):
        raise NotImplementedError("this system cannot bind processes to cores; use a ProcessPoolExecutor as it is")
    there = sorted(os.sched_getaffinity(0))
    if count is None:
        count = len(there)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= len(there):
        raise ValueError(f"count must be a whole number from 1 to {len(there)}, the cores there are; got {count!r}")
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    for core in there[:count]:
        free.put(core)
    return ProcessPoolExecutor(count, context, initializer=_keep_to_one, initargs=(free,))


def _keep_to_one(free) -> None:
    os.sched_setaffinity(0, {free.get()})  # before JAX makes its threads
