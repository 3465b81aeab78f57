"""Gradient flow on shallow univariate ReLU classifiers, and the implicit bias of its limit.

Importing gradflow changes no JAX setting. Late training needs float64: call
`jax.config.update("jax_enable_x64", True)` before making arrays (the command line does). What belongs to studies is
imported when it is first used, as xarray, HDF5 and SciPy take half as long as all the rest, and so is `gradflow.plot`,
as Matplotlib takes its time, too.
"""

import importlib
import typing

from gradflow.certificate import kkt_residual as kkt_residual
from gradflow.data import Dataset as Dataset
from gradflow.descent import Descent as Descent
from gradflow.descent import DescentStatus as DescentStatus
from gradflow.descent import descend as descend
from gradflow.distribution import Distribution as Distribution
from gradflow.distribution import Histogram as Histogram
from gradflow.distribution import TruncatedNormal as TruncatedNormal
from gradflow.distribution import Uniform as Uniform
from gradflow.flow import integrate as integrate
from gradflow.flow import limit as limit
from gradflow.influence import Influence as Influence
from gradflow.influence import influence as influence
from gradflow.limit import Limit as Limit
from gradflow.limit import LimitStatus as LimitStatus
from gradflow.loss import Exponential as Exponential
from gradflow.loss import Logistic as Logistic
from gradflow.loss import Loss as Loss
from gradflow.network import ReluNetwork as ReluNetwork
from gradflow.optimum import Optimum as Optimum
from gradflow.optimum import max_margin as max_margin
from gradflow.outcome import STATUSES as STATUSES
from gradflow.outcome import Entry as Entry
from gradflow.outcome import Flow as Flow
from gradflow.outcome import Path as Path
from gradflow.outcome import Sensitivity as Sensitivity
from gradflow.outcome import Status as Status
from gradflow.outcome import Until as Until
from gradflow.piecewise import Piecewise as Piecewise
from gradflow.piecewise import knots as knots
from gradflow.piecewise import linear_regions as linear_regions
from gradflow.piecewise import sign_changes as sign_changes
from gradflow.placement import Placement as Placement
from gradflow.placement import worst_placement as worst_placement
from gradflow.record import Record as Record
from gradflow.record import Verdict as Verdict
from gradflow.teacher import Teacher as Teacher
from gradflow.teacher import max_switches as max_switches
from gradflow.teacher import population_error as population_error
from gradflow.theory import generalisation_bound as generalisation_bound
from gradflow.theory import region_bound as region_bound
from gradflow.theory import sufficient_width as sufficient_width
from gradflow.trial import Trial as Trial

if typing.TYPE_CHECKING:
    from gradflow.archive import load as load
    from gradflow.archive import studies as studies
    from gradflow.claim import Claim as Claim
    from gradflow.statistics import Estimate as Estimate
    from gradflow.statistics import confidence_sequence as confidence_sequence
    from gradflow.statistics import estimate_probability as estimate_probability
    from gradflow.statistics import estimate_quantile as estimate_quantile
    from gradflow.statistics import sample_size as sample_size
    from gradflow.study import replay as replay
    from gradflow.study import run_study as run_study
    from gradflow.study import run_sweep as run_sweep
    from gradflow.table import claims as claims
    from gradflow.table import summary as summary
    from gradflow.watch import Progress as Progress

__version__ = "0.1.0"

_LATER = {  # the same names again, by their modules
    "archive": ("load", "studies"),
    "claim": ("Claim",),
    "statistics": ("Estimate", "confidence_sequence", "estimate_probability", "estimate_quantile", "sample_size"),
    "study": ("replay", "run_study", "run_sweep"),
    "table": ("claims", "summary"),
    "watch": ("Progress",),
}


def __getattr__(name: str):
    if name == "plot" or name in _LATER:
        return importlib.import_module(f"gradflow.{name}")
    for module, names in _LATER.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(f"gradflow.{module}"), name)
            return value
    raise AttributeError(f"module 'gradflow' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), "plot"}.union(*_LATER.values()) - {"importlib", "typing"})


__all__ = [name for name in __dir__() if name[0] != "_" and name != "plot"]  # pyright: ignore[reportUnsupportedDunderAll]
