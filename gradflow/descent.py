"""Discretised training, to compare: gradient descent, stochastic or not, and any other transformation of Optax.

A step takes a gradient of the loss L or of log L = log mean_i ℓ(q_i). For the exponential loss

    −∇ log L = Σ_i p_i ∂q_i = dθ/dτ,

so `optax.sgd(η)` on log L is Euler's method for the flow in rescaled time, with step η: gradient descent whose learning
rate η/L grows as the loss falls (Lyu and Li 2020, section 5). On L, the step shrinks with the loss, and t = η · steps.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gradflow.data import Dataset
from gradflow.loss import Exponential, Loss
from gradflow.network import ReluNetwork, is_concrete, is_whole
from gradflow.outcome import Path

OBJECTIVES = ("loss", "log_loss")


class DescentStatus(eqx.Enumeration):
    """How a descent ended. Printing a value gives its sentence."""

    done = "All steps were taken."
    diverged = "Weights are not finite: a smaller learning rate may do better."


class Descent(eqx.Module):
    """The end of a descent.

    - `final`: the network; `status`: how it ended; `steps`: how many were taken;
    - `log_loss`: log of the mean loss over all points; `margin`: γ = min_i q_i/‖θ‖²;
    - `path`: snapshots if `save` asked for them, else `None`; its `time` counts steps, `log_time` is the log of that.

    `gradflow.integrate(descent.final, data).limit` is the limit of the gradient flow that goes on from there.
    """

    final: ReluNetwork
    status: DescentStatus
    steps: Int[Array, ""]
    log_loss: Float[Array, ""]
    margin: Float[Array, ""]
    path: Path | None

    def check(self) -> "Descent":
        """This descent, or a `RuntimeError` with the status's advice. For people; not for jit or vmap."""
        if not bool(self.status == DescentStatus.done):
            raise RuntimeError(f"{DescentStatus[self.status]} ({self.steps} steps)")
        return self

    def __repr__(self) -> str:
        if not is_concrete(self.steps) or self.steps.ndim:
            return super().__repr__()
        return (
            f"Descent of {self.final.width} neuron{'s' * (self.final.width > 1)}: {DescentStatus[self.status]}\n"
            f"  {self.steps} steps, log loss {self.log_loss:.6g}, margin {self.margin:.6g}"
        )


def descend(
    net: ReluNetwork,
    data: Dataset,
    optimiser: optax.GradientTransformation,
    steps: int | Array,
    loss: Loss | None = None,
    *,
    objective: str = "loss",
    batch: int | None = None,
    key: PRNGKeyArray | None = None,
    save: int | None = None,
) -> Descent:
    """Trains `net` on `data` with any transformation of Optax that needs gradients only.

    **Arguments** `optimiser`: such as `optax.sgd(0.1)` or `optax.adam(1e-3)`; `steps`: how many, may be traced; `loss`:
    default `Exponential()`; `objective`: `"loss"` or `"log_loss"`, of which gradients are taken; `batch`: points in a
    step, drawn with `key` without replacement, default all; `save`: an even number of snapshots to keep.

    **Returns** a `Descent`, under jit and vmap too. It stops early only at weights that are not finite. Where the loss
    itself, not its log, is descended, steps vanish with it: with `sgd` nothing moves once η L is below rounding.

    **Raises** `ValueError` for an unknown objective, a batch without a key or larger than the data, padded data, and a
    `save` that is no even number.

    >>> import jax, optax
    >>> import gradflow as gf
    >>> net = gf.ReluNetwork.random(jax.random.key(1), width=8)
    >>> data = gf.Dataset([-1.0, -0.5, 0.5, 1.0], [1, -1, -1, 1])
    >>> found = gf.descend(net, data, optax.sgd(0.05), 2000, objective="log_loss")
    >>> bool(found.margin > 0)
    True
    """
    loss = Exponential() if loss is None else loss
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; choose one of {', '.join(map(repr, OBJECTIVES))}")
    if data.count is not None:
        raise ValueError("descend takes data without padding")
    if (batch is None) != (key is None):
        raise ValueError("a batch is drawn with a key: give both, `batch` and `key`, or neither")
    if batch is not None and not 1 <= batch <= data.x.shape[0]:
        raise ValueError(f"batch must be a number of points from 1 to {data.x.shape[0]}, got {batch}")
    if save is not None and (save != int(save) or save < 2 or save % 2):
        raise ValueError(f"save must be an even number of snapshots, at least 2, got {save}")
    if not is_whole(steps, 0, 2**31 - 1):
        raise ValueError(f"steps must be a whole number, not negative, got {steps}")
    if data.x.dtype != net.w.dtype:
        raise ValueError(f"the network is {net.w.dtype} and the data {data.x.dtype}: convert one of them")
    steps = jnp.asarray(int(steps) if is_concrete(steps) else steps)
    save = None if save is None else int(save)
    return _descend(net, data, optimiser, steps, loss, objective, batch, key, save)


@eqx.filter_jit
def _descend(net, data, optimiser, steps, loss, objective, batch, key, save):
    def value(net, number):
        part = data
        if batch is not None:
            chosen = jr.permutation(jr.fold_in(key, number), data.x.shape[0])[:batch]
            part = eqx.tree_at(lambda d: (d.x, d.y), data, (data.x[chosen], data.y[chosen]))
        log_mean = loss.log_mean(part.margins(net))
        return log_mean if objective == "log_loss" else jnp.exp(log_mean)

    def numbers(net):
        q = data.margins(net)
        return loss.log_mean(q), jnp.min(q) / net.squared_norm

    def record(path, net, number, due):
        if path is None:
            return None
        real = jnp.asarray(number, net.w.dtype)
        return path.with_row(due, real, jnp.log(real), *numbers(net), net)

    def goes_on(carry):
        net, _, number, _ = carry
        return (number < steps) & jnp.isfinite(net.squared_norm)

    def body(carry):
        net, memory, number, path = carry
        update, memory = optimiser.update(jax.grad(value)(net, number), memory, net)
        net, number = optax.apply_updates(net, update), number + 1
        if path is not None:
            path = record(path, net, number, (number % path.stride == 0) & (number < steps))
        return net, memory, number, path

    begin = jnp.zeros_like(steps)
    path = None if save is None else record(Path.empty(save, net), net, begin, jnp.array(True))
    carry = (net, optimiser.init(eqx.filter(net, eqx.is_array)), begin, path)
    net, _, number, path = jax.lax.while_loop(goes_on, body, carry)
    if path is not None:  # unless it is the last already
        path = record(path, net, number, number > path.time[path.count - 1])
    status = DescentStatus.where(jnp.isfinite(net.squared_norm), DescentStatus.done, DescentStatus.diverged)
    return Descent(net, status, number, *numbers(net), path)
