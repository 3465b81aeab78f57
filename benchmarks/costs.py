"""What a step attempt costs against the numbers of points and neurons, a flow in memory, and a start in seconds.

Trials have n points with 4 label switches on [−1, 1] and a balanced network of k neurons. An attempt's time is that of
the second half of `--attempts` attempts from the start, one flow on its own. Memory is what XLA sets aside for one.
A start is a fresh Python process that follows one flow with n = 50, k = 32 to its certified limit, with an empty and
then with a filled compilation cache.

    python benchmarks/costs.py            # up to n = 100,000 and k = 4,096
    python benchmarks/costs.py --quick    # up to n = 1,000 and k = 256

Two cores (Intel Xeon), JAX 0.10, float64, November 2026.
k = 32: n = 100 takes 375 µs an attempt and 0.25 MB, n = 1,000 939 and 0.55, n = 10,000 6,402 and 4.85, n = 100,000
43,713 and 47.7: exponents 0.40, 0.83 and 0.83, and 0.69 from end to end. n = 50: k = 64 takes 318 µs and 0.20 MB, k =
256 593 and 0.51, k = 1,024 1,528 and 1.92, k = 4,096 6,457 and 7.57: exponents 0.45, 0.68 and 1.04, and 0.72 from end
to end; those of pairs differed by up to 0.2 between two runs. Above 4,096 pairs of a point and a neuron nothing in a
step is of size n k, and its linear system has n, 2(k + 1) or 160 unknowns, the least of them; memory is linear.
A start took 19.0 s to its certified limit, of which 1.2 s import, and 3.9 s with a filled cache, of which 0.9 s import.
On two other cores (AMD EPYC), busy with other work, the version before took 22 to 29 s, and 5 to 6.5 s. What else was
tried: LLVM at its first level of optimisation (XLA_FLAGS=--xla_backend_optimization_level=1) 17.9 s instead of 19.2, at
the same speed of what is compiled; without any 15.4 s, but then trials take five times as long.
XLA's older fusion emitters (--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters) 13.8 s, but trials take a
quarter longer: 16.7 a second instead of 20.7.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time

import jax
import jax.random as jr
import numpy as np

import gradflow as gf

START = """
import time
begun = time.perf_counter()
import gradflow as gf
imported = time.perf_counter()
import jax
jax.config.update("jax_enable_x64", True)
a, b, c = jax.random.split(jax.random.key(0), 3)
data = gf.Teacher.random(a, 4, switches=4).sample(b, 50)
flow = gf.integrate(gf.ReluNetwork.random(c, 32), data)
assert flow.check()
print(imported - begun, time.perf_counter() - begun)
"""


def attempt(samples: int, width: int, attempts: int) -> tuple[float, float]:
    """Seconds an attempt, and bytes."""
    a, b, c = jr.split(jr.key(1), 3)
    data = gf.Teacher.random(a, 4, switches=4).sample(b, samples)
    net = gf.ReluNetwork.random(c, width)

    def follow(net, data, most):
        return gf.integrate(net, data, until=gf.Until(log_loss=-1e9), max_steps=most)

    program = jax.jit(follow).lower(net, data, attempts).compile()
    memory = program.memory_analysis()
    spent = {}
    for most in (attempts, attempts // 2):
        best = np.inf
        for _ in range(3):
            begun = time.perf_counter()
            flow = jax.block_until_ready(program(net, data, most))
            best = min(best, time.perf_counter() - begun)
        spent[most] = best, int(flow.steps + flow.rejected)
    (whole, more), (half, less) = spent[attempts], spent[attempts // 2]
    return (whole - half) / (more - less), memory.temp_size_in_bytes


def report(name: str, sizes, measured) -> None:
    print(f"{name:>10}{'us/attempt':>12}{'MB':>8}{'exponent':>10}")
    for i, (size, (seconds, memory)) in enumerate(zip(sizes, measured, strict=True)):
        slope = "" if i == 0 else f"{np.log(seconds / measured[i - 1][0]) / np.log(size / sizes[i - 1]):>10.2f}"
        print(f"{size:>10}{1e6 * seconds:>12.0f}{memory / 1e6:>8.2f}{slope}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=200)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}")
    samples = (100, 1_000) if args.quick else (100, 1_000, 10_000, 100_000)
    widths = (64, 256) if args.quick else (64, 256, 1_024, 4_096)
    report("n (k = 32)", samples, [attempt(n, 32, args.attempts) for n in samples])
    report("k (n = 50)", widths, [attempt(50, k, args.attempts) for k in widths])
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        for name in ("cold", "warm"):
            found = subprocess.run(
                [sys.executable, "-c", START], env=os.environ | cache, capture_output=True, text=True, check=True
            )
            imported, whole = map(float, found.stdout.split())
            print(f"{name} start: import {imported:.1f} s, first certified limit after {whole:.1f} s")


if __name__ == "__main__":
    main()
