"""Where a mode ends: breakpoints that reach a data point, cross it, stick to it or come off again.

Distances are those of u_j = (w_j, b_j) from the line w x_i + b = 0 in the (w, b) plane, positive inside the neuron's
cell. They are polynomials in time wherever the parameters are, so events within a step are found on a polynomial
through five of its points.

An event *matters* if ignoring it until the end of the step could move the neuron by more than a tenth of its
tolerance, by the jump of the field, |v_j| Σ p_i ‖x̃_i‖ over the points passed, times the step, or a margin that
counts by more than a tenth of its own, by v_j times the distance gone beyond the ray; or if the breakpoint would stick
and ends too far beyond to be put back. Those that do neither are passed several at a time, and so are those that matter
but can be made good (`crossing.py`).

**Noise.** Margins with errors δq put every z_j wrong by up to ν = Σ c_i |δq_i| ‖x̃_i‖, the `noise`. Where forces all but
cancel, velocities on the sides of a ray can be smaller than |v_j| ν, and their signs arbitrary. In doubt a breakpoint
slides, and a sliding one is released only beyond twice the doubt, lest a mode flicker.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gradflow.clarke import (
    Field,
    Mode,
    Points,
    Weights,
    active_cell,
    cell_range,
    find_cell,
    inactive_cell,
    point_of,
    pulls,
)
from gradflow.crossing import cross
from gradflow.length import length
from gradflow.network import ReluNetwork
from gradflow.origin import closest_approach, leave_origin
from gradflow.sites import sums_before

NODES = np.linspace(0, 1, 5)  # where a step is sampled: enough for the quartics that Tsit5 and Rodas5P give
_TO_QUARTIC = np.linalg.inv(np.vander(NODES, 5))
_SCAN = np.vander(np.linspace(0, 1, 17), 5)
SHARE = 1e-3  # of rtol, that an event may change a derivative by and not be met


class Tolerance(eqx.Module):
    """What one step may be wrong by: `rtol` and `atol` in the parameters, `margin` in every margin that matters.

    Parameters of neuron j are held to `atol` + `rtol` · (its size + `least`), `least` (k,) being the smallest size that
    it has had: relative to the neuron itself, on whatever scale it is, without the need to follow a neuron that has
    just begun to grow as closely as one that has always been as small.
    `each`: every event is met that changes derivatives, too (`sensitivity.py`).
    """

    rtol: Float[Array, ""]
    atol: Float[Array, ""]
    margin: Float[Array, ""]
    least: Float[Array, " k"]
    each: bool = eqx.field(static=True)

    def reach(self, net: ReluNetwork, points: Points) -> Float[Array, " k"]:
        """How far u_j may be put aside: v_j times that moves no margin by more than a tenth of `margin`.

        Beyond it, putting a large neuron on its ray kicks the margins, and with them all velocities.
        """
        lever = jnp.abs(net.v) * jnp.sqrt(jnp.max(points.squared_norm))
        return jnp.where(lever > 0, 0.1 * self.margin / jnp.where(lever > 0, lever, 1), jnp.inf)

    def landing(self, net: ReluNetwork, points: Points) -> Float[Array, " k"]:
        """How near to a ray is on it: within a fifth of rtol ‖u_j‖, and within `reach`."""
        return jnp.minimum(0.2 * self.rtol * length(net.w, net.b), self.reach(net, points))

    def origin(self, net: ReluNetwork) -> Float[Array, " k"]:
        """How near u_j = 0 counts as there: within rtol |v_j|, where tolerance leaves the direction of u_j open."""
        return self.rtol * jnp.abs(net.v)

    @property
    def release(self) -> Float[Array, ""]:
        """How far μ may be outside [0, 1] at a release: an error in force that lasts as short a time as it is small.

        Derivatives are as wrong as that time is long.
        """
        return self.rtol if self.each else 0.3 * jnp.sqrt(self.rtol)

    def size(self, net: ReluNetwork) -> Float[Array, " k"]:
        """What the parameters of every neuron may be wrong by."""
        return self.atol + self.rtol * (net.sizes + self.least)


def rays(mode: Mode, n: int) -> Int[Array, "2 k"]:
    """The rays that can be hit next: the two beside a free neuron's cell, a sliding neuron's own (twice)."""
    lower, upper = jnp.where(mode.cell > 0, mode.cell - 1, 2 * n - 1), mode.cell
    return jnp.where(mode.sliding[None], mode.ray[None], jnp.stack([lower, upper]))


def _inward(ray: Int[Array, "..."], upper, n: int):
    """+1 where a cell is on the active side of `ray`, −1 on the inactive one; `upper`: it is the cell's upper ray."""
    return jnp.where((ray < n) == upper, 1, -1)


