"""Data on which gradient flow does worst: points moved to where its limit is furthest from the global optimum.

From one initialisation, with labels fixed, the inputs climb the gradient of log(value of the limit/value of the
optimum), both values ½‖θ‖² at minimum margin 1: the limit's by its KKT conditions, the optimum's by its closed form.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from gradflow.data import Dataset
from gradflow.flow import integrate, limit
from gradflow.limit import Limit
from gradflow.network import ReluNetwork
from gradflow.optimum import Optimum, max_margin

_SMALLEST = 1e-3  # of the first steps, below which no more are tried


class Placement(eqx.Module):
    """The worst placement found: `data`, the flow's certified `limit` on it, the global `optimum`; and `ratios` (s,) of
    their values, at the start and after every step that was taken.
    """

    data: Dataset
    limit: Limit
    optimum: Optimum
    ratios: Float[Array, " s"]

    @property
    def ratio(self) -> Float[Array, ""]:
        """½‖θ‖² of the limit over that of the optimum: how many times smaller its margin is."""
        return self.limit.value / self.optimum.value


def worst_placement(
    net: ReluNetwork, data: Dataset, steps: int = 50, optimiser: optax.GradientTransformation | None = None
) -> Placement:
    """Moves the points of `data`, within their range and in their order, to where the limit of the flow from `net` has
    the smallest margin compared to the best.

    **Arguments** `steps`: gradients, at most; `optimiser`: any of Optax (default `adam`, 1 % of the range a step). A
    step that leads to no certified limit, to points that change places, or to a smaller ratio, is halved.

    **Raises** `RuntimeError` if the flow has no certified limit on `data`, or none that can be differentiated.

    >>> import jax
    >>> import gradflow as gf
    >>> net = gf.ReluNetwork.random(jax.random.key(1), width=8)
    >>> data = gf.Dataset([-1.0, -0.5, 0.5, 1.0], [1, -1, -1, 1])
    >>> bool(gf.worst_placement(net, data, steps=1).ratio >= 1)
    True
    """
    low, high = float(jnp.min(data.x)), float(jnp.max(data.x))
    optimiser = optax.adam(0.01 * (high - low)) if optimiser is None else optimiser
    found = _measure(net, data)
    found[1].check()
    if not jnp.all(jnp.isfinite(found[3])):
        raise RuntimeError("the limit on these data has no derivative: move the points a little")
    memory, share, ratios = optimiser.init(data.x), 1.0, [float(jnp.exp(found[0]))]
    order = np.argsort(data.x)
    if not np.all(np.diff(np.asarray(data.x)[order]) > 0):
        raise ValueError("points that occur twice cannot be moved: leave each in once")
    for _ in range(steps):
        update, later = optimiser.update(-found[3], memory, found[4].x)
        (along,) = jax.tree.leaves(update)
        x = jnp.clip(found[4].x + share * along, low, high)
        tried = None
        if np.all(np.diff(np.asarray(x)[order]) > 0):
            tried = _measure(net, eqx.tree_at(lambda d: d.x, data, x))
        if tried is not None and bool(tried[1].certified & jnp.all(jnp.isfinite(tried[3])) & (tried[0] > found[0])):
            found, memory, share = tried, later, min(1.0, 2 * share)
            ratios.append(float(jnp.exp(found[0])))
        else:
            share /= 2
            if share < _SMALLEST:
                break
    return Placement(found[4], found[1], found[2], jnp.asarray(ratios))


@eqx.filter_jit
def _measure(net: ReluNetwork, data: Dataset):
    """Log of the ratio, the limit, the optimum, the gradient, the data."""

    def log_ratio(x):
        there = eqx.tree_at(lambda d: d.x, data, x)
        found, optimum = limit(integrate(net, there), there), max_margin(there)
        return jnp.log(found.value / optimum.value), (found, optimum)

    (value, (found, optimum)), gradient = jax.value_and_grad(log_ratio, has_aux=True)(data.x)
    return value, found, optimum, gradient, data
