"""What a step attempt is made of, in microseconds a lane, on one core.

Reference trials (50 points with 4 label switches, 32 neurons), 100 attempts after the start, in a batch. Every piece is
repeated in a loop inside one program, on inputs that depend on the round before (by 1e-30 of themselves), so that no
call is counted and nothing can be taken out of the loop; its time is that of many rounds less that of a few. Pieces
that are compiled alone are fused otherwise than in an attempt, so they need not add up to one.

    python benchmarks/pieces.py                # batches of 8 and 64, three minutes
    python benchmarks/pieces.py --quick        # a batch of 8, fewer rounds

One core of two (AMD EPYC), JAX 0.10, float64, November 2026, µs a lane; how often an attempt does it:

                                              batch of   8    64
    who is active where                              1   1.0   1.0
    field                                            8   3.0   2.1
    weights of the points                            7   1.4   1.9
    Gram matrix of the linear system                 1   6.4   6.1
    the same, inverted, and a refined solution       1  37.1  30.6
    all of a linear solve, from the start            1  38.3  41.5
    a step of Rodas5P, sampled, and its error        1  81.0  80.9
    a network from its lines                         7   0.3   0.4
    events in the step                               1  19.5  17.3
    the mode decided anew                            1   2.9   2.6
    status, time scale, records                      1   4.3   3.3
    an attempt                                           114   134

A step contains a linear solve, and that the Gram matrix. In a batch of 8 the elimination of 50 points is a quarter of
an attempt (37 − 6 µs), the stages and what is sampled of them over a third (81 − 38), events a sixth.

What did not help, in batches of 8. Elimination takes 24 µs a lane if timed alone: by halves, with Schur complements, 17
(31 instead of 51 for 66 points), but nearly singular halves would need a refinement that takes most of that; by blocks
of ten pivots 20, with the same fault; by two pivots in one pass over the matrix, the same to the last bit, 22; even
without a mask of the pivots' rows, which it needs, 16. Of five pivots XLA computes what it needs of the first for every
entry of the last: 39. Factors of rank four (the matrix is the identity and a matrix whose halves above and below the
diagonal have rank four each) and the inverse by substitution from them take O(n²) operations, but in two loops: 38
instead of 31 µs where both were timed.
"""

import argparse
import os
import platform
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import gradflow as gf
from gradflow.clarke import solver_of_positive_definite
from gradflow.course import Course, default_solvers
from gradflow.events import look_ahead, update
from gradflow.lift import Local, from_lines

ATTEMPTS = 100  # before the pieces are looked at


class Moment(eqx.Module):
    """An attempt half done: what its pieces are given."""

    problem: object
    state: object
    field: object
    step: jax.Array
    nodes: object
    error: object
    start: object
    end: object

    @classmethod
    def of(cls, course: Course) -> "Moment":
        problem, state = course.problem, course.state
        field = problem.field(state).ready()
        start, step = field.weights(state.net.lines), jnp.minimum(state.step, state.cap)
        _, nodes, error, _ = problem.advance(field, state, start, step)
        end = field.weights(jax.tree.map(lambda a: a[-1], nodes).lines)
        return cls(problem, state, field, step, nodes, error, start, end)

    @property
    def last(self):
        return jax.tree.map(lambda a: a[-1], self.nodes)

    @property
    def y(self):
        return self.state.net, self.state.net.lines, self.state.clock

    def local(self) -> Local:
        force = self.field.pull(self.start.p)
        return Local(
            self.state.net, force, 5 / self.step, self.field.lifted, self.state.mode.sliding, self.field.tangent()
        )

    def matrix(self):
        root = jnp.sqrt(self.start.c)
        gram = self.field.sites.gram(self.local().response(), slice(None))
        return jnp.eye(root.size) + root[:, None] * gram * root[None, :]

    def crossings(self):
        tolerance = self.problem.tolerance(self.state.force, self.state.least)
        return look_ahead(self.field, self.nodes, self.start, self.end, self.step, self.state.noise, tolerance)

    def decided(self):
        nobody, tolerance = (
            jnp.zeros(self.state.net.width, bool),
            self.problem.tolerance(self.state.force, self.state.least),
        )
        return update(self.field, self.last, self.end, nobody, nobody, nobody, self.state.noise, tolerance)


