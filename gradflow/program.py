"""The convex program behind a limit direction: the least ½‖θ‖² of networks whose neurons stay in given cells.

**Primal.** A neuron in cell c (`clarke.py`) with output sign s draws the line s g·x̃ on its active points, at the cost
½(‖u‖² + v²) = ‖g‖ if it is balanced, u ∝ g. Neurons of one cell and sign add up, so with the closed cones C_c of
directions, and a set A of allowed pairs (s, c),

    minimise Σ_A ‖g_sc‖  over g_sc ∈ C_c   subject to   y_i Σ_A s [i ∈ c] g_sc·x̃_i ≥ 1 for all i.

With all pairs allowed that is the maximum-margin problem at unlimited width, and its value ½‖θ*‖² = 1/(2γ*).

**Dual.** maximise Σ λ_i over λ ≥ 0 subject to h_c(s z_c) ≤ 1 on A, with z_c = Σ_{i ∈ c} λ_i y_i x̃_i and h_c(z) the
maximum of u·z over unit u ∈ C_c, that is ‖P_c z‖, P_c the projection to the cone (0 if it is the apex). The maximiser
is where the neurons of the cell end up: inside it along ±z_c, or on a ray, with their breakpoint on a data point.

**Method.** A barrier, μ (Σ log λ_i + Σ_A log(1 − h²)), maximised by damped Newton steps for falling μ. Its stationary
points are primal feasible too: g_sc = 2 μ P_c z/(1 − h²) has margins 1 + μ/λ_i. Slacks lose half of their digits on the
way, so the last steps are Newton's on the equations h = 1 and q_i = 1 of the constraints that have proved active,
proximally regularised as amplitudes need not be unique (Rockafellar 1976). Mostly they show at μ = 10⁻⁶ of the mean λ;
where what Newton's method then finds is not optimal to 10⁻¹¹, the barrier goes on.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.clarke import cell_range, solver_of_positive_definite
from gradflow.network import ReluNetwork
from gradflow.sites import Sites

_CENTRE = 1e4  # first μ over the first λ: a path that starts in the middle stays there
_BARRIER = 200  # Newton steps of the barrier, at most
_POLISH = 8  # Newton steps for one set of active constraints
_ROUNDS = 13  # in which that set is corrected, at last; but for the first, which measures; two before that
CERTAIN = 1e-11  # what Newton's method leaves of a constraint that it meets
_NOTHING = 1e-13  # a neuron's share of ½‖θ‖² that is rounding
_UPRIGHT = 1e-10  # change of a neuron along the data, relative to itself, that is rounding: 1e-14 was seen
_ACTIVE = 30.0
_SHRINK = 0.1  # of μ, once a Newton step was short
_ACCURATE = 1e-6, 1e-9, 1e-12  # μ over the mean λ at which the active constraints are read off, until all is certain
_PRECISE = 1e-8  # μ over the mean λ down to which amplitudes have their digits
_PROXIMAL = 1e-7
_RIDGE = 1e-13
_BARRIER_RIDGE = 1e-14  # what is below the rounding of a Hessian
_ROUNDING = 1e-9  # of the amplitudes, up to which lines may be changed to make up for rounding


def neurons_held(points: int) -> int:
    """How many cells may be active at once; no more than there are points, of which some have no weight, are needed."""
    return min(4 * points, points + 8)


class Solution(eqx.Module):
    """λ (n,); g (2, 2, 2n) by sign, coordinate and cell as `lines`; and how far both are from being optimal.

    `residual` is the largest of: what margins lack, what h exceeds 1 by, the gap between Σ‖g‖ and Σλ relative to Σλ,
    and negative λ and ‖g‖ relative to Σλ. If it is 0, Σλ ≤ value ≤ Σ‖g‖ proves both optimal.
    """

    multipliers: Float[Array, " n"]
    lines: Float[Array, "2 2 cells"]
    residual: Float[Array, ""]

    def network(self, x: Float[Array, " n"]) -> ReluNetwork:
        """The balanced network with these lines: one neuron a cell in use, zero-padded to `neurons_held`.

        One that is constant on the points `x` up to rounding bends nowhere. It would at ±10¹⁵: where all points are
        active, optimal directions may well be upright, z = (0, ·).
        """
        size = jnp.sqrt(jnp.sum(self.lines**2, axis=1)).reshape(-1)
        size, index = jax.lax.top_k(jnp.where(size > _NOTHING * jnp.sum(size), size, 0), neurons_held(size.size // 4))
        sign, cell = index // self.lines.shape[-1], index % self.lines.shape[-1]
        root = jnp.sqrt(jnp.where(size > 0, size, 1))
        w, b = jnp.where(size > 0, 1 / root, 0)[None] * self.lines[sign, :, cell].T
        w = jnp.where(jnp.abs(w) * jnp.maximum(1, jnp.max(jnp.abs(x))) <= _UPRIGHT * jnp.abs(b), 0, w)
        return ReluNetwork(w, b, jnp.where(size > 0, jnp.where(sign == 0, root, -root), 0))


class Cones(eqx.Module):
    """The 2n cells of n ≥ 2 sorted points as cones between unit rays `first` and `second`, (2, 2n) each."""

    x: Float[Array, " n"]
    first: Float[Array, "2 cells"]
    second: Float[Array, "2 cells"]
    sites: Sites

    def __init__(self, x: Float[Array, " n"]):
        n = x.shape[0]
        ray = jnp.stack([jnp.ones_like(x), -x]) / jnp.hypot(1, x)[None]
        self.x, self.second = x, jnp.concatenate([ray, -ray], axis=1)
        self.first = jnp.roll(self.second, 1, axis=1)
        self.sites = Sites(x, *cell_range(jnp.arange(2 * n), n)).ready()

    def active(self, cell: Int[Array, " m"]) -> Bool[Array, "m n"]:
        """Which points are active in each of some cells."""
        low, high = cell_range(cell, self.x.shape[0])
        index = jnp.arange(self.x.shape[0], dtype=cell.dtype)
        return (index[None] >= low[:, None]) & (index[None] < high[:, None])

    def forces(self, force: Float[Array, " n"]) -> Float[Array, "2 2 cells"]:
        """s Σ_{i ∈ c} force_i x̃_i."""
        z = self.sites.pull(force)
        return jnp.stack([z, -z])

    def place(self, z: Float[Array, "2 2 cells"]):
        """0 where z lies in its cone, 1 or 2 where the projection is on the first or second ray, 3 where it is 0."""
        along = jnp.stack([jnp.sum(z * t[None], axis=1) for t in (self.first, self.second)])
        # Cells follow each other clockwise.
        inside = (_cross(self.first[None], z) <= 0) & (_cross(z, self.second[None]) <= 0)
        best = jnp.where(along[0] >= along[1], 1, 2)
        return jnp.where(inside, 0, jnp.where(jnp.max(along, axis=0) > 0, best, 3))

    def project(self, z: Float[Array, "2 2 cells"], place) -> Float[Array, "2 2 cells"]:
        t = jnp.where((place == 1)[:, None], self.first[None], self.second[None])
        on_ray = jnp.sum(z * t, axis=1, keepdims=True) * t
        place = place[:, None]
        return jnp.where(place == 0, z, jnp.where(place == 3, 0, on_ray))

    def margins(self, lines: Float[Array, "2 2 cells"], y) -> Float[Array, " n"]:
        return y * self.sites.lines(lines[0] - lines[1])

    def gram(self, b: Float[Array, "3 cells"]) -> Float[Array, "n n"]:
        """Σ_c [i, l ∈ c] x̃_iᵀ B_c x̃_l."""
        return self.sites.gram(b[jnp.array([0, 1, 1, 2])], slice(None))


def _cross(a, b):
    """Signed area, over the axis of coordinates of (2, 2, m)."""
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def solve(
    x: Float[Array, " n"],
    y: Float[Array, " n"],
    real: Bool[Array, " n"],
    allowed: Bool[Array, "2 cells"],
    wanted: Bool[Array, ""],
) -> Solution:
    """Solve the program on ascending points, n ≥ 2; those that are not `real` have λ = 0.

    Where it is not `wanted` nothing is done: a batch waits for its slowest lane, and for finished ones in vain.
    """
    cones = Cones(x)
    real_ = real.astype(x.dtype)

    def ingredients(lam):
        z = cones.forces(lam * y)
        place = cones.place(z)
        p = cones.project(z, place)
        return z, place, p, jnp.where(allowed, jnp.sum(p**2, axis=1), 0)

    def barrier(lam, mu, step):
        """Its value at λ + t `step`, as a function of t. Forces are linear in t, and summed only once."""
        first, second = cones.first, cones.second

        def along(force):
            z = cones.sites.pull(force * y)
            turns = first[0] * z[1] - first[1] * z[0], z[0] * second[1] - z[1] * second[0]
            return jnp.stack([*turns, jnp.sum(z * first, axis=0), jnp.sum(z * second, axis=0), *z])

        here, change = along(lam), along(step)

        def value(t):
            from_first, to_second, on_first, on_second, *z = here + t * change
            new, squared = lam + t * step, z[0] ** 2 + z[1] ** 2
            good, slacks = jnp.all(jnp.where(real, new > 0, True)), jnp.zeros_like(mu)
            for sign, some in zip((1, -1), allowed, strict=True):
                inside = (sign * from_first <= 0) & (sign * to_second <= 0)  # as in `Cones.place`
                on_ray = jnp.maximum(jnp.maximum(sign * on_first, sign * on_second), 0)
                h = jnp.where(some, jnp.where(inside, squared, on_ray**2), 0)
                good &= jnp.all(h < 1)
                slacks += jnp.sum(jnp.log1p(-jnp.where(h < 1, h, 0)))
            own = jnp.sum(jnp.where(real, new + mu * jnp.log(jnp.where(new > 0, new, 1)), 0))
            return jnp.where(good, own + mu * slacks, -jnp.inf)

        return value

    def direction(lam, mu, careful):
        _, place, p, squared = ingredients(lam)
        # The barrier that let λ in may have been rounded otherwise.
        slack = jnp.where(allowed, jnp.maximum(1 - squared, jnp.finfo(lam.dtype).eps), 1)
        lines = jnp.where(allowed[:, None], 2 * mu * p / slack[:, None], 0)
        gradient = real_ * (1 + mu / jnp.where(real, lam, 1) - cones.margins(lines, y))
        curve = jnp.where(careful, _curvature(cones, jnp.zeros_like(place)), _curvature(cones, place))
        b = jnp.where(allowed[:, None], 2 * mu * curve / slack[:, None], 0)
        b = b + jnp.where(allowed[:, None], 4 * mu * _outer(p) / slack[:, None] ** 2, 0)
        h = cones.gram(jnp.sum(b, axis=0)) * (y * real_)[:, None] * (y * real_)[None, :]
        own = jnp.where(real, mu / jnp.where(real, lam, 1) ** 2, 1)
        # Where x̃_i is orthogonal to the rays in use, rounding may leave less than nothing of their share.
        h = jnp.where(jnp.eye(own.size, dtype=bool), (jnp.maximum(jnp.diag(h), 0) + own)[None], h)
        scale = 1 / jnp.sqrt(jnp.diag(h))
        # Where one cell holds all points the rest of h is below its rounding: a pivot of 0 was seen (one label).
        h = h * scale[:, None] * scale[None, :] + _BARRIER_RIDGE * jnp.eye(own.size, dtype=h.dtype)
        step = scale * solver_of_positive_definite(h)(scale * gradient)
        return step, jnp.sum(step * gradient) / mu, lines

    # Beyond 1 too: h² has jumps in its second derivative, where Newton's steps may be much too short. Where they prove
    # too long, the next step is careful: as if all z were inside their cells, where the second derivative is largest.
    lengths = jnp.append(2.0 ** jnp.arange(8, -16, -1, dtype=x.dtype), 0)

    def iterate(path, accurate):
        """One Newton step, and whether μ is small enough."""
        count, lam, mu, careful, kept = path
        step, decrement, lines = direction(lam, mu, careful)
        mean = jnp.sum(lam) / jnp.sum(real_)
        kept = jnp.where(mu > _PRECISE * mean, lines, kept)
        # To at most 0.95 of the boundary λ = 0; that of the cells by trial.
        toward = jnp.where(real & (step < 0), -step / jnp.where(real, lam, 1), 0)
        tries = jnp.minimum(lengths, 0.95 / jnp.maximum(jnp.max(toward), 1e-30))
        values = jax.vmap(barrier(lam, mu, step))(tries)
        best, here = jnp.argmax(values[:-1]), values[-1]
        moved = values[best] >= here
        new = jnp.where(moved, lam + tries[best] * step, lam)
        near = jnp.where(careful, ~moved, decrement < 0.3)
        careful = ~near & (~moved | (tries[best] < 0.1))
        small = mu <= accurate * mean
        return (count + 1, new, jnp.where(~near | small, mu, _SHRINK * mu), careful, kept), near & small

    def goes_on(state):
        stage, _, best = state
        return wanted & (stage < len(_ACCURATE)) & ~(best.residual <= CERTAIN)

    def attempt(state):
        """On with the barrier to the next accuracy, and Newton's method from there."""
        stage, path, best = state
        accurate, last = jnp.asarray(_ACCURATE, x.dtype)[stage], stage == len(_ACCURATE) - 1
        idle = ~goes_on(state)  # a lane that waits for others
        path, _ = jax.lax.while_loop(
            lambda s: ~s[1] & (s[0][0] < _BARRIER), lambda s: iterate(s[0], accurate), (path, idle)
        )
        _, lam, mu, _, kept = path
        _, _, lines = direction(lam, mu, False)
        rounds = jnp.where(idle, 0, jnp.where(last, _ROUNDS, 2))
        found = _polish(cones, y, real, allowed, lam, mu, lines, kept, rounds)
        better = (found.residual < best.residual) | (stage == 0)
        return stage + 1, path, jax.tree.map(lambda a, b: jnp.where(better, a, b), found, best)

    one = cones.forces(real_ * y)
    place = cones.place(one)
    largest = jnp.sqrt(jnp.max(jnp.where(allowed, jnp.sum(cones.project(one, place) ** 2, axis=1), 0)))
    lam = real_ * 0.3 / jnp.where(largest > 0, largest, 1)
    path = jnp.zeros((), int), lam, _CENTRE * jnp.max(lam), jnp.array(False), jnp.zeros_like(one)
    nothing = Solution(jnp.zeros_like(lam), jnp.zeros_like(one), jnp.full((), jnp.inf, x.dtype))
    return jax.lax.while_loop(goes_on, attempt, (jnp.zeros((), int), path, nothing))[2]


