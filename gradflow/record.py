"""The record of a trial: scalars, and three claims judged, each **holds**, **fails** or **unresolved**:

- *perfect training accuracy*. Holds once the mean loss is below ℓ(0)/n, which proves every margin positive from then
  on; fails if the flow stalls at a stationary point first.
- *at most 32 r + 67 linear regions* of the certified limit, counted exactly.
- *the global optimum*. Holds if the certified limit has the largest possible margin, to 1e-8 and by a value that is
  proved; fails if it has less, or if training failed.

The trial's verdict is the first two together. Unresolved says that the run decided nothing, and counts against a claim.
"""

import enum
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.data import Dataset
from gradflow.distribution import Distribution
from gradflow.limit import LIMIT_STATUSES, LimitStatus
from gradflow.network import ReluNetwork
from gradflow.optimum import Optimum
from gradflow.outcome import STATUSES, Flow, Status
from gradflow.teacher import Teacher, population_error
from gradflow.theory import coverage, loss_law, placed_knots, region_bound, survivors

_OPTIMAL = 1e-8  # relative difference of values up to which a limit is the global optimum


class Verdict(enum.IntEnum):
    """The codes of a record's verdicts."""

    unresolved = 0
    holds = 1
    fails = 2


class Record(NamedTuple):
    """The outcome of one trial, all scalars. Numbers about a limit are NaN, and counts 0, if it is not certified.

    - `verdict`, `accuracy_verdict`, `regions_verdict`, `optimum_verdict`: codes of `Verdict`;
    - `status`: how the flow ended, an index into `STATUSES`; `limit_status`: one into `LIMIT_STATUSES`;
    - `teacher_switches`: of the teacher, on the whole line; `sample_switches`: m, in the sorted sample;
    - `covered_right`, `covered_left`: the smallest number of initial neurons, by the way they face, in an interval of
      constant sign of the teacher and with that sign of v; `survivors`: the share of all such neurons that are active
      on some point when the late phase begins, at `entry_time` τ and `entry_log_time` (NaN if it never did);
    - `separated`: whether the loss proves perfect training accuracy; `training_accuracy`: share of q_i > 0;
    - `regions`: linear regions of the limit; `pinned`: its knots on data points; `crowded`: most knots in one run of
      equal labels; `value`: ½‖θ*‖²; `optimality`: its margin over the largest possible, and whether that is proved,
      `optimum_proved`; `kkt`: its residual;
    - `population_error`: probability of a wrong label, of the limit, or of the final network if there is none; NaN if
      that is not finite;
    - `law`: relative error of log t against its asymptotic law (`loss_law`), NaN before the late phase;
    - `sliding`: neurons whose breakpoints stick to a point at the end; the rest is as in `Flow`.
    """

    verdict: Int[Array, ""]
    status: Int[Array, ""]
    limit_status: Int[Array, ""]
    accuracy_verdict: Int[Array, ""]
    regions_verdict: Int[Array, ""]
    optimum_verdict: Int[Array, ""]
    teacher_switches: Int[Array, ""]
    sample_switches: Int[Array, ""]
    covered_right: Int[Array, ""]
    covered_left: Int[Array, ""]
    survivors: Float[Array, ""]
    entry_time: Float[Array, ""]
    entry_log_time: Float[Array, ""]
    separated: Bool[Array, ""]
    training_accuracy: Float[Array, ""]
    regions: Int[Array, ""]
    pinned: Int[Array, ""]
    crowded: Int[Array, ""]
    value: Float[Array, ""]
    optimality: Float[Array, ""]
    kkt: Float[Array, ""]
    optimum_proved: Bool[Array, ""]
    population_error: Float[Array, ""]
    time: Float[Array, ""]
    log_time: Float[Array, ""]
    log_loss: Float[Array, ""]
    law: Float[Array, ""]
    margin: Float[Array, ""]
    residual: Float[Array, ""]
    drift: Float[Array, ""]
    rise: Float[Array, ""]
    fall: Float[Array, ""]
    events: Int[Array, ""]
    sliding: Int[Array, ""]
    steps: Int[Array, ""]
    rejected: Int[Array, ""]


def judge(
    neurons, law: Distribution, teacher: Teacher, data: Dataset, best: Optimum, net: ReluNetwork, flow: Flow
) -> Record:
    """The record of a trial from the optimum for its data, its initial network and its flow, which must have sought its
    limit; r = `neurons`."""
    limit = flow.limit
    assert limit is not None
    certified, stalled = limit.certified, flow.status == Status.stalled
    finite = jnp.isfinite(flow.final.squared_norm)
    regions, bound = limit.regions, region_bound(neurons)
    accuracy = _verdict(flow.separated, stalled)
    regions_verdict = _verdict(certified & (regions <= bound), certified & (regions > bound))
    optimal = limit.value <= (1 + _OPTIMAL) * best.value
    optimum = _verdict(certified & best.proved & optimal, stalled | (certified & best.proved & ~optimal))
    both = (accuracy == Verdict.holds.value) & (regions_verdict == Verdict.holds.value)
    either = (accuracy == Verdict.fails.value) | (regions_verdict == Verdict.fails.value)
    error = population_error(flow.final, teacher, law), population_error(limit.network, teacher, law)
    pinned, crowded = placed_knots(limit, data)
    right, left = coverage(net, teacher, law.support)
    late = loss_law(flow.log_loss, flow.log_time, flow.margin, data.samples)

    def of_limit(number):
        return jnp.where(certified, number, 0 if jnp.issubdtype(number.dtype, jnp.integer) else jnp.nan)

    return Record(
        verdict=_verdict(both, either),
        status=_code(flow.status, Status, STATUSES),
        limit_status=_code(limit.status, LimitStatus, LIMIT_STATUSES),
        accuracy_verdict=accuracy,
        regions_verdict=regions_verdict,
        optimum_verdict=optimum,
        teacher_switches=jnp.sum(jnp.isfinite(teacher.switches)),
        sample_switches=data.switches,
        covered_right=right,
        covered_left=left,
        survivors=survivors(net, flow.entry.network, teacher, data),
        entry_time=flow.entry.time,
        entry_log_time=flow.entry.log_time,
        separated=flow.separated,
        training_accuracy=jnp.sum(data.real & (data.margins(flow.final) > 0)) / data.samples,
        regions=of_limit(regions),
        pinned=of_limit(pinned),
        crowded=of_limit(crowded),
        value=of_limit(limit.value),
        optimality=of_limit(best.value / limit.value),
        kkt=of_limit(limit.residual),
        optimum_proved=best.proved,
        population_error=jnp.where(certified, error[1], jnp.where(finite, error[0], jnp.nan)),
        time=flow.time,
        log_time=flow.log_time,
        log_loss=flow.log_loss,
        law=jnp.where(flow.separated, late, jnp.nan),
        margin=flow.margin,
        residual=flow.residual,
        drift=flow.drift,
        rise=flow.rise,
        fall=flow.fall,
        events=flow.events,
        sliding=jnp.sum(jnp.isfinite(flow.sliding)),
        steps=flow.steps,
        rejected=flow.rejected,
    )


def _verdict(holds, fails) -> Int[Array, ""]:
    code = jnp.where(holds, Verdict.holds.value, jnp.where(fails, Verdict.fails.value, Verdict.unresolved.value))
    return code.astype(jnp.int8)


def _code(status, kind, names) -> Int[Array, ""]:
    found = jnp.stack([status == getattr(kind, name) for name in names])
    return jnp.where(jnp.any(found), jnp.argmax(found), -1).astype(jnp.int32)
