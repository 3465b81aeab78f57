"""Studies whose outcome is written by hand."""

import json

import jax.random as jr
import numpy as np
import xarray as xr

from gradflow.archive import VARIABLES, assembled, gathered, key_to_json
from gradflow.record import Verdict
from gradflow.trial import Trial

STAMP = {
    "versions": json.dumps({"gradflow": "0"}),
    "backend": "cpu",
    "dtype": "float64",
    "created": "2026-11-25T00:00:00+00:00",
}


def study(trial: Trial, trials: int, **columns) -> xr.Dataset:
    """A study of `trials` trials that all go well, but for these columns; verdicts may be given by name."""
    part = {name: np.zeros(trials, kind) for name, (kind, *_) in VARIABLES.items()}
    for name in ("verdict", "accuracy_verdict", "regions_verdict", "optimum_verdict"):
        part[name][:] = Verdict.holds.value
    part["separated"][:] = True
    part["regions"][:] = part["sample_switches"][:] = 4
    for name, values in columns.items():
        values = np.asarray(values)
        part[name][:] = [Verdict[v].value for v in values] if values.dtype.kind == "U" else values
    # As `judge` has it: no limit where training failed or is unresolved, and the verdict is both others together.
    open_ = part["accuracy_verdict"] != Verdict.holds.value
    for name, value in (("limit_status", 3), ("separated", False), ("regions_verdict", Verdict.unresolved.value)):
        if name not in columns:
            part[name][open_] = value
    if "verdict" not in columns:
        both = np.stack([part["accuracy_verdict"], part["regions_verdict"]])
        part["verdict"][:] = np.where((both == 2).any(0), 2, np.where((both == 1).all(0), 1, 0))
    stamp = STAMP | {"title": "gradflow study", "trial": trial.to_json(), "key": key_to_json(jr.key(0))}
    spent = {"seconds": 1.0, "lane_attempts": 1.0, "history": ""}
    return assembled(part, np.arange(trials), stamp | spent)


def sweep(*studies: xr.Dataset) -> xr.Dataset:
    return gathered(studies, jr.key(0))
