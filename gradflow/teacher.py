"""Teachers: target networks whose signs are the labels, with as many label switches as wanted.

**How many switches can r neurons realise?** `max_switches(r)` = r − 1 for r ≤ 3 and r + 1 for r ≥ 4.

*At most r + 1*: r breakpoints make r + 1 linear pieces, each with at most one sign change.

*At most r − 1 for r ≤ 3*: with all neurons facing right (or all left), N vanishes before the first breakpoint and has
no sign change on the piece after it, which leaves r − 1 pieces. r = 2, facing apart: if the active halves do not
overlap, N has one sign change at most, between them; if they do, each outer piece belongs to one neuron and has none,
which leaves the middle one. r = 3, one left-facing neuron c (t − x)₊ and two right-facing ones with breakpoints s₁ ≤
s₂ (mirrored for the other case): if t ≤ s₁, no sign change lies left of the gap [t, s₁], at most one in it and at
most one right of it. If s₁ < t, none lies left of s₁, so three would need one on each of the pieces that t and s₂ cut
from (s₁, ∞), say with c > 0 and signs +, −, +, −: the first bend of the two is convex, the second concave. The slope
change at t is c > 0, so t comes first and N = d₁ (x − s₁) on the second piece, which has no root there.

*r + 1 for r ≥ 4*: let m = r + 1 and take lines Λ_0 … Λ_r, Λ_i through the switch (z_{i+1}, 0), with slopes of
alternating signs. Following one line after the other, N bends at their r intersections τ_i (of Λ_{i−1} and Λ_i),
which lie between the switches, with slope changes Λ_i − Λ_{i−1}. Let τ_3 and τ_4 face left and the others right. Left
of all breakpoints N = −Σ_{i=3,4} (Λ_i − Λ_{i−1}) = Λ_2 − Λ_4, and this must be Λ_0. Slopes σ_0 = λσ_2, σ_4 = (1−λ)σ_2
with λ = (z_5 − z_3)/(z_5 − z_1) do it, since the root of Λ_0 + Λ_4 is then λ z_1 + (1−λ) z_5 = z_3. The remaining
slopes are free, so any r + 1 positions can be switches. For m = r, Λ_4 = Λ_2 − Λ_0 is a roof over the run (z_4, z_5)
instead of a line through a switch. For m < r, all neurons left of one switch face left and all right of it face
right.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from gradflow.data import Dataset
from gradflow.distribution import Distribution, Uniform
from gradflow.network import ReluNetwork, is_concrete, is_whole
from gradflow.piecewise import Piecewise

_ATTEMPTS = 1000  # rejection sampling inside jit must end; at one acceptance in 50 this fails once in 6e8


def max_switches(neurons: int) -> int:
    """The most label switches that a network of `neurons` neurons without output bias can realise (proof above).

    >>> import gradflow as gf
    >>> gf.max_switches(4)
    5
    """
    if neurons < 1:
        raise ValueError(f"a teacher needs at least one neuron, got {neurons}")
    return neurons - 1 if neurons <= 3 else neurons + 1


class Teacher(eqx.Module):
    """A target classifier: labels are the sign of its network, +1 where it is exactly 0, NaN where it is NaN."""

    net: ReluNetwork

    def __call__(self, x):
        """The labels ±1 at `x`, in its shape, as floats."""
        value = self.net(x)
        return jnp.where(value >= 0, 1, jnp.where(value < 0, -1, value))

    @property
    def switches(self) -> Float[Array, " switches"]:
        """Where the label switches, on the whole line, ascending. Under jit or vmap: 2r + 1 entries, the last +inf."""
        position, real = self._switches()
        position = jnp.sort(position)
        return position[: int(real.sum())] if is_concrete(position) else position

    def _switches(self):
        cuts = _cuts(self.net)
        finite = jnp.isfinite(cuts)
        cuts = jnp.where(finite, cuts, jnp.max(jnp.where(finite, cuts, -jnp.inf), initial=-jnp.inf))
        cuts = jnp.where(jnp.isfinite(cuts), cuts, 0)
        reach = 1 + jnp.abs(cuts)
        inside = jnp.concatenate([(cuts - reach)[:1], 0.5 * (cuts[1:] + cuts[:-1]), (cuts + reach)[-1:]])
        # A cell of no length has no label of its own; it takes its left neighbour's.
        label = self(inside)
        empty = jnp.concatenate([jnp.zeros((1,), bool), cuts[1:] == cuts[:-1], jnp.zeros((1,), bool)])
        owner = jax.lax.cummax(jnp.where(empty, 0, jnp.arange(label.shape[0])))
        label = label[owner]
        real = label[1:] != label[:-1]
        cuts = jnp.where(jnp.isnan(label[1:]), jnp.nan, cuts)
        return jnp.where(real, cuts, jnp.inf), real

    def sample(
        self,
        key: PRNGKeyArray,
        samples: int | Array,
        distribution: Distribution | None = None,
        *,
        slots: int | None = None,
    ) -> Dataset:
        """`samples` inputs from `distribution` (default: uniform on [−1, 1]) with this teacher's labels.

        Point i depends on (`key`, i) only. With `slots`, the data are padded to this many points, as by
        `Dataset.padded`, and `samples` may be traced.

        >>> import jax
        >>> import gradflow as gf
        >>> teacher = gf.Teacher.random(jax.random.key(0), neurons=4, switches=3)
        >>> data = teacher.sample(jax.random.key(1), samples=50)
        >>> bool((teacher(data.x) == data.y).all())
        True
        """
        if not is_whole(samples, 1, slots or np.inf):
            raise ValueError(
                f"samples must be a whole number of at least 1{f' and at most {slots}' if slots else ''}, got {samples}"
            )
        law = Uniform() if distribution is None else distribution
        if slots is None:
            x = law.sample(key, int(samples))
            return Dataset(x, self(x))
        x = law.sample(key, slots)
        return Dataset(x, self(x)).padded(samples)

    @classmethod
    def random(
        cls,
        key: PRNGKeyArray,
        neurons: int = 4,
        *,
        switches: int | None = None,
        min_run: float | Array = 0.0,
        distribution: Distribution | None = None,
    ) -> "Teacher":
        """A random teacher.

        **Arguments**

        - `neurons`: r ≥ 1.
        - `switches`: exactly this many label switches on the whole line, all inside the support of `distribution`;
            at most `max_switches(neurons)`. Their positions are independent draws from `distribution` (conditioned by
            `min_run`), the slopes between them log-uniform. `None`: w, b, v are standard normal in the input scaled to
            [−1, 1], and the number of switches is what it happens to be.
        - `min_run`: the least probability, under `distribution`, of each label run inside the support: the teacher is
            conditioned on it. The default 0 conditions on nothing; short runs are then common, and a sample may miss
            them.
        - `distribution`: the law of inputs that the teacher is meant for; default uniform on [−1, 1].

        **Raises** `ValueError` for impossible requests. If no draw in 1000 meets `min_run` (only with
        `switches=None`), the weights are NaN, and everything computed from them says so.

        >>> import jax
        >>> import gradflow as gf
        >>> teacher = gf.Teacher.random(jax.random.key(0), neurons=4, switches=3, min_run=0.1)
        >>> teacher.switches.shape
        (3,)
        """
        distribution = Uniform() if distribution is None else distribution
        most = max_switches(neurons)
        if switches is not None and not 0 <= switches <= most:
            raise ValueError(f"{neurons} neurons can realise 0 to {most} label switches, not {switches}")
        runs = 1 if switches is None else switches + 1
        if is_concrete(min_run) and not 0 <= np.asarray(min_run) * runs < 1:
            raise ValueError(f"{runs} label run(s) cannot each have probability {min_run}: lower min_run")
        return cls(_draw(key, neurons, switches, jnp.asarray(min_run, distribution.support[0].dtype), distribution))


@eqx.filter_jit  # outside of jit, one program instead of one for each operation
def _draw(key, neurons, switches, min_run, distribution) -> ReluNetwork:
    if switches is None:
        return _gaussian(key, neurons, min_run, distribution)
    place, shape = jr.split(key)
    u = jnp.sort(jr.uniform(place, (switches,), min_run.dtype))
    u = u * (1 - (switches + 1) * min_run) + min_run * jnp.arange(1, switches + 1, dtype=min_run.dtype)
    z = distribution.quantile(u)
    if switches == 0:
        return _constant(shape, neurons, distribution)
    build = _split if switches < neurons else _interlaced
    return build(shape, z, neurons, distribution)


def population_error(net: ReluNetwork, teacher: Teacher, distribution: Distribution) -> Float[Array, ""]:
    """P(sign N(X) ≠ label of X) for X from `distribution`, a probability: exact up to rounding, no sampling.

    The line is cut at every root and knot of both networks; between cuts both signs are constant, and each cell's
    probability is a difference of the CDF. N(x) = 0 is an error: it decides for neither label. NaN weights give NaN.

    >>> import gradflow as gf
    >>> teacher = gf.Teacher(gf.ReluNetwork([1.0, -1.0], [0.0, 0.0], [1.0, -1.0]))  # the sign of x
    >>> net = gf.ReluNetwork([1.0, -1.0], [-0.5, 0.5], [1.0, -1.0])  # that of x − 1/2
    >>> print(gf.population_error(net, teacher, gf.Uniform(-1.0, 1.0)))
    0.25
    """
    low, high = distribution.support
    cuts = jnp.sort(jnp.clip(jnp.concatenate([_cuts(net), _cuts(teacher.net), low[None], high[None]]), low, high))
    middle = 0.5 * (cuts[1:] + cuts[:-1])
    agreement = jnp.sign(net(middle)) * teacher(middle)
    wrong = jnp.where(jnp.isnan(agreement), jnp.nan, jnp.where(agreement == 1, 0, 1))
    return jnp.sum(wrong * jnp.diff(distribution.cdf(cuts)))


def _cuts(net: ReluNetwork) -> Float[Array, " cuts"]:
    """The k breakpoints and k + 1 roots of a network, ascending, padded with +inf: its sign is constant between."""
    shape = Piecewise(net)
    return jnp.sort(jnp.concatenate([shape.breakpoints, shape.roots()[0]]))


def _network(slope_change, knot, right) -> ReluNetwork:
    """Balanced neurons with these signed slope changes, breakpoints and directions (`right`: active to the right)."""
    w = jnp.sqrt(jnp.abs(slope_change) / jnp.hypot(1, knot))
    v = jnp.sign(slope_change) * w * jnp.hypot(1, knot)
    w = jnp.where(right, w, -w)
    return ReluNetwork(w, -w * knot, v)


def _magnitudes(key, count, dtype):
    """Log-uniform factors between 1/2 and 2."""
    return 2 ** jr.uniform(key, (count,), dtype, minval=-1, maxval=1)


def _gaussian(key, neurons, min_run, distribution):
    low, high = distribution.support
    centre, half = 0.5 * (low + high), 0.5 * (high - low)

    def draw(attempt):
        w, b, v = jr.normal(jr.fold_in(key, attempt), (3, neurons), low.dtype)
        return ReluNetwork(w / half, b - w * centre / half, v)

    def short(net):
        switches, _ = Teacher(net)._switches()
        runs = jnp.diff(jnp.sort(distribution.cdf(switches)), prepend=0, append=1)
        return jnp.any((runs > 0) & (runs < min_run))  # a run outside the support has probability 0

    def again(carry):
        attempt, net = carry
        return short(net) & (attempt < _ATTEMPTS)

    attempt, net = jax.lax.while_loop(
        again, lambda carry: (carry[0] + 1, draw(carry[0] + 1)), (jnp.asarray(0), draw(jnp.asarray(0)))
    )
    return jax.tree.map(lambda a: jnp.where(attempt < _ATTEMPTS, a, jnp.nan), net)


def _constant(key, neurons, distribution):
    """No switch at all: output weights of one sign, and no gap in which the network vanishes."""
    low, high = distribution.support
    place, face, size, sign = jr.split(key, 4)
    knot = low + (high - low) * jr.uniform(place, (neurons,), low.dtype)
    right = jr.bernoulli(face, 0.5, (neurons,))
    # The first two cover the line from both ends; a single neuron leaves a gap, where the label is +1 by convention.
    knot = knot.at[0].set(low - 0.1 * (high - low))
    right = right.at[0].set(True)
    positive = jr.bernoulli(sign)
    if neurons > 1:
        knot, right = knot.at[1].set(high + 0.1 * (high - low)), right.at[1].set(False)
    else:
        positive = jnp.asarray(True)
    change = _magnitudes(size, neurons, low.dtype) * jnp.where(positive, 1, -1).astype(low.dtype)
    return _network(change, knot, right)


def _split(key, z, neurons, distribution):
    """m < r switches at z: left-facing neurons left of one of them, right-facing ones right of it."""
    low, high = distribution.support
    m, extra = z.shape[0], neurons - z.shape[0] - 1
    first, sizes, sides, tails, place, bend, where = jr.split(key, 7)
    sign = jr.rademacher(first, (), z.dtype)
    slope = sign * (1 - 2 * (jnp.arange(m, dtype=z.dtype) % 2)) * _magnitudes(sizes, m, z.dtype)
    side = _magnitudes(sides, 2, z.dtype)
    c = jr.randint(where, (), 0, m)
    inner = (slope[1:] * z[1:] - slope[:-1] * z[:-1]) / (slope[1:] - slope[:-1])
    right = jnp.arange(m - 1) >= c
    change = jnp.diff(slope) * jnp.where(right, side[1], side[0])
    # What is left over bends the outer runs away from zero.
    tail = jr.bernoulli(tails, 0.5, (extra,))
    u = jr.uniform(place, (extra,), z.dtype)
    outer = jnp.where(tail, z[-1] + u * (high - z[-1]), low + u * (z[0] - low))
    steeper = jnp.where(tail, slope[-1] * side[1], -slope[0] * side[0]) * _magnitudes(bend, extra, z.dtype)
    return _network(
        jnp.concatenate([jnp.stack([slope[c] * side[1], -slope[c] * side[0]]), change, steeper]),
        jnp.concatenate([jnp.stack([z[c], z[c]]), inner, outer]),
        jnp.concatenate([jnp.array([True, False]), right, tail]),
    )


def _interlaced(key, z, neurons, distribution):
    """m = r or r + 1 switches at z, r ≥ 4: the construction in this module's docstring."""
    r, m = neurons, z.shape[0]
    first, sizes, place = jr.split(key, 3)
    size = _magnitudes(sizes, r + 1, z.dtype)
    slope = [(-1) ** i * size[i] for i in range(r + 1)]
    if m == r + 1:
        share = (z[4] - z[2]) / (z[4] - z[0])
        slope[0], slope[4] = share * slope[2], (1 - share) * slope[2]
        offset = [-slope[i] * z[i] for i in range(r + 1)]
    else:
        # Λ_2 = x ↦ −(x − z_3), Λ_0 a little steeper, so that the roof Λ_2 − Λ_0 rises and is positive right of z_1.
        slope[:3] = -(1 + size[0] / 4), size[1], -jnp.ones_like(size[2])
        roof = slope[2] - slope[0]
        roof_offset = z[2] + slope[0] * z[0]
        # Λ_3 meets the roof at `top` in the run after z_4; Λ_5 leaves it for z_5 later than that.
        end = z[4] if r > 4 else 2 * z[3] - z[0]
        top = z[3] + (end - z[3]) * jr.uniform(place, (), z.dtype, minval=0.2, maxval=0.8)
        height = roof * top + roof_offset
        slope[3:5] = height / (top - z[3]), roof
        if r > 4:
            slope[5] = -height / (end - top) * (1 + size[5])
        offset = [-slope[i] * z[i] for i in range(4)] + [roof_offset]
        offset += [-slope[i] * z[i - 1] for i in range(5, r + 1)]
    slope, offset = jnp.stack(slope), jnp.stack(offset)
    change = jr.rademacher(first, (), z.dtype) * jnp.diff(slope)
    index = jnp.arange(1, r + 1)
    return _network(change, -jnp.diff(offset) / jnp.diff(slope), (index != 3) & (index != 4))
