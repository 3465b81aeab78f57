"""What the theory speaks of, measured on one network, dataset and teacher; and the bounds it is compared with.

Safran, Vardi and Lee (2022) argue from the initialisation: if every interval on which the teacher's sign is constant
has neurons in it whose output has that sign, training succeeds, and later neurons of one run of labels end up in few
places. Which initialisation, which law of inputs and which constants is theirs to say; here they are parameters, and
the numbers below our own reading of what the argument suggests to measure.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.data import Dataset
from gradflow.length import length
from gradflow.limit import Limit
from gradflow.network import ReluNetwork
from gradflow.piecewise import Piecewise
from gradflow.teacher import Teacher

_ROUNDING = 1e-12  # relative, below which a neuron's output is rounding


def region_bound(neurons):
    """32 r + 67 for r = `neurons` teacher neurons: a *reported* bound on the linear regions of the limit.

    It is quoted from a secondary source on Safran, Vardi and Lee (2022, arXiv 2205.09072), and whether r counts the
    target's neurons or its label switches is not settled there; here it is neurons. A network of width k has at most
    k + 1 regions whatever it learns, so the bound says nothing where k + 1 ≤ 32 r + 67.

    >>> import gradflow as gf
    >>> gf.region_bound(4)
    195
    """
    return 32 * neurons + 67


def generalisation_bound(regions, samples: int, delta: float = 0.01):
    """A bound on the population error of any classifier with `regions` linear regions that fits `samples` points.

    (2/n) (d log₂(2en/d) + log₂(2 d (d + 1)/δ)) with d = regions + 1, at least the VC dimension of such classifiers, as
    their sign changes at most `regions` times (Blumer, Ehrenfeucht, Haussler and Warmuth 1989, Theorem A2.1; d is seen
    with the data, so δ is shared out among all d, as δ/(d (d + 1))). Holds with probability 1 − δ over the sample. Our
    own choice of bound, not the paper's. At 1 or more it says nothing.

    >>> import gradflow as gf
    >>> print(f"{gf.generalisation_bound(6, 1000):.3f}")
    0.161
    """
    d = jnp.minimum(jnp.asarray(regions, float) + 1, samples)
    return 2 / samples * (d * jnp.log2(2 * math.e * samples / d) + jnp.log2(2 * d * (d + 1) / delta))


def sufficient_width(intervals: int, probability: float, delta: float) -> int:
    """Neurons that leave none of `intervals` without one with probability 1 − δ, each hitting each with `probability`.

    P(some interval missed) ≤ I (1 − p)^k ≤ I e^{−pk}, so k ≥ log(I/δ)/p. With p ∝ 1/r this is Õ(r), whatever n.

    >>> import gradflow as gf
    >>> gf.sufficient_width(intervals=5, probability=0.1, delta=0.01)
    63
    """
    if not (intervals >= 1 and 0 < probability <= 1 and 0 < delta < 1):
        raise ValueError(
            f"need intervals >= 1, 0 < probability <= 1, 0 < delta < 1: {intervals}, {probability}, {delta}"
        )
    return math.ceil(math.log(intervals / delta) / probability)


def helpers(net: ReluNetwork, teacher: Teacher) -> Bool[Array, " k"]:
    """Which neurons bend N where the teacher's sign is that of their v: in x, with sign(v) = sign of the teacher."""
    place = -net.b / jnp.where(net.w == 0, 1, net.w)
    return (net.w != 0) & (net.v * teacher(jnp.where(jnp.isfinite(place), place, 0)) > 0)


def coverage(net: ReluNetwork, teacher: Teacher, support) -> Int[Array, "2"]:
    """The smallest number of helpers in any interval of constant sign within `support`, right- and left-facing.

    **Arguments** `support`: (2,), where inputs lie.
    """
    cuts = teacher.switches
    inside = (cuts > support[0]) & (cuts < support[1])
    cuts = jnp.sort(jnp.where(inside, cuts, jnp.inf))
    place = -net.b / jnp.where(net.w == 0, 1, net.w)
    helps = helpers(net, teacher) & (place > support[0]) & (place < support[1])
    home = jnp.searchsorted(cuts, place)
    intervals = jnp.sum(inside) + 1
    index = jnp.arange(cuts.shape[0] + 1)

    def least(who):
        count = jnp.zeros(index.shape, int).at[home].add((helps & who).astype(int))
        return jnp.min(jnp.where(index < intervals, count, jnp.iinfo(count.dtype).max))

    return jnp.stack([least(net.w > 0), least(net.w < 0)])


def survivors(start: ReluNetwork, entry: ReluNetwork, teacher: Teacher, data: Dataset) -> Float[Array, ""]:
    """The share of the helpers of `start` that are active on some point at `entry`, with the same sign of v.

    One whose breakpoint sticks to the outermost of its points is active on none: max(0, ·) is 0 there, and what
    rounding makes of it does not count. NaN if there are no helpers, or if the late phase was never entered.
    """
    helps = helpers(start, teacher)
    reach = _ROUNDING * length(entry.w, entry.b)[:, None] * jnp.hypot(1, data.x)[None, :]
    active = jnp.any(entry.w[:, None] * data.x[None, :] + entry.b[:, None] > reach, axis=1) & (entry.v * start.v > 0)
    share = jnp.sum((helps & active).astype(entry.v.dtype)) / jnp.sum(helps.astype(entry.v.dtype))
    return jnp.where(jnp.isnan(entry.v[0]), jnp.nan, share)


def placed_knots(limit: Limit, data: Dataset) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How many knots of a limit sit on points, and the most knots in one run of equal labels (the gaps between runs
    go to neither; those beyond the outermost points are not counted).
    """
    place, real = Piecewise(limit.network).knots(limit.resolution)
    distance = jnp.abs(place[:, None] - data.x[None, :])
    stuck = jnp.min(distance, axis=1) <= limit.resolution
    # A knot that sits on the first or last point of a run belongs to it, on whichever side rounding puts it.
    place = jnp.where(stuck, data.x[jnp.argmin(distance, axis=1)], place)
    order = jnp.argsort(data.x)
    x, y = data.x[order], data.y[order]
    run = jnp.concatenate([jnp.zeros((1,), int), jnp.cumsum((y[1:] != y[:-1]).astype(int))])
    left = jnp.clip(jnp.searchsorted(x, place, side="right") - 1, 0, x.shape[0] - 1)
    right = jnp.clip(jnp.searchsorted(x, place, side="left"), 0, x.shape[0] - 1)
    inside = real & (place >= x[0]) & (place <= x[-1]) & (run[left] == run[right])
    count = jnp.zeros(x.shape[0], int).at[run[left]].add(inside.astype(int))
    return jnp.sum(real & stuck), jnp.max(count)


def loss_law(log_loss, log_time, margin, samples) -> Float[Array, ""]:
    """How far log t is from its asymptotic law Λ − log(Λ − log n) − log(4γ), Λ = −log L, relative to log t.

    For the exponential loss d li(1/L)/dt → 4γ (sum loss), so L ~ 1/(t log t): not 1/t.
    """
    late = -log_loss
    return jnp.abs((late - jnp.log(late - jnp.log(samples)) - jnp.log(4 * margin)) / log_time - 1)
