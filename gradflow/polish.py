"""Newton's method on the constraints of the program for a limit (`program.py`) that are active at its optimum."""

import jax
import jax.numpy as jnp

from gradflow.clarke import solver_of_positive_definite
from gradflow.cones import Cones, Solution, neurons_held

CERTAIN = 1e-11  # what Newton's method leaves of a constraint that it meets
ROUNDS = 13  # in which the active constraints are corrected, at last; but for the first, which measures
_STEPS = 8  # for one set of active constraints
_ACTIVE = 30.0
_PROXIMAL = 1e-7
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
