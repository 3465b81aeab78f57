"""Which experiments decide the claims: the cells of a sweep around one trial.

Along r, everything else goes in proportion: k, n and the number of label switches like r (or as many switches as r
neurons can realise, which is fewer for r < 4), and the least probability of a label run so that short runs get equally
many points.
"""

import dataclasses
from fractions import Fraction

from gradflow.distribution import TruncatedNormal
from gradflow.network import SCHEMES
from gradflow.teacher import max_switches
from gradflow.trial import Trial


def scaled(trial: Trial, neurons: int, ratio: Fraction = Fraction(1)) -> Trial:
    """`trial` for another r, with k times `ratio`, in proportion."""
    factor = Fraction(neurons, trial.neurons)
    switches, min_run = trial.switches, trial.min_run
    if trial.switches:
        switches = min(max_switches(neurons), max(1, round(trial.switches * factor)))
        if switches != trial.switches:
            min_run *= (trial.switches + 1) / (switches + 1)
    return dataclasses.replace(
        trial,
        neurons=neurons,
        switches=switches,
        min_run=min_run,
        width=max(1, int(trial.width * factor * ratio)),
        samples=max(1, int(trial.samples * factor)),
    )


def around(trial: Trial) -> list[Trial]:
    """A small sweep, of 7 cells for the default trial, which comes first; half and twice its n; and r and 2 r, each
    with a half and a quarter of the k in proportion, so that all fit into one program.
    """
    samples = [dataclasses.replace(trial, samples=n) for n in (max(trial.samples // 2, 1), 2 * trial.samples)]
    narrow = [scaled(trial, r, Fraction(1, c)) for r in (trial.neurons, 2 * trial.neurons) for c in (2, 4)]
    return _distinct([trial, *samples, *narrow])


def thorough(trial: Trial) -> list[Trial]:
    """The real one, of 31 cells for the default trial, which comes first.

    - r from its own to twice as many, each with an eighth to all of the k in proportion;
    - n from half to fourfold, each with an eighth to all of k;
    - other laws and scales of the initial weights, and another law of inputs;
    - r = 2 with 256 neurons, where 32 r + 67 is less than the most regions that these can have.
    """
    ratios = [Fraction(1, c) for c in (8, 4, 2, 1)]
    neurons = [scaled(trial, int(trial.neurons * g), c) for g in (1, Fraction(3, 2), 2) for c in ratios]
    sizes = [
        dataclasses.replace(trial, samples=max(1, int(trial.samples * g)), width=max(1, int(trial.width * c)))
        for g in (Fraction(1, 2), 2, 4)
        for c in ratios
    ]
    more = [dataclasses.replace(trial, scheme=scheme) for scheme in SCHEMES]
    more += [dataclasses.replace(trial, scale=trial.scale * factor) for factor in (0.25, 4.0)]
    more += [dataclasses.replace(trial, distribution=TruncatedNormal(0.0, 0.5, -1.0, 1.0))]
    more += [dataclasses.replace(scaled(trial, 2), width=256)]
    return _distinct([trial, *neurons, *sizes, *more])


def _distinct(trials: list[Trial]) -> list[Trial]:
    return list(dict.fromkeys(trials))
