"""Flows that almost stand still, followed to the end of time.

Training can fail without ever stopping. Split the points into those that hold all the weight, S, and the rest R, and
let the forces of S cancel: the loss tends to that of S alone, which is positive, while R goes on being fitted, with a
weight ε = Σ_R p_i ~ 1/τ that tends to 0 and moves everything ever more slowly. (For linear models this is the split of
the data into a separable and a strongly convex part: Ji and Telgarsky 2018, Theorem 1.1.) A breakpoint may well reach
a point of S in the course of that, after 10⁸ or 10⁸⁰ units of time, and training succeeds after all. So "the speed
is tiny" is no reason to call a flow stalled.

**Two time scales.** To leading order in ε the motion is gradient flow on R, on its own clock dσ = ε dτ, constrained to
the minimisers of S: a slow motion along that manifold, in which ε enters only through errors of O(ε) (Fenichel 1979;
Hairer and Wanner 1996, VI.1). Any other small number may take its place. Here it is held at ε̂ = 10⁻⁴ (less if S has
lighter points), with the weights inside R and inside S in proportion; time, which then runs e^β = ε̂/ε faster, is
counted accordingly. Λ = −log ε so grows exponentially in the steps taken, as it does in a flow that has separated.

The split is made at the widest gap between the sorted weights of those at which the forces of S do cancel, and kept
while they do: on a neuron of size r, R's forces add up to at most ε r max_i‖x̃_i‖, and so must all of them, on every
neuron, however small. Points of R may come to be in balance, too, while the others go on: if all forces have become
much smaller than ε̂, they go over to S. Where there is no such gap there is no split.

A flow whose β reaches `forever` is called stalled: by then, beyond a physical time of e^β, it had not left the
minimisers of S.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_SMALL = 1e-4  # ε̂, if S has no lighter points: trials that left S at log t = 41 and 57 did so at times 1 % and 3 % off
_LIGHTEST = 1e-7  # the smallest weight that a point of S may have
_CANCELS = 1.5  # how many times R's weight all forces may add up to
_BALANCED = 0.03  # of ε̂: if all forces add up to less, some points of R may be in balance, too
_FADES = 0.8  # of the slack, that is left after each step


def forever(dtype) -> float:
    """The largest β that leaves room for times of e^β in `dtype`: 496 in float64, 62 in float32."""
    return 0.7 * math.log(float(jnp.finfo(dtype).max))


class Slow(eqx.Module):
    """The split in force: R as `rest` (n,), empty if there is none, log ε̂ as `log_size`, and `slack`, what is left of
    the forces that were in balance before points went over from R to S.
    """

    rest: Bool[Array, " n"]
    log_size: Float[Array, ""]
    slack: Float[Array, ""]

    @property
    def holds(self) -> Bool[Array, ""]:
        return jnp.any(self.rest)

    def shares(self, log_weight: Float[Array, " n"]) -> tuple[Float[Array, "..."], ...]:
        """From logs of weights, up to a common factor: p in force (n,), its sum over each point's part (n,), β, and the
        log of the sum of all weights.

        One exponential a point: each part is taken relative to its own largest weight.
        """
        size = jnp.where(self.holds, jnp.exp(self.log_size), 0)
        total = jnp.where(self.rest, size, 1 - size)
        part = jnp.stack([~self.rest, self.rest])
        # A constant for derivatives: what is divided out by it comes back.
        largest = jnp.max(jnp.where(part, jax.lax.stop_gradient(log_weight)[None], -jnp.inf), axis=1)
        heavy, light = largest = jnp.where(jnp.isfinite(largest), largest, 0)
        share = jnp.exp(log_weight - jnp.where(self.rest, light, heavy))
        of_heavy, of_light = jnp.sum(jnp.where(part, share[None], 0), axis=1)
        # Without a split the sum over R is empty: a stand-in keeps derivatives finite.
        log_heavy, log_light = largest + jnp.log(jnp.stack([of_heavy, jnp.where(self.holds, of_light, 1)]))
        log_all = jnp.where(self.holds, jnp.logaddexp(log_heavy, log_light), log_heavy)
        p = total * share / jnp.where(self.rest, of_light, of_heavy)
        return p, total, jnp.where(self.holds, self.log_size + log_all - log_light, 0), log_all

    def after_step(self, log_p: Float[Array, " n"], pace: Float[Array, ""]) -> "Slow":
        """The split for the next step.

        **Arguments** `log_p`: logs of the true weights p, −∞ for padding; `pace`: the largest speed of a
        neuron relative to its size, over max_i‖x̃_i‖, with the weights so far.
        """
        n = log_p.shape[0]
        if n == 1:
            return self
        size = jnp.where(self.holds, jnp.exp(self.log_size), _SMALL)
        cancels = pace <= _CANCELS * jnp.maximum(size, self.slack)
        # A split once made is kept while it is one: another would start with a new boundary layer.
        log_rest = jax.nn.logsumexp(jnp.where(self.rest, log_p, -jnp.inf))
        holds = self.holds & cancels & (log_rest <= self.log_size)
        kept = Slow(self.rest & holds, self.log_size, _FADES * self.slack)
        looks = jnp.where(self.holds, holds & (pace <= _BALANCED * size), cancels)

        def split(state):
            # Tied to the loop, lest the compiler take what follows out of it.
            log_p, _ = jax.lax.optimization_barrier((all_p, state))
            order = jnp.argsort(-log_p)
            falling, rest = log_p[order], kept.rest[order]
            in_force = falling + jnp.where(rest, kept.log_size - log_rest, 0)
            # log Σ of all lighter ones, for each point but the last in descending order.
            lighter, lifted = (jax.lax.cumlogsumexp(a, reverse=True)[1:] for a in (falling, in_force))
            lightest = falling[:-1]
            log_small = jnp.minimum(jnp.log(_SMALL), lightest + jnp.log(0.01))
            eligible = (lightest >= jnp.log(_LIGHTEST)) & (lighter > -jnp.inf) & (lighter < log_small)
            eligible &= pace <= _CANCELS * jnp.exp(lifted)
            # Of R itself only a part, if the others have come to be in balance.
            others = jax.lax.cummax((~rest & (falling > -jnp.inf)).astype(int), reverse=True)[1:] > 0
            eligible &= ~holds | (rest[:-1] & ~others)
            split = jnp.argmax(jnp.where(eligible, lightest - lighter, -jnp.inf))
            found = Slow(log_p < lightest[split], log_small[split], jnp.where(holds, jnp.exp(kept.log_size), 0))
            return jnp.array(False), jax.tree.map(lambda a, b: jnp.where(eligible[split], a, b), found, kept)

        # Most steps need not look for one, and sorting would take a tenth of their time. A loop, as `cond` would run
        # for every lane of a batch.
        all_p = log_p
        return jax.lax.while_loop(lambda c: c[0], split, (looks, kept))[1]


def no_split(x: Float[Array, " n"]) -> Slow:
    return Slow(jnp.zeros(x.shape, bool), jnp.zeros((), x.dtype), jnp.zeros((), x.dtype))
