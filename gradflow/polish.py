"""Newton's method on the constraints of the program for a limit (`program.py`) that are active at its optimum.

Where two points of the support are close, λ is as large as one over their distance, and cancels; nearly singular in λ,
the equations are not in values of G (`nodes`), in which they are solved.
"""

import functools as ft

import jax
import jax.numpy as jnp

from gradflow.clarke import solver_of_positive_definite
from gradflow.cones import Cones, Solution, neurons_held

CERTAIN = 1e-11  # what Newton's method leaves of a constraint that it meets
ROUNDS = 13  # in which the active constraints are corrected, at last; but for the first, which measures
_STEPS = 8  # for one set of active constraints
_ACTIVE = 30.0
_PROXIMAL = 1e-7
_LOOSE = 1e-10  # rounding of margins over what it may change a value of G by
_RIDGE = 1e-13
_ROUNDING = 1e-9  # of the amplitudes, up to which lines may be changed to make up for rounding


def polish(cones: Cones, y, real, allowed, lam, mu, lines, kept, rounds) -> Solution:
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

    def step(lam, amplitude, support, in_use, by_nodes):
        """Newton's step for the constraints in use."""
        _, h, e, place = unit(lam)
        basis = y[:, None] * jnp.where(by_nodes, nodes(cones.x, support), jnp.eye(n, dtype=y.dtype))
        c = columns(e)
        lack = (c.T @ amplitude - 1) @ basis
        # Inside its cell a unit vector turns with z, on a ray it does not.
        c, turn = c @ basis, columns(jnp.stack([-e[1], e[0]])) @ basis
        bend = jnp.where(in_use & (place == 0), amplitude / jnp.where(h > 0, h, 1), 0)
        k = (turn.T * bend[None]) @ turn
        gaps = jnp.concatenate([lack, h - 1])
        live = jnp.concatenate([support, in_use])
        upper = jnp.concatenate([k, c.T], axis=1)
        lower = jnp.concatenate([c, jnp.zeros((held, held), y.dtype)], axis=1)
        matrix = jnp.where(live[:, None] & live[None, :], jnp.concatenate([upper, lower]), 0)
        # Forces that change G by 1 or turn z by 1, and amplitudes of the size of all: no entry is far above 1 then.
        reach = jnp.where(by_nodes, 1, jnp.max(jnp.where(in_use[:, None], c**2, 0), axis=0))
        largest = jnp.maximum(jnp.diag(k), total * jnp.where(support & (reach > 0), reach, 1))
        scale = jnp.concatenate([1 / jnp.sqrt(largest), jnp.full((held,), jnp.sqrt(total))])
        sign = jnp.concatenate([jnp.ones(n, y.dtype), -jnp.ones(held, y.dtype)])
        # Margins are rounded: along numbers that nothing fixes, that must not drive λ far.
        loose = jnp.maximum(_PROXIMAL, _LOOSE * jnp.sum(jnp.abs(basis), axis=0))
        loose = jnp.concatenate([loose, jnp.full((held,), _PROXIMAL, y.dtype)])
        damped = scale[:, None] * matrix * scale[None, :] + jnp.diag(jnp.where(live, loose, 1) * sign)
        change = scale * solver_of_positive_definite(damped)(-scale * jnp.where(live, gaps, 0))
        change = jnp.where(jnp.all(jnp.isfinite(change)), change, 0)
        return lam + basis @ change[:n], amplitude + change[n:]

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
        change = exact - amplitude[None] * e
        small = jnp.max(jnp.abs(change)) <= _ROUNDING * jnp.max(jnp.abs(amplitude))
        lines = jnp.zeros((2, 2, 2 * n), y.dtype).at[sign, :, cell].set(jnp.where(small, exact, amplitude[None] * e).T)
        whole = jnp.sum(lam)
        root = jnp.sqrt(jnp.where(amplitude > 0, amplitude, jnp.inf) * whole)
        change = jnp.where(small, change, 0)  # what is not made up for, margins lack
        parts = (
            jnp.max(jnp.where(real, 1 - cones.margins(lines, y), 0)),
            jnp.max(jnp.where(allowed, every_h - 1, 0)),
            jnp.abs(jnp.sum(amplitude) / whole - 1),
            jnp.max(-lam) / whole,
            jnp.max(-amplitude) / whole,
            # What a neuron √|g| (g/|g|, 1) then is off √|g| (z, 1).
            jnp.max(jnp.abs(change) / root[None]),
        )
        residual = jnp.max(jnp.stack(parts))
        return Solution(lam, lines, jnp.where(jnp.isfinite(residual) & (whole > 0), residual, jnp.inf))

    def correct(state):
        """Newton's method, then violated constraints come, and of those that turned out negative the worst goes.

        In the first round nothing but measuring: what the barrier left may do.
        """
        round_, lam, amplitude, support, in_use, best = state
        lam, amplitude = jnp.where(support | (round_ == 0), lam, 0), jnp.where(in_use, amplitude, 0)
        steps = jnp.where(round_ == 0, 0, _STEPS)
        # By values of G in turn with λ itself: each finds constraints that the other does not.
        newton = ft.partial(step, support=support, in_use=in_use, by_nodes=round_ % 2 == 0)
        lam, amplitude = jax.lax.fori_loop(0, steps, lambda _, s: newton(*s), (lam, amplitude))
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


def nodes(x, support):
    """Forces y λ of the points of `support` that change one number each: a basis (n, n), a column a number.

    G(u) = Σ λ_i y_i max(0, u·x̃_i) is linear in (1, −ξ) between neighbouring points, so it is given by its values at the
    rays (1, −x_i), and one at a ray (−1, x_i). These are of order 1 where λ is as large as one over the distance of
    two points, and cancels. The last point, beyond which nothing is active at (1, −x_i), has the left-facing value.
    """
    index = jnp.arange(x.shape[0])
    before = jax.lax.cummax(jnp.where(support, index, -1))
    before = jnp.concatenate([jnp.full((1,), -1, before.dtype), before[:-1]])
    after = jax.lax.cummin(jnp.where(support, index, x.shape[0]), reverse=True)
    after = jnp.concatenate([after[1:], jnp.full((1,), x.shape[0], after.dtype)])
    first, last = jnp.argmax(support), x.shape[0] - 1 - jnp.argmax(support[::-1])
    length = x[last] - x[first]

    def over(distance):
        return jnp.where(distance > 0, 1 / jnp.where(distance > 0, distance, 1), 1)

    left = over(x - x[jnp.maximum(before, 0)])
    right = over(x[jnp.minimum(after, x.shape[0] - 1)] - x)
    row = index[:, None]
    own = jnp.where(index == first, over(length), -left) - right
    hat = jnp.where(row == index[None], own[None], 0)
    hat += jnp.where((row == before[None]) & (index != first)[None], left[None], 0)
    hat += jnp.where(row == after[None], right[None], 0)
    hat = jnp.where((index == last)[None], jnp.where(row == first, over(length), 0), hat)
    return jnp.where(support[:, None] & support[None], hat * jnp.hypot(1, x)[None], 0)
