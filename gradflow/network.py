"""The network: one hidden layer of ReLUs on a scalar input.

    N(x) = Σ_j v_j max(0, w_j x + b_j),   θ = (w, b, v) ∈ R^{3k}

There is no output bias, so N is 2-homogeneous in θ: N(cθ; x) = c² N(θ; x). Signs, breakpoints and regions depend on the
direction θ/‖θ‖ only, which is what gradient flow on an exponential-type loss makes converge.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow.length import length


def is_concrete(*arrays) -> bool:
    """Whether values can be read now, that is, whether none of `arrays` is a tracer of jit, vmap or grad."""
    return not any(isinstance(array, Tracer) for array in arrays)


def is_whole(number, least: int, most: int | float = np.inf) -> bool:
    """Whether a concrete `number` is a whole one from `least` to `most`; a tracer always passes.

    By NumPy: inside a trace JAX would make a tracer of the comparison.
    """
    if not is_concrete(number):
        return True
    value = np.asarray(number)
    return bool(value.ndim == 0 and np.isfinite(value) and int(value) == value and least <= value <= most)


class ReluNetwork(eqx.Module):
    """x ↦ Σ_j v_j max(0, w_j x + b_j) with k hidden neurons.

    **Arguments** `w`, `b`, `v`: input weights, hidden biases and output weights, each of shape (k,), k ≥ 1. Anything
    that converts to an array; integers become floats.

    **Raises** `ValueError` for shapes that are not three equal (k,). Non-finite weights are allowed: they are how a
    failed computation inside a batch reports itself.

    >>> import gradflow as gf
    >>> net = gf.ReluNetwork(w=[1.0, -1.0], b=[0.5, 0.0], v=[2.0, 1.0])
    >>> print(net(0.5), net([-1.0, 1.0]))
    2.0 [1. 3.]
    """

    w: Float[Array, " k"]
    b: Float[Array, " k"]
    v: Float[Array, " k"]

    def __init__(self, w, b, v):
        w, b, v = (jnp.asarray(a) for a in (w, b, v))
        if w.ndim != 1 or w.shape[0] == 0 or not (w.shape == b.shape == v.shape):
            raise ValueError(
                f"a network needs w, b and v of one shape (k,), k >= 1; got {w.shape}, {b.shape} and {v.shape}"
            )
        floats = [a.dtype for a in (w, b, v) if jnp.issubdtype(a.dtype, jnp.floating)]
        dtype = jnp.result_type(*floats) if floats else jnp.result_type(float)
        self.w, self.b, self.v = (a.astype(dtype) for a in (w, b, v))

    @property
    def width(self) -> int:
        """Number of hidden neurons k."""
        return self.w.shape[-1]

    @property
    def squared_norm(self) -> Float[Array, ""]:
        """ρ² = ‖θ‖² = Σ_j w_j² + b_j² + v_j²."""
        return jnp.sum(self.w**2) + jnp.sum(self.b**2) + jnp.sum(self.v**2)

    @property
    def balance(self) -> Float[Array, " k"]:
        """v_j² − w_j² − b_j² per neuron, the quantities that gradient flow conserves (Du, Hu and Lee 2018, Thm 2.1)."""
        # In factors: the difference of two large squares would drown in rounding at late times.
        norm = length(self.w, self.b)
        return (self.v - norm) * (self.v + norm)

    @property
    def sizes(self) -> Float[Array, " k"]:
        """The size of every neuron, max(‖(w_j, b_j)‖, |v_j|)."""
        return jnp.maximum(length(self.w, self.b), jnp.abs(self.v))

    @property
    def lines(self) -> Float[Array, "2 k"]:
        """Slope v_j w_j and offset v_j b_j of the line that each neuron adds where it is active."""
        return jnp.stack([self.v * self.w, self.v * self.b])

    def scaled(self, factor) -> "ReluNetwork":
        """The network with every parameter times `factor`: its values are those of this one times `factor`²."""
        return jax.tree.map(lambda a: a * factor, self)

    def __call__(self, x):
        """N(x), of the shape of `x`. Python numbers and integers are taken as floats of the weights' dtype.

        Its derivatives take max(0, ·)' = 0 at 0.
        """
        x = jnp.asarray(x, dtype=self.w.dtype)
        flat = x.reshape(-1, 1)
        hidden = jax.nn.relu(self.w[None, :] * flat + self.b[None, :])
        return (hidden @ self.v).reshape(x.shape)

    @classmethod
    def random(
        cls,
        key: PRNGKeyArray,
        width: int | Array = 64,
        scheme: str = "balanced",
        scale: ArrayLike = 1.0,
        dtype=float,
        *,
        slots: int | None = None,
    ):
        """A random initialisation.

        **Arguments**

        - `key`: JAX random key. Neuron j depends on (`key`, j) only, so a wider network contains the narrower one
            (up to the factor of `"he"`, which depends on the width).
        - `width`: k. With `slots` it may be traced.
        - `scheme`: the law of one neuron, before scaling:
            - `"balanced"`: (w, b) standard normal, v = ±‖(w, b)‖ with a fair sign, so that v² − w² − b² = 0;
            - `"gaussian"`: w, b, v independent standard normal;
            - `"he"`: w, b standard normal, v normal of variance 2/k (He et al. 2015, for fan-in 1 and then k);
            - `"sphere"`: (w, b) uniform on the unit circle, v = ±1 with a fair sign; balanced too.
        - `scale`: multiplies every parameter, so N scales with `scale`². May be traced.
        - `dtype`: float dtype; the default follows JAX's `jax_enable_x64`.
        - `slots`: pad with zero neurons, which change nothing, to this many: one compilation then serves many widths.

        **Raises** `ValueError` for an unknown scheme, a width below 1 or above `slots`.

        >>> import jax
        >>> import gradflow as gf
        >>> net = gf.ReluNetwork.random(jax.random.key(0), width=64, scheme="he", scale=0.5)
        >>> net.width
        64
        """
        if scheme not in SCHEMES:
            raise ValueError(f"unknown scheme {scheme!r}; choose one of {', '.join(map(repr, SCHEMES))}")
        if not is_whole(width, 1, np.inf if slots is None else slots):
            raise ValueError(
                f"width must be a whole number of at least 1{f' and at most {slots}' if slots else ''}, got {width}"
            )
        if is_concrete(scale) and not (np.greater(scale, 0) and np.isfinite(scale)):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        dtype = jnp.result_type(dtype)
        count = int(width) if slots is None else slots
        return cls(*_draw(key, count, jnp.asarray(width), scheme, jnp.asarray(scale, dtype)))


@eqx.filter_jit  # outside of jit, one program instead of one for each operation
def _draw(key, count, width, scheme, scale):
    index, dtype = jnp.arange(count), scale.dtype
    keys = jax.vmap(lambda j: jr.fold_in(key, j))(index)
    weights = jax.vmap(lambda k: SCHEMES[scheme](k, width.astype(dtype), dtype))(keys)
    return tuple(jnp.where(index < width, a, 0) * scale for a in weights)


def _balanced(key, width, dtype):
    direction, sign = jr.split(key)
    w, b = jr.normal(direction, (2,), dtype)
    return w, b, jr.rademacher(sign, (), dtype) * length(w, b)


def _gaussian(key, width, dtype):
    w, b, v = jr.normal(key, (3,), dtype)
    return w, b, v


def _he(key, width, dtype):
    w, b, v = jr.normal(key, (3,), dtype)
    return w, b, v * (2 / width) ** 0.5


def _sphere(key, width, dtype):
    direction, sign = jr.split(key)
    angle = jr.uniform(direction, (), dtype, maxval=2 * jnp.pi)
    return jnp.cos(angle), jnp.sin(angle), jr.rademacher(sign, (), dtype)


SCHEMES: dict[str, Callable] = {"balanced": _balanced, "gaussian": _gaussian, "he": _he, "sphere": _sphere}
