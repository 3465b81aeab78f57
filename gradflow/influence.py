"""What each data point does to the limit: how its margin and its knots move when the point does.

Only support vectors have influence, those with multipliers. To first order, in the limit of infinite time: how far the
flow goes on the way does not enter, and neither does the initialisation, as a certified limit stays where it is when
that moves a little.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow.data import Dataset
from gradflow.limit import Limit, on_data


class Influence(eqx.Module):
    """Derivatives of a limit by the inputs x_i, in the order of the data.

    - `value` (n,): of ½‖θ*‖²; `margin` (n,): of the normalised margin γ = 1/(2 value);
    - `breakpoints` (k,): −b_j/w_j of the neurons of `limit.network`, NaN for those that are not in use;
    - `moves` (k, n): their derivatives.

    All NaN where the limit has no derivative, or is not certified.
    """

    value: Float[Array, " n"]
    margin: Float[Array, " n"]
    breakpoints: Float[Array, " k"]
    moves: Float[Array, "k n"]


def influence(limit: Limit, data: Dataset) -> Influence:
    """The influence of every data point on a limit (`implicit.py` has the derivation). Works under jit and vmap.

    **Arguments** `limit`: of `gradflow.limit` or `flow.limit`; `data`: what it is the limit on.

    >>> import jax
    >>> import gradflow as gf
    >>> net = gf.ReluNetwork.random(jax.random.key(1), width=8)
    >>> data = gf.Dataset([-1.0, -0.5, 0.5, 1.0], [1, -1, -1, 1])
    >>> limit = gf.integrate(net, data).limit
    >>> gf.influence(limit, data).margin.shape
    (4,)
    """

    def ends(x):
        found = on_data(limit, eqx.tree_at(lambda d: d.x, data, x))
        net = found.network
        bends = (net.v != 0) & (net.w != 0)
        breakpoints = jnp.where(bends, -net.b / jnp.where(bends, net.w, 1), 0)
        return (found.value, breakpoints), bends

    (value, moves), bends = jax.jacrev(ends, has_aux=True)(data.x)
    (_, breakpoints), _ = ends(data.x)
    blank = jnp.where(bends, 0, jnp.nan)
    return Influence(value, -value / (2 * limit.value**2), breakpoints + blank, moves + blank[:, None])
