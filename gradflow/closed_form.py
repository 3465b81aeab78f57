"""The global maximum-margin classifier in closed form, with multipliers that prove it: for all label switches but two.

    (P)  minimise ½‖θ‖² = Σ‖g‖  subject to  y_i N(x_i) ≥ 1;     (D)  maximise Σ λ_i over λ ≥ 0 with |G(u)| ≤ 1, ‖u‖ = 1,

G(u) = Σ λ_i y_i max(0, u·x̃_i), x̃ = (x, 1): any such λ bounds ½‖θ‖² from below at any width (weak duality). Write
e(ξ) = (1, −ξ)/√(1 + ξ²) for the right-facing direction with breakpoint ξ.

**Three switches or more.** At switch κ between neighbours of different labels a_κ < b_κ let L_κ be the line through
both labels, s_κ the label at a_κ, and let λ live on these neighbours, with

    λ y x̃ at a_κ + λ y x̃ at b_κ = s_{κ−1} e(ξ_{κ−1}) − s_κ e(ξ_κ)     (no e before the first bend and after the last).

By Cramer's rule λ(a_κ) (b_κ − a_κ) = c_{κ−1}(b_κ) + c_κ(b_κ) and λ(b_κ) (b_κ − a_κ) = c_{κ−1}(a_κ) + c_κ(a_κ), with
c_κ(x) = (1 + x ξ_κ)/√(1 + ξ_κ²) = √(1 + x²) cos(arctan x − arctan ξ_κ). All forces sum to 0, so G at e(ξ) and at −e(ξ)
is the same piecewise linear g(ξ)/√(1 + ξ²); within the run after switch κ, g is the tangent of s_κ √(1 + ξ²) at ξ_κ.
Between a_κ and b_κ it lies, if λ ≥ 0, below the tangent on its one side and above that on its other, and outside the
outer switches it is 0: |G| ≤ 1 for *any* ξ that leave λ ≥ 0, wherever they are. Inner switches do if ξ_{κ−1} ≤ a_κ and
b_κ ≤ ξ_κ, as the sum of the two cosines is twice the product of two that are not negative. The outer ones ask for
1 + a_1 ξ_1 ≥ 0 and 1 + b_m ξ_{m−1} ≥ 0, which holds for inputs in [−1, 1] but not for all.

The best ξ_κ is where L_κ and L_{κ+1} meet, at the cost ‖L_{κ+1} − L_κ‖ = |Δa_κ| √(1 + ξ_κ²), a the slope (Boursier and
Flammarion 2023). Where 1 + a_1 ξ_1 < 0, a steeper L_1 is cheaper: through (a_1, y), with ξ_1 = −1/a_1, where
λ(b_1) = 0; and likewise on the right. Attained, if a share β_κ of bend κ faces left, by

    f* = Σ Δa_κ [(1 − β_κ) max(0, x − ξ_κ) + β_κ max(0, ξ_κ − x)]

when L_1 = Σ β_κ (L_κ − L_{κ+1}), so that no line is left over. The lines alternate in slope and their roots ascend: the
origin is a convex combination α L_1 + ζ L_2 + η L_3, and β_1 = 1 − α, β_2 = η, all others 0, will do.

**One switch**, a < b. One neuron a label, with its breakpoint on the other's point, λ(b) = √(1 + a²)/(b − a), or along
x̃_b if that is in between (1 + ab < 0): λ(b) = 1/‖x̃_b‖; λ(a) alike. Only the all-active G is left to check: z = λ(b) x̃_b
− λ(a) x̃_a has z·x̃_a ≤ 0 and on the rays |G| ≤ 1, by Cauchy and Schwarz.

**One class.** If 0 is outside the points, the nearest has λ = 1/‖x̃‖. Else, of the neighbours p < 0 < q of 0 with unit
vectors p̂, q̂ along x̃ and cosine c, maximise λ_p + λ_q, α = λ_p ‖x̃_p‖ ≤ 1, β = λ_q ‖x̃_q‖ ≤ 1 (if c ≤ 0), ‖α p̂ + β q̂‖ ≤ 1:
α = β = 1 if c ≤ −1/2; else N = 1 with α p̂ + β q̂ = (0, 1) if that has α, β ≤ 1; else the larger is 1 and the other −2c.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gradflow.network import ReluNetwork

_NEGATIVE = 1e-12  # of Σλ, up to which a negative λ is rounding


class Solved(eqx.Module):
    """A network with margins ≥ 1, of width max(n, 3); multipliers (n,) of the ascending points, and what they prove."""

    network: ReluNetwork
    multipliers: Float[Array, " n"]
    bound: Float[Array, ""]


def closed_form(x: Float[Array, " n"], y: Float[Array, " n"], real: Bool[Array, " n"]) -> Solved:
    """The optimum of ascending points by their label switches; for two switches nonsense, and a bound of 0."""
    switches = count_switches(y, real)

    def where(applies):
        """The points, as constants where a formula does not apply: it may be singular there, and 0 · NaN is NaN."""
        return jnp.where(applies, x, jax.lax.stop_gradient(x))

    found = _one_class(where(switches == 0), y, real)
    if x.shape[0] > 1:
        found = chosen(switches == 0, found, _one_switch(where(switches == 1), y, real))
    if x.shape[0] > 3:
        found = chosen(switches < 3, found, _many_switches(where(switches > 2), y, real))
    return eqx.tree_at(lambda f: f.bound, found, jnp.where(switches == 2, 0, found.bound))


def count_switches(y: Float[Array, " n"], real: Bool[Array, " n"]) -> Array:
    """The number of neighbours of different labels among the real points, which come first."""
    return jnp.sum(switch(y, real))


def switch(y: Float[Array, " n"], real: Bool[Array, " n"]) -> Bool[Array, " m"]:
    """Which real points are followed by one of another label."""
    return real[1:] & (y[1:] != y[:-1])


def chosen(which: Bool[Array, ""], a, b):
    """`a` or `b`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), a, b)


