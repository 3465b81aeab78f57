"""What becomes of flows from every kind of initialisation and data: a table of laws × outcomes.

Every flow draws one of each factor: inputs, labels, initialisation scheme, scale of the weights, number of points and
neurons; `key_of(seed, size, loss, number)` is all that it depends on. A certified limit is checked once more, from its
weights and multipliers alone, in extended precision. Pieces are kept in a folder, and a run goes on where it stopped.

    python benchmarks/families.py --flows 100000     # hours; may be stopped and started again
    python benchmarks/families.py --finer            # the first tenth again with rtol 1e-9: the same answers?
    python benchmarks/families.py --quick            # 32 flows, for CI

Not yet run to its end.
"""

import argparse
import functools
import operator
import pathlib
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import gradflow as gf
from gradflow.limit import LIMIT_STATUSES
from gradflow.outcome import STATUSES

BATCH = 16  # lanes
PIECE = 320  # flows that are kept at a time
PASSES = (250, 1_000, 4_000)  # attempts, after which a flow goes on among those that take as long


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
    """One flow to its limit: scalars, and what the limit is checked by."""
    net, data, picks = draw(size, key)
    rtol, max_steps = setting
    flow = gf.integrate(net, data, LOSSES[loss](), rtol=rtol, max_steps=max_steps)
    limit = flow.limit
    scalars = {
        "status": flow.status._value,
        "limit_status": limit.status._value,
        "attempts": flow.steps + flow.rejected,
        "time": flow.time,
        "log_time": flow.log_time,
        "log_loss": flow.log_loss,
        "value": limit.value,
        "residual": limit.residual,
    }
    return scalars | picks, (limit.network, limit.multipliers, data)


def key_of(seed, size, loss, number):
    kind = len(LOSSES) * list(SIZES).index(size) + list(LOSSES).index(loss)
    return jr.fold_in(jr.fold_in(jr.key(seed), kind), number)


@functools.cache
def program(size, loss):
    return eqx.filter_jit(eqx.filter_vmap(functools.partial(trial, size, loss), in_axes=(0, None)))


def run(size, loss, seed, numbers, batch, rtol, max_steps):
    """Flows of these numbers, as NumPy arrays; those that certify are checked."""
    columns = []
    for start in range(0, len(numbers), batch):
        some = numbers[start : start + batch]
        padded = np.concatenate([some, np.repeat(some[-1:], batch - len(some))])
        keys = jax.vmap(functools.partial(key_of, seed, size, loss))(jnp.asarray(padded))
        scalars, checks = program(size, loss)(keys, (jnp.asarray(rtol), jnp.asarray(max_steps)))
        scalars, checks = jax.tree.map(np.asarray, (scalars, eqx.filter(checks, eqx.is_array)))
        rows = [jax.tree.map(operator.itemgetter(row), checks) for row in range(len(some))]
        independent = [independent_residual(*row) for row in rows]
        columns.append({n: a[: len(some)] for n, a in scalars.items()} | {"independent": np.array(independent)})
    return {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}


def run_long(size, loss, seed, numbers, batch, rtol, max_steps):
    """As `run`, but flows that take long run among themselves: a batch waits for its slowest."""
    found, long = None, np.arange(len(numbers))
    for most in (*(steps for steps in PASSES if steps < max_steps), max_steps):
        again = run(size, loss, seed, numbers[long], batch, rtol, most)
        if found is None:
            found = again
        else:
            for name, column in again.items():
                found[name][long] = column
        long = np.flatnonzero(names(found["status"]) == "step_limit")
        if not long.size:
            break
    return found


def independent_residual(net, multipliers, data):
    """The KKT residual of a limit in extended precision, with no code of the package: the largest of what margins lack,
    what complementarity lacks, −λ, and ‖θ − Σ λ ∂q‖ over ‖θ‖, the activation on a breakpoint fitted in [0, 1].
    """
    wide = np.longdouble
    w, b, v, x, y, lam = (np.asarray(a, wide) for a in (net.w, net.b, net.v, data.x, data.y, multipliers))
    real = np.arange(x.size) < data.count
    x, y, lam = x[real], y[real], lam[real]
    live = v != 0
    w, b, v = w[live], b[live], v[live]
    if not live.any() or not lam.sum() > 0:
        return np.inf
    inner, reach = np.outer(w, x) + b[:, None], np.sqrt(1 + x**2)
    on = np.abs(inner) <= 1e-11 * np.hypot(w, b)[:, None] * reach[None]
    q = y * (v @ np.maximum(inner, 0))
    force = lam * y
    off = wide(0)
    for j in range(w.size):
        active = (inner[j] > 0) & ~on[j]
        z = np.array([np.sum((force * x)[active]), np.sum(force[active])])
        lack = np.array([w[j], b[j]]) / v[j] - z
        for i in np.flatnonzero(on[j]):
            share = np.clip((lack @ [x[i], 1]) / (force[i] * reach[i] ** 2), 0, 1) if force[i] else 0
            lack = lack - share * force[i] * np.array([x[i], 1])
        off += v[j] ** 2 * np.sum(lack**2) + (v[j] - np.sum(np.maximum(inner[j], 0) * force)) ** 2
    size = np.sum(w**2 + b**2 + v**2)
    whole = lam.sum()
    parts = np.sqrt(off / size), np.max(-lam) / whole, np.sum(lam * np.abs(q - 1)) / whole, np.max(1 - q)
    return float(max(parts))