def distances(net: ReluNetwork, mode: Mode, points: Points) -> Float[Array, "2 k"]:
    """Distance of every neuron from its two rays, positive inside the cell; if it slides, the length along its ray."""
    n = points.x.shape[0]
    ray = rays(mode, n)
    at = point_of(ray, n)
    x, norm = points.x[at], points.norm[at]
    upper = jnp.array([[False], [True]])
    raw = (net.w[None] * x + net.b[None]) / norm
    along = (net.w[None] - x * net.b[None]) / norm * jnp.where(ray < n, 1, -1).astype(x.dtype)
    free = _inward(ray, upper, n).astype(x.dtype) * raw
    return jnp.where(mode.sliding[None], along, free)


class Sides(eqx.Module):
    """Velocities of the distance u·x̃_i/‖x̃_i‖ on the inactive and on the active side of one ray per neuron."""

    inactive: Float[Array, " k"]
    active: Float[Array, " k"]

    def excess(self, slack: Float[Array, " k"]) -> Float[Array, " k"]:
        """How far the sliding condition inactive ≥ −slack, active ≤ slack is from being violated; negative: release."""
        size = jnp.abs(self.inactive) + jnp.abs(self.active)
        worst = jnp.minimum(self.inactive, -self.active) + slack
        return jnp.where(size > 0, worst / jnp.where(size > 0, size, 1), 0)


def side_velocities(points: Points, net: ReluNetwork, weights: Weights, ray: Int[Array, " k"], z) -> Sides:
    """At these rays, with `z` (2, k) the pull of all points but the ray's own."""
    i = point_of(ray, points.x.shape[0])
    off = net.v * (z[0] * points.x[i] + z[1]) / points.norm[i]
    return Sides(off, off + net.v * (weights.p * points.y * points.norm)[i])


class Outlook(eqx.Module):
    """What a step that passed error control runs into.

    - `share`: the part of the step that can be taken: up to the earliest event that matters or, if that is more, the
      part in which crossings can be made good; +∞ for all of it;
    - `lands`: whether `share` is the place of an event, before which nothing needs a kick: there, a step can be cut;
    - `passed`: free neurons that left their cell until then in a way that does not matter;
    - `arrives`: free neurons that are on a ray at `share`; `enters`: free ones that are at the origin of their plane;
    - `kick`: (2, k) what crossings add to u;
    - `growth`: the next step should be no longer than this times the step.
    """

    share: Float[Array, ""]
    lands: Bool[Array, ""]
    passed: Bool[Array, " k"]
    arrives: Bool[Array, " k"]
    enters: Bool[Array, " k"]
    kick: Float[Array, "2 k"]
    growth: Float[Array, ""]


