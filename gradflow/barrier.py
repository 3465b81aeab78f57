"""A barrier for the program of a limit (`program.py`), followed to its optimum by Newton's method.

That h_c(z) ≤ 1 on a cone C between unit rays t₁ and t₂ is that some e with |e| ≤ 1 is at least z on both rays,
e·t ≥ z·t (weak duality, and e = P_c z). So with one such e for each allowed pair of a sign and a cell,

    maximise  Σ λ_i + μ [Σ log λ_i + Σ_A (log(1 − |e|²) + log d₁ + log d₂)],   d_k = (e − s z)·t_k.

h² alone has jumps in its second derivative at the rays, closer to each other the closer points lie, between which
Newton's method went back and forth. Here nothing jumps: all terms are self-concordant, for which Newton's method finds
its way whatever the scale and the shape of the problem (Nesterov and Nemirovskii 1994, 2.2). At a stationary point a
line is g = μ (t₁/d₁ + t₂/d₂), which lies in the cone, is parallel to e, and costs ‖g‖ = 2 μ |e|/(1 − |e|²); margins are
1 + μ/λ_i.

**Newton's equations.** All vectors of a cell are taken in the frame of its bisector, in which t₁ = (cos, −sin) and
t₂ = (cos, sin) of half its angle: sums and differences of d₁ and d₂ then keep their digits where both rays are nearly
the same or nearly opposite. Let K have the rows t₁ and t₂, D = diag(d), r = 1 − |e|², Q = 2/r + 4 e eᵀ/r² and
R = K⁻¹ D² K⁻ᵀ. With ν = 1/d + δ(1/d), and y = Kᵀ ν = g/μ, stationarity in e is Q δe = y − 2 e/r, and K δe − s K δz = δd
= d − D² ν. So

    (R + Q⁻¹) y = K⁻¹ d + e r/(1 + |e|²) + s δz,

2 × 2, and with Σ_A s y·x̃_i = 1/μ + 1/λ_i − δλ_i/λ_i² that is an equation for λ alone. In cells that are not wide, and
in the matrix for λ, ν is taken by both rays instead, (D² + K Q⁻¹ Kᵀ) ν = K (…): many values on rays are 0 exactly.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gradflow.clarke import solver_of_positive_definite
from gradflow.cones import Cones

_CENTRE = 1e4  # first μ over the first λ: a path that starts in the middle stays there
_SHRINK = 0.1  # of μ, once a Newton step was short
_NEAR = 0.3  # squared length of a Newton step, in the metric of the second derivative, that is short
_MOST = 0.98  # of the way to the boundary
_LENGTHS = 2.0 ** np.arange(3, -13, -1)  # of steps that are tried
_PRECISE = 1e-8  # μ over the mean λ down to which amplitudes have their digits
_RIDGE = 1e-14  # what is below the rounding of a second derivative


class Path(eqx.Module):
    """A point of the barrier: λ; e, by coordinate, sign and cell; d, by ray, sign and cell; and 1 − |e|². The last two
    are carried along, as they have more digits than the differences that they are. `kept` are the amplitudes ‖g‖ of
    the last point at which they were precise; `centred` whether μ has begun to fall. `earlier_multipliers` and
    `earlier_shares`: λ and μ/d at the end of the last μ, ten times as large.
    """

    steps: Int[Array, ""]
    multipliers: Float[Array, " n"]
    inner: Float[Array, "2 2 cells"]
    slack: Float[Array, "2 2 cells"]
    room: Float[Array, "2 cells"]
    mu: Float[Array, ""]
    centred: Bool[Array, ""]
    kept: Float[Array, "2 cells"]
    earlier_multipliers: Float[Array, " n"]
    earlier_shares: Float[Array, "2 2 cells"]


class Response(eqx.Module):
    """How the dual variables of each cell answer: (R + Q⁻¹)⁻¹ in the frame of its bisector, (D² + K Q⁻¹ Kᵀ)⁻¹ by its
    rays, entries 11, 22 and 12 by sign and cell, 0 where none is allowed; and r/(1 + |e|²).
    """

    cones: Cones
    in_frame: Float[Array, "3 2 cells"]
    by_rays: Float[Array, "3 2 cells"]
    share: Float[Array, "2 cells"]

    def __init__(self, cones: Cones, allowed, path: Path):
        (cos, sin), (a, b), (d1, d2), room = cones.half, path.inner, path.slack, path.room
        over = 1 + a**2 + b**2
        half = 0.5 * room / over  # Q⁻¹ = r/2 − r e eᵀ/(1 + |e|²)
        q_aa, q_bb, q_ab = half * (room + 2 * b**2), half * (room + 2 * a**2), -2 * half * a * b
        p1, p2 = (half * (room + 2 * (cos * b + side * sin * a) ** 2) for side in (1, -1))  # t Q⁻¹ t
        # Sums of positive terms: nothing cancels.
        determinant = d1**2 * d2**2 + d1**2 * p2 + d2**2 * p1 + cos**2 * sin**2 * room**3 / over
        mean, twist = 0.25 * (d1**2 + d2**2), 0.25 * (d2 - d1) * (d2 + d1)
        frame = jnp.stack([mean / sin**2 + q_bb, mean / cos**2 + q_aa, -twist / (cos * sin) - q_ab])
        rays = jnp.stack([d2**2 + p2, d1**2 + p1, sin**2 * q_bb - cos**2 * q_aa])
        self.cones, self.share = cones, 2 * half
        self.in_frame = jnp.where(allowed[None], 4 * cos[None] ** 2 * sin[None] ** 2 * frame / determinant[None], 0)
        self.by_rays = jnp.where(allowed[None], rays / determinant[None], 0)

    def duals(self, frame: Float[Array, "2 2 cells"], rays: Float[Array, "2 2 cells"]):
        """y in the frame of the bisector, and ν by rays, from the right side of their equation in both.

        ν follows from y in wide cells, and by rays in others: each would lose its digits in the other's.
        """
        cos, sin = self.cones.half
        y, nu = (
            jnp.stack([r[0] * v[0] + r[2] * v[1], r[2] * v[0] + r[1] * v[1]])
            for r, v in ((self.in_frame, frame), (self.by_rays, rays))
        )
        wide = 0.5 * jnp.stack([y[0] / cos - y[1] / sin, y[0] / cos + y[1] / sin])
        return y, jnp.where(self.cones.cos[None] > 0, nu, wide)

    def gram(self, values: Float[Array, "cells n"]) -> Float[Array, "n n"]:
        """The matrix for λ, from values on rays, of which many are 0 exactly: neighbours have a cell between them."""
        s11, s22, s12 = jnp.sum(self.by_rays, axis=1)[..., None]
        before, after = self.cones.before, self.cones.after
        return values.T @ ((s22 + s11[after]) * values + s12 * values[before] + (s12 * values)[after])


class Barrier(eqx.Module):
    """The barrier for neurons in `allowed` cells: from λ, `frame` (2, 2n, n) are both coordinates of z in the frame of
    its cell's bisector, and `values` (2n, n) its values on rays.
    """

    cones: Cones
    real: Bool[Array, " n"]
    allowed: Bool[Array, "2 cells"]
    frame: Float[Array, "2 cells n"]
    values: Float[Array, "cells n"]

    def __init__(self, cones: Cones, y, real, allowed):
        self.cones, self.real, self.allowed = cones, real, allowed & cones.exists
        cos, sin = cones.half[:, 0, :, None]
        first, turned, y = cones.values[cones.before], cones.from_first, jnp.where(real, y, 0)
        frame = jnp.stack([cos * first + sin * turned, cos * turned - sin * first])
        self.frame = jnp.where(cones.exists[0][None, :, None], frame * y[None, None], 0)
        self.values = cones.values * y[None]

    def forces(self, lam: Float[Array, " n"]) -> Float[Array, "2 2 cells"]:
        """s z, by coordinate, sign and cell."""
        z = self.frame @ lam
        return jnp.stack([z, -z], axis=1)

    def forces_on_rays(self, lam: Float[Array, " n"]) -> Float[Array, "2 2 cells"]:
        """s z·t, by ray, sign and cell."""
        second = self.values @ lam
        both = jnp.stack([self.cones.first(second), second])
        return jnp.stack([both, -both], axis=1)

    def on_rays(self, vector: Float[Array, "2 2 cells"]) -> Float[Array, "2 2 cells"]:
        """K times a vector."""
        along, across = self.cones.half[0] * vector[0], self.cones.half[1] * vector[1]
        return jnp.stack([along - across, along + across])

    def from_rays(self, values: Float[Array, "2 2 cells"]) -> Float[Array, "2 2 cells"]:
        """K⁻¹ times values on both rays."""
        cos, sin = self.cones.half
        return jnp.stack([(values[0] + values[1]) / (2 * cos), (values[1] - values[0]) / (2 * sin)])

    def start(self) -> Path:
        """The middle of the cones, for z = 0, with λ so small that they are inside."""
        inner = jnp.zeros((2, *self.allowed.shape), self.frame.dtype).at[0].set(0.5**0.5)
        on_rays, real = self.on_rays(inner), self.real.astype(self.frame.dtype)
        largest = jnp.max(jnp.where(self.allowed[None], self.forces_on_rays(real) / on_rays, 0))
        lam = real * 0.3 / jnp.where(largest > 0, largest, 1)
        slack = jnp.where(self.allowed[None], on_rays - self.forces_on_rays(lam), 1)
        room = jnp.where(self.allowed, 0.5, jnp.ones_like(slack[0]))
        return Path(
            steps=jnp.zeros((), int),
            multipliers=lam,
            inner=inner,
            slack=slack,
            room=room,
            mu=_CENTRE * jnp.max(lam),
            centred=jnp.array(False),
            kept=jnp.zeros_like(room),
            earlier_multipliers=lam,
            earlier_shares=jnp.zeros_like(slack),
        )

    def amplitudes(self, path: Path) -> Float[Array, "2 cells"]:
        """‖g‖, by sign and cell."""
        return jnp.where(self.allowed, 2 * path.mu * jnp.sqrt(jnp.sum(path.inner**2, axis=0)) / path.room, 0)

    def shares(self, path: Path) -> Float[Array, "2 2 cells"]:
        """μ/d, a line's share of each of its rays: by ray, sign and cell."""
        return jnp.where(self.allowed[None], path.mu / path.slack, 0)

    def newton(self, path: Path):
        """Newton's step of λ (n,), and of d and e (2, 2, 2n)."""
        lam, e, d = path.multipliers, path.inner, path.slack
        response = Response(self.cones, self.allowed, path)
        # What rounding has left of d = K (e − s z) is made up for.
        frame = 2 * self.from_rays(d) - e + self.forces(lam) + response.share[None] * e
        rays = 2 * d - self.on_rays(e) + self.forces_on_rays(lam) + response.share[None] * self.on_rays(e)
        pull = response.duals(frame, rays)[1]
        first, second = pull[:, 0] - pull[:, 1]
        safe = jnp.where(self.real, lam, 1)
        gradient = 1 / path.mu + 1 / safe - (self.cones.as_first(first) + second) @ self.values
        matrix = response.gram(self.values) + jnp.diag(jnp.where(self.real, 1 / safe**2, 1))
        unit = 1 / jnp.sqrt(jnp.diag(matrix))
        matrix = unit[:, None] * matrix * unit[None, :] + _RIDGE * jnp.eye(unit.size, dtype=unit.dtype)
        change = unit * solver_of_positive_definite(matrix)(unit * jnp.where(self.real, gradient, 0))
        change = jnp.where(self.real, change, 0)
        y, nu = response.duals(frame + self.forces(change), rays + self.forces_on_rays(change))
        inner = 2 * jnp.sum(e * y, axis=0) / (1 + jnp.sum(e**2, axis=0))
        of_e = 0.5 * path.room[None] * (y - inner[None] * e) - response.share[None] * e
        return change, *(jnp.where(self.allowed[None], part, 0) for part in (d * (1 - d * nu), of_e))

    def step(self, path: Path, accurate):
        """One Newton step, and whether μ is small enough and the step was short."""
        lam, e = path.multipliers, path.inner
        mean = jnp.sum(lam) / jnp.sum(self.real.astype(lam.dtype))
        change, of_d, of_e = self.newton(path)
        relative, of_d = jnp.where(self.real, change / jnp.where(self.real, lam, 1), 0), of_d / path.slack
        across, size = jnp.sum(e * of_e, axis=0) / path.room, jnp.sum(of_e**2, axis=0) / path.room
        near = jnp.sum(relative**2) + jnp.sum(of_d**2) + jnp.sum(2 * size + 4 * across**2) < _NEAR
        # One over the way to each boundary.
        ways = jnp.max(-relative), jnp.max(-of_d), jnp.max(across + jnp.sqrt(across**2 + size))
        most = _MOST / jnp.maximum(jnp.max(jnp.stack(ways)), 1e-30)

        def gain(t):
            terms = jnp.sum(jnp.log1p(t * relative)), jnp.sum(jnp.log1p(t * of_d))
            rooms = jnp.log1p(-(2 * t * across + t**2 * size))
            return t * jnp.sum(change) / path.mu + sum(terms) + jnp.sum(rooms)

        tries = jnp.minimum(jnp.asarray(_LENGTHS, lam.dtype), most)
        gains = jax.vmap(gain)(tries)
        best = jnp.argmax(jnp.where(jnp.isnan(gains), -jnp.inf, gains))
        taken = jnp.where(gains[best] > 0, tries[best], 0)
        small, precise = path.mu <= accurate * mean, path.mu > _PRECISE * mean
        over = near | (taken == 0)
        centred = path.centred | over  # until then λ may grow by magnitudes, and μ with it
        falls = over & ~small
        path = Path(
            steps=path.steps + 1,
            multipliers=lam + taken * change,
            inner=e + taken * of_e,
            slack=path.slack * (1 + taken * of_d),
            room=path.room * (1 - (2 * taken * across + taken**2 * size)),
            mu=jnp.where(centred, jnp.where(falls, _SHRINK * path.mu, path.mu), _CENTRE * jnp.max(lam)),
            centred=centred,
            kept=jnp.where(near & precise, self.amplitudes(path), path.kept),
            earlier_multipliers=jnp.where(falls, lam, path.earlier_multipliers),
            earlier_shares=jnp.where(falls, self.shares(path), path.earlier_shares),
        )
        return path, over & small
