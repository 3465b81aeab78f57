"""Exponential-type losses ℓ(q) of the unnormalised margins q_i = y_i N(x_i), in log space.

The training loss is the *mean*, L = (1/n) Σ_i ℓ(q_i). Its gradient is −(1/n) Σ_i (−ℓ'(q_i)) ∂q_i, so with

    p_i = −ℓ'(q_i) / Σ_l −ℓ'(q_l)      and      s = log mean_i (−ℓ'(q_i))

gradient flow dθ/dt = −∂L reads dθ/dt = e^s Σ_i p_i ∂q_i. Late in training q_i runs into the thousands, so no margin
is ever exponentiated: everything below is a log-sum-exp.
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Loss(eqx.Module):
    """A strictly decreasing loss of one margin with an exponential tail (abstract)."""

    @abc.abstractmethod
    def log_value(self, q: Float[Array, "..."]) -> Float[Array, "..."]:
        """log ℓ(q), elementwise."""

    @abc.abstractmethod
    def log_weight(self, q: Float[Array, "..."]) -> Float[Array, "..."]:
        """log(−ℓ'(q)), elementwise."""

    @abc.abstractmethod
    def inverse(self, log_value: Float[Array, ""]) -> Float[Array, ""]:
        """The margin q at which log ℓ(q) equals `log_value`."""

    def log_mean(self, q: Float[Array, " n"]) -> Float[Array, ""]:
        """log L, the log of the mean loss of n margins."""
        return jax.nn.logsumexp(self.log_value(q)) - math.log(q.shape[0])

    def log_mean_weight(self, q: Float[Array, " n"]) -> Float[Array, ""]:
        """s = log mean_i(−ℓ'(q_i)) = log(dτ/dt), the rate of rescaled time (= log L for the exponential loss)."""
        return jax.nn.logsumexp(self.log_weight(q)) - math.log(q.shape[0])

    def weights(self, q: Float[Array, " n"]) -> Float[Array, " n"]:
        """p, the sample weights: non-negative, summing to one."""
        return jax.nn.softmax(self.log_weight(q))

    def log_separated(self, samples) -> Float[Array, ""]:
        """log(ℓ(0)/n): below it the mean loss proves every margin positive, hence perfect training accuracy.

        If L < ℓ(0)/n then each ℓ(q_i) ≤ nL < ℓ(0), and ℓ decreases. Gradient flow never increases L, so the margins
        stay positive from then on: the late phase of Lyu and Li (2020).
        """
        return self.log_at_zero - jnp.log(samples)

    @property
    @abc.abstractmethod
    def log_at_zero(self) -> float:
        """log ℓ(0)."""


class Exponential(Loss):
    """ℓ(q) = e^{−q}.

    >>> import gradflow as gf
    >>> print(gf.Exponential().log_mean(jax.numpy.array([0.0, 1000.0])))
    -0.6931471805599453
    """

    def log_value(self, q):
        return -q

    def log_weight(self, q):
        return -q

    def inverse(self, log_value):
        return -log_value

    @property
    def log_at_zero(self):
        return 0.0


class Logistic(Loss):
    """ℓ(q) = log(1 + e^{−q}).

    >>> import gradflow as gf
    >>> print(gf.Logistic().log_value(jax.numpy.array(1000.0)))
    -1000.0
    """

    def log_value(self, q):
        # log(log1p(e^{-q})). Beyond `far`, log1p(e) = e − e²/2 + … to the last digit; the clipped argument of the other
        # branch keeps its derivative finite there.
        far = -math.log(jnp.finfo(q.dtype).eps)
        near = jnp.minimum(q, far)
        return jnp.where(q > far, -q - 0.5 * jnp.exp(-jnp.maximum(q, far)), jnp.log(jax.nn.softplus(-near)))

    def log_weight(self, q):
        return -jax.nn.softplus(q)

    def inverse(self, log_value):
        # q = −log(e^L − 1) = −L − log(1 − e^{−L}) neither overflows nor cancels; it tends to −log L as L vanishes.
        value = jnp.exp(log_value)
        tiny = value < jnp.finfo(value.dtype).eps
        return jnp.where(tiny, -log_value, -value - jnp.log(-jnp.expm1(-jnp.where(tiny, 1.0, value))))

    @property
    def log_at_zero(self):
        return math.log(math.log(2.0))


LOSSES: dict[str, type[Loss]] = {"exponential": Exponential, "logistic": Logistic}
