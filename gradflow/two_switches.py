"""The global maximum-margin classifier for two label switches, where a line is left over that no bend can share.

Let the labels be +, −, + with switches a < b and c < e, b ≤ c (for −, +, − all signs change), and L_1, L_2 the lines
through the labels at a, b and at c, e. The optimum has three neurons: r, a line ≤ −1 at b and c and cut off at 0; a
left-facing g_a and a right-facing g_e that lift a and e to +1. With the points between b and c on its side, as N is
convex there and −1 or less at both,

    F(r) = ‖r‖ + A + E,    A = min ‖g‖ over g(a) ≥ 1 + max(0, −r(a)), g(b) ≤ −1 − r(b),    E likewise with e and c,

which is the least ½‖θ‖² for given r, is convex in the two numbers r(b) ≤ −1 and r(c) ≤ −1. (With no condition active
but those of A and E at both of their points, that is ‖r‖ + ‖L_1 − r‖ + ‖L_2 − r‖: r is the Fermat point of 0, L_1, L_2.
A closed form with one bend is dearer; theory that lets a line pass for free is too cheap.)

**Proof.** Every r gives multipliers, of the conditions behind A and E, and those of r(b) ≤ −1, r(c) ≤ −1. They belong
to a minorant of F; between two r on both sides of the minimum a convex combination has slope 0. The minimum is
enclosed in one number, inside an enclosure in the other, until the minorants leave nothing. What they prove is checked
on its own: G(u) = Σ λ_i y_i max(0, u·x̃_i) is a sinusoid between the rays of neighbouring points, so its values there,
which have no 1/(b − a) in them while λ has, give its largest one. Σλ over that, if it exceeds 1, bounds ½‖θ‖² from
below, whether or not the above finds the optimum.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gradflow.closed_form import Solved, chosen, solved, switch
from gradflow.length import length

_CLEVER = 24  # steps in one number of which each third one halves the floats between; then all do
_STEPS = 90
_FLAT = 1e-15  # of the terms of a slope, that is 0
_GAP = 0.0
_CORNER = 1e-4  # of the terms of a slope, that a corner has on both sides
_BRACKET = 4.0  # times the steepest slope and level that can pay
_BETWEEN = 1e-9  # of the margin 1, that a neuron may reach beyond the points where it has to end: rounding


class Piece(eqx.Module):
    """F at one r, and a minorant of F that is tight there.

    - `cost` F; `lines` (3, 2) of g_a, r and g_e, as slope and value at 0; `within`: g_a ends before c, and g_e at b;
    - `slope`: of the minorant by −r(w), w = c or e; `level`: by −r(b), for the same slope of r or at the bound of r(w);
    - `sizes` (2,) of the terms that make up `slope` and `level`;
    - `forces` (2, 2): Σ λ y x̃ of a and b, and of e and c, as far as they come from A and E, which are unit vectors;
    - `shares` (2, 2): those multipliers of A and E, of the outer point and the inner one;
    - `bound` (2,): multipliers of r(b) ≤ −1 and r(c) ≤ −1.
    """

    cost: Float[Array, ""]
    lines: Float[Array, "3 2"]
    within: Bool[Array, ""]
    slope: Float[Array, ""]
    level: Float[Array, ""]
    sizes: Float[Array, "2"]
    forces: Float[Array, "2 2"]
    shares: Float[Array, "2 2"]
    bound: Float[Array, "2"]


def two_switches(
    x: Float[Array, " n"], y: Float[Array, " n"], real: Bool[Array, " n"], wanted: Bool[Array, ""]
) -> Solved:
    """The optimum of n ≥ 3 ascending points with two label switches; nothing is done where it is not `wanted`."""
    order = jnp.argsort(~switch(y, real), stable=True)
    first, second = order[0], order[1]
    places = jnp.stack([first, first + 1, second, second + 1])
    at = jnp.where(wanted, x[places], jnp.array([-2.0, -1, 1, 2], x.dtype))
    # The narrower switch on the left.
    mirrored = at[1] - at[0] > at[3] - at[2]
    at = jnp.where(mirrored, -at[::-1], at)
    best = _least(at, wanted)
    bound, lam = _proof(at, best)
    facing = jnp.where(mirrored, -1, 1).astype(x.dtype)
    lam = jnp.where(mirrored, lam[::-1], lam)
    way = jnp.array([1, -1, 1], x.dtype)  # r is ≤ 0 where its neuron is active
    directions = jnp.stack([facing * way * best.lines[:, 0], way * best.lines[:, 1]])
    found = solved(directions, length(*best.lines.T), way * y[first], jnp.zeros_like(x).at[places].add(lam))
    return Solved(found.network, found.multipliers, jnp.where(wanted & best.within & (jnp.min(lam) >= 0), bound, 0))


def _reference(at):
    """The point w at which r is given besides b: the farther of c and e from its neighbour, as a distance from b, and
    where c lies between b (0) and w (1).
    """
    _, b, c, e = at
    inner = c - b >= e - c
    width = jnp.where(inner, c - b, e - b)
    return inner, width, jnp.where(inner, 1, (c - b) / width)


def _lift(outer, inner, value, room, slope):
    """A: the least ‖g‖ with g(outer) ≥ `value`, g(inner) ≤ `room` (and of this `slope` if both are met with equality).

    Returns ‖g‖, g, its direction, g(inner), and the multipliers of both conditions.
    """
    reach = jnp.hypot(1, outer)
    foot = value * (1 + outer * inner) <= room * reach**2
    along = jnp.stack([outer, jnp.ones_like(outer)]) / reach
    g = jnp.stack([slope, room - slope * inner])
    size = length(*g)
    unit = g / jnp.where(size > 0, size, 1)
    shares = jnp.stack([unit[0] - inner * unit[1], unit[0] - outer * unit[1]]) / (outer - inner)
    alone = jnp.stack([1 / reach, jnp.zeros_like(reach)])
    return (
        jnp.where(foot, value / reach, size),
        jnp.where(foot, along * value / reach, g),
        jnp.where(foot, along, unit),
        jnp.where(foot, value * (1 + outer * inner) / reach**2, room),
        jnp.where(foot, alone, shares),
    )


def _piece(at, level, other) -> Piece:
    """F where r(b) = −1 − `level` and r(w) = −1 − `other`."""
    a, b, c, e = at
    inner, width, part = _reference(at)
    tilt = (level - other) / width  # the slope of r
    room = jnp.maximum(jnp.where(inner, other, (1 - part) * level + part * other), 0)
    # −r at a and e. As quotients: sums and products may be computed once more for each use, rounded otherwise, and
    # which side of 0 they are on must be the same throughout.
    below_a = ((1 + level) * width + (level - other) * (b - a)) / width
    below_e = jnp.where(inner, ((1 + other) * width - (level - other) * (e - c)) / width, 1 + other)
    r = jnp.stack([tilt, -(1 + level) - tilt * b])
    size = length(*r)
    unit = r / size
    at_a, at_e = below_a > 0, below_e > 0
    cost_a, g_a, force_a, at_b, share_a = _lift(
        a, b, 1 + jnp.maximum(below_a, 0), level, jnp.where(at_a, 2 / (a - b) - tilt, (1 - level) / (a - b))
    )
    cost_e, g_e, force_e, at_c, share_e = _lift(
        e, c, 1 + jnp.maximum(below_e, 0), room, jnp.where(at_e, 2 / (e - c) - tilt, (1 - room) / (e - c))
    )
    ray = jnp.stack([jnp.ones_like(b), -b])
    lifted = jnp.where(at_e, 0, share_e[0] * (e - b))
    by_tilt = ray @ (unit - jnp.where(at_a, force_a, 0) - force_e) + lifted
    by_level = -unit[1] + jnp.where(at_a, force_a[1], -share_a[1]) + jnp.where(at_e, force_e[1], -share_e[1])
    terms = jnp.stack([unit, force_a, force_e])
    sizes = [(jnp.sum(jnp.abs(terms @ ray)) + lifted) / width]
    sizes += [jnp.sum(jnp.abs(terms[:, 1])) + jnp.where(at_a, 0, share_a[1]) + jnp.where(at_e, 0, share_e[1])]
    # What lifts e must not reach b, nor what lifts a reach c: N would not be as F has it.
    beyond = jnp.maximum(at_c - g_e[0] * (c - b), at_b + g_a[0] * (c - b))
    return Piece(
        size + cost_a + cost_e,
        jnp.stack([g_a, r, g_e]),
        beyond <= _BETWEEN,
        -by_tilt / width,
        by_level,
        jnp.stack(sizes),
        jnp.stack([force_a, force_e]),
        jnp.stack([share_a, share_e]),
        jnp.zeros_like(at[:2]),
    )


def _between(low: Piece, high: Piece, slopes) -> Piece:
    """The better of two r, with the combination of their minorants that has slope 0."""
    (down, _), (up, _) = slopes(low), slopes(high)
    rise = up - down
    weight = jnp.clip(jnp.where(rise > 0, up / jnp.where(rise > 0, rise, 1), 0.5), 0, 1)
    best = chosen(low.cost <= high.cost, low, high)

    def minorant(piece):
        return piece.slope, piece.level, piece.sizes, piece.forces, piece.shares, piece.bound

    mixed = jax.tree.map(lambda a, b: weight * a + (1 - weight) * b, minorant(low), minorant(high))
    return eqx.tree_at(minorant, best, mixed)


def _enclose(of, slopes, low, high, start, wanted) -> Piece:
    """Where the slope of convex `of` changes sign between `low`, where it is `start`, and `high`.

    In turn where the minorants of the ends meet, which finds a corner at once, where their slopes extrapolate to 0,
    and at the float half way between them; until an end has no slope, a corner is found or the ends are neighbours. The
    pieces at the ends are kept: computed again, in another place, they may be rounded otherwise.
    """

    def meeting(low, high, before, after):
        """How far from `low` minorants meet, and how far they let the minimum be below the better of the two ends."""
        (down, _), (up, _) = slopes(before), slopes(after)
        step = (after.cost - before.cost - up * (high - low)) / jnp.where(up > down, down - up, 1)
        return step, jnp.minimum(before.cost, after.cost) - before.cost - down * step

    def open_(low, high, before, after):
        (down, size), (up, more) = slopes(before), slopes(after)
        flat = (jnp.abs(down) <= _FLAT * size) | (jnp.abs(up) <= _FLAT * more)
        corner = meeting(low, high, before, after)[1] <= 0
        # Where an end is far up, its rounding alone may close the gap.
        corner &= jnp.maximum(before.cost, after.cost) <= 2 * jnp.minimum(before.cost, after.cost)
        corner &= (jnp.abs(down) > _CORNER * size) & (jnp.abs(up) > _CORNER * more)
        middle = _half_way(low, high)
        return wanted & ~flat & ~corner & (low < middle) & (middle < high)

    def narrow(state):
        count, going, low, high, before, after = state
        (down, _), (up, _) = slopes(before), slopes(after)
        secant = (high - low) * -down / jnp.where(up > down, up - down, 1)
        place = low + jnp.where(count % 3 == 0, meeting(low, high, before, after)[0], secant)
        inside = (place > low) & (place < high) & (count % 3 < 2) & (count < _CLEVER)
        place = jnp.where(inside, place, _half_way(low, high))
        here = of(place, going)  # in a batch, a lane that is done waits for others
        falls = slopes(here)[0] < 0
        ends = jnp.where(falls, place, low), jnp.where(falls, high, place)
        ends += chosen(falls, here, before), chosen(falls, after, here)
        return count + 1, open_(*ends), *ends

    # Whether it goes on is decided once: in another place it might be rounded otherwise.
    ends = low, high, start, of(high, wanted)
    begin = jnp.zeros((), int), open_(*ends), *ends
    *_, before, after = jax.lax.while_loop(lambda s: s[1] & (s[0] < _STEPS), narrow, begin)
    return _between(before, after, slopes)


def _half_way(low, high):
    """The float with as many floats between it and `low` as between it and `high`."""

    def turned(bits):
        return jnp.where(bits < 0, jnp.iinfo(bits.dtype).min - bits, bits)

    a, b = (turned(jax.lax.bitcast_convert_type(end, jnp.int64)) for end in (low, high))
    return jax.lax.bitcast_convert_type(turned((a >> 1) + (b >> 1) + (a & b & 1)), low.dtype)


def _for_level(at, level, wanted) -> Piece:
    """The least F with r(b) = −1 − `level`, by r(w), which must leave r(c) ≤ −1."""
    a, b, c, e = at
    _, width, part = _reference(at)
    most = width * (1 + level) * _BRACKET * (1 / (b - a) + 1 / (e - c) + jnp.abs(b) / (1 + b**2) + 1)
    floor = jnp.where(part > 0, -(1 - part) * level / jnp.where(part > 0, part, 1), -jnp.inf)
    low = jnp.maximum(floor, level - most)
    start = _piece(at, level, low)
    free = _enclose(
        lambda other, _: _piece(at, level, other), lambda p: (p.slope, p.sizes[0]), low, level + most, start, wanted
    )
    # At the floor r(c) = −1, whose multiplier takes what slope is left.
    push = jnp.where(part > 0, start.slope / jnp.where(part > 0, part, 1), 0)
    held = eqx.tree_at(lambda p: (p.level, p.bound), start, (start.level - push, start.bound.at[1].set(push)))
    return chosen(start.slope >= 0, held, free)


def _least(at, wanted) -> Piece:
    """The minimum of F."""
    a, b, c, e = at
    most = _BRACKET * (1 + 2 * (c - b) * (1 / (b - a) + 1 / (e - c)))
    zero = jnp.zeros_like(a)
    start = _for_level(at, zero, wanted)
    free = _enclose(
        lambda level, wanted: _for_level(at, level, wanted),
        lambda p: (p.level, p.sizes[1]),
        zero,
        most,
        start,
        wanted & (start.level < 0),
    )
    held = eqx.tree_at(lambda p: p.bound, start, start.bound.at[0].set(start.level))
    return chosen(start.level >= 0, held, free)


def _proof(at, best: Piece):
    """A lower bound from the multipliers of `best`, and those of a, b, c and e."""
    lift = jnp.stack([at, jnp.ones_like(at)])
    reach = jnp.hypot(1, at)
    ray = jnp.stack([1 / reach, -at / reach])
    # The forces of all points right of the middle, left of it, and of all together, without any 1/(b − a).
    right = best.forces[1] - best.bound[1] * lift[:, 2]
    left = best.forces[0] - best.bound[0] * lift[:, 1]
    whole = left + right
    zero = jnp.zeros_like(at[0])
    # G at the rays (1, −x) and (−1, x) of the four points.
    rightward = jnp.stack([whole @ ray[:, 0], right @ ray[:, 1], best.forces[1] @ ray[:, 2], zero])
    leftward = -jnp.stack([zero, best.forces[0] @ ray[:, 1], left @ ray[:, 2], whole @ ray[:, 3]])
    largest = jnp.maximum(_largest(rightward, at), _largest(leftward, at))
    # Where all four are active.
    inside = (whole @ lift[:, 0]) * (whole @ lift[:, 3]) > 0
    largest = jnp.maximum(largest, jnp.where(inside, length(*whole), 0))
    outer, inner = best.shares[:, 0], best.shares[:, 1]
    lam = jnp.stack([outer[0], inner[0] + best.bound[0], inner[1] + best.bound[1], outer[1]])
    return jnp.sum(lam) / jnp.maximum(largest, 1), lam


def _largest(values: Float[Array, "4"], at: Float[Array, "4"]):
    """The largest |value| of functions that are sinusoids between neighbouring rays, with these values at the rays."""
    first, second, p, q = values[:-1], values[1:], at[:-1], at[1:]
    reach = jnp.hypot(1, p) * jnp.hypot(1, q)
    sine, cosine = (q - p) / reach, (1 + p * q) / reach
    ends = jnp.maximum(jnp.abs(first), jnp.abs(second))
    inside = (first * second > 0) & (jnp.abs(first) > jnp.abs(second) * cosine)
    inside &= (jnp.abs(second) > jnp.abs(first) * cosine) & (sine > 0)
    # Squared amplitude (f² + s² − 2 f s cos)/sin², without cancellation near angles of 0 and π; near 0 no more than a
    # sinusoid of these ends can have.
    second_ = jnp.where(cosine < 0, -second, second)
    top = ((first - second_) / jnp.where(sine > 0, sine, 1)) ** 2 + 2 * first * second_ / (1 + jnp.abs(cosine))
    top = jnp.minimum(top, jnp.where(cosine > 0, 2 * ends**2 / (1 + cosine), jnp.inf))
    return jnp.max(jnp.where(inside, jnp.maximum(ends, jnp.sqrt(jnp.maximum(top, 0))), ends))