def solved(direction: Float[Array, "2 k"], amplitude, sign, multipliers: Float[Array, " n"]) -> Solved:
    """From the neurons' directions, of any length, ‖g‖ (k,) and signs of v, and multipliers ≥ 0 but for rounding."""
    size = jnp.sqrt(jnp.sum(direction**2, axis=0))
    live = amplitude > 0
    root = jnp.sqrt(jnp.where(live, amplitude, 1))
    turn = jnp.where(live, root / size, 0)
    net = ReluNetwork(turn * direction[0], turn * direction[1], jnp.where(live, sign * root, 0))
    width = max(multipliers.shape[0], 3)
    net = jax.tree.map(lambda a: jnp.pad(a, (0, width - a.shape[0])), net)
    total = jnp.sum(jnp.maximum(multipliers, 0))
    sound = jnp.min(multipliers) >= -_NEGATIVE * total
    return Solved(net, jnp.maximum(multipliers, 0), jnp.where(sound, total, 0))


def _one_class(x, y, real) -> Solved:
    at_most, below = jnp.sum(real & (x <= 0)), jnp.sum(real & (x < 0))
    last = jnp.sum(real) - 1
    i, j = jnp.where(at_most > 0, at_most - 1, below), jnp.where(below > last, last, below)
    p, q, alone = x[i], x[j], i == j
    size_p, size_q, gap = jnp.hypot(1, p), jnp.hypot(1, q), jnp.where(alone, 1, q - p)
    cosine = jnp.where(alone, -1, (1 + p * q) / (size_p * size_q))
    # α and β that make N = 1.
    alpha, beta = q * size_p / gap, -p * size_q / gap
    wide = (cosine <= -0.5) | alone
    flat = ~wide & (alpha <= 1) & (beta <= 1)
    right = ~wide & ~flat & (beta > 1)
    left = ~wide & ~flat & ~right
    both = -2 * cosine
    alpha = jnp.where(flat, alpha, jnp.where(right, both, 1))
    beta = jnp.where(flat, beta, jnp.where(left, both, 1))
    of_p, of_q = (p / size_p, 1 / size_p), (q / size_q, 1 / size_q)
    middle = tuple(alpha * a + beta * b for a, b in zip(of_p, of_q, strict=True))
    middle = jnp.where(flat, 0, middle[0]), jnp.where(flat | wide, 1, middle[1])
    # With both sides' points at 1: the side with α or β = −2c has the middle neuron alone, the other one of its own.
    slant = jnp.where(left | right, -cosine, 1)
    level = jnp.where(right, 1 / (slant * size_p), 1 / (slant * size_q))
    own = 1 - level * (1 - 2 * cosine**2) * jnp.where(right, size_q, size_p)
    on_p = jnp.where(wide, 1, jnp.where(left, own, 0)) / size_p
    on_q = jnp.where(wide & ~alone, 1, jnp.where(right, own, 0)) / size_q
    common = jnp.where(wide, 0, jnp.where(flat, 1, level))
    lam = jnp.zeros_like(x).at[i].add(alpha / size_p).at[j].add(jnp.where(alone, 0, beta / size_q))
    sign = y[i]
    directions = jnp.stack([jnp.stack(u) for u in (of_p, middle, of_q)], axis=1)
    return solved(directions, jnp.stack([on_p, common, on_q]), jnp.stack([sign, sign, sign]), lam)