def look_ahead(
    field: Field,
    nodes: ReluNetwork,
    start: Weights,
    end: Weights,
    step: Float[Array, ""],
    noise: Float[Array, ""],
    tolerance: Tolerance,
) -> Outlook:
    """The events of one step, from the network at its five `nodes`, each field (5, k)."""
    points, mode = field.points, field.mode
    n, dtype = points.x.shape[0], nodes.w.dtype
    first, last = (jax.tree.map(lambda a, i=i: a[i], nodes) for i in (0, -1))
    value = jax.vmap(lambda net: distances(net, mode, points))(nodes)  # (5, 2, k)
    quartic = jnp.einsum("ij,jrk->irk", jnp.asarray(_TO_QUARTIC, dtype), value)
    scan = jnp.einsum("ij,jrk->irk", jnp.asarray(_SCAN, dtype), quartic)  # (17, 2, k)
    sliding = mode.sliding[None]
    touch = jnp.where(sliding, 0.1 * tolerance.size(last)[None], tolerance.landing(last, points)[None])
    below = scan < -touch[None]
    hit = jnp.any(below, axis=0)

    slack = 2 * noise * jnp.abs(last.v)
    ray = rays(mode, n)
    nearer = jnp.where(hit[1], ray[1], ray[0])
    # At all nodes on the ray that a neuron slides on, after the step on the one that a free neuron hits.
    inner = jax.vmap(lambda net: field.weights(net.lines))(jax.tree.map(lambda a: a[1:-1], nodes))
    weights = jax.tree.map(lambda a, b, c: jnp.concatenate([a[None], b, c[None]]), start, inner, end)

    def on_own_ray(net, weights):
        z = field.sites.pull(weights.p * points.y)
        return side_velocities(points, net, weights, jnp.maximum(mode.ray, 0), z).excess(slack)

    sides = side_velocities(points, last, end, nearer, pulls(points, end)[:, nearer])
    excess = jax.vmap(on_own_ray)(nodes, weights) + 0.5 * tolerance.release
    # Where v passes through 0 both sides change, and the neuron comes off.
    flips = mode.sliding & (first.v * last.v < 0)
    signed_v = jnp.asarray(_TO_QUARTIC, dtype) @ (nodes.v * jnp.sign(first.v)[None])
    loose = mode.sliding & (flips | (excess[-1] < -0.5 * tolerance.release))
    quartic_excess = jnp.asarray(_TO_QUARTIC, dtype) @ excess
    release = jnp.where(flips, signed_v, quartic_excess)
    falls = jnp.asarray(_SCAN, dtype) @ release < 0
    both = jnp.concatenate([quartic, release[:, None]], axis=1)
    index = jnp.concatenate([jnp.argmax(below, axis=0), jnp.argmax(falls, axis=0)[None]])
    roots = _root(both, jnp.maximum(index, 1), len(_SCAN) - 1)
    root, aim = jnp.where(hit, roots[:2], jnp.inf), jnp.where(flips, roots[2], jnp.clip(roots[2], 0.05, 0.95))

    # The jump of the field over all points passed.
    heaviest = jnp.maximum(start.p, end.p) * points.norm
    neighbour = jnp.sum(jnp.where(hit, heaviest[point_of(ray, n)], 0), axis=0)
    passed = ~mode.sliding & jnp.any(scan[-1] < -touch, axis=0)
    cell = jnp.where(passed, find_cell(last, points.x), mode.cell)
    moved = _passed_weight(heaviest, mode.cell, cell, n)
    weight = jnp.where(mode.sliding, heaviest[point_of(mode.ray, n)], jnp.maximum(neighbour, moved))
    weight = jnp.where(mode.sliding & hit[0], jnp.sum(heaviest), weight)
    matters = jnp.abs(last.v) * weight * step > 0.1 * tolerance.size(last)
    depth = jnp.max(jnp.where(hit, -jnp.min(scan, axis=0), 0), axis=0)
    mass = jnp.minimum(1, weight * jnp.sum(jnp.exp(points.log_count)))
    matters |= ~mode.sliding & (jnp.abs(last.v) * depth * mass > 0.1 * tolerance.margin)

    # One that would stick has to be put on its ray, so it has to get there, unless it is near enough as it is.
    sticks = (sides.inactive > 0) & (sides.active < 0) & (jnp.where(hit[1], value[0, 1], value[0, 0]) > 0)
    most = jnp.minimum(tolerance.size(last), tolerance.reach(last, points))
    matters |= ~mode.sliding & jnp.any(hit, axis=0) & sticks & (depth > most)

    if tolerance.each:
        # At a crossing u̇_j jumps by v_j p_i x̃_i, and the change of u_j by as large a share of itself as the speed.
        speed = jnp.maximum(jnp.abs(sides.inactive), jnp.abs(sides.active))
        met = jnp.any(hit, axis=0) & (jnp.abs(last.v) * weight > SHARE * tolerance.rtol * speed)
        matters |= ~mode.sliding & met
    crossing = cross(field, first, last, start, end, step, cell, weight, depth, tolerance.size(last), tolerance.rtol)
    if tolerance.each:
        crossing = eqx.tree_at(lambda c: (c.harmless, c.enough), crossing, (~(weight >= 0), jnp.zeros_like(weight)))
    passes = matters & crossing.harmless
    enough = jnp.where(crossing.enough >= jnp.maximum(jnp.min(root, axis=0), 0.05), crossing.enough, 0)
    many = matters & (enough > 0)
    growth = jnp.min(jnp.where(many, enough, jnp.inf))
    matters &= ~passes

    # A neuron that starts a hair beyond its ray would be sent back to the start: a hundredth of the step is progress.
    stop = jnp.where(hit & matters[None], jnp.where(mode.sliding[None], root, jnp.maximum(root, enough[None])), jnp.inf)
    nearest, when = closest_approach(nodes, jnp.asarray(_TO_QUARTIC, dtype), jnp.asarray(_SCAN, dtype))
    outside = length(first.w, first.b) > tolerance.origin(first)
    at_origin = jnp.where(~mode.sliding & (mode.cell != n) & outside & (nearest < 0.5 * tolerance.rtol), when, jnp.inf)
    share = jnp.maximum(jnp.minimum(jnp.min(stop), jnp.min(at_origin)), 0.01)
    share = jnp.minimum(share, jnp.min(jnp.where(loose & (matters | flips), aim, jnp.inf)))
    enters = (at_origin <= share) & (at_origin < jnp.inf)
    arrives = ~mode.sliding & ~enters & matters & jnp.any(hit & (root <= share), axis=0)
    there = jnp.einsum("i,irk->rk", lagrange(jnp.minimum(share, 1)), value)
    passed = jnp.where(share <= 1, ~mode.sliding & ~arrives & jnp.any(there < -touch, axis=0), passed)
    # At the origin of the (w, b) plane, where neurons die, a step is only cut if it matters in a shorter one too.
    dies = mode.sliding & hit[0] & matters & (root[0] <= share)
    lands = (share > 0.01) & ~jnp.any((many & (enough >= share)) | (passed & passes) | dies)
    kick = jnp.where((passed & passes)[None], crossing.kick, 0)
    return Outlook(share, lands, passed & ~enters, arrives, enters, kick, growth)


