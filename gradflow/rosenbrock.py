"""Rodas5P, a stiffly accurate Rosenbrock method of order 5, as a Diffrax solver.

A Rosenbrock method needs one factorisation and no Newton iteration a step. Written for K_i, with σ = 1/(hγ) and J the
Jacobian at the start of the step (Hairer and Wanner 1996, IV.7, eq. 7.25, autonomous form):

    (σ I − J) K_i = f(y_0 + Σ_{j<i} a_ij K_j) + (1/h) Σ_{j<i} c_ij K_j

Stage 8 starts from the result of an embedded method of order 4, y_1 is that point + K_8, and K_8 is the error estimate.
The dense output is of order 4. Coefficients: Steinebach 2023 (BIT 63:27), who chose them such that the order does not
drop under stiff forces that change (Prothero and Robinson 1974), as it does with RODAS.
"""

from typing import ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

_GAMMA = 0.21193756319429014
# Row i: how the point at which stage i + 1 is taken, and its right side (over h), depend on K_1 … K_8.
_A = np.zeros((8, 8))
_A[1, :1] = 3.0
_A[2, :2] = 2.849394379747939, 0.45842242204463923
_A[3, :3] = -6.954028509809101, 2.489845061869568, -10.358996098473584
_A[4, :4] = 2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641
_A[5:, :5] = -7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256, 0.030198172008377946
_A[6:, 5] = 1.0
_A[7, 6] = 1.0
_C = np.zeros((8, 8))
_C[1, :1] = -14.155112264123755
_C[2, :2] = -17.97296035885952, -2.859693295451294
_C[3, :3] = 147.12150275711716, -1.41221402718213, 71.68940251302358
_C[4, :4] = 165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306
_C[5, :5] = 24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125, -0.6610691825249471
_C[6, :6] = (
    30.91273214028599,
    -3.1208243349937974,
    77.79954646070892,
    34.28646028294783,
    -19.097331116725623,
    -28.087943162872662,
)
_C[7, :7] = (
    37.80277123390563,
    -3.2571969029072276,
    112.26918849496327,
    66.9347231244047,
    -40.06618937091002,
    -54.66780262877968,
    -9.48861652309627,
)
_D = np.array(
    [
        (
            25.948786856663858,
            -2.5579724845846235,
            10.433815404888879,
            -2.3679251022685204,
            0.524948541321073,
            1.1241088310450404,
            0.4272876194431874,
            -0.17202221070155493,
        ),
        (
            -9.91568850695171,
            -0.9689944594115154,
            3.0438037242978453,
            -24.495224566215796,
            20.176138334709044,
            15.98066361424651,
            -6.789040303419874,
            -6.710236069923372,
        ),
        (
            11.419903575922262,
            2.8879645146136994,
            72.92137995996029,
            80.12511834622643,
            -52.072871366152654,
            -59.78993625266729,
            -0.15582684282751913,
            4.883087185713722,
        ),
    ]
)

_LAST = np.concatenate([_A[7:] + np.eye(8)[7:], _D])  # y_1 − y_0, and the dense output


class RodasInterpolation(diffrax.AbstractLocalInterpolation):
    """Dense output of Rodas5P, of order 4: (1−s) y_0 + s (y_1 + (1−s)(d_0 + s (d_1 + s d_2))), s from 0 to 1."""

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    y0: PyTree
    y1: PyTree
    d: tuple[PyTree, PyTree, PyTree]

    def evaluate(self, t0, t1=None, left=True):
        del left
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        length = self.t1 - self.t0
        s = jnp.where(length > 0, (t0 - self.t0) / jnp.where(length > 0, length, 1), 0)
        return jax.tree.map(
            lambda a, b, c, d, e: (1 - s) * a + s * (b + (1 - s) * (c + s * (d + s * e))), self.y0, self.y1, *self.d
        )


class Rodas5P(diffrax.AbstractAdaptiveSolver):
    """Rodas5P for autonomous `diffrax.ODETerm`s.

    If the vector field offers `resolvent(y, sigma)`, a function r ↦ (σI − J)^{−1} r, that solves the linear systems;
    otherwise J is formed by forward-mode differentiation and factorised densely. The Jacobian must be exact: with an
    inexact one the order drops. A field that depends on time is treated as if it did not: append t to the state.
    """

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = RodasInterpolation

    def order(self, terms):
        return 5

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

        # One stage a round of a loop, so that the field and the linear solve are compiled once; the unknowns in one
        # vector, so that a stage is read and written at once. Stages to come are 0, and so are their coefficients.
        start, unravel = ravel_pytree(y0)

        def combine(weights, stages):
            return jnp.matmul(weights.astype(start.dtype), stages, precision=jax.lax.Precision.HIGHEST)

        def stage(carry, row):
            (stages, sums), (i, weights, last) = carry, row
            point, pushed = combine(weights, stages)
            slope, _ = ravel_pytree(terms.vf(t0, unravel(start + point), args))
            new, _ = ravel_pytree(solve(unravel(slope + pushed)))
            stages = jax.lax.dynamic_update_index_in_dim(stages, new, i, 0)
            return (stages, sums + last[:, None] * new[None]), None

        rows = jnp.stack([jnp.asarray(_A, h.dtype), jnp.asarray(_C, h.dtype) / h], axis=1)
        empty = jnp.zeros((8, start.size), start.dtype), jnp.zeros((4, start.size), start.dtype)
        # Summed up on the way, as sums after the loop would be computed anew for all that is made of them.
        last = jnp.asarray(_LAST.T, start.dtype)
        (stages, (change, *d)), _ = jax.lax.scan(stage, empty, (jnp.arange(8), rows, last))
        y1 = unravel(start + change)
        return y1, unravel(stages[7]), dict(y0=y0, y1=y1, d=tuple(map(unravel, d))), None, diffrax.RESULTS.successful


def dense_resolvent(function, y, sigma):
    """r ↦ (σI − J)^{−1} r for the Jacobian J of any `function` at `y`, by LU of the dense matrix."""
    flat, unravel = ravel_pytree(y)
    jacobian = jax.jacfwd(lambda v: ravel_pytree(function(unravel(v)))[0])(flat)
    factors = jax.scipy.linalg.lu_factor(sigma * jnp.eye(flat.size, dtype=flat.dtype) - jacobian)
    return lambda right: unravel(jax.scipy.linalg.lu_solve(factors, ravel_pytree(right)[0]))
