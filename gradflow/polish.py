"""Newton's method on the constraints of the program for a limit (`program.py`) that are active at its optimum.

A neuron is on a ray t, where s z·t = 1, or inside a cell along a unit vector e, where s z = e. Its line is r e. With λ,
r and the angle of each e as unknowns the equations are

    q_i = Σ_k r_k C_ik = 1,    Σ_i λ_i C_ik = 1,    Σ_i λ_i C′_ik = 0,    C_ik = y_i s_k e_k·x̃_i on active points,

and C′ the derivative of C by the angle. The last, one an angle, are eliminated. That e is an unknown of its own matters
where two points are close: λ is as large as one over their distance, and cancels, so that z has lost digits that N must
have. Nearly singular in λ, the equations are not in values of G (`nodes`), in which they are solved in turn.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gradflow.barrier import Path
from gradflow.clarke import solver_of_positive_definite
from gradflow.cones import Cones, Solution, neurons_held

CERTAIN = 1e-11  # what Newton's method leaves of a constraint that it meets
ROUNDS = 13  # in which the active constraints are corrected, at last; but for the first, which measures
_STEPS = 8  # for one set of active constraints
_LARGE = 30.0  # times what a number is whose slack is, on its own scale, as large
_STAYS = 0.5  # of what it was at ten times μ: active ones are as they were, others a tenth, and degenerate ones 0.3
_PROXIMAL = 1e-7
_LOOSE = 1e-10  # rounding of margins over what it may change a value of G by


class Neurons(eqx.Module):
    """Amplitudes of neurons on each ray and inside each cell, which of them are in use, and the angles between t₁ and
    those inside: by sign, and ray or cell.
    """

    on_ray: Float[Array, "2 rays"]
    inside: Float[Array, "2 cells"]
    uses_ray: Bool[Array, "2 rays"]
    uses_cell: Bool[Array, "2 cells"]
    angle: Float[Array, "2 cells"]

    @property
    def amplitudes(self) -> Float[Array, " m"]:
        return jnp.concatenate([self.on_ray.reshape(-1), self.inside.reshape(-1)])

    @property
    def used(self) -> Bool[Array, " m"]:
        return jnp.concatenate([self.uses_ray.reshape(-1), self.uses_cell.reshape(-1)])

    def with_(self, amplitudes, used) -> "Neurons":
        (on_ray, inside), (uses_ray, uses_cell) = amplitudes.reshape(2, 2, -1), used.reshape(2, 2, -1)
        return Neurons(on_ray, inside, uses_ray, uses_cell, self.angle)

    def settled(self, cones: Cones, allowed, force) -> "Neurons":
        """Those on rays whose z leads into an allowed cell go inside it, those that have left their cell to its ray."""
        angle, deep = cones.angles(force)
        deep = deep & allowed
        # From a ray: into the cell before it, of which it is the second ray, or after it.
        after = cones.as_first(deep) & self.uses_ray
        before = deep & self.uses_ray & ~after
        enters = before | cones.first(after)
        gains = jnp.where(before, self.on_ray, 0) + cones.first(jnp.where(after, self.on_ray, 0))
        angle = jnp.where(enters & ~self.uses_cell, angle, self.angle)
        to_first = self.uses_cell & ~enters & (angle <= 0)
        to_second = self.uses_cell & ~enters & (angle >= cones.theta)
        lost = cones.as_first(jnp.where(to_first, self.inside, 0)) + jnp.where(to_second, self.inside, 0)
        stays = self.uses_ray & ~(before | after)
        return Neurons(
            jnp.where(stays, self.on_ray, 0) + lost,
            jnp.where(to_first | to_second, 0, self.inside) + gains,
            stays | cones.as_first(to_first) | to_second,
            (self.uses_cell & ~(to_first | to_second)) | enters,
            angle,
        )


def active(cones: Cones, path: Path, shares: Float[Array, "2 2 cells"]) -> tuple[Bool[Array, " n"], Neurons]:
    """The points and the neurons that the end of the barrier shows: those whose λ and whose `shares` of rays are as
    they were at ten times μ, on whatever scale; a product of such a number and a slack is μ, and one of both falls
    with it (El-Bakry, Tapia and Zhang 1994, on indicators).

    Amplitudes are as they were in `path.kept`: the last ones, μ over a slack, have lost their digits, and those that
    are not unique would go astray.
    """
    stays = (shares > _STAYS * path.earlier_shares) & (shares > 0)
    # Where rays are nearly opposite shares of them cancel, and fall as long as e turns: there the line that they make
    # counts, and which of them are not small.
    now, earlier = (a[0] ** 2 + a[1] ** 2 + 2 * cones.cos * a[0] * a[1] for a in (shares, path.earlier_shares))
    small = _LARGE * path.mu * jnp.sum(path.multipliers) / (2 * cones.sin)
    both = jnp.all(shares**2 > small[None], axis=0)
    larger = jnp.stack([shares[0] >= shares[1], shares[0] < shares[1]])
    line = (now > _STAYS**2 * earlier) & (now > 0)
    stays |= (cones.cos[None] <= 0) & line[None] & (both[None] | larger)
    inside = stays[0] & stays[1]
    first, second = stays[0] & ~inside, stays[1] & ~inside
    return path.multipliers > _STAYS * path.earlier_multipliers, Neurons(
        jnp.where(second, path.kept, 0) + cones.as_first(jnp.where(first, path.kept, 0)),
        jnp.where(inside, path.kept, 0),
        second | cones.as_first(first),
        inside,
        jnp.arctan2(path.inner[1], path.inner[0]) + 0.5 * cones.theta,
    )


def polish(cones: Cones, y, real, allowed, path: Path, shares, rounds) -> Solution:
    """Newton's method on the equations of the constraints that are active at the end of the barrier."""
    n, held = cones.x.shape[0], neurons_held(cones.x.shape[0])
    lam, total = path.multipliers, jnp.sum(path.multipliers)
    allowed &= cones.exists
    rays = allowed | cones.as_first(allowed)

    def rows(neurons: Neurons):
        """C and C′ of all neurons, as functions of which."""
        signs = jnp.array([1.0, -1.0], lam.dtype)[:, None, None] * y[None, None]
        of_rays = (signs * cones.values[None]).reshape(-1, n)
        first, turned = cones.values[cones.before][None], cones.from_first[None]
        cos, sin = jnp.cos(neurons.angle)[..., None], jnp.sin(neurons.angle)[..., None]
        c, turn = (signs * (cos * a + sin * b) for a, b in ((first, turned), (turned, -first)))
        inside, turn = c.reshape(-1, n), turn.reshape(-1, n)
        return jnp.concatenate([of_rays, inside]), jnp.concatenate([jnp.zeros_like(of_rays), turn])

    def step(lam, neurons: Neurons, support, by_nodes):
        """Newton's step for the constraints in use."""
        c, turn = rows(neurons)
        amplitudes, used = neurons.amplitudes, neurons.used
        slot = jax.lax.top_k(jnp.where(used, jnp.abs(amplitudes), -1), held)[1]
        c, turn, amplitude, in_use = c[slot].T, turn[slot].T, amplitudes[slot], used[slot]
        c, turn = jnp.where(in_use[None], c, 0), jnp.where(in_use[None], turn, 0)
        along, across = lam @ c, lam @ turn
        basis = jnp.where(by_nodes, nodes(cones.x, support) * y[:, None], jnp.eye(n, dtype=lam.dtype))
        bend = jnp.where(in_use, amplitude / jnp.where(along > 0, along, 1), 0)
        lack = (c @ amplitude - 1 + turn @ (bend * across)) @ basis
        c, turn = basis.T @ c, basis.T @ turn
        k = (turn * bend[None]) @ turn.T
        live = jnp.concatenate([support, in_use])
        upper = jnp.concatenate([k, c], axis=1)
        lower = jnp.concatenate([c.T, jnp.zeros((held, held), lam.dtype)], axis=1)
        matrix = jnp.where(live[:, None] & live[None, :], jnp.concatenate([upper, lower]), 0)
        # Forces that change G by 1 or turn z by 1, and amplitudes of the size of all: no entry is far above 1 then.
        reach = jnp.where(by_nodes, 1, jnp.max(c**2, axis=1))
        largest = jnp.maximum(jnp.diag(k), total * jnp.where(support & (reach > 0), reach, 1))
        scale = jnp.concatenate([1 / jnp.sqrt(largest), jnp.full((held,), jnp.sqrt(total))])
        sign = jnp.concatenate([jnp.ones(n, lam.dtype), -jnp.ones(held, lam.dtype)])
        # Margins are rounded: along numbers that nothing fixes, that must not drive λ far.
        loose = jnp.maximum(_PROXIMAL, _LOOSE * jnp.sum(jnp.abs(basis), axis=0))
        loose = jnp.concatenate([loose, jnp.full((held,), _PROXIMAL, lam.dtype)])
        damped = scale[:, None] * matrix * scale[None, :] + jnp.diag(jnp.where(live, loose, 1) * sign)
        gaps = jnp.where(live, jnp.concatenate([lack, jnp.where(in_use, along - 1, 0)]), 0)
        change = scale * solver_of_positive_definite(damped)(-scale * gaps)
        change = jnp.where(jnp.all(jnp.isfinite(change)), change, 0)
        angles = (across + turn.T @ change[:n]) / jnp.where(along > 0, along, 1)
        angles = jnp.zeros_like(amplitudes).at[slot].set(jnp.where(in_use, angles, 0))[neurons.on_ray.size :]
        amplitudes = amplitudes.at[slot].add(change[n:])
        neurons = neurons.with_(jnp.where(used, amplitudes, 0), used)
        angle = neurons.angle + angles.reshape(2, -1)
        # Far beyond its cell means nothing.
        angle = jnp.clip(angle, -cones.theta, 2 * cones.theta)
        return lam + basis @ change[:n], eqx.tree_at(lambda s: s.angle, neurons, angle)

    def lines(neurons: Neurons):
        """By sign, coordinate and cell; on a ray, in a cell that is allowed."""
        after = cones.as_first(allowed)
        on_ray = neurons.on_ray[:, None] * cones.rays[None]
        first, second = jnp.where(after[:, None], on_ray, 0), jnp.where(after[:, None], 0, on_ray)
        return neurons.inside[:, None] * cones.unit(neurons.angle) + cones.first(first) + second

    def measured(lam, neurons: Neurons):
        """The solution, with its residual as `Solution` has it, and its margins."""
        # Beyond their cell neurons would have other active points.
        neurons = eqx.tree_at(lambda s: s.angle, neurons, jnp.clip(neurons.angle, 0, cones.theta))
        c, turn = rows(neurons)
        amplitudes = neurons.amplitudes
        q, along, across = amplitudes @ c, c @ lam, turn @ lam
        whole = jnp.sum(lam)
        root = jnp.sqrt(jnp.maximum(amplitudes, 0) / whole)
        # On a ray z may be on either side of it, but not inside an allowed cell.
        deep = allowed & cones.angles(lam * y)[1]
        first, second = (jnp.where(deep, a, 0) for a in cones.across(lam * y))
        turned = jnp.concatenate([(cones.as_first(first) + second).reshape(-1), jnp.zeros(4 * n, lam.dtype)])
        parts = (
            jnp.max(jnp.where(real, 1 - q, 0)),
            jnp.max(jnp.where(allowed, cones.sizes(lam * y) - 1, 0)),
            jnp.abs(jnp.sum(amplitudes) / whole - 1),
            jnp.max(-lam) / whole,
            jnp.max(-amplitudes) / whole,
            # What a neuron √r (e, 1) is off √r (s z, 1).
            jnp.max(root * jnp.maximum(jnp.abs(along - 1), jnp.maximum(jnp.abs(across), turned))),
        )
        residual = jnp.max(jnp.stack(parts))
        residual = jnp.where(jnp.isfinite(residual) & (whole > 0), residual, jnp.inf)
        return Solution(lam, lines(neurons), residual), q

    def correct(state):
        """Newton's method, then violated constraints come, and of those that turned out negative the worst goes.

        In the first round nothing but measuring: what the barrier left may do.
        """
        round_, lam, neurons, support, best = state
        lam = jnp.where(support | (round_ == 0), lam, 0)
        steps = jnp.where(round_ == 0, 0, _STEPS)
        # By values of G in turn with λ itself: each finds constraints that the other does not.
        newton = ft.partial(step, support=support, by_nodes=round_ % 2 == 0)
        lam, neurons = jax.lax.fori_loop(0, steps, lambda _, s: newton(*s), (lam, neurons))
        now, q = measured(lam, neurons)
        better = (now.residual < best.residual) | (round_ == 0)
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), now, best)
        changed = neurons.settled(cones, allowed, lam * y)
        worst = jnp.minimum(jnp.minimum(jnp.min(lam), jnp.min(changed.amplitudes)), -CERTAIN * total)
        angle, deep = cones.angles(lam * y)
        over = cones.sizes(lam * y) > 1 + CERTAIN
        new_cell = allowed & deep & over & ~changed.uses_cell
        beside = (allowed & deep) | cones.as_first(allowed & deep)
        new_ray = rays & ~beside & (cones.on_rays(lam * y) > 1 + CERTAIN)
        used = changed.used & (changed.amplitudes > worst)
        used |= jnp.concatenate([new_ray.reshape(-1), new_cell.reshape(-1)])
        changed = changed.with_(jnp.where(used, changed.amplitudes, 0), used)
        changed = eqx.tree_at(lambda s: s.angle, changed, jnp.where(new_cell, angle, changed.angle))
        points = real & ((support & (lam > worst)) | (q < 1 - CERTAIN))
        support, neurons = jax.tree.map(
            lambda a, b: jnp.where(round_ == 0, a, b), (support, neurons), (points, changed)
        )
        return round_ + 1, lam, neurons, support, best

    nothing = Solution(jnp.zeros_like(lam), jnp.zeros((2, 2, 2 * n), lam.dtype), jnp.full_like(total, jnp.inf))
    support, neurons = active(cones, path, shares)
    start = (jnp.zeros((), int), lam, neurons, real & support, nothing)
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
