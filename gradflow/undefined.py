"""Tangents of what has no derivative: NaN where anything moves, in reverse mode where anything is asked about them.

NaN times a tangent will not do: reverse mode gives outputs that nobody looks at the weight 0, in loops and batches, and
NaN times 0 is NaN. Nor will a sum of weights, which may cancel.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def undefined(moves: Float[Array, " m"], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tangent, of the shape of `like`, of what has no derivative by what `moves`."""

    def mark(_, moves):
        return jnp.where(moves == 0, 0, jnp.nan)

    def marked(moves):
        return jax.lax.custom_linear_solve(lambda same: same, moves, mark, mark)

    return marked(jnp.sum(marked(moves)) * jnp.ones_like(like))
