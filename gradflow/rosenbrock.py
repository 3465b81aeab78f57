"""Rodas4, a stiffly accurate Rosenbrock method of order 4, as a Diffrax solver.

A Rosenbrock method needs one factorisation and no Newton iteration a step. Written for K_i, with σ = 1/(hγ) and J the
Jacobian at the start of the step (Hairer and Wanner 1996, IV.7, eq. 7.25, autonomous form):

    (σ I − J) K_i = f(y_0 + Σ_{j<i} a_ij K_j) + (1/h) Σ_{j<i} c_ij K_j

Stage 6 starts from y_0 + Σ a_5j K_j + K_5, the result is y_1 = (that point) + K_6, and K_6 is the error estimate
(order 3 embedded). Coefficients of RODAS: Hairer and Wanner 1996, and their Fortran code of that name (method 1).
"""

from typing import ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

_GAMMA = 0.25
# Row i: how the point at which stage i + 1 is taken, and its right side (over h), depend on K_1 … K_5.
_A = np.array(
    [
        (0, 0, 0, 0, 0),
        (1.544000000000000, 0, 0, 0, 0),
        (0.9466785280815826, 0.2557011698983284, 0, 0, 0),
        (3.314825187068521, 2.896124015972201, 0.9986419139977817, 0, 0),
        (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.6878860361058950, 0),
        (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.6878860361058950, 1),
    ]
)
_C = np.array(
    [
        (0, 0, 0, 0, 0),
        (-5.668800000000000, 0, 0, 0, 0),
        (-2.430093356833875, -0.2063599157091915, 0, 0, 0),
        (-0.1073529058151375, -9.594562251023355, -20.47028614809616, 0, 0),
        (7.496443313967647, -10.24680431464352, -33.99990352819905, 11.70890893206160, 0),
        (8.083246795921522, -7.981132988064893, -31.52159432874371, 16.31930543123136, -6.058818238834054),
    ]
)
_D = np.array(
    [
        (10.12623508344586, -7.487995877610167, -34.80091861555747, -7.992771707568823, 1.025137723295662),
        (-0.6762803392801253, 6.087714651680015, 16.43084320892478, 24.76722511418386, -6.594389125716872),
    ]
)


class RodasInterpolation(diffrax.AbstractLocalInterpolation):
    """Dense output of Rodas4, of order 3: (1−s) y_0 + s (y_1 + (1−s)(d_2 + s d_3)) with s = (t − t_0)/(t_1 − t_0)."""

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    y0: PyTree
    y1: PyTree
    d2: PyTree
    d3: PyTree

    def evaluate(self, t0, t1=None, left=True):
        del left
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        length = self.t1 - self.t0
        s = jnp.where(length > 0, (t0 - self.t0) / jnp.where(length > 0, length, 1), 0)
        return jax.tree.map(
            lambda a, b, c, d: (1 - s) * a + s * (b + (1 - s) * (c + s * d)), self.y0, self.y1, self.d2, self.d3
        )


class Rodas4(diffrax.AbstractAdaptiveSolver):
    """Rodas4 for autonomous `diffrax.ODETerm`s.

    If the vector field offers `resolvent(y, sigma)`, a function r ↦ (σI − J)^{−1} r, that solves the linear systems;
    otherwise J is formed by forward-mode differentiation and factorised densely. The Jacobian must be exact: with an
    inexact one the order drops. A field that depends on time is treated as if it did not: append t to the state.
    """

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = RodasInterpolation

    def order(self, terms):
        return 4

    def init(self, terms, t0, t1, y0, args):
        return None

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        h = jnp.asarray(t1 - t0)
        # A lane that is done steps with h = 0: a positive stand-in keeps reverse-mode derivatives finite there.
        h = jnp.where(h > 0, h, 1e-3)
        sigma = 1 / (h * _GAMMA)
        own = getattr(getattr(terms, "vector_field", None), "resolvent", None)
        solve = dense_resolvent(lambda y: terms.vf(t0, y, args), y0, sigma) if own is None else own(y0, sigma)

        # One stage a round of a loop, so that the field and the linear solve are compiled once.
        def stage(stages, row):
            i, a, c = row
            slope = terms.vf(t0, _add(y0, stages, a), args)
            new = solve(_add(slope, stages, c / h))
            return jax.tree.map(lambda ks, k: ks.at[i].set(k, mode="drop"), stages, new), new

        empty = jax.tree.map(lambda leaf: jnp.zeros((5, *jnp.shape(leaf)), jnp.result_type(leaf)), y0)
        stages, every = jax.lax.scan(stage, empty, (jnp.arange(6), *(jnp.asarray(m, h.dtype) for m in (_A, _C))))
        error = jax.tree.map(lambda ks: ks[5], every)
        y1 = jax.tree.map(jnp.add, _add(y0, stages, _A[5]), error)
        zero = jax.tree.map(jnp.zeros_like, y0)
        dense = dict(y0=y0, y1=y1, d2=_add(zero, stages, _D[0]), d3=_add(zero, stages, _D[1]))
        return y1, error, dense, None, diffrax.RESULTS.successful


def dense_resolvent(function, y, sigma):
    """r ↦ (σI − J)^{−1} r for the Jacobian J of any `function` at `y`, by LU of the dense matrix."""
    flat, unravel = ravel_pytree(y)
    jacobian = jax.jacfwd(lambda v: ravel_pytree(function(unravel(v)))[0])(flat)
    factors = jax.scipy.linalg.lu_factor(sigma * jnp.eye(flat.size, dtype=flat.dtype) - jacobian)
    return lambda right: unravel(jax.scipy.linalg.lu_solve(factors, ravel_pytree(right)[0]))


def _add(start, stages, coefficients):
    """start + Σ_j coefficients_j stages_j, leaf by leaf; `stages` has an axis of five in front."""

    def leaf(a, ks):
        return a + jnp.tensordot(jnp.asarray(coefficients, ks.dtype), ks, 1)

    return jax.tree.map(leaf, start, stages)
