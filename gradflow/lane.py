"""A trial under way, as a value: what a batch holds in each of its lanes.

`Trial.run` follows one trial to its end. A batch of them would wait for its slowest, and steps vary a hundredfold. So a
trial can be followed for some attempts at a time, and taken out of the batch when it is over.
"""

import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Int

from gradflow.course import Course, default_solvers
from gradflow.data import Dataset
from gradflow.distribution import Distribution
from gradflow.loss import LOSSES
from gradflow.network import ReluNetwork
from gradflow.optimum import Optimum, max_margin
from gradflow.outcome import Until
from gradflow.record import Record, judge
from gradflow.teacher import Teacher
from gradflow.trial import Sizes, Values, draw

_drawing = threading.Lock()  # two threads that compile the same draws would do it twice


class Lane(eqx.Module):
    """One trial: what was drawn, the optimum for its data, and its flow on its way."""

    neurons: Int[Array, ""]
    law: Distribution
    teacher: Teacher
    net: ReluNetwork
    best: Optimum
    course: Course

    @classmethod
    def begin(cls, loss: str, values: Values, teacher: Teacher, data: Dataset, net: ReluNetwork) -> "Lane":
        """At time 0, from what `draw` drew; as `measure` does it."""
        course = Course.begin(
            net, data, LOSSES[loss](), Until(), values.rtol, values.atol, default_solvers(), None, values.max_steps
        )
        return cls(values.neurons, values.distribution, teacher, net, max_margin(data), course)

    @property
    def attempts(self) -> Int[Array, "*lanes"]:
        """Step attempts so far."""
        return self.course.attempts

    @property
    def waits(self) -> Bool[Array, "*lanes"]:
        """Whether it can only go on by `close`."""
        return self.course.waits

    @property
    def over(self) -> Bool[Array, "*lanes"]:
        return self.course.over

    def idle(self) -> "Lane":
        """The same lane, over before anything happens in it."""
        return eqx.tree_at(lambda lane: lane.course.over, self, jnp.ones_like(self.over))

    def follow(self, attempts) -> "Lane":
        """On by so many step attempts at most."""
        return eqx.tree_at(lambda lane: lane.course, self, self.course.follow(attempts))

    def close(self) -> tuple["Lane", Record]:
        """What the end of a round leads to, and the record, which is final if the lane then is `over`."""
        course = self.course.hand_over()
        record = judge(self.neurons, self.law, self.teacher, course.data, self.best, self.net, course.flow())
        return eqx.tree_at(lambda lane: lane.course, self, course), record


def begin(sizes: Sizes, values: Values, key, numbers) -> eqx.Module:
    """Trials of one cell by their numbers, one a lane."""
    with _drawing:
        drawn = _draw(sizes, values, key, numbers)
    return _begin(sizes.loss, values, drawn)


@eqx.filter_jit
def _draw(sizes: Sizes, values: Values, key, numbers):
    return jax.vmap(lambda i: draw(sizes, values, jr.fold_in(key, i)))(numbers)


@eqx.filter_jit
def _begin(loss: str, values: Values, drawn):
    return eqx.filter_vmap(lambda one: Lane.begin(loss, values, *one))(drawn)
