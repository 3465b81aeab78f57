"""One random experiment: a key draws a teacher, a sample and an initial network, gradient flow trains the network, and
the outcome is a record of scalars with a verdict.

Two claims are judged, each **holds**, **fails** or **unresolved**:

- *perfect training accuracy*. Holds once the mean loss is below ℓ(0)/n, which proves every margin positive from then
  on; fails if the flow stalls at a stationary point first.
- *at most 32 r + 67 effective regions* at the log-loss where the trial stops. Holds or fails only if the flow got there
  and the count is on one side of the bound whichever tolerances it is made with, within half a decade up and down.

The trial's verdict is both together. Unresolved says that the run decided nothing; it counts against any claim.
"""

import dataclasses
import enum
import json
import math
import operator
from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gradflow.data import Dataset
from gradflow.distribution import DISTRIBUTIONS, Distribution, Uniform
from gradflow.flow import FLOAT32_LOG_LOSS, integrate
from gradflow.loss import LOSSES
from gradflow.network import SCHEMES, ReluNetwork
from gradflow.outcome import STATUSES, Flow, Status, Until
from gradflow.piecewise import linear_regions
from gradflow.teacher import Teacher, max_switches, population_error

# Half a decade down and up: the tolerances of the region count are conventions, and a count that hangs on them is none.
SENSITIVITY = (10**-0.5, 1.0, 10**0.5)


class Verdict(enum.IntEnum):
    """The codes of a record's verdicts."""

    unresolved = 0
    holds = 1
    fails = 2


def region_bound(neurons: int) -> int:
    """32 r + 67 for r = `neurons` teacher neurons: a *reported* bound on the linear regions of the limit.

    It is quoted from a secondary source on Safran, Vardi and Lee (2022, arXiv 2205.09072), and whether r counts the
    target's neurons or its label switches is not settled there; here it is neurons. A network of width k has at most
    k + 1 regions whatever it learns, so the bound says nothing where k + 1 ≤ 32 r + 67.
    """
    return 32 * neurons + 67


class Record(NamedTuple):
    """The outcome of one trial, all scalars.

    - `verdict`, `accuracy_verdict`, `regions_verdict`: codes of `Verdict`;
    - `status`: how the flow ended, an index into `STATUSES` (−1 for one that is not there);
    - `switches`: of the teacher, on the whole line; `sample_switches`: m, in the sorted sample;
    - `separated`: whether the loss proves perfect training accuracy; `training_accuracy`: share of q_i > 0;
    - `regions`: effective number of linear regions of the final network; `regions_low`, `regions_high`: the least and
      most over both tolerances times 10^{−1/2}, 1 and 10^{1/2}; all three 0 if the network is not finite;
    - `population_error`: probability of a wrong label, NaN if the network is not finite;
    - `sliding`: how many neurons' breakpoints stick to a point at the end; the rest is as in `Flow`.
    """

    verdict: Int[Array, ""]
    status: Int[Array, ""]
    accuracy_verdict: Int[Array, ""]
    regions_verdict: Int[Array, ""]
    switches: Int[Array, ""]
    sample_switches: Int[Array, ""]
    separated: Bool[Array, ""]
    training_accuracy: Float[Array, ""]
    regions: Int[Array, ""]
    regions_low: Int[Array, ""]
    regions_high: Int[Array, ""]
    population_error: Float[Array, ""]
    time: Float[Array, ""]
    log_time: Float[Array, ""]
    log_loss: Float[Array, ""]
    margin: Float[Array, ""]
    residual: Float[Array, ""]
    drift: Float[Array, ""]
    events: Int[Array, ""]
    sliding: Int[Array, ""]
    steps: Int[Array, ""]
    rejected: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a trial's shapes and code depend on: another value compiles anew."""

    neurons: int
    width: int
    samples: int
    switches: int | None
    scheme: str
    loss: str