# What is timed, and how often an attempt does it.
PIECES = {
    "who is active where": ("1", lambda m: m.problem.field(m.state).ready()),
    "field": ("8", lambda m: m.field(jnp.zeros(()), m.y, None)),
    "weights of the points": ("7", lambda m: m.field.weights(m.state.net.lines)),
    "Gram matrix of the linear system": ("1", lambda m: m.matrix()),
    "the same, inverted, and a refined solution": ("1", lambda m: solver_of_positive_definite(m.matrix())(m.start.q)),
    "all of a linear solve, from the start": ("1", lambda m: m.field.resolvent(m.y, 5 / m.step)(m.y)),
    "a step of Rodas5P, sampled, and its error": (
        "1",
        lambda m: m.problem.advance(m.field, m.state, m.start, m.step),
    ),
    "a network from its lines": (
        "7",
        lambda m: from_lines(m.state.net, m.state.net.lines, m.problem.balance, m.field.lifted),
    ),
    "events in the step": ("1", lambda m: m.crossings()),
    "the mode decided anew": ("1", lambda m: m.decided()),
    "status, time scale, records": ("1", lambda m: m.problem.judge(m.state)),
    "an attempt": ("", lambda m: m.problem.attempt(m.state)),
}


def moments(batch: int) -> Moment:
    keys = jax.vmap(lambda i: jr.fold_in(jr.key(3), i))(np.arange(batch))
    _, data, nets = jax.jit(jax.vmap(gf.Trial().draw))(keys)

    @jax.jit
    @jax.vmap
    def arrays(net, data):
        tolerance = jnp.asarray(1e-6)
        most = jnp.asarray(20_000)
        course = Course.begin(
            net, data, gf.Exponential(), gf.Until(), tolerance, tolerance, default_solvers(), None, most
        )
        return eqx.filter(Moment.of(course.follow(ATTEMPTS)), eqx.is_array)

    return arrays(nets, data)


def moved(a, total):
    """`a`, as far as a compiler can tell something else than before."""
    if a.dtype == bool:
        return a
    return a * (1 + 1e-30 * total) if jnp.issubdtype(a.dtype, jnp.inexact) else a + (total > 1e300).astype(a.dtype)


def microseconds(piece, batch: Moment, rounds: int) -> float:
    """A lane, the least of five times."""

    @jax.jit
    def repeated(count, batch):
        def again(_, total):
            def one(moment, total):
                found = eqx.filter(piece(jax.tree.map(lambda a: moved(a, total), moment)), eqx.is_inexact_array)
                return sum(jnp.sum(jnp.where(jnp.isfinite(a), a, 0)) for a in jax.tree.leaves(found))

            return jax.vmap(one)(batch, total)

        return jax.lax.fori_loop(0, count, again, jnp.zeros(batch.step.shape))

    spent = {}
    for count in (rounds // 2, 2 * rounds):
        repeated(count, batch).block_until_ready()
        best = np.inf
        for _ in range(5):
            begun = time.perf_counter()
            repeated(count, batch).block_until_ready()
            best = min(best, time.perf_counter() - begun)
        spent[count] = best
    (less, more), few = spent.values(), rounds // 2
    return 1e6 * (more - less) / (2 * rounds - few) / batch.step.size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before JAX starts its threads
    jax.config.update("jax_enable_x64", True)
    sizes, rounds = ((8,), 20) if args.quick else ((8, 64), 100)
    batches = [moments(size) for size in sizes]
    print(f"{platform.processor() or platform.machine()}, one core, JAX {jax.__version__}")
    print(f"{'piece':44}{'times':>6}" + "".join(f"{f'batch {size}':>10}" for size in sizes))
    for name, (times, piece) in PIECES.items():
        print(f"{name:44}{times:>6}" + "".join(f"{microseconds(piece, b, rounds):>10.1f}" for b in batches), flush=True)


if __name__ == "__main__":
    main()
