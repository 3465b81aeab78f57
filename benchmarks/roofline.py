"""What a step attempt must compute and move, and what a GPU's rates would allow: a bound, no measurement of one.

An H100 could do the operations of 62,000 trials a second. Its memory allows 2,300, if every round of a loop is a kernel
of its own, as XLA makes it, and all else is fused: an attempt then moves 3.0 MB, of which 2.1 are the elimination of 50
points, which reads and writes its matrix 50 times. More takes an elimination in one kernel that keeps its matrix (20
kB) on the chip, or so few lanes that all matrices stay in the cache of 50 MB. An attempt that is one kernel would move
5.5 kB, and memory allow a million trials; without any fusion it would allow 350. On no GPU was this version measured.

    python benchmarks/roofline.py                       # for an H100
    python benchmarks/roofline.py --tflops 34 --tb 4.8  # for an H200
    python benchmarks/roofline.py --quick               # the whole attempt alone

Counted is what JAX traces, for one reference trial (50 points with 4 label switches, 32 neurons) in float64, loops of
fixed length as often as they run, others once, choices with all that may be chosen; the programs for limits, a fifth of
a trial's time on a CPU, are not. An operation is one entry of an elementwise result (a division or exponential like a
sum), or one multiplication or addition of a product or sum; choices, comparisons and integers are counted apart. Bytes
are counted three ways: what goes into a piece and comes out of it, as if all in between stayed on the chip; besides,
what every round of a loop reads and leaves; and what every single operation reads and writes.

JAX 0.10, November 2026:
                                                 operations    other kB in, out with loops  unfused
    who is active where                               3,200    9,922       27.4         27       52
    field                                            15,256    1,738       29.2         29      122
    weights of the points                             7,898      936       17.1         17       67
    Gram matrix of the linear system                 70,082   12,020       48.4         48      968
    the same, inverted, and a refined solution      337,884  273,032       29.2       2130   11,962
    all of a linear solve, from the start           401,007  275,379       29.2       2130   12,466
    a step of Rodas5P, sampled, and its error       815,782  296,355       39.2       2981   16,570
    a network from its lines                          1,739      736        1.8          2       60
    events in the step                              203,634   26,857       35.6         91    1,870
    the mode decided anew                            35,346   12,298       19.2         19      363
    status, time scale, records                      16,235    3,555        5.2          6      227
    an attempt                                    1,111,844  354,496        5.5       3004   19,491
"""

import argparse
import math

import equinox as eqx
import jax
import numpy as np
from pieces import PIECES, moments

ATTEMPTS = 490  # of a trial, the median of `batches.py`
# An H100 SXM: float64 without tensor cores, and its memory (NVIDIA, data sheet of the H100, 2023).
TFLOPS, TERABYTES = 34.0, 3.35
MOVES = {
    *("broadcast_in_dim", "reshape", "squeeze", "slice", "dynamic_slice", "dynamic_update_slice", "concatenate", "pad"),
    *("gather", "transpose", "rev", "copy", "iota", "stop_gradient", "split", "expand_dims", "stack"),
}


def size(variable) -> int:
    return math.prod(variable.aval.shape)


def bytes_of(variables) -> int:
    return sum(size(v) * v.aval.dtype.itemsize for v in variables if hasattr(v.aval, "dtype"))


def inner(equation):
    """The programs inside an equation, and how often each runs."""
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    for value in equation.params.values():
        for one in value if isinstance(value, (tuple, list)) else [value]:
            program = getattr(one, "jaxpr", one)
            if hasattr(program, "eqns"):
                yield times, program


def count(program) -> np.ndarray:
    """Float operations, other operations, bytes of the rounds of loops, bytes of every operation."""
    total = np.zeros(4)
    for equation in program.eqns:
        name, programs = equation.primitive.name, list(inner(equation))
        moved = bytes_of(equation.invars) + bytes_of(equation.outvars)
        if programs and not name.startswith("scatter"):
            if name == "custom_linear_solve":  # its solution alone; the rest is for derivatives
                programs = [(1, equation.params["jaxprs"].solve.jaxpr)]
            for times, one in programs:
                total += times * count(one)
                if name in ("scan", "while"):
                    total[2] += times * (bytes_of(one.invars) + bytes_of(one.outvars))
            continue
        total[3] += moved
        if name in MOVES:
            continue
        operations = sum(size(v) for v in equation.outvars)
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operations *= 2 * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        elif name.startswith("scatter"):
            operations = size(equation.invars[2])  # what is added
        elif name.startswith(("reduce", "arg", "cum", "sort")):
            operations = size(equation.invars[0])
        is_float = np.issubdtype(equation.outvars[0].aval.dtype, np.floating) and name != "select_n"
        total[0 if is_float else 1] += operations
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=TFLOPS)
    parser.add_argument("--tb", type=float, default=TERABYTES)
    parser.add_argument("--quick", action="store_true", help="the whole attempt alone")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    moment = jax.tree.map(lambda a: a[0], moments(1))
    print(f"{'':44}{'operations':>11}{'other':>9}{'kB in, out':>11}{'with loops':>11}{'unfused':>9}")
    for name, (_, piece) in PIECES.items():
        if args.quick and name != "an attempt":
            continue
        program = jax.make_jaxpr(lambda m, piece=piece: eqx.filter(piece(m), eqx.is_array))(moment).jaxpr
        used = {v for equation in program.eqns for v in equation.invars if not hasattr(v, "val")}
        once = bytes_of([v for v in program.invars if v in used]) + bytes_of(program.outvars)
        floats, others, loops, each = count(program)
        print(
            f"{name:44}{floats:>11,.0f}{others:>9,.0f}{once / 1e3:>11.1f}{(once + loops) / 1e3:>11.0f}"
            f"{each / 1e3:>9,.0f}",
            flush=True,
        )
    print(f"{ATTEMPTS} attempts a trial, at {args.tflops} TFLOP/s and {args.tb} TB/s, allow in a second")
    print(f"  {args.tflops * 1e12 / (ATTEMPTS * floats):>9,.0f} trials by operations")
    for what, moved in (("in, out", once), ("with loops", once + loops), ("unfused", each)):
        print(f"  {args.tb * 1e12 / (ATTEMPTS * moved):>9,.0f} trials by bytes, {what}")


if __name__ == "__main__":
    main()
