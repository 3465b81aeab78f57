"""Laws that inputs are drawn from.

Each has bounded support, so that "the part of the line that matters" is a plain interval, and offers its density, its
CDF and its quantile function, vectorised over x. Sample i depends on (key, i) only: a larger sample contains the
smaller one.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow.network import is_concrete


class Distribution(eqx.Module):
    """A law of the input x with bounded support (abstract)."""

    @property
    @abc.abstractmethod
    def support(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The ends (low, high) of the support."""

    @abc.abstractmethod
    def density(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Probability density at x, per unit of x; 0 outside the support."""

    @abc.abstractmethod
    def cdf(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """P(X ≤ x); exactly 0 up to the low end of the support and 1 from the high end on, at ±∞ too."""

    @abc.abstractmethod
    def quantile(self, u: Float[Array, "..."]) -> Float[Array, "..."]:
        """The x at which the CDF is u, for u in [0, 1]; inside the support whatever the rounding."""

    @eqx.filter_jit
    def sample(self, key: PRNGKeyArray, samples: int) -> Float[Array, " n"]:
        """`samples` independent draws, shape (n,); draw i depends on (`key`, i) only."""
        dtype = self.support[0].dtype
        keys = jax.vmap(lambda i: jr.fold_in(key, i))(jnp.arange(samples))
        return self.quantile(jax.vmap(lambda k: jr.uniform(k, (), dtype))(keys))


class Uniform(Distribution):
    """The uniform law on [`low`, `high`]. **Raises** `ValueError` unless both are finite and `low` < `high`.

    >>> import gradflow as gf
    >>> print(gf.Uniform(0.0, 4.0).cdf(1.0))
    0.25
    """

    low: Float[Array, ""]
    high: Float[Array, ""]

    def __init__(self, low=-1.0, high=1.0):
        self.low, self.high = _scalars(low, high)
        _check_interval(self.low, self.high)

    @property
    def support(self):
        return self.low, self.high

    def density(self, x):
        return jnp.where((x >= self.low) & (x <= self.high), 1 / (self.high - self.low), 0)

    def cdf(self, x):
        return _share(x, self.support, (jnp.clip(x, self.low, self.high) - self.low) / (self.high - self.low))

    def quantile(self, u):
        return _position(u, self.support, self.low + u * (self.high - self.low))


class TruncatedNormal(Distribution):
    """The normal law of `mean` and standard deviation `std`, conditioned on [`low`, `high`].

    **Raises** `ValueError` unless all are finite, `std` > 0, `low` < `high` and the interval has probability above 0.

    >>> import gradflow as gf
    >>> print(gf.TruncatedNormal(0.0, 1.0, -2.0, 2.0).cdf(0.0))
    0.5
    """

    mean: Float[Array, ""]
    std: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]

    def __init__(self, mean=0.0, std=1.0, low=-2.0, high=2.0):
        self.mean, self.std, self.low, self.high = _scalars(mean, std, low, high)
        _check_interval(self.low, self.high)
        if is_concrete(self.mean, self.std):
            if not (np.isfinite(self.mean) and np.isfinite(self.std) and np.asarray(self.std) > 0):
                raise ValueError(f"mean must be finite and std positive, got {self.mean} and {self.std}")
            with jax.ensure_compile_time_eval():
                mass = self._mass if is_concrete(self.low, self.high) else 1
            if not mass > 0:
                raise ValueError(
                    f"[{self.low}, {self.high}] is so far from mean {self.mean} (std {self.std}) that its "
                    "probability is 0 in floating point; move the interval"
                )

    # In the upper half ndtr is close to 1 and loses its digits, so an interval that lies there is mirrored.
    @property
    def _mirror(self):
        return jnp.where(self.low + self.high > 2 * self.mean, -1, 1).astype(self.mean.dtype)

    def _tail(self, x):
        return ndtr(self._mirror * (x - self.mean) / self.std)

    @property
    def _mass(self):
        return jnp.abs(self._tail(self.high) - self._tail(self.low))

    @property
    def support(self):
        return self.low, self.high

    def density(self, x):
        z = (jnp.clip(x, self.low, self.high) - self.mean) / self.std  # z² has no derivative at ±∞
        height = jnp.exp(-0.5 * z**2) / (self.std * (2 * jnp.pi) ** 0.5)
        return jnp.where((x >= self.low) & (x <= self.high), height / self._mass, 0)

    def cdf(self, x):
        mass = jnp.abs(self._tail(jnp.clip(x, self.low, self.high)) - self._tail(self.low))
        return _share(x, self.support, mass / self._mass)

    def quantile(self, u):
        low, high = self._tail(self.low), self._tail(self.high)
        # Where a tail is rounded to 0 or 1, ndtri is infinite and so is its derivative.
        limits = jnp.finfo(self.mean.dtype)
        below = jnp.clip(low + u * (high - low), limits.tiny, 1 - limits.epsneg)
        return _position(u, self.support, self.mean + self._mirror * self.std * ndtri(below))


class Histogram(Distribution):
    """A piecewise-constant density: bin i, from `edges[i]` to `edges[i+1]`, has probability ∝ `masses[i]`.

    **Arguments** `edges`: (bins + 1,) ascending; `masses`: (bins,) non-negative, not all zero; normalised here, so
    `numpy.histogram`'s counts do. **Raises** `ValueError` for anything else.

    >>> import gradflow as gf
    >>> print(gf.Histogram(edges=[0.0, 1.0, 2.0], masses=[1.0, 3.0]).cdf(1.0))
    0.25
    """

    edges: Float[Array, " bins+1"]
    masses: Float[Array, " bins"]

    def __init__(self, edges, masses):
        edges, masses = jnp.asarray(edges, float), jnp.asarray(masses, float)
        if edges.ndim != 1 or masses.ndim != 1 or edges.shape[0] != masses.shape[0] + 1 or masses.shape[0] == 0:
            raise ValueError(
                f"{masses.shape[0] if masses.ndim else 0} masses need one more edges; "
                f"got shapes {edges.shape} and {masses.shape}"
            )
        if is_concrete(edges, masses):
            edges_, masses_ = np.asarray(edges), np.asarray(masses)  # under jit, JAX would trace what is asked of them
            if not (np.isfinite(edges_).all() and (np.diff(edges_) > 0).all()):
                raise ValueError("edges must be finite and strictly ascending")
            if not (np.isfinite(masses_).all() and (masses_ >= 0).all() and masses_.sum() > 0):
                raise ValueError("masses must be finite, non-negative and not all zero")
        self.edges, self.masses = edges, masses / jnp.sum(masses)

    @property
    def support(self):
        return self.edges[0], self.edges[-1]

    @property
    def _cumulative(self):
        cumulative = jnp.concatenate([jnp.zeros_like(self.masses[:1]), jnp.cumsum(self.masses)])
        # Sums of many are rounded in an order of their own, so that empty bins would get some 1e-16 of the mass.
        filled = jnp.concatenate([jnp.zeros((1,), bool), self.masses > 0])
        cumulative = cumulative[jax.lax.cummax(jnp.where(filled, jnp.arange(filled.size), 0))]
        return cumulative / cumulative[-1]

    def density(self, x):
        heights = self.masses / jnp.diff(self.edges)
        bin_ = jnp.clip(jnp.searchsorted(self.edges, x, side="right") - 1, 0, self.masses.shape[0] - 1)
        return jnp.where((x >= self.edges[0]) & (x <= self.edges[-1]), heights[bin_], 0)

    def cdf(self, x):
        inside = jnp.clip(x, *self.support)  # the share of a bin has no derivative at ±∞
        return _share(x, self.support, jnp.interp(inside, self.edges, self._cumulative))

    def quantile(self, u):
        cumulative = self._cumulative
        # The bin with cumulative[bin] ≤ u < cumulative[bin + 1] has positive mass: empty bins are never drawn.
        last = self.masses.shape[0] - 1
        bin_ = jnp.clip(jnp.searchsorted(cumulative, u, side="right") - 1, 0, last)
        mass = cumulative[bin_ + 1] - cumulative[bin_]
        share = jnp.clip((u - cumulative[bin_]) / jnp.where(mass > 0, mass, 1), 0, 1)
        low, high = self.edges[bin_], self.edges[bin_ + 1]
        return _position(share, (low, high), low + share * (high - low))


DISTRIBUTIONS: dict[str, type[Distribution]] = {
    "uniform": Uniform,
    "truncated_normal": TruncatedNormal,
    "histogram": Histogram,
}


# Two programs may round one formula differently, and what should cancel at an end, or meet it, misses it by a rounding.
def _share(x, support, share):
    """`share`, a CDF at x inside the support, and 0 and 1 exactly from its ends on."""
    low, high = support
    return jnp.where(x <= low, 0, jnp.where(x >= high, 1, jnp.clip(share, 0, 1)))


def _position(u, support, x):
    """`x`, a quantile for u between 0 and 1, inside the support, and its ends exactly for 0 and 1."""
    low, high = support
    return jnp.where(u <= 0, low, jnp.where(u >= 1, high, jnp.clip(x, low, high)))


def _scalars(*values):
    """Floats of one dtype: that of the float arrays among `values`, else JAX's default float."""
    arrays = (value.dtype for value in values if isinstance(value, jax.Array))
    dtype = jnp.result_type(float, *(d for d in arrays if jnp.issubdtype(d, jnp.floating)))
    return tuple(jnp.asarray(value, dtype) for value in values)


def _check_interval(low, high):
    if is_concrete(low, high) and not (np.isfinite(low) and np.isfinite(high) and np.asarray(low) < np.asarray(high)):
        raise ValueError(f"an interval needs finite low < high, got [{low}, {high}]")
