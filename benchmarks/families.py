"""What becomes of flows from every kind of initialisation and data: a table of laws × outcomes.

Every flow draws one of each factor: inputs, labels, initialisation scheme, scale of the weights, number of points and
neurons; `key_of(seed, size, loss, number)` is all that it depends on. A certified limit is checked once more, from its
weights and multipliers alone, in extended precision. Pieces are kept in a folder, and a run goes on where it stopped.

    python benchmarks/families.py --flows 100000     # hours; may be stopped and started again
    python benchmarks/families.py --flows 100000 --finer   # the first tenth again with rtol 1e-9: the same answers?
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
from gradflow.course import Course, default_solvers
from gradflow.dispatch import group_of, in_threads
from gradflow.engine import Work
from gradflow.limit import LIMIT_STATUSES
from gradflow.outcome import STATUSES

LANES = 8  # for each thread
PIECE = 5_000  # flows in one file
SAVES = 60.0  # seconds between writing files


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


class Lane(eqx.Module):
    """One flow on its way, and which factors it drew; as `gradflow.engine` wants it."""

    picks: dict
    course: Course

    @classmethod
    def begin(cls, size, loss, key, rtol, max_steps):
        net, data, picks = draw(size, key)
        zero = jnp.zeros_like(rtol)
        course = Course.begin(net, data, LOSSES[loss](), gf.Until(), rtol, zero, default_solvers(), None, max_steps)
        return cls(picks, course)

    @property
    def attempts(self):
        return self.course.attempts

    @property
    def waits(self):
        return self.course.waits

    @property
    def over(self):
        return self.course.over

    def idle(self):
        return eqx.tree_at(lambda lane: lane.course.over, self, jnp.ones_like(self.over))

    def follow(self, attempts):
        return Lane(self.picks, self.course.follow(attempts))

    def close(self):
        """The end of a round; and scalars, and what the limit is checked by."""
        course = self.course.hand_over()
        flow = course.flow()
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
        return Lane(self.picks, course), (scalars | self.picks, (limit.network, limit.multipliers, course.data))


def key_of(seed, size, loss, number):
    kind = len(LOSSES) * list(SIZES).index(size) + list(LOSSES).index(loss)
    return jr.fold_in(jr.fold_in(jr.key(seed), kind), number)


@eqx.filter_jit
def begin(size, loss, seed, rtol, max_steps, numbers):
    keys = jax.vmap(functools.partial(key_of, seed, size, loss))(numbers)
    return eqx.filter_vmap(lambda key: Lane.begin(size, loss, key, rtol, max_steps))(keys)


class Kept:
    """What has become of flows, a file for every `PIECE` of a size and a loss: where one is, and how to go on."""

    possible = 0

    def __init__(self, folder, seed, rtol, max_steps, wanted):
        """`wanted`: (size, loss) to how many flows."""
        self.folder, self.seed, self.rtol, self.max_steps = folder, seed, rtol, max_steps
        self.kinds, self.wanted, self.begun = list(wanted), wanted, time.perf_counter()
        self.columns, self.dirty, self.saved, self.fresh = {}, set(), self.begun, 0
        for kind in range(len(self.kinds)):
            for piece in range(-(-wanted[self.kinds[kind]] // PIECE)):
                path = self.path(kind, piece)
                self.columns[kind, piece] = dict(np.load(path)) if path is not None and path.exists() else None

    def path(self, kind, piece):
        size, loss = self.kinds[kind]
        name = f"{list(SIZES).index(size)}-{loss}-{self.seed}-{self.rtol:g}-{self.max_steps}-{piece}.npz"
        return self.folder / name if self.folder is not None else None

    def missing(self, kind):
        numbers = np.arange(self.wanted[self.kinds[kind]])
        there = [c["number"] for (other, _), c in self.columns.items() if other == kind and c is not None]
        return np.setdiff1d(numbers, np.concatenate([*there, np.zeros(0, int)]))

    def work(self, kind, group):
        size, loss = self.kinds[kind]
        settings = jnp.asarray(self.seed), jnp.asarray(self.rtol), jnp.asarray(self.max_steps)
        for some in np.split(missing := self.missing(kind), range(group, missing.size, group)):
            if some.size:
                yield Work(kind, some, functools.partial(begin, size, loss, *settings))

    def add(self, kind, numbers, found):
        scalars, checks = found
        rows = [jax.tree.map(operator.itemgetter(row), checks) for row in range(numbers.size)]
        new = scalars | {"number": numbers, "independent": np.array([independent_residual(*row) for row in rows])}
        for piece in np.unique(numbers // PIECE):
            mine, old = numbers // PIECE == piece, self.columns[kind, int(piece)]
            some = {name: np.asarray(column)[mine] for name, column in new.items()}
            if old is not None:
                some = {name: np.concatenate([old[name], column]) for name, column in some.items()}
            self.columns[kind, int(piece)] = some
            self.dirty.add((kind, int(piece)))
        self.fresh += numbers.size

    def look(self):
        now = time.perf_counter()
        if now - self.saved < SAVES or self.folder is None:
            return
        self.saved = now
        print(f"\r{self.fresh} flows in {now - self.begun:.0f} s", end="", file=sys.stderr, flush=True)
        self.save()

    def save(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for place in list(self.dirty):
            self.dirty.discard(place)
            path, columns = self.path(*place), self.columns[place]
            part = path.with_suffix(".part.npz")
            np.savez_compressed(part, **columns)
            part.replace(path)

    def run(self, kinds, lanes):
        """All that is missing of some kinds."""
        try:
            in_threads([self.work(kind, group_of(lanes)) for kind in kinds], lanes, group_of(lanes), self)
        finally:
            if self.folder is not None:
                self.save()

    def all(self):
        parts = []
        for (kind, _), columns in self.columns.items():
            if columns is not None:
                order, (size, loss) = np.argsort(columns["number"]), self.kinds[kind]
                part = {name: column[order] for name, column in columns.items()}
                parts.append(part | {"size": np.full(order.size, size), "loss": np.full(order.size, loss)})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def plan(flows):
    """How many flows of each size and loss."""
    return {
        (size, loss): max(1, round(flows * share / len(LOSSES)))
        for size, (*_, share) in SIZES.items()
        for loss in LOSSES
    }


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


def same_flows(r, finer):
    """The rows of both that are of the same flows."""
    places = [{key: i for i, key in enumerate(zip(a["size"], a["loss"], a["number"], strict=True))} for a in (r, finer)]
    both = [key for key in places[0] if key in places[1]]
    return tuple(
        {name: column[[place[key] for key in both]] for name, column in a.items()}
        for a, place in zip((r, finer), places, strict=True)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=20_000)
    parser.add_argument("--finer", action="store_true", help="the first tenth with rtol 1e-9, and compare")
    parser.add_argument("--show", action="store_true", help="what there is, and run nothing")
    parser.add_argument("--kind", type=int, help="only this size and loss, 0 to 7")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/families"))
    parser.add_argument("--quick", action="store_true", help="32 flows of the smallest size")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if args.quick:
        kept = Kept(None, args.seed, 1e-6, 2_000, {(next(iter(SIZES)), "exponential"): 32})
        kept.run([0], LANES)
        report(kept.all())
        return
    everything = Kept(args.folder, args.seed, 1e-6, args.max_steps, plan(args.flows))
    finer = Kept(args.folder, args.seed, 1e-9, args.max_steps, plan(max(1, args.flows // 10)))
    if not args.show:
        kept = finer if args.finer else everything
        kept.run(range(len(kept.kinds)) if args.kind is None else [args.kind], LANES)
    report(everything.all())
    if args.finer:
        compare(*same_flows(everything.all(), finer.all()))


if __name__ == "__main__":
    main()
