"""States along a flow, to go back over it: a fixed number of slots for any number of steps.

State i (after i accepted steps) is kept if i is a multiple of the stride, which is 1 for the first S states and doubles
whenever all S slots are taken: from state 2^(p−1) S on it is 2^p. Nothing is moved for that: state 2^(p−1) S + 2^p j
takes the slot of state 2^p j + 2^(p−1), which is no multiple of the new stride.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gradflow.hybrid import State


def stride(last: Int[Array, ""], slots: int) -> Int[Array, ""]:
    """How many steps lie between two of the states that are kept, of those up to `last`."""
    return jnp.where(last < slots, 1, 2 * _power_of_two(last // slots))


def slot(number: Int[Array, ""], slots: int) -> Int[Array, ""]:
    """Where a state is kept."""

    def fold(_, number):
        return jnp.where(number >= slots, number - _power_of_two(number // slots) * (slots - 1), number)

    return jax.lax.fori_loop(0, 31 - slots.bit_length(), fold, number)


def _power_of_two(number: Int[Array, ""]) -> Int[Array, ""]:
    """The largest power of two up to `number` (1 for 0)."""
    return 1 << (number.dtype.type(8 * number.dtype.itemsize - 1) - jax.lax.clz(jnp.maximum(number, 1)))


class Trace(eqx.Module):
    """`states`: a `State` with slots in front of every leaf."""

    states: State

    @classmethod
    def empty(cls, state: State, slots: int) -> "Trace":
        return cls(jax.tree.map(lambda a: jnp.zeros((slots, *a.shape), a.dtype), state))

    @property
    def slots(self) -> int:
        return self.states.time.shape[0]

    def with_state(self, state: State, due) -> "Trace":
        """With `state` in its slot, if it is `due` and belongs into one."""
        number = state.accepted
        due &= number % stride(number, self.slots) == 0
        place = jnp.where(due, slot(number, self.slots), self.slots)  # beyond the last: dropped
        return Trace(jax.tree.map(lambda row, a: row.at[place].set(a, mode="drop"), self.states, state))

    def state(self, number: Int[Array, ""]) -> State:
        """State `number`, a multiple of the stride."""
        place = slot(number, self.slots)
        return jax.tree.map(lambda row: row[place], self.states)
