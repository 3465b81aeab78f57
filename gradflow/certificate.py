"""The certificate of a limit: the KKT conditions of the maximum-margin problem, recomputed from a network alone.

    minimise ½‖θ‖²  subject to  q_i(θ) = y_i N(x_i) ≥ 1:    θ ∈ Σ λ_i ∂q_i(θ),  λ_i ≥ 0,  λ_i (q_i − 1) = 0.

Knows nothing of flows, cells or programs.

**Rounding.** A network with margins 1 whose weights are rounded to float64, by u = 2⁻⁵³ of themselves, has margins that
are wrong by up to 3 u Σ_j |v_j| ‖u_j‖ ‖x̃_i‖ = 3 u ½‖θ‖² ‖x̃_i‖ if it is balanced, and rounded multipliers, Σ λ_i =
½‖θ‖², put Σ λ_i ∂q_i wrong by up to u ½‖θ‖² max ‖x̃_i‖ of ‖θ‖. That is 1e-14 as a rule. But between two labels in a
distance δ a network climbs by 2, so that ½‖θ‖² ≥ 2/δ: at δ = 10⁻⁶ a KKT point rounded to float64 may have a residual
of some 10⁻¹⁰. So much is allowed for, but never more than 10⁻⁹: the bound grows with the very norm that it certifies.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gradflow.data import Dataset
from gradflow.length import length
from gradflow.network import ReluNetwork

CERTIFIED = 1e-10  # largest relative residual of a certified limit, but for rounding of the limit itself
_MOST = 1e-9  # that rounding may make of it
_ROUNDING = float(np.finfo(np.float64).eps)  # 2 u
ON = 1e-11  # |u·x̃| over ‖u‖ ‖x̃‖ up to which a breakpoint is on a point: rounding


def kkt_residual(net: ReluNetwork, data: Dataset, multipliers=None) -> Float[Array, ""]:
    """How far a network that classifies `data`, scaled to minimum margin 1, is from a KKT point of (P).

    **Arguments** `multipliers`: λ (n,); default the natural ones of the exponential loss, λ_i = p_i ρ²/(2 Σ p_l q_l), p
    the softmax of −q.

    **Returns** the largest of

    - stationarity: ‖θ − Σ λ_i ∂q_i‖/‖θ‖ with the Clarke subdifferential, the activation at a breakpoint on a point
      being the number in [0, 1] that fits best;
    - negative multipliers: max −λ_i/Σ λ; complementarity: Σ |λ_i| |q_i − 1|/Σ λ.

    Infinite if some margin is not positive. Works under jit and vmap.

    >>> import gradflow as gf
    >>> net = gf.ReluNetwork([1.0], [1.0], [2**0.5])  # one point x = 1: u is parallel to (x, 1), and balanced
    >>> bool(gf.kkt_residual(net, gf.Dataset([1.0], [1])) < 1e-15)
    True
    """
    q = data.margins(net)
    least = jnp.min(q)
    fits = least > 0  # where not, stand-ins keep derivatives finite
    scale = 1 / jnp.sqrt(jnp.where(fits, least, 1))
    natural = jax.nn.softmax(jnp.where(data.real, -q, -jnp.inf))
    natural = natural * net.squared_norm / jnp.where(fits, 2 * jnp.sum(natural * q), 1)
    lam = natural if multipliers is None else jnp.asarray(multipliers, q.dtype)
    net, q = net.scaled(scale), q * scale**2

    x, force = data.x[None, :], (lam * data.y)[None, :]
    reach = jnp.hypot(1, x)
    inner = net.w[:, None] * x + net.b[:, None]
    on = jnp.abs(inner) <= ON * length(net.w, net.b)[:, None] * reach
    active = ((inner > 0) & ~on).astype(q.dtype)
    z = jnp.stack([active @ (force * x)[0], active @ force[0]])
    # What u/v still lacks is to come from the points under the breakpoint, which lie in one place.
    lack = jnp.stack([net.w, net.b]) / jnp.where(net.v == 0, 1, net.v)[None] - z
    push = on.astype(q.dtype) * force
    needed = (lack[0][:, None] * x + lack[1][:, None]) / reach**2
    total = jnp.sum(push, axis=1, keepdims=True)
    share = jnp.where(total == 0, 0, needed / jnp.where(total == 0, 1, total))
    push = push * jnp.clip(share, 0, 1)
    z = z + jnp.stack([push @ data.x, jnp.sum(push, axis=1)])
    off = ReluNetwork(
        net.w - net.v * z[0], net.b - net.v * z[1], net.v - jnp.sum(jnp.maximum(inner, 0) * force, axis=1)
    )
    whole = jnp.where(fits, jnp.sum(jnp.abs(lam)), 1)
    parts = (
        jnp.sqrt(jnp.where(fits, off.squared_norm, 1) / jnp.where(fits, net.squared_norm, 1)),
        jnp.max(-lam) / whole,
        jnp.sum(jnp.abs(lam) * jnp.abs(q - 1)) / whole,
    )
    residual = jnp.max(jnp.stack(parts))
    return jnp.where(fits & ~jnp.isnan(residual), residual, jnp.inf)


def certifies(residual: Float[Array, ""], net: ReluNetwork, data: Dataset) -> Bool[Array, ""]:
    """Tell whether a network with minimum margin 1 and this `kkt_residual` is a KKT point, up to 1e-10 or, if that is
    more, the rounding of the KKT point itself, at most 1e-9 (see above).
    """
    reach = jnp.max(jnp.hypot(1, data.x))
    return residual <= jnp.clip(_ROUNDING * 0.5 * net.squared_norm * reach, CERTIFIED, _MOST)