def _one_switch(x, y, real) -> Solved:
    at = jnp.argmax(switch(y, real))
    a, b = x[at], x[at + 1]
    size_a, size_b, far = jnp.hypot(1, a), jnp.hypot(1, b), 1 + a * b < 0
    for_b, for_a = jnp.where(far, 1 / size_b, size_a / (b - a)), jnp.where(far, 1 / size_a, size_b / (b - a))
    one = jnp.ones_like(a)
    right = jnp.stack([jnp.where(far, b, one), jnp.where(far, one, -a)])
    left = jnp.stack([jnp.where(far, a, -one), jnp.where(far, one, b)])
    lam = jnp.zeros_like(x).at[at].set(for_a).at[at + 1].set(for_b)
    return solved(jnp.stack([right, left], axis=1), jnp.stack([for_b, for_a]), jnp.stack([y[at + 1], y[at]]), lam)


def _many_switches(x, y, real) -> Solved:
    order = jnp.argsort(~switch(y, real), stable=True)
    count = count_switches(y, real)
    low, high = x[:-1][order], x[1:][order]
    live = jnp.arange(order.size) < count
    gap = jnp.where(live, high - low, 1)
    slope, sign = 2 / gap, y[:-1][order]
    bends, last = live[1:], jnp.maximum(count - 2, 1)
    jump, run = slope[:-1] + slope[1:], low[1:] - high[:-1]
    # From the run's ends, so that a run of one point bends on it.
    place = jnp.clip(high[:-1] + run * (slope[1:] / jump), high[:-1], jnp.maximum(low[1:], high[:-1]))
    place = jnp.where(bends, place, 0)

    # The outer lines, where steeper ones are cheaper.
    outer, end = low[0], high[last + 1]
    steep, steep_end = 1 + outer * place[0] < 0, 1 + end * place[last] < 0
    turn, turn_end = -1 / jnp.where(steep, outer, 1), -1 / jnp.where(steep_end, end, 1)
    reach, reach_end = jnp.where(steep, turn - outer, 1), jnp.where(steep_end, end - turn_end, 1)
    first = jnp.where(steep, (2 + slope[1] * (low[1] - turn)) / reach, slope[0])
    final = jnp.where(steep_end, (2 + slope[last] * (turn_end - high[last])) / reach_end, slope[last + 1])
    place = place.at[0].set(jnp.where(steep, turn, place[0])).at[last].set(jnp.where(steep_end, turn_end, place[last]))
    jump = jump.at[0].set(first + slope[1]).at[last].set(slope[last] + final)

    size = jnp.sqrt(1 + place**2)

    def cosines(at):
        """c_{κ−1}(x_κ) + c_κ(x_κ) for a point x_κ beside each switch."""
        before = jnp.where(live[1:], (1 + at[1:] * place) / size, 0)
        after = jnp.where(bends, (1 + at[:-1] * place) / size, 0)
        return jnp.pad(before, (1, 0)) + jnp.pad(after, (0, 1))

    on_low, on_high = cosines(high) / gap, cosines(low) / gap
    on_low = on_low.at[0].set(jnp.where(steep, 1 / jnp.hypot(1, outer), on_low[0]))
    on_high = on_high.at[0].set(jnp.where(steep, 0, on_high[0]))
    on_low = on_low.at[last + 1].set(jnp.where(steep_end, 0, on_low[last + 1]))
    on_high = on_high.at[last + 1].set(jnp.where(steep_end, 1 / jnp.hypot(1, end), on_high[last + 1]))
    on_low, on_high = jnp.where(live, on_low, 0), jnp.where(live, on_high, 0)
    lam = jnp.zeros_like(x).at[order].add(on_low).at[order + 1].add(on_high)

    # Barycentric coordinates of the origin among the first three lines, from slopes and roots.
    slopes = [first, slope[1], jnp.where(last == 1, final, slope[2])]
    roots = [
        jnp.where(steep, outer + 1 / first, low[0] + gap[0] / 2),
        low[1] + gap[1] / 2,
        jnp.where(steep_end & (last == 1), end - 1 / final, low[2] + gap[2] / 2),
    ]
    parts = [(roots[2] - roots[1]) / slopes[0], (roots[2] - roots[0]) / slopes[1], (roots[1] - roots[0]) / slopes[2]]
    total = jnp.where(count > 2, sum(parts), 1)
    left = jnp.zeros_like(place).at[0].set((parts[1] + parts[2]) / total).at[1].set(parts[2] / total)

    amplitude = jnp.where(bends, jump * size, 0)
    right = jnp.stack([jnp.ones_like(place), -place])
    return solved(
        jnp.concatenate([right, -right[:, :2]], axis=1),
        jnp.concatenate([(1 - left) * amplitude, (left * amplitude)[:2]]),
        jnp.concatenate([sign[:-1], sign[:2]]),
        lam,
    )