def lagrange(s: Float[Array, ""]) -> Float[Array, " 5"]:
    """Weights with which the values at `NODES` make up that of their quartic at s."""
    return jnp.stack([s**4, s**3, s**2, s, jnp.ones_like(s)]) @ jnp.asarray(_TO_QUARTIC, s.dtype)


def _root(quartic, index, cells: int):
    """The root in scan cell `index` of quartics (5, ...) that change sign there, by eight bisections, a secant and a
    step of Newton's method: a neuron whose root is off is moved that far to be put on its ray.
    """

    def value(s):
        return (((quartic[0] * s + quartic[1]) * s + quartic[2]) * s + quartic[3]) * s + quartic[4]

    def slope(s):
        return ((4 * quartic[0] * s + 3 * quartic[1]) * s + 2 * quartic[2]) * s + quartic[3]

    high = index.astype(quartic.dtype) / cells
    low = high - 1 / cells

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        inside = value(middle) > 0
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

    low, high = jax.lax.fori_loop(0, 8, halve, (low, high))
    a, b = value(low), value(high)
    root = jnp.where(a > b, low + (high - low) * jnp.clip(a / jnp.where(a > b, a - b, 1), 0, 1), high)
    falls = slope(root)
    return jnp.clip(root - value(root) / jnp.where(falls < 0, falls, -jnp.inf), low, high)


def _passed_weight(weight, old, new, n: int):
    """Σ weight over the points that are active in exactly one of two cells."""
    total = sums_before(weight[None])[0]
    (a, b), (c, d) = cell_range(old, n), cell_range(new, n)
    low, high = jnp.maximum(a, c), jnp.maximum(jnp.minimum(b, d), jnp.maximum(a, c))
    both = total[high] - total[low]
    return (total[b] - total[a]) + (total[d] - total[c]) - 2 * both


