"""Data: n points on the line, each labelled −1 or +1, checked where they come in."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gradflow.network import ReluNetwork, is_concrete, is_whole


class Dataset(eqx.Module):
    """n points x_i with labels y_i = ±1.

    **Arguments** `x`: (n,) finite numbers in any order; `y`: (n,) of −1 and +1. Repeated points are fine as long as
    their labels agree. `padded` makes room for one compilation to serve many n.

    **Raises** `ValueError` for wrong shapes, no data, values that are not finite, labels other than ±1, and equal
    points with opposite labels, which no classifier can fit; the message names the offending points. Inside jit, vmap
    or grad, values are unknown and only shapes are checked.

    >>> import gradflow as gf
    >>> data = gf.Dataset([0.5, -1.0, 2.0], [1, -1, 1])
    >>> print(data.samples, data.switches)
    3 1
    """

    x: Float[Array, " n"]
    y: Float[Array, " n"]
    count: Int[Array, ""] | None  # how many of the points are data, None for all; the rest is padding

    def __init__(self, x, y):
        if is_concrete(x, y):
            _check_points(np.asarray(x), np.asarray(y))
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.result_type(float))
        y = jnp.asarray(y).astype(x.dtype)
        if x.ndim != 1 or x.shape != y.shape or x.shape[0] == 0:
            raise ValueError(f"x and y must have one shape (n,), n >= 1; got {x.shape} and {y.shape}")
        if is_concrete(x) and not np.isfinite(np.asarray(x)).all():  # under jit, JAX would trace it
            raise ValueError(f"some points of x do not fit into {x.dtype}; enable jax_enable_x64 or rescale x")
        self.x, self.y, self.count = x, y, None

    @property
    def samples(self) -> int | Int[Array, ""]:
        """Number of points n, without padding."""
        return self.x.shape[-1] if self.count is None else self.count

    @property
    def real(self) -> Bool[Array, " n"]:
        """Which entries are data and no padding."""
        return jnp.arange(self.x.shape[0]) < self.samples

    def padded(self, count: int | Int[Array, ""]) -> "Dataset":
        """The first `count` points, which may be traced, in arrays of this size: the others repeat the first, and have
        no part in the mean loss. **Raises** `ValueError` unless `count` is 1 … n, and if there is padding already.
        """
        if self.count is not None:
            raise ValueError("these data are padded already")
        if not is_whole(count, 1, self.x.shape[0]):
            raise ValueError(f"count must be a whole number from 1 to {self.x.shape[0]}, got {count}")
        real = jnp.arange(self.x.shape[0]) < count
        x, y = jnp.where(real, self.x, self.x[0]), jnp.where(real, self.y, self.y[0])
        return eqx.tree_at(
            lambda d: (d.x, d.y, d.count), self, (x, y, jnp.asarray(count)), is_leaf=lambda leaf: leaf is None
        )

    @property
    def switches(self) -> Array:
        """m, the number of label switches along the sorted points."""
        y = self.y[jnp.argsort(self.x)]
        return jnp.sum(y[1:] != y[:-1])

    def margins(self, net: ReluNetwork) -> Float[Array, " n"]:
        """q_i = y_i N(x_i), the unnormalised margins."""
        return self.y * net(self.x)


def _check_points(x, y):
    """Everything that can be wrong with a user's points, in the order a user would want to hear it."""
    for name, values in (("x", x), ("y", y)):
        if values.dtype.kind not in "fiub":
            raise ValueError(f"{name} must hold real numbers, got dtype {values.dtype}")
    if x.ndim != 1 or y.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"x and y must be one-dimensional and equally long, got shapes {x.shape} and {y.shape}; "
            "for inputs of shape (n, 1) pass x[:, 0]"
        )
    if x.size == 0:
        raise ValueError("there is no data: x and y are empty")
    bad = np.flatnonzero(~np.isfinite(x))
    if bad.size:
        raise ValueError(f"x must be finite; {_listed(bad, x)}; remove or repair these points")
    bad = np.flatnonzero((y != 1) & (y != -1))
    if bad.size:
        hint = "; write -1 instead of 0, for instance y = 2*y - 1" if np.isin(y, (0, 1)).all() else ""
        raise ValueError(f"labels must be -1 or +1; {_listed(bad, y, 'y')}{hint}")
    order = np.argsort(x, kind="stable")
    # Equal after conversion to the working dtype is equal for the network.
    xs = np.asarray(x, dtype=jnp.result_type(x.dtype if x.dtype.kind == "f" else float))[order]
    _, start = np.unique(xs, return_index=True)
    clash = np.maximum.reduceat(y[order], start) != np.minimum.reduceat(y[order], start)
    if clash.any():
        first = int(np.flatnonzero(clash)[0])
        stop = start[first + 1] if first + 1 < start.size else xs.size
        rows = np.sort(order[start[first] : stop])
        raise ValueError(
            f"{int(clash.sum())} position(s) of x carry both labels, the first x = {xs[start[first]]!s} "
            f"at rows {_few(rows)}; no classifier can fit them: keep one label per position"
        )


def _few(values, limit: int = 5) -> str:
    shown = ", ".join(str(value) for value in values[:limit])
    return shown + (f" and {len(values) - limit} more" if len(values) > limit else "")


def _listed(rows, values, name: str = "x") -> str:
    return f"{len(rows)} bad value(s): {_few([f'{name}[{row}] = {values[row]}' for row in rows])}"
