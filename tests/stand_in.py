"""A stand-in for the trial of a study, which draws its record at random from the key and compiles in no time."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import xarray as xr

from gradflow import lane
from gradflow.archive import VARIABLES
from gradflow.record import Record
from gradflow.trial import Trial

QUICK = Trial(neurons=2, switches=1, width=32, samples=20, max_steps=2000)
KEY = jr.key(5)


# The stand-in

FAKE = dataclasses.replace(QUICK, samples=19, width=1000)  # sizes that no real trial has: compiled code is shared
_widths = itertools.count(1001)


class Traces(list):
    """The sizes that draws were traced for, and in `programs` the widths that batches were traced for."""

    def __init__(self):
        super().__init__()
        self.programs = []


TRACES = Traces()


def draw(sizes, values, key):
    TRACES.append(sizes)
    return jr.bits(key, (len(Record._fields),), jnp.uint32), jnp.zeros(sizes.slots.width)


class FakeLane(eqx.Module):
    """A trial that takes up to 400 attempts and has a random record."""

    bits: jax.Array
    net: jax.Array
    scale: jax.Array
    needs: jax.Array
    attempts: jax.Array
    over: jax.Array

    @classmethod
    def begin(cls, loss, values, bits, net):
        needs = (bits[0] % 20) ** 2 + 1
        return cls(bits, net, values.scale, needs.astype(int), jnp.zeros((), int), jnp.array(False))

    @property
    def waits(self):
        return ~self.over & (self.attempts >= self.needs)

    def idle(self):
        return eqx.tree_at(lambda one: one.over, self, jnp.ones_like(self.over))

    def follow(self, attempts):
        TRACES.programs.append(self.net.shape[0])
        now = jnp.where(self.over, self.attempts, jnp.minimum(self.attempts + attempts, self.needs))
        return eqx.tree_at(lambda one: one.attempts, self, now)

    def close(self):
        outcome = {}
        for i, (name, (kind, *_)) in enumerate(VARIABLES.items()):
            real = self.bits[i].astype(self.scale.dtype) / 2**32 * self.scale
            outcome[name] = real if kind is np.float64 else (self.bits[i] % 3).astype(kind)
        outcome |= {"steps": self.attempts.astype(np.int32), "rejected": jnp.zeros((), np.int32)}
        return eqx.tree_at(lambda one: one.over, self, self.over | self.waits), Record(**outcome)


def install():
    """In a worker process."""
    lane.draw, lane.Lane = draw, FakeLane


@pytest.fixture
def traces(monkeypatch):
    """Puts the stand-in in place of the trial's draws and lanes, and lists their traces."""
    TRACES.clear()
    TRACES.programs.clear()
    monkeypatch.setattr(lane, "draw", draw)
    monkeypatch.setattr(lane, "Lane", FakeLane)
    return TRACES


@pytest.fixture
def trial(traces):
    """The stand-in trial; compiled once for each batch size, for all tests."""
    return FAKE


@pytest.fixture
def fresh(traces):
    """A stand-in trial that nothing has been compiled for, and its traces."""
    return dataclasses.replace(FAKE, width=next(_widths)), traces


def same(a: xr.Dataset, b: xr.Dataset) -> bool:
    """Equal in every variable, coordinate and meaning; provenance may differ."""
    a, b = (d.drop_vars([name for name in d.coords if str(name).startswith("study_")]) for d in (a, b))
    return a.drop_attrs(deep=False).identical(b.drop_attrs(deep=False))


def first(dataset, trials):
    return dataset.isel(trial=slice(trials))
