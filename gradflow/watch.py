"""A study under way: what the engines hand in is kept and saved, and reported."""

import collections
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gradflow.archive import VARIABLES
from gradflow.record import Record, Verdict
from gradflow.statistics import Estimate, confidence_sequence
from gradflow.store import Store

_CHECKPOINT = 30.0  # seconds between saves of an unfinished study


class Progress(NamedTuple):
    """How far a study is.

    - `done`, `trials`: how many have ended, of how many;
    - `verdicts`: how many of those hold, fail and are unresolved;
    - `interval`: of a study, not a sweep: the probability that a trial's verdict is that it holds, from the trials up
      to the first that has not ended, with an interval that may be looked at at any time (`confidence_sequence`);
    - `rate`: trials a second, since the first one ended; `left`: seconds to go at that rate (infinite at first);
    """

    done: int
    trials: int
    verdicts: dict[str, int]
    interval: Estimate | None
    rate: float
    left: float

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.trials} trials", *(f"{count} {name}" for name, count in self.verdicts.items())]
        if self.interval is not None:
            parts.append(str(self.interval))
        if math.isfinite(self.left):
            parts.append(f"{self.rate:.1f} trials/s, {self.left:.0f} s left")
        return ", ".join(parts)


class Watch:
    """Of the studies in these stores, each of so many trials. `possible`: step attempts that the lanes of all engines
    have made time for, which they say before each `look`.
    """

    def __init__(self, stores: Sequence[Store], trials: int, progress: Callable[[Progress], None] | None):
        self.stores, self.trials, self.progress = stores, trials, progress
        self.attempts = [0] * len(stores)  # of trials that have ended and are not charged, and one for each
        self.possible = self.charged = 0
        self.saved = self.counted = time.monotonic()
        self.before = self._done()
        self.started: tuple[float, int] | None = None  # when the first trials had ended, and how many that were
        self.fresh = self.before > 0
        self.lock, self.closed = threading.Lock(), False

    def add(self, cell: int, numbers: np.ndarray, record: Record) -> None:
        """Finished trials, from any thread. After `close` they are left out: the thread has outlived its study."""
        columns = {name: np.asarray(getattr(record, name)).astype(kind) for name, (kind, *_) in VARIABLES.items()}
        with self.lock:
            if not self.closed:
                self.stores[cell].add(numbers, columns)
                self.attempts[cell] += int(np.sum(columns["steps"] + columns["rejected"] + 1))
                self.fresh = True

    def look(self) -> None:
        with self.lock:
            if self.fresh:
                self.fresh = False
                self._report()
            if time.monotonic() - self.saved > _CHECKPOINT:
                self._save()

    def close(self) -> None:
        """Save what there is, and take nothing more: Ctrl-C again and again leaves threads behind."""
        with self.lock:
            self.closed = True
            self._save()

    @property
    def advice(self) -> str:
        """For somebody who stops here."""
        done = f"{self._done()} of {self.trials * len(self.stores)} trials have ended"
        if self.stores[0].folder is None:
            return f"{done} and are lost, as there is no path to keep them in"
        return f"{done} and are kept; run the same again, and it goes on"

    def _save(self) -> None:
        """Each store is charged its share of the time, compiling included, and of the lanes, by step attempts."""
        self.saved = now = time.monotonic()
        whole, possible = sum(self.attempts), self.possible
        if not whole:
            return  # what was spent so far is charged with the next trials that end
        for attempts, store in zip(self.attempts, self.stores, strict=True):
            share = attempts / whole
            store.save((now - self.counted) * share, (possible - self.charged) * share)
        self.attempts, self.charged, self.counted = [0] * len(self.stores), possible, now

    def _done(self) -> int:
        return sum(store.done(self.trials) for store in self.stores)

    def _report(self) -> None:
        if self.progress is None:
            return
        done = self._done()
        total, now = self.trials * len(self.stores), time.monotonic()
        since, first = self.started or (now, done)
        if done > self.before:
            self.started = since, first
        rate = (done - first) / (now - since) if done > first else 0.0
        left = 0.0 if done == total else (total - done) / rate if rate else math.inf
        verdicts = collections.Counter({verdict.name: 0 for verdict in Verdict})
        for store in self.stores:
            verdicts.update(store.verdicts(self.trials))
        interval = None
        if len(self.stores) == 1 and (prefix := min(self.stores[0].prefix, self.trials)):
            count = self.stores[0].verdicts(prefix)
            holds, fails = count[Verdict.holds.name], count[Verdict.fails.name]
            interval = confidence_sequence(holds, holds + fails, unresolved=count[Verdict.unresolved.name])
        self.progress(Progress(done, total, dict(verdicts), interval, rate, left))
