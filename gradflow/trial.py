"""One random experiment: a key draws a teacher, a sample and an initial network, gradient flow trains the network until
the limit of its direction is certified, and the outcome is a record of scalars with verdicts (`record.py`).
"""

import dataclasses
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
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gradflow.data import Dataset
from gradflow.distribution import DISTRIBUTIONS, Distribution, Uniform
from gradflow.flow import integrate
from gradflow.loss import LOSSES
from gradflow.network import SCHEMES, ReluNetwork
from gradflow.optimum import max_margin
from gradflow.outcome import Flow
from gradflow.record import Record, judge
from gradflow.teacher import Teacher, max_switches


class Slots(NamedTuple):
    """The sizes of a trial's arrays, which hold a teacher, a network and a sample of at most these."""

    neurons: int
    width: int
    samples: int


class Sizes(NamedTuple):
    """What the shapes and the code of a trial's draws depend on: another value compiles them anew, in a second. The
    flow and its limit, which take longer to compile, depend on `slots` and `loss` only."""

    neurons: int
    switches: int | None
    scheme: str
    loss: str
    slots: Slots


class Values(NamedTuple):
    """What enters a trial as numbers: another value does not recompile."""

    neurons: Int[Array, ""]
    width: Int[Array, ""]
    samples: Int[Array, ""]
    min_run: Float[Array, ""]
    distribution: Distribution
    scale: Float[Array, ""]
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
    - `rtol`, `atol`, `max_steps`: as in `integrate`.

    Trials are equal if everything in them is. **Raises** `ValueError` for anything out of range.

    >>> trial = Trial(neurons=2, switches=1, width=32, samples=20)
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
        rtol=1e-6,
        atol=0.0,
        max_steps=20_000,
    ):
        def set_(**fields):
            for name, value in fields.items():
                object.__setattr__(self, name, value)  # the way in for a frozen dataclass under construction

        whole = dict(neurons=neurons, width=width, samples=samples, max_steps=max_steps)
        real = dict(min_run=min_run, scale=scale, rtol=rtol, atol=atol)
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
        for name in ("scale", "rtol"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.atol >= 0:
            raise ValueError(f"atol must not be negative, got {self.atol}")

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
    def slots(self) -> Slots:
        """The arrays that this trial fills."""
        return Slots(self.neurons, self.width, self.samples)

    def sizes(self, slots: Slots | None = None) -> Sizes:
        """The static part, in arrays of these sizes (default: its own)."""
        return Sizes(self.neurons, self.switches, self.scheme, self.loss, self.slots if slots is None else slots)

    @property
    def values(self) -> Values:
        """The traced part. **Raises** `ValueError` in float32, where no limit can be certified."""
        dtype = jnp.result_type(float)
        if dtype != jnp.float64:
            raise ValueError("a trial needs float64: call jax.config.update('jax_enable_x64', True) first")
        whole = {name: jnp.asarray(getattr(self, name), int) for name in ("neurons", "width", "samples", "max_steps")}
        real = {name: jnp.asarray(getattr(self, name), dtype) for name in ("min_run", "scale", "rtol", "atol")}
        law = jax.tree.map(lambda a: jnp.asarray(a, dtype), self.distribution)
        return Values(distribution=law, **whole, **real)

    def draw(self, key: PRNGKeyArray) -> tuple[Teacher, Dataset, ReluNetwork]:
        """The teacher, the sample and the initial network of the trial that `key` is."""
        drawn = _draw(self.sizes(), self.values, key)
        return eqx.tree_at(lambda d: d[1].count, drawn, None)  # nothing is padded

    def run(self, key: PRNGKeyArray) -> Record:
        """The record of the trial that `key` is. Works under jit and vmap."""
        return _run(self.sizes(), self.values, key)

    def flow(self, key: PRNGKeyArray, save: int | None = None) -> Flow:
        """The very same trial as a `Flow`, with up to `save` snapshots; equal to `run`'s up to the tolerance."""
        _, data, net = self.draw(key)
        return _integrate(self.loss, self.values, data, net, save)


def draw(sizes: Sizes, values: Values, key: PRNGKeyArray) -> tuple[Teacher, Dataset, ReluNetwork]:
    """`Trial.draw`, as a function of arrays, padded to `sizes.slots`: draws do not depend on the padding."""
    teacher_key, sample_key, net_key = jr.split(key, 3)
    law, slots = values.distribution, sizes.slots
    teacher = Teacher.random(
        teacher_key, sizes.neurons, switches=sizes.switches, min_run=values.min_run, distribution=law
    )
    data = teacher.sample(sample_key, values.samples, law, slots=slots.samples)
    net = ReluNetwork.random(net_key, values.width, sizes.scheme, values.scale, slots=slots.width)
    # A teacher that could not be drawn labels nothing: the trial must end as a failed computation, not as a success.
    drawn = jnp.isfinite(teacher.net.squared_norm)
    teacher = jax.tree.map(lambda a: jnp.pad(a, (0, slots.neurons - sizes.neurons)), teacher)
    return teacher, data, jax.tree.map(lambda a: jnp.where(drawn, a, jnp.nan), net)


def measure(loss: str, values: Values, teacher: Teacher, data: Dataset, net: ReluNetwork) -> Record:
    """The record of a trial that was drawn."""
    flow = _integrate(loss, values, data, net)
    return judge(values.neurons, values.distribution, teacher, data, max_margin(data), net, flow)


def _integrate(loss, values, data, net, save=None) -> Flow:
    return integrate(
        net, data, LOSSES[loss](), rtol=values.rtol, atol=values.atol, save=save, max_steps=values.max_steps
    )


_draw = eqx.filter_jit(draw)
_run = eqx.filter_jit(lambda sizes, values, key: measure(sizes.loss, values, *draw(sizes, values, key)))


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
