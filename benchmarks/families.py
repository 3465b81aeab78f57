"""TITLE"""

import argparse
import concurrent.futures
import functools
import itertools
import os
import pathlib
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import gradflow as gf
from gradflow.outcome import STATUSES


# ---- laws: every flow draws one of each factor ----


def uniform(key, n):
    return jr.uniform(key, (n,), minval=-1.0)


def pairs(key, n):
    """Points in pairs 1e-6 apart."""
    return jnp.repeat(jr.uniform(key, ((n + 1) // 2,), minval=-1.0), 2)[:n] + 1e-6 * (jnp.arange(n) % 2)


def integers(key, n):
    return jr.permutation(key, jnp.arange(-n, n + 1))[:n].astype(float)


def lattice(key, n, count):
    """Equally spaced points, symmetric about 0, on [−1, 1]."""
    del key
    return (2 * jnp.arange(n) - (count - 1)) / jnp.maximum(count - 1, 1)


def shifted(key, n):
    return 6 + uniform(key, n)


INPUTS = {
    "uniform": uniform,
    "pairs 1e-6 apart": pairs,
    "integers": integers,
    "lattice about 0": lattice,
    "times 1e3": lambda key, n: 1e3 * uniform(key, n),
    "times 1e-3": lambda key, n: 1e-3 * uniform(key, n),
    "shifted by 3 lengths": shifted,
}


def alternating(key, n, count):
    del key, count
    return 1 - 2 * (jnp.arange(n) % 2)


def random_labels(key, n, count):
    del count
    return jr.rademacher(key, (n,))


def one_class(key, n, count):
    del count
    return jr.rademacher(key) * jnp.ones(n, int)


def clustered(key, n, count):
    """Three runs at most."""
    first, second, sign = jr.split(key, 3)
    a, b = (jr.randint(k, (), 0, count + 1) for k in (first, second))
    index = jnp.arange(n)
    return jr.rademacher(sign) * jnp.where((index < jnp.minimum(a, b)) | (index >= jnp.maximum(a, b)), 1, -1)


LABELS = {"alternating": alternating, "random": random_labels, "one class": one_class, "clustered": clustered}


def by_scheme(name):
    def weights(key, slots, width):
        net = gf.ReluNetwork.random(key, width, name, slots=slots)
        return net.w, net.b, net.v

    return weights


def zero_bias(key, slots, width):
    w, _, v = by_scheme("balanced")(key, slots, width)
    return w, jnp.zeros_like(w), jnp.sign(v) * jnp.abs(w)


def dominated(ratio, key, slots, width):
    """|v| = `ratio` · ‖u‖."""
    w, b, v = by_scheme("balanced")(key, slots, width)
    return w, b, ratio * v


def antisymmetric(key, slots, width):
    """Pairs of neurons that cancel, N = 0 at the start; of an odd number the last is 0."""
    w, b, v = by_scheme("balanced")(key, slots, width)
    index = jnp.arange(slots)
    partner, pair = index - index % 2, jnp.where(index % 2 == 0, 1.0, -1.0)
    whole = (partner + 1 < width) | (width == 1)
    return tuple(jnp.where(whole, a[partner], 0) * s for a, s in ((w, 1.0), (b, 1.0), (v, pair)))


SCHEMES = {
    "balanced": by_scheme("balanced"),
    "gaussian": by_scheme("gaussian"),
    "he": by_scheme("he"),
    "sphere": by_scheme("sphere"),
    "zero bias": zero_bias,
    "|v| = 3 ‖u‖": functools.partial(dominated, 3.0),
    "|v| = ‖u‖/3": functools.partial(dominated, 1 / 3),
    "antisymmetric": antisymmetric,
}

SCALES = (1e-100, 1e-30, 1e-10, 1e-5, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
LOSSES = {"exponential": gf.Exponential, "logistic": gf.Logistic}
# Name: most points, fewest points, most neurons, part of all flows.
SIZES = {
    "n ≤ 12, k ≤ 16": (12, 1, 16, 0.6),
    "n ≤ 12, k ≤ 64": (12, 1, 64, 0.25),
    "n = 50, k ≤ 64": (50, 50, 64, 0.1),
    "n = 200, k ≤ 64": (200, 200, 64, 0.05),
}
FACTORS = {"inputs": INPUTS, "labels": LABELS, "scheme": SCHEMES, "scale": SCALES}


def draw(size, key):
    """The network and the data of one flow, and which of each factor it drew."""
    most, fewest, width, _ = SIZES[size]
    choose, of_x, of_y, of_net, of_sizes = jr.split(key, 5)
    picks = {
        name: jr.randint(k, (), 0, len(some))
        for k, (name, some) in zip(jr.split(choose, len(FACTORS)), FACTORS.items(), strict=True)
    }
    n = jr.randint(of_sizes, (), fewest, most + 1)
    k = jnp.floor(2.0 ** jr.uniform(jr.fold_in(of_sizes, 1), (), maxval=np.log2(width + 1))).astype(int)

    def inputs(law):
        return lambda: law(of_x, most, n) if law is lattice else law(of_x, most)

    x = jax.lax.switch(picks["inputs"], [inputs(law) for law in INPUTS.values()])
    x = jnp.sort(jnp.where(jnp.arange(most) < n, x, jnp.inf))
    x = jnp.where(jnp.arange(most) < n, x, 0)
    y = jax.lax.switch(picks["labels"], [functools.partial(law, of_y, most, n) for law in LABELS.values()])
    weights = jax.lax.switch(picks["scheme"], [functools.partial(law, of_net, width, k) for law in SCHEMES.values()])
    net = gf.ReluNetwork(*weights).scaled(jnp.asarray(SCALES)[picks["scale"]])
    return net, gf.Dataset(x, y.astype(x.dtype)).padded(n), picks | {"n": n, "k": k}


def trial(size, loss, key, setting):
    """One flow to its limit."""
    net, data, picks = draw(size, key)
    rtol, max_steps = setting
    flow = gf.integrate(net, data, LOSSES[loss](), rtol=rtol, max_steps=max_steps)
    return flow, data, picks


def key_of(seed, number):
    return jr.fold_in(jr.key(seed), number)


@functools.cache
def program(size, loss):
    return eqx.filter_jit(eqx.filter_vmap(functools.partial(trial, size, loss), in_axes=(0, None)))


def run(size, loss, seed, numbers, batch, rtol, max_steps, workers):
    """Flows of these numbers, as NumPy arrays."""

    def part(some):
        keys = jax.vmap(functools.partial(key_of, seed))(jnp.asarray(some))
        out = program(size, loss)(keys, (jnp.asarray(rtol), jnp.asarray(max_steps)))
        return jax.tree.map(np.asarray, eqx.filter(out, eqx.is_array))

    padded = np.concatenate([numbers, np.repeat(numbers[-1:], -len(numbers) % batch)])
    parts = padded.reshape(-1, batch)
    first = part(parts[0])  # compile once, before threads
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = [first, *pool.map(part, parts[1:])]
    return jax.tree.map(lambda *a: np.concatenate(a)[: len(numbers)], *results)


def rerun_long(size, loss, seed, numbers, batch, rtol, max_steps, workers, passes=(250, 1_000)):
    """As `run`, but flows that take long run among themselves: a batch waits for its slowest."""
    found, long = None, np.arange(len(numbers))
    for most in (*(steps for steps in passes if steps < max_steps), max_steps):
        again = run(size, loss, seed, numbers[long], batch, rtol, most, workers)

        def put(a, b, long=long):
            a = a.copy()
            a[long] = b
            return a

        found = again if found is None else jax.tree.map(put, found, again)
        long = np.flatnonzero(names(found[0]) == "step_limit")
        if not long.size:
            break
    return found


def names(flow):
    return np.array(STATUSES)[np.asarray(flow.status._value)]