def lower_bound(x: Float[Array, " n"], y: Float[Array, " n"], multipliers: Float[Array, " n"]) -> Float[Array, ""]:
    """A lower bound on ½‖θ‖² for every network of any width with margins ≥ 1, from any λ: Σλ/max_c h_c, λ < 0 as 0."""
    cones, lam = Cones(x), jnp.maximum(multipliers, 0)
    z = cones.forces(lam * y)
    largest = jnp.sqrt(jnp.max(jnp.sum(cones.project(z, cones.place(z)) ** 2, axis=1)))
    return jnp.sum(lam) / jnp.where(largest > 0, largest, jnp.inf)


def _polish(cones: Cones, y, real, allowed, lam, mu, lines, kept, rounds) -> Solution:
    """Newton's method on h_c = 1 and q_i = 1 of the constraints that are active at the end of the barrier.

    Amplitudes start as they were in `kept`: 2μ/(1 − h²) has lost its digits by the end, and those that are not unique
    would go astray.
    """
    n = cones.x.shape[0]
    total = jnp.sum(lam)
    support = real & (lam**2 > _ACTIVE * mu * total / n)
    size = jnp.sqrt(jnp.sum(lines**2, axis=1)).reshape(-1)
    # A product amplitude × slack is μ: active are those whose amplitude is the larger, both on their own scales.
    held = neurons_held(n)
    amplitude, index = jax.lax.top_k(size, held)
    in_use = amplitude**2 > _ACTIVE * mu * total
    sign, cell = index // (2 * n), index % (2 * n)
    amplitude = jnp.sqrt(jnp.sum(kept**2, axis=1))[sign, cell]
    # Across the ray that a projection is on lies a cell with the same z·t, as x̃_i ⊥ t. If its own z is off the ray, by
    # however little, its h is larger and this one below 1: the neuron belongs there.
    z = cones.forces(lam * y)
    place = cones.place(z)
    h = jnp.sum(cones.project(z, place) ** 2, axis=1)
    side = jnp.where(place[sign, cell] == 1, -1, 1).astype(cell.dtype)
    beyond = (cell + side) % (2 * n)
    goes = in_use & (place[sign, cell] > 0) & allowed[sign, beyond] & (h[sign, beyond] > h[sign, cell])
    into = goes[None, :] & ((sign * 2 * n + beyond)[None, :] == index[:, None])
    in_use = (in_use & ~goes) | jnp.any(into, axis=1)
    amplitude = jnp.where(goes, 0, amplitude) + into.astype(y.dtype) @ amplitude
    pattern = cones.active(cell).astype(y.dtype) * jnp.where(sign == 0, 1, -1).astype(y.dtype)[:, None] * y[None, :]

    def unit(lam):
        """‖P z‖ of all cells, and of those in use, with the direction of P z and its place."""
        z = cones.forces(lam * y)
        place = cones.place(z)
        p = cones.project(z, place)
        every = jnp.sqrt(jnp.sum(p**2, axis=1))
        h = every[sign, cell]
        return every, h, p[sign, :, cell].T / jnp.where(h > 0, h, 1)[None], place[sign, cell]

    def columns(e):
        """y_i s [i ∈ c] e·x̃_i."""
        return pattern * (e[0][:, None] * cones.x[None, :] + e[1][:, None])

    def step(lam, amplitude, support, in_use):
        """Newton's step for the constraints in use."""
        _, h, e, place = unit(lam)
        c = columns(e)
        # Inside its cell a unit vector turns with z, on a ray it does not.
        turn = columns(jnp.stack([-e[1], e[0]]))
        bend = jnp.where(in_use & (place == 0), amplitude / jnp.where(h > 0, h, 1), 0)
        k = (turn.T * bend[None]) @ turn * total
        gaps = jnp.concatenate([c.T @ amplitude - 1, h - 1])
        live = jnp.concatenate([support, in_use])
        c = c * total
        upper = jnp.concatenate([k, c.T], axis=1)
        lower = jnp.concatenate([c, jnp.zeros((held, held), y.dtype)], axis=1)
        matrix = jnp.where(live[:, None] & live[None, :], jnp.concatenate([upper, lower]), 0)
        most = jnp.max(jnp.abs(matrix), axis=1)
        scale = jnp.where(live & (most > 0), 1 / jnp.sqrt(jnp.where(most > 0, most, 1)), 1)
        matrix = scale[:, None] * matrix * scale[None, :]
        sign = jnp.concatenate([jnp.ones(n, y.dtype), -jnp.ones(held, y.dtype)])
        damped = matrix + jnp.diag(jnp.where(live, _PROXIMAL, 1) * sign)
        change = total * scale * solver_of_positive_definite(damped)(-scale * jnp.where(live, gaps, 0))
        change = jnp.where(jnp.all(jnp.isfinite(change)), change, 0)
        return lam + change[:n], amplitude + change[n:]

    def meet(g, t, free, amplitude, support):
        """`g` (2, held) with the least change, relative to amplitudes, that puts the margins of `support` at 1.

        Where points of different labels are close, λ are so large that rounding them turns z, and with it N.
        """
        # Directions that a line may change in: any inside its cell, along `t` on a ray.
        first = jnp.where(free[None], jnp.array([1.0, 0], y.dtype)[:, None], t)
        second = jnp.where(free[None], jnp.array([0, 1.0], y.dtype)[:, None], 0)
        a = columns(first) * support[None, :].astype(y.dtype), columns(second) * support[None, :].astype(y.dtype)
        gram = sum(part.T @ (amplitude[:, None] * part) for part in a)
        scale = 1 / jnp.sqrt(jnp.where(support & (jnp.diag(gram) > 0), jnp.diag(gram), 1))
        gram = scale[:, None] * gram * scale[None, :]
        invert = solver_of_positive_definite(gram + jnp.diag(jnp.where(support, _RIDGE, 1)))

        def correct(_, g):
            lack = jnp.where(support, 1 - jnp.sum(columns(g), axis=0), 0)
            pull = scale * invert(scale * lack)
            change = amplitude * (a[0] @ pull), amplitude * (a[1] @ pull)
            return g + first * change[0][None] + second * change[1][None]

        return jax.lax.fori_loop(0, 3, correct, g)

    def measured(lam, amplitude, support, every_h, e, place):
        """The solution, with its residual as `Solution` has it."""
        exact = meet(amplitude[None] * e, e, place == 0, jnp.maximum(amplitude, 0), support)
        small = jnp.max(jnp.abs(exact - amplitude[None] * e)) <= _ROUNDING * jnp.max(jnp.abs(amplitude))
        lines = jnp.zeros((2, 2, 2 * n), y.dtype).at[sign, :, cell].set(jnp.where(small, exact, amplitude[None] * e).T)
        whole = jnp.sum(lam)
        parts = (
            jnp.max(jnp.where(real, 1 - cones.margins(lines, y), 0)),
            jnp.max(jnp.where(allowed, every_h - 1, 0)),
            jnp.abs(jnp.sum(amplitude) / whole - 1),
            jnp.max(-lam) / whole,
            jnp.max(-amplitude) / whole,
        )
        residual = jnp.max(jnp.stack(parts))
        return Solution(lam, lines, jnp.where(jnp.isfinite(residual) & (whole > 0), residual, jnp.inf))

    def correct(state):
        """Newton's method, then violated constraints come, and of those that turned out negative the worst goes.

        In the first round nothing but measuring: what the barrier left may do.
        """
        round_, lam, amplitude, support, in_use, best = state
        lam, amplitude = jnp.where(support | (round_ == 0), lam, 0), jnp.where(in_use, amplitude, 0)
        steps = jnp.where(round_ == 0, 0, _POLISH)
        lam, amplitude = jax.lax.fori_loop(0, steps, lambda _, s: step(s[0], s[1], support, in_use), (lam, amplitude))
        every_h, h, e, place = unit(lam)
        q = columns(e).T @ amplitude
        now = measured(lam, amplitude, support, every_h, e, place)
        better = (now.residual < best.residual) | (round_ == 0)
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), now, best)
        worst = jnp.minimum(jnp.minimum(jnp.min(lam), jnp.min(amplitude)), -CERTAIN * total)
        changed = (
            real & ((support & (lam > worst)) | (q < 1 - CERTAIN)),
            (in_use & (amplitude > worst)) | (allowed[sign, cell] & (h > 1 + CERTAIN)),
        )
        support, in_use = jax.tree.map(lambda a, b: jnp.where(round_ == 0, a, b), (support, in_use), changed)
        return round_ + 1, lam, amplitude, support, in_use, best

    nothing = Solution(jnp.zeros_like(lam), jnp.zeros_like(lines), jnp.full_like(total, jnp.inf))
    start = (jnp.zeros((), int), lam, amplitude, support, in_use, nothing)
    *_, best = jax.lax.while_loop(lambda s: (s[-1].residual > CERTAIN) & (s[0] < rounds), correct, start)
    return best


def _outer(p):
    """(xx, xb, bb) entries of p pᵀ: (2, 3, cells) from (2, 2, cells)."""
    return jnp.stack([p[:, 0] ** 2, p[:, 0] * p[:, 1], p[:, 1] ** 2], axis=1)


def _curvature(cones: Cones, place):
    """The derivative of P z: identity, t tᵀ or 0, as (2, 3, cells)."""
    t = jnp.where((place == 1)[:, None], cones.first[None], cones.second[None])
    identity = jnp.array([1.0, 0, 1], cones.x.dtype)[None, :, None]
    place = place[:, None]
    return jnp.where(place == 0, identity, jnp.where(place == 3, 0, _outer(t)))
