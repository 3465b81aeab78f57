"""Many trials on one device: a batch of lanes that fresh trials enter as others end.

A lane is whatever module has the properties and methods of `Lane`: `attempts`, `waits`, `over`, `idle`, `follow` and
`close`.

A *segment* follows all lanes until the rounds of a *group* of them have ended, or for some attempts. Such rounds are
closed, finished trials taken out, and fresh ones put in their place. What is computed in one lane does not depend
on the others, nor on where segments end.
"""

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

SEGMENT = 50  # step attempts


class Work(NamedTuple):
    """Trials of one cell, by their numbers: at most as many as a group has lanes, which `begin` makes of them."""

    cell: int
    numbers: np.ndarray
    begin: Callable[[np.ndarray], eqx.Module]


# What an engine compiles. Everything is mapped over lanes.


@eqx.filter_jit
def _enter(lanes, fresh, rows, places):
    """The lanes with `rows` of the fresh ones in these places; a place beyond the last is none."""
    return jax.tree.map(lambda a, b: a.at[places].set(b[rows], mode="drop") if eqx.is_array(a) else a, lanes, fresh)


@eqx.filter_jit
def _follow(lanes, attempts, enough):
    """The lanes on by so many step attempts, or until in so many a round has ended, and which and how far they are."""
    changes, stays = eqx.partition(lanes, eqx.is_array)

    def waits(changes):
        return eqx.combine(changes, stays).waits

    def goes_on(state):
        count, changes = state
        return (count < attempts) & (jnp.sum(waits(changes)) < enough)

    def attempt(state):
        count, changes = state
        lanes = eqx.filter_vmap(lambda lane: lane.follow(1))(eqx.combine(changes, stays))
        return count + 1, eqx.filter(lanes, eqx.is_array)

    _, changes = jax.lax.while_loop(goes_on, attempt, (jnp.zeros((), int), changes))
    lanes = eqx.combine(changes, stays)
    return lanes, jnp.stack([lanes.waits.astype(int), lanes.attempts.astype(int)])


@eqx.filter_jit
def _close(lanes, rows):
    """The lanes with the rounds of these `rows` closed, whether they are over, and their records."""
    some = jax.tree.map(lambda a: a.at[rows].get(mode="clip") if eqx.is_array(a) else a, lanes)
    closed, record = eqx.filter_vmap(lambda lane: lane.close())(some)
    lanes = jax.tree.map(lambda a, b: a.at[rows].set(b, mode="drop") if eqx.is_array(a) else a, lanes, closed)
    return lanes, closed.over, record


class Engine:
    """Runs trials on JAX's default device, in `width` lanes, of which `group` begin or are closed in one call.

    `done(cell, numbers, record)` is called with the records of trials that have ended, as arrays along trials. `stop`
    ends a run at the end of a segment.
    """

    def __init__(
        self,
        width: int,
        group: int,
        done: Callable[[int, np.ndarray, Any], None],
        stop: threading.Event,
    ):
        self.width, self.group, self.done, self.stop = width, min(group, width), done, stop
        self.possible = 0  # step attempts that the lanes have made time for
        self.none = np.full(self.group, width)  # rows that are no lanes
        self.waiting: collections.deque[tuple[int, int, object, int]] = collections.deque()  # cell, number, block, row

    def prepare(self, work: Iterator[Work]) -> None:
        """Take up work whose trials share their programs, and compile those. One engine on a device at a time: each
        would compile them for itself."""
        self.work = work
        self.cells, self.numbers = (
            np.full(self.width, -1),
            np.full(self.width, -1),
        )  # the trial in each lane, −1 for none
        self.attempts = np.zeros(self.width, int)
        self._draw(1)
        if self.waiting:
            _, _, block, _ = self.waiting[0]
            idle = jax.tree.map(lambda a: a[np.zeros(self.width, int)] if eqx.is_array(a) else a, block).idle()
            self.lanes, _ = _follow(idle, np.asarray(0), np.asarray(self.group))
            self.lanes, *_ = _close(self.lanes, self.none)

    def run(self) -> None:
        """All of it."""
        while not self.stop.is_set():
            self._fill()
            busy = self.cells >= 0
            if not busy.any():
                break
            # A group costs the same however few lanes are in it: few wait, unless too few others are left.
            enough = min(self.group, int(busy.sum()) // 4 + 1)
            self.lanes, told = _follow(self.lanes, np.asarray(SEGMENT), np.asarray(enough))
            waits, now = np.asarray(told)
            made = np.where(busy, now - self.attempts, 0)
            self.attempts = now.copy()
            self.possible += int(made.max()) * self.width
            rows = np.flatnonzero(busy & (waits > 0))
            while rows.size >= enough:
                some, rows = rows[: self.group], rows[self.group :]
                self._close(some)

    def _draw(self, wanted: int) -> None:
        """Blocks of fresh trials until so many wait, if there are."""
        while len(self.waiting) < wanted and (one := next(self.work, None)) is not None:
            count = one.numbers.size
            padded = np.pad(one.numbers, (0, self.group - count), mode="edge").astype(np.uint32)
            block = one.begin(padded)
            self.waiting.extend((one.cell, int(one.numbers[row]), block, row) for row in range(count))

    def _fill(self) -> None:
        """Fresh trials into free lanes."""
        free = np.flatnonzero(self.cells < 0)
        self._draw(free.size)
        while free.size and self.waiting:
            _, _, block, _ = self.waiting[0]
            rows, places = np.zeros(self.group, int), self.none.copy()
            for i, place in enumerate(free[: self.group]):
                if not self.waiting or self.waiting[0][2] is not block:
                    break
                self.cells[place], self.numbers[place], _, rows[i] = self.waiting.popleft()
                places[i], self.attempts[place] = place, 0
            free = free[np.sum(places < self.width) :]
            self.lanes = _enter(self.lanes, block, rows, places)

    def _close(self, rows: np.ndarray) -> None:
        """The end of a round in these lanes, and of the trials that are over."""
        self.lanes, over, record = _close(self.lanes, np.concatenate([rows, self.none[rows.size :]]))
        ended = np.flatnonzero(np.asarray(over)[: rows.size])
        if not ended.size:
            return
        record = jax.tree.map(lambda a: np.asarray(a)[ended], record)
        cells, numbers = self.cells[rows[ended]], self.numbers[rows[ended]]
        for cell in np.unique(cells):
            mine = cells == cell
            self.done(int(cell), numbers[mine], jax.tree.map(lambda a, mine=mine: a[mine], record))
        self.cells[rows[ended]] = -1