class Values(NamedTuple):
    """What enters a trial as numbers: another value does not recompile."""

    min_run: Float[Array, ""]
    distribution: Distribution
    scale: Float[Array, ""]
    log_loss: Float[Array, ""]
    merge: Float[Array, ""]
    drop: Float[Array, ""]
    rtol: Float[Array, ""]
    atol: Float[Array, ""]
    max_steps: Int[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """The description of a random experiment; with a key it is one trial.

    **Arguments**

    - `neurons`, `switches`, `min_run`, `distribution`: the teacher and the law of inputs, as in `Teacher.random`
      (`switches=None`: whatever a random teacher has; default law: uniform on [−1, 1]);
    - `samples`: n; `width`, `scheme`, `scale`: the initial network, as in `ReluNetwork.random`;
    - `loss`: `"exponential"` or `"logistic"`;
    - `log_loss`: the natural log of the mean loss at which the flow stops and regions are counted;
    - `merge`, `drop`: tolerances of the effective region count, as in `linear_regions`, with `merge` as a share of the
      support's length. The default 0.01 is a convention; `regions_low` and `regions_high` say what hangs on it;
    - `rtol`, `atol`, `max_steps`: as in `integrate`.

    Trials are equal if everything in them is. **Raises** `ValueError` for anything out of range, and for a `log_loss`
    too high to prove perfect training accuracy on `samples` points.

    >>> trial = Trial(neurons=2, switches=1, width=32, samples=20, log_loss=-5)
    >>> Trial.from_json(trial.to_json()) == trial
    True
    """

    neurons: int
    width: int
    samples: int
    switches: int | None
    min_run: float
    distribution: Distribution
    scheme: str
    scale: float
    loss: str
    log_loss: float
    merge: float
    drop: float
    rtol: float
    atol: float
    max_steps: int

    def __init__(
        self,
        neurons=4,
        width=32,
        samples=50,
        switches=4,
        min_run=0.05,
        distribution=None,
        scheme="balanced",
        scale=1.0,
        loss="exponential",
        log_loss=-1000.0,
        merge=0.01,
        drop=0.01,
        rtol=1e-6,
        atol=1e-6,
        max_steps=20_000,
    ):
        def set_(**fields):
            for name, value in fields.items():
                object.__setattr__(self, name, value)  # the way in for a frozen dataclass under construction

        whole = dict(neurons=neurons, width=width, samples=samples, max_steps=max_steps)
        real = dict(min_run=min_run, scale=scale, log_loss=log_loss, merge=merge, drop=drop, rtol=rtol, atol=atol)
        set_(**{name: _whole(name, value, least=1) for name, value in whole.items()})
        set_(**{name: _finite(name, value) for name, value in real.items()})
        set_(switches=None if switches is None else _whole("switches", switches, least=0))
        set_(distribution=Uniform() if distribution is None else distribution, scheme=scheme, loss=loss)
        self._check()

    def _check(self):
        most, runs = max_switches(self.neurons), 1 if self.switches is None else self.switches + 1
        if runs > most + 1:
            raise ValueError(f"{self.neurons} neurons can realise 0 to {most} label switches, not {self.switches}")
        if not 0 <= self.min_run * runs < 1:
            raise ValueError(f"{runs} label run(s) cannot each have probability {self.min_run}: lower min_run")
        for name, known in (("scheme", SCHEMES), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(map(repr, known))}")
        if type(self.distribution) not in DISTRIBUTIONS.values():
            known = ", ".join(kind.__name__ for kind in DISTRIBUTIONS.values())
            raise ValueError(f"a trial can record only the distributions {known}, got {self.distribution!r}")
        for name in ("scale", "rtol", "atol"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not (0 <= self.merge and 0 <= self.drop < 1):
            raise ValueError(f"merge must be at least 0 and drop in [0, 1), got {self.merge} and {self.drop}")
        proof = LOSSES[self.loss]().log_separated(self.samples)
        if not self.log_loss < proof:
            raise ValueError(
                f"log_loss {self.log_loss} stops the flow before the loss can prove that {self.samples} points are "
                f"classified; ask for less than {proof:.4g}"
            )

    def __eq__(self, other):
        return self.to_json() == other.to_json() if isinstance(other, Trial) else NotImplemented

    def __hash__(self):
        return hash(self.to_json())

    def to_json(self) -> str:
        """Everything in this trial as one line of JSON, each number to its last digit."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(content | {"distribution": _to_plain(self.distribution)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Trial":
        """The trial that `to_json` wrote. **Raises** `ValueError` for anything else."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a trial must be JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"a trial must be a JSON object, got {text[:80]!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        for complaint, odd in (("lacks", names - content.keys()), ("has unknown", content.keys() - names)):
            if odd:
                raise ValueError(f"this trial {complaint} {', '.join(sorted(odd))}")
        content["distribution"] = _from_plain(content["distribution"])
        return cls(**content)

    @property
    def sizes(self) -> Sizes:
        """The static part."""
        return Sizes(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Sizes)})

    @property
    def values(self) -> Values:
        """The traced part, in JAX's default float. **Raises** `ValueError` if that is too coarse for `log_loss`."""
        dtype = jnp.result_type(float)
        if dtype == jnp.float32 and self.log_loss < FLOAT32_LOG_LOSS:
            raise ValueError(
                f"log loss {self.log_loss} needs float64: call jax.config.update('jax_enable_x64', True) first, or ask "
                f"for {FLOAT32_LOG_LOSS} at most"
            )
        numbers = {name: getattr(self, name) for name in Values._fields if name != "max_steps"}
        numbers = jax.tree.map(lambda a: jnp.asarray(a, dtype), numbers)
        return Values(**numbers, max_steps=jnp.asarray(self.max_steps))

    def draw(self, key: PRNGKeyArray) -> tuple[Teacher, Dataset, ReluNetwork]:
        """The teacher, the sample and the initial network of the trial that `key` is."""
        return _draw(self.sizes, self.values, key)

    def run(self, key: PRNGKeyArray) -> Record:
        """The record of the trial that `key` is. Works under jit and vmap."""
        return _run(self.sizes, self.values, key)

    def flow(self, key: PRNGKeyArray, save: int | None = None) -> Flow:
        """The very same trial as a `Flow`, with up to `save` snapshots; equal to `run`'s up to the tolerance."""
        sizes, values = self.sizes, self.values
        _, data, net = _draw(sizes, values, key)
        return _integrate(sizes, values, data, net, save)


def draw(sizes: Sizes, values: Values, key: PRNGKeyArray) -> tuple[Teacher, Dataset, ReluNetwork]:
    """`Trial.draw`, as a function of arrays."""
    teacher_key, sample_key, net_key = jr.split(key, 3)
    law = values.distribution
    teacher = Teacher.random(
        teacher_key, sizes.neurons, switches=sizes.switches, min_run=values.min_run, distribution=law
    )
    data = teacher.sample(sample_key, sizes.samples, law)
    net = ReluNetwork.random(net_key, sizes.width, sizes.scheme, values.scale)
    # A teacher that could not be drawn labels nothing: the trial must end as a failed computation, not as a success.
    drawn = jnp.isfinite(teacher.net.squared_norm)
    return teacher, data, jax.tree.map(lambda a: jnp.where(drawn, a, jnp.nan), net)


def record(sizes: Sizes, values: Values, key: PRNGKeyArray) -> Record:
    """`Trial.run`, as a function of arrays; what a study maps over keys."""
    teacher, data, net = draw(sizes, values, key)
    return judge(sizes, values, teacher, data, _integrate(sizes, values, data, net))


def judge(sizes: Sizes, values: Values, teacher: Teacher, data: Dataset, flow: Flow) -> Record:
    """The record of a trial from its flow."""
    final, law = flow.final, values.distribution
    finite = jnp.isfinite(final.squared_norm)
    length = law.support[1] - law.support[0]
    factors = jnp.asarray(SENSITIVITY, length.dtype)

    def count(merge, drop):
        return linear_regions(final, merge * length, drop)

    grid = jax.vmap(jax.vmap(count, (None, 0)), (0, None))(values.merge * factors, values.drop * factors)
    grid = jnp.where(finite, grid, 0)
    low, high, bound = jnp.min(grid), jnp.max(grid), region_bound(sizes.neurons)
    success = flow.success
    accuracy = _verdict(flow.separated, flow.status == Status.stalled)
    regions = _verdict(success & (high <= bound), success & (low > bound))
    both = (accuracy == Verdict.holds.value) & (regions == Verdict.holds.value)
    either = (accuracy == Verdict.fails.value) | (regions == Verdict.fails.value)
    error = population_error(final, teacher, law)
    return Record(
        verdict=_verdict(both, either),
        status=_code(flow.status),
        accuracy_verdict=accuracy,
        regions_verdict=regions,
        switches=jnp.sum(jnp.isfinite(teacher.switches)),
        sample_switches=data.switches,
        separated=flow.separated,
        training_accuracy=jnp.mean((data.margins(final) > 0).astype(length.dtype)),
        regions=grid[1, 1],
        regions_low=low,
        regions_high=high,
        population_error=jnp.where(finite, error, jnp.nan),
        time=flow.time,
        log_time=flow.log_time,
        log_loss=flow.log_loss,
        margin=flow.margin,
        residual=flow.residual,
        drift=flow.drift,
        events=flow.events,
        sliding=jnp.sum(jnp.isfinite(flow.sliding)),
        steps=flow.steps,
        rejected=flow.rejected,
    )


def _integrate(sizes, values, data, net, save=None) -> Flow:
    loss, until = LOSSES[sizes.loss](), Until(log_loss=values.log_loss)
    return integrate(net, data, loss, until, rtol=values.rtol, atol=values.atol, save=save, max_steps=values.max_steps)


def _verdict(holds, fails) -> Int[Array, ""]:
    code = jnp.where(holds, Verdict.holds.value, jnp.where(fails, Verdict.fails.value, Verdict.unresolved.value))
    return code.astype(jnp.int8)


def _code(status) -> Int[Array, ""]:
    found = jnp.stack([status == getattr(Status, name) for name in STATUSES])
    return jnp.where(jnp.any(found), jnp.argmax(found), -1).astype(jnp.int32)


_draw = eqx.filter_jit(draw)
_run = eqx.filter_jit(record)


def _to_plain(law: Distribution) -> dict:
    """A distribution as a JSON-able mapping: its name and its numbers."""
    (name,) = (name for name, kind in DISTRIBUTIONS.items() if kind is type(law))
    return {"law": name} | {field.name: getattr(law, field.name).tolist() for field in dataclasses.fields(law)}


def _from_plain(content) -> Distribution:
    if not isinstance(content, Mapping) or content.get("law") not in DISTRIBUTIONS:
        raise ValueError(f"a distribution needs a law, one of {', '.join(DISTRIBUTIONS)}; got {content!r}")
    kind = DISTRIBUTIONS[content["law"]]
    names = [field.name for field in dataclasses.fields(kind)]
    if set(names) != content.keys() - {"law"}:
        raise ValueError(f"a {content['law']} distribution needs {', '.join(names)}; got {content!r}")
    numbers = [jnp.asarray(content[name], float) for name in names]
    # The constructor checks, but it also normalises, which can move a last digit: what was written is put back.
    law = kind(*numbers)
    return eqx.tree_at(lambda law: [getattr(law, name) for name in names], law, numbers)


def _whole(name, value, least) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if not least <= number < 2**31:
        raise ValueError(f"{name} must be at least {least} and below 2^31, got {number}")
    return number


def _finite(name, value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number