def update(
    field: Field,
    net: ReluNetwork,
    weights: Weights,
    passed: Bool[Array, " k"],
    arrives: Bool[Array, " k"],
    enters: Bool[Array, " k"],
    noise: Float[Array, ""],
    tolerance: Tolerance,
) -> tuple[ReluNetwork, Mode, Int[Array, ""], Bool[Array, ""]]:
    """The mode after an accepted step, by the velocities on both sides; neurons on a ray are put exactly there.

    `passed`, `arrives` and `enters` as in `Outlook`.

    Returns the network, the mode, the number of events, and whether the step did not end where it was meant to: not on
    the ray of one that arrives, or too late for one that is released to be accurate.
    """
    mode, points = field.mode, field.points
    n = points.x.shape[0]
    cell = jnp.where(passed, find_cell(net, points.x), mode.cell)
    mode = Mode(cell, mode.ray)
    gap, ray = distances(net, mode, points), rays(mode, n)
    nearer = jnp.abs(gap[1]) < jnp.abs(gap[0])
    ray = jnp.where(nearer, ray[1], ray[0])
    if n == 1:  # both rays lie on one line; the breakpoint's direction tells which is meant
        ray = jnp.where(mode.sliding, ray, jnp.where(net.w > 0, 0, 1))
    near = jnp.where(nearer, gap[1], gap[0])

    # At the origin of the (w, b) plane: free, or along the ray, which goes on on the opposite one.
    outward = field.combine(net, weights.p)
    tangent = field.tangent()
    speed = outward.w * tangent[0] + outward.b * tangent[1]
    through = mode.sliding & (gap[0] <= 0.1 * tolerance.size(net)) & (speed < 0)
    near_origin = ~mode.sliding & (net.v != 0) & (length(net.w, net.b) <= tolerance.origin(net))
    # Dead neurons stay where they are.
    there = (near_origin & (cell != n)) | mode.resting

    sides = side_velocities(points, net, weights, ray, pulls(points, weights)[:, ray])
    doubt = noise * jnp.abs(net.v)
    excess = jnp.where(mode.sliding & ~through, sides.excess(2 * doubt), 0)
    released = excess < 0
    inside = jnp.where(mode.cell == active_cell(ray, n), sides.active, -sides.inactive)
    touching = ~mode.sliding & (jnp.abs(near) <= tolerance.landing(net, points)) & (inside < 0)
    # One that was let pass although it would stick comes back, again and again, unless it is held here.
    most = jnp.minimum(tolerance.size(net), tolerance.reach(net, points))
    held = (sides.inactive > 0) & (sides.active < 0) & (jnp.abs(near) <= most)
    touching |= (passed & held) | (arrives & (inside < 0) & (jnp.abs(near) <= most))
    # A kick is as wrong as u_j may be. One that it has put before the ray again would cross it for ever.
    before = passed & (cell == field.mode.cell)
    touching |= before & (inside < 0) & (jnp.abs(near) <= tolerance.size(net))
    # Where v passes through 0 a sliding neuron comes off all at once.
    turns = (
        mode.sliding
        & (jnp.abs(net.v) <= tolerance.size(net))
        & (net.v * outward.v < 0)
        & (net.v**2 < net.w**2 + net.b**2)
    )
    released |= turns & ~through
    astray = jnp.any(arrives & ~touching) | jnp.any(enters & ~there) | jnp.any((excess < -tolerance.release) & ~turns)

    decided = (touching & ~there) | released
    slides = decided & ~released & (sides.inactive > -doubt) & (sides.active < doubt)
    # Off the ray: across it for an arrival, else to the side whose own velocity leads away from it.
    to_inactive = jnp.where(touching, mode.cell == active_cell(ray, n), turns | (sides.inactive < 0))
    beside = jnp.where(to_inactive, inactive_cell(ray, n), active_cell(ray, n))
    beside = jnp.where(decided & ~slides, beside, mode.cell).astype(mode.cell.dtype)
    new = Mode(beside, jnp.where(decided, jnp.where(slides, ray, -1), mode.ray))

    x = points.x[point_of(ray, n)]
    along = (net.w - x * net.b) / (1 + x**2)
    along = jnp.where(through, 0, along)
    on = decided | new.sliding | through
    net = ReluNetwork(jnp.where(on, along, net.w), jnp.where(on, -x * along, net.b), net.v)
    opposite = jnp.where(mode.ray < n, mode.ray + n, mode.ray - n)
    new = Mode(new.cell, jnp.where(through, opposite, new.ray))
    net, new = leave_origin(points, net, weights, new, there | through)
    return net, new, jnp.sum(decided | passed | (there & ~new.resting) | through), astray
