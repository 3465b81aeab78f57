"""What derivatives of a flow cost: a jvp and a gradient over the flow itself, to the same time at the same tolerance.

A trial has 50 points with 4 label switches from a random teacher of 4 neurons on [−1, 1], and a balanced network of 32
neurons (the trials of `exact_flow.py`), and is followed to a rescaled time. A jvp is by all of initialisation, inputs
and time in one direction; a gradient is that of the log loss by all of them.

    python benchmarks/sensitivities.py            # 32 trials, one by one, and all in one batch
    python benchmarks/sensitivities.py --quick    # 4 trials

Two cores (Intel Xeon), JAX 0.10, float64, November 2026.
32 trials to τ = 60: medians of 170 events and 290 attempts; derivatives exist for all 32. One by one, of a flow's
63 ms: a jvp takes 2.32 times as long in the median, 2.65 at most; a gradient 3.20, 3.72 at most. In one batch, of 76 ms
a flow: 2.39 and 3.64 times.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import gradflow as gf


def start(key):
    teacher, sample, weights = jr.split(key, 3)
    data = gf.Teacher.random(teacher, 4, switches=4).sample(sample, 50)
    return gf.ReluNetwork.random(weights, 32), data.x, data.y


def flow(net, x, end, y):
    found = gf.integrate(net, gf.Dataset(x, y), until=gf.Until(time=end))
    return found.log_loss, found


def along(net, x, end, y):
    _, change, found = jax.jvp(lambda *a: flow(*a, y), (net, x, end), (net, x, end), has_aux=True)
    return change, found


def gradient(net, x, end, y):
    return jax.grad(lambda *a: flow(*a, y), argnums=(0, 1, 2), has_aux=True)(net, x, end)


def seconds(function, args):
    """Of the fastest of three calls, after one that compiles, and the result."""
    result = jax.block_until_ready(function(*args))
    spent = []
    for _ in range(3):
        begun = time.perf_counter()
        jax.block_until_ready(function(*args))
        spent.append(time.perf_counter() - begun)
    return min(spent), result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--time", type=float, default=60.0)
    parser.add_argument("--quick", action="store_true", help="4 trials")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    trials = 4 if args.quick else args.trials
    net, x, y = jax.vmap(lambda i: start(jr.fold_in(jr.key(args.seed), i)))(jnp.arange(trials))
    whole = net, x, jnp.full((trials,), args.time), y

    singles = {name: jax.jit(f) for name, f in (("flow", flow), ("jvp", along), ("gradient", gradient))}
    spent, counts = {name: [] for name in singles}, []
    for i in range(trials):
        one = jax.tree.map(lambda a, i=i: a[i], whole)
        for name, function in singles.items():
            taken, (_, found) = seconds(function, one)
            spent[name].append(taken)
        counts.append((found.events, found.steps + found.rejected, found.sensitivity == gf.Sensitivity.exists))
    events, attempts, exists = np.array(counts).T
    print(f"{trials} trials to τ = {args.time:g}: {np.median(events):.0f} events, {np.median(attempts):.0f} attempts")
    print(f"  derivatives exist for {int(exists.sum())}")
    for name in ("jvp", "gradient"):
        ratio = np.array(spent[name]) / np.array(spent["flow"])
        print(f"  one by one: {name} over flow, median {np.median(ratio):.2f}, most {ratio.max():.2f}")
    print(f"  a flow takes a median of {np.median(spent['flow']) * 1e3:.0f} ms")
    batch = {
        name: seconds(jax.jit(jax.vmap(f)), whole)[0]
        for name, f in (("flow", flow), ("jvp", along), ("gradient", gradient))
    }
    for name in ("jvp", "gradient"):
        print(f"  in one batch: {name} over flow {batch[name] / batch['flow']:.2f}")
    print(f"  a flow takes {batch['flow'] / trials * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
