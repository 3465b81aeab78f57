"""Lengths of vectors that may vanish, as the weights of padding do: with a derivative at 0."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def length(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns √(a² + b²), whose derivative where both are 0 is the smallest of its subgradients, 0.

    There the quotients a/√(a² + b²) are 0/0, and reverse mode multiplies them even by the weight 0 of a branch that is
    not taken. (The derivative of `jnp.hypot` at 0 depends on the version of JAX.)

    >>> from gradflow.length import length
    >>> zero = jax.numpy.zeros(())
    >>> print(jax.grad(length)(zero, zero))
    0.0
    """
    vanishes = (a == 0) & (b == 0)
    return jnp.where(vanishes, 0, jnp.hypot(jnp.where(vanishes, 1, a), b))