def names(status):
    return np.array(STATUSES)[np.asarray(status)]


def piece(folder, size, loss, seed, start, count, rtol, max_steps):
    """Flows `start` … of one size, from the folder if they are there."""
    label = f"{list(SIZES).index(size)}-{loss}-{seed}-{start}-{count}-{rtol:g}-{max_steps}"
    path = folder / f"{label}.npz"
    if not path.exists():
        found = run_long(size, loss, seed, np.arange(start, start + count), BATCH, rtol, max_steps)
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, **found)
        part.replace(path)
    return dict(np.load(path))


def plan(flows):
    """(size, loss, first number, count) of every piece."""
    for size, (*_, share) in SIZES.items():
        for loss in LOSSES:
            wanted = max(1, round(flows * share / len(LOSSES)))
            for start in range(0, wanted, PIECE):
                yield size, loss, start, min(PIECE, wanted - start)


def collect(args, rtol, flows):
    parts, begun = [], time.perf_counter()
    for size, loss, start, count in plan(flows):
        part = piece(args.folder, size, loss, args.seed, start, count, rtol, args.max_steps)
        part |= {"number": start + np.arange(count), "size": np.full(count, size), "loss": np.full(count, loss)}
        parts.append(part)
        done = sum(p["number"].size for p in parts)
        print(f"\r{done} of {flows} flows, {time.perf_counter() - begun:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def report(r):
    """The table, and every flow that is unresolved."""
    outcome = names(r["status"])
    certified, stalled = outcome == "certified", outcome == "stalled"
    open_ = ~(certified | stalled)
    rejected = certified & ~(r["independent"] <= 1e-9)
    clocks = np.isnan(r["time"]) | np.isnan(r["log_time"])
    print(
        f"{certified.size} flows: {certified.sum()} certified, {stalled.sum()} stalled, {open_.sum()} unresolved "
        f"({open_.mean():.2%}); {rejected.sum()} certificates that the independent check rejects, largest residual "
        f"{r['independent'][certified].max(initial=0):.1e}; {clocks.sum()} clocks are no numbers; attempts: median "
        f"{np.median(r['attempts']):.0f}, 99 % {np.percentile(r['attempts'], 99):.0f}"
    )
    print(f"{'factor':>10}  {'law':<22}{'flows':>8}{'certified':>11}{'stalled':>9}{'unresolved':>12}{'attempts':>10}")
    factors = {name: (r[name], dict(enumerate(map(str, some)))) for name, some in FACTORS.items()}
    factors |= {name: (r[name], {level: level for level in dict.fromkeys(r[name])}) for name in ("size", "loss")}
    for name, (column, levels) in factors.items():
        for level, label in levels.items():
            m = column == level
            counts = (m.sum(), (m & certified).sum(), (m & stalled).sum(), (m & open_).sum())
            attempts = np.median(r["attempts"][m]) if m.any() else np.nan
            print("{:>10}  {:<22}{:>8}{:>11}{:>9}{:>12}{:>10.0f}".format(name, label, *counts, attempts))
    for i in np.flatnonzero(open_ | rejected | clocks):
        laws = ", ".join(str(list(some)[r[name][i]]) for name, some in FACTORS.items())
        print(
            f"  {r['size'][i]}, {r['loss'][i]}, {r['number'][i]}: {outcome[i]}, "
            f"{LIMIT_STATUSES[r['limit_status'][i]]}; {laws}; n = {r['n'][i]}, k = {r['k'][i]}; log loss "
            f"{r['log_loss'][i]:.4g}, τ {r['time'][i]:.3g}, {r['attempts'][i]} attempts, {r['residual'][i]:.1e}"
        )


def compare(r, finer):
    """Whether flows with tolerances a thousand times finer end the same way."""
    both = names(r["status"]), names(finer["status"])
    certified = (both[0] == "certified") & (both[1] == "certified")
    same = (both[0] == both[1]) & (~certified | (np.abs(r["value"] / finer["value"] - 1) <= 1e-8))
    print(f"{same.sum()} of {same.size} flows ({same.mean():.2%}) have the same status, and limits of the same value")
    for i in np.flatnonzero(~same):
        print(
            f"  {r['size'][i]}, {r['loss'][i]}, {r['number'][i]}: {both[0][i]} {r['value'][i]:.10g}, finer "
            f"{both[1][i]} {finer['value'][i]:.10g}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=20_000)
    parser.add_argument("--finer", action="store_true", help="the first tenth with rtol 1e-9 beside 1e-6")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/families"))
    parser.add_argument("--quick", action="store_true", help="32 flows of the smallest size")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if args.quick:
        size, loss = next(iter(SIZES)), "exponential"
        found = run_long(size, loss, args.seed, np.arange(32), BATCH, 1e-6, 2_000)
        report(found | {"number": np.arange(32), "size": np.full(32, size), "loss": np.full(32, loss)})
        return
    flows = max(1, args.flows // 10) if args.finer else args.flows
    found = collect(args, 1e-6, flows)
    report(found)
    if args.finer:
        compare(found, collect(args, 1e-9, flows))


if __name__ == "__main__":
    main()
