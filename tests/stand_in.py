"""A stand-in for the trial of a study, which draws its record at random from the key and compiles in no time."""

import dataclasses
import itertools

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import xarray as xr

from gradflow import study
from gradflow.archive import VARIABLES
from gradflow.record import Record
from gradflow.trial import Trial

QUICK = Trial(neurons=2, switches=1, width=32, samples=20, max_steps=2000)
KEY = jr.key(5)


# The stand-in

FAKE = dataclasses.replace(QUICK, samples=19, width=1000)  # sizes that no real trial has: compiled code is shared
_widths = itertools.count(1001)


class Traces(list):
    """The sizes that draws were traced for, and in `programs` the widths that flows were traced for."""

    def __init__(self):
        super().__init__()
        self.programs = []


@pytest.fixture
def traces(monkeypatch):
    """Puts the stand-in in place of the trial's draws and record, and lists their traces."""
    traces = Traces()

    def draw(sizes, values, key):
        traces.append(sizes)
        return jr.bits(key, (len(Record._fields),), jnp.uint32), jnp.zeros(sizes.slots.width)

    def measure(loss, values, bits, net):
        traces.programs.append(net.shape[0])
        outcome = {}
        for i, (name, (kind, *_)) in enumerate(VARIABLES.items()):
            real = bits[i].astype(values.scale.dtype) / 2**32 * values.scale
            outcome[name] = real if kind is np.float64 else (bits[i] % 3).astype(kind)
        return Record(**outcome)

    monkeypatch.setattr(study, "draw", draw)
    monkeypatch.setattr(study, "measure", measure)
    return traces


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
