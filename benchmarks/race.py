"""Wall time and accuracy against what a user would pick instead, on the same flow, in one run.

The reference trial: 50 points with 4 label switches, 32 neurons, exponential loss. All integrate the same field in
rescaled time, dθ/dτ = Σ_i p_i y_i ∂N(x_i) with p = softmax(−q), written down as if ∂N existed everywhere, to the times
at which the log loss is −1, −10, −60, −200 and −1000. Each has a process and one core to itself, its nominal tolerance,
relative and absolute, and `--minutes`. Compiling is not counted. The error is that of θ/‖θ‖ in its largest component,
against gradflow at 1e-9. A batch is 64 trials: by vmap in Diffrax and gradflow, as one system in torchdiffeq, natively
in torchode, one after the other in SciPy.

    pip install torch torchdiffeq torchode
    python benchmarks/race.py                       # ten minutes for each of 17 entries, as many at once as cores
    python benchmarks/race.py --only gradflow       # what is called that, anew
    python benchmarks/race.py --quick               # half a minute, and nothing is kept
    python benchmarks/race_table.py                 # from race.json: rewrite README's table

Two cores (x86_64), JAX 0.10, float64, November 2026, seconds to log L = −60 and the error there: gradflow at 1e-6
0.098 (4e-8), for 64 trials 5.7 (2e-7); Tsit5 at 1e-6 15.0 (2e-5), 153 times as long (131 to 200 times in six
measurements of gradflow), at 1e-4 5.2 (1e-2). On another day Dopri8 took 279 (3e-6), gradflow then 0.108; neither
Kvaerno3 nor Kvaerno5, nor SciPy's BDF, got to −1 in ten minutes; LSODA, torchdiffeq and torchode got to −10, not to
−60. Radau at 1e-4 says that it got to −1000, in 243 s, and is wrong by 0.7. Of 64 trials none but gradflow got to −10,
so that it is at least 105 times faster to −60. At −1000 gradflow takes 0.104 and 5.6, Tsit5 190 and more than 600. The
64 are those of the first 73 that get to −1000 by τ = 10⁴: what stands almost still until τ = 10¹⁴ nobody else can
follow.
"""

import argparse
import concurrent.futures
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).parent / "race.json"  # which notebooks/02 and README show
GOALS = (-1.0, -10.0, -60.0, -200.0, -1000.0)
BATCH = 64
DRAWN, LATEST = 96, 1e4  # trials, and the τ by which those that race must get to the last goal
ENTRIES = [
    ("gradflow", 1e-6, 1),
    ("gradflow", 1e-6, BATCH),
    ("diffrax Tsit5", 1e-4, 1),
    ("diffrax Tsit5", 1e-6, 1),
    ("diffrax Dopri8", 1e-6, 1),
    ("diffrax Kvaerno3", 1e-4, 1),
    ("diffrax Kvaerno5", 1e-4, 1),
    ("scipy LSODA", 1e-4, 1),
    ("scipy LSODA", 1e-6, 1),
    ("scipy Radau", 1e-4, 1),
    ("scipy BDF", 1e-4, 1),
    ("torchdiffeq dopri5", 1e-6, 1),
    ("torchode Tsit5", 1e-6, 1),
    ("diffrax Tsit5", 1e-6, BATCH),
    ("scipy LSODA", 1e-6, BATCH),
    ("torchdiffeq dopri5", 1e-6, BATCH),
    ("torchode Tsit5", 1e-6, BATCH),
]


# --- the reference ---------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Starts, data, the times of the goals and the directions there, of the first trials that get there by `LATEST`."""
    import jax
    import numpy as np

    import gradflow as gf

    jax.config.update("jax_enable_x64", True)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(np.arange(DRAWN))
    _, data, nets = jax.jit(jax.vmap(gf.Trial().draw))(keys)

    def reach(net, data, goal):
        flow = gf.integrate(net, data, until=gf.Until(log_loss=goal))
        return jax.numpy.where(flow.success, flow.time, np.inf)

    def follow(net, data, time):
        return gf.integrate(net, data, until=gf.Until(time=time), rtol=1e-9, atol=1e-9).final

    reach, follow = jax.jit(jax.vmap(reach, (0, 0, None))), jax.jit(jax.vmap(follow))
    times = np.stack([reach(nets, data, goal) for goal in GOALS])
    (soon,) = np.nonzero(times[-1] <= LATEST)
    chosen, times = soon[:BATCH], times[:, soon[:BATCH]]
    print(f"The first {BATCH} of {chosen[-1] + 1} trials that get to log L = {GOALS[-1]:,g} by τ = {LATEST:,g}")
    nets, data = jax.tree.map(lambda a: a[chosen], (nets, data))
    found = {"x": data.x, "y": data.y, "w": nets.w, "b": nets.b, "v": nets.v, "time": times, "end": []}
    end, now = nets, 0.0
    for time_ in times:
        end, now = follow(end, data, time_ - now), time_
        found["end"].append(np.concatenate([end.w, end.b, end.v], axis=1))
    np.savez(folder / "race.npz", **{name: np.asarray(value) for name, value in found.items()})


# --- one entry -------------------------------------------------------------------------------------------------------


def numpy_field(x, y, k):
    import numpy as np

    def field(time, theta):
        w, b, v = theta[:k], theta[k : 2 * k], theta[2 * k :]
        a = x[:, None] * w + b
        h = np.maximum(a, 0)
        q = y * (h @ v)
        p = np.exp(np.min(q) - q)
        force = y * p / np.sum(p)
        on = (a > 0).T
        return np.concatenate([v * (on @ (force * x)), v * (on @ force), force @ h])

    return field


def jax_field(time, theta, points):
    import jax
    import jax.numpy as jnp

    x, y = points
    w, b, v = jnp.split(theta, 3)
    a = x[:, None] * w + b
    h = jnp.maximum(a, 0)
    force = y * jax.nn.softmax(-y * (h @ v))
    on = jnp.where(a > 0, 1.0, 0.0).T
    return jnp.concatenate([v * (on @ (force * x)), v * (on @ force), force @ h])


def torch_field(x, y, k):
    """Of a batch: θ is (trials, 3k)."""
    import torch

    x, y = torch.as_tensor(x), torch.as_tensor(y)

    def field(time, theta):
        w, b, v = theta[:, :k], theta[:, k : 2 * k], theta[:, 2 * k :]
        a = x[:, :, None] * w[:, None, :] + b[:, None, :]
        h = torch.relu(a)
        force = y * torch.softmax(-y * torch.einsum("tnk,tk->tn", h, v), dim=1)
        on = (a > 0).to(h.dtype)
        dw, db = torch.einsum("tnk,tn->tk", on, force * x), torch.einsum("tnk,tn->tk", on, force)
        return torch.cat([v * dw, v * db, torch.einsum("tnk,tn->tk", h, force)], dim=1)

    return field


def march(entry: str, tolerance: float, batch: int, found):
    """Yields (seconds so far, θ) at each goal; compiling not counted."""
    import numpy as np

    library, _, method = entry.partition(" ")
    x, y, w, b, v = (found[name][:batch] for name in "xywbv")
    start, times, k = np.concatenate([w, b, v], axis=1), found["time"][:, :batch], w.shape[1]
    if library == "gradflow":
        yield from march_gradflow(x, y, start, times, tolerance)
        return
    if library == "diffrax":
        advance = diffrax_advance(method, tolerance, x, y)
        advance(start, 0 * times[0], 1e-6 + 0 * times[0])
    elif library == "torchdiffeq":
        advance = torchdiffeq_advance(method, tolerance, x, y, k)
    elif library == "torchode":
        advance = torchode_advance(method, tolerance, x, y, k)
    else:
        advance = scipy_advance(method, tolerance, x, y, k)
    seconds, theta, now = 0.0, start, 0 * times[0]
    for goal in times:
        begun = time.perf_counter()
        theta = advance(theta, now, goal)
        seconds, now = seconds + time.perf_counter() - begun, goal
        yield seconds, theta


def march_gradflow(x, y, start, times, tolerance):
    import jax
    import numpy as np

    import gradflow as gf

    def end(theta, x, y, time):
        flow = gf.integrate(
            gf.ReluNetwork(*jax.numpy.split(theta, 3)),
            gf.Dataset(x, y),
            until=gf.Until(time=time),
            rtol=tolerance,
            atol=tolerance,
        )
        return jax.numpy.concatenate([flow.final.w, flow.final.b, flow.final.v])

    one = start.shape[0] == 1  # a batch of one is not what a user would run
    run = jax.jit(end) if one else jax.jit(jax.vmap(end))
    args = (start[0], x[0], y[0]) if one else (start, x, y)
    jax.block_until_ready(run(*args, 1e-6 + 0 * (times[0, 0] if one else times[0])))
    for goal in times:
        spent = []
        for _ in range(5 if one else 1):  # from the start, each time; a tenth of a second is soon disturbed
            begun = time.perf_counter()
            theta = np.asarray(run(*args, goal[0] if one else goal))
            spent.append(time.perf_counter() - begun)
        yield np.median(spent), np.atleast_2d(theta)


def diffrax_advance(method, tolerance, x, y):
    import diffrax
    import jax
    import numpy as np

    implicit = method.startswith("Kvaerno")
    solver = getattr(diffrax, method)() if implicit else getattr(diffrax, method)(scan_kind="lax")

    def one(theta, x, y, begin, end):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(jax_field),
            solver,
            begin,
            end,
            None,
            theta,
            (x, y),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            saveat=diffrax.SaveAt(t1=True),
            max_steps=None,
        ).ys[0]

    if x.shape[0] == 1:
        run = jax.jit(one)
        return lambda theta, begin, end: np.asarray(run(theta[0], x[0], y[0], begin[0], end[0]))[None]
    run = jax.jit(jax.vmap(one))
    return lambda theta, begin, end: np.asarray(run(theta, x, y, begin, end))


def scipy_advance(method, tolerance, x, y, k):
    import numpy as np
    from scipy.integrate import solve_ivp

    def advance(theta, begin, end):
        rows = []
        for i in range(x.shape[0]):
            span = (begin[i], end[i])
            found = solve_ivp(
                numpy_field(x[i], y[i], k), span, theta[i], method, t_eval=span[1:], rtol=tolerance, atol=tolerance
            )
            rows.append(found.y[:, -1])
        return np.stack(rows)

    return advance


def torchdiffeq_advance(method, tolerance, x, y, k):
    """Trials end at different times: each runs in its own unit of time."""
    import torch
    from torchdiffeq import odeint

    field = torch_field(x, y, k)

    def advance(theta, begin, end):
        span = torch.as_tensor(end - begin)[:, None]
        unit = torch.tensor([0.0, 1.0], dtype=torch.float64)
        with torch.no_grad():
            path = odeint(
                lambda s, theta: span * field(s, theta),
                torch.as_tensor(theta),
                unit,
                method=method,
                rtol=tolerance,
                atol=tolerance,
                options={"max_num_steps": 2**31 - 1},
            )
        return path[-1].numpy()

    return advance


def torchode_advance(method, tolerance, x, y, k):
    import torch
    import torchode

    term = torchode.ODETerm(torch_field(x, y, k))
    solver = torchode.AutoDiffAdjoint(
        getattr(torchode, method)(term=term),
        torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term),
    )

    def advance(theta, begin, end):
        with torch.no_grad():
            problem = torchode.InitialValueProblem(
                y0=torch.as_tensor(theta), t_eval=torch.as_tensor(end)[:, None], t_start=torch.as_tensor(begin)
            )
            return solver.solve(problem).ys[:, -1].numpy()

    return advance


def run_entry(name: str, tolerance: float, batch: int, folder: Path) -> None:
    """One line of JSON for each goal that is reached."""
    import numpy as np

    if name.startswith("torch"):
        import torch

        torch.set_num_threads(1)
    else:
        import jax

        jax.config.update("jax_enable_x64", True)
    found = np.load(folder / "race.npz")
    for goal, end, (seconds, theta) in zip(GOALS, found["end"], march(name, tolerance, batch, found), strict=True):
        end = end[:batch]
        off = theta / np.linalg.norm(theta, axis=1)[:, None] - end / np.linalg.norm(end, axis=1)[:, None]
        errors = np.max(np.abs(off), axis=1)
        told = {"goal": goal, "seconds": seconds, "error": float(np.median(errors)), "worst": float(np.max(errors))}
        print(json.dumps(told), flush=True)


# --- all of them -----------------------------------------------------------------------------------------------------


def race(entry, folder: Path, minutes: float, cpus) -> tuple[list[dict], bool]:
    """What it told, and whether it gave up before its time was over."""
    name, tolerance, batch = entry
    command = [sys.executable, __file__, "--entry", name, str(tolerance), str(batch), "--folder", str(folder)]
    cpu = cpus.pop()
    one = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    with open(folder / f"{name} {tolerance} {batch}.jsonl", "w+") as out, open(os.devnull, "w") as null:
        process = subprocess.Popen(command, stdout=out, stderr=null, env=os.environ | one)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, {cpu})
        failed = False
        try:
            failed = process.wait(60 * minutes) != 0
        except subprocess.TimeoutExpired:
            process.kill()
        cpus.append(cpu)
        out.seek(0)
        return [json.loads(line) for line in out], failed


def _which(told: dict) -> tuple:
    return told["name"], told["tolerance"], told["batch"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--only", help="those with this in their name; the others stay as they are in race.json")
    parser.add_argument("--batch", type=int, choices=(1, BATCH), help="one trial, or the batch; default both")
    parser.add_argument("--cores", type=int, help="how many to use; default all")
    parser.add_argument("--entry", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        prepare(args.prepare)
        return
    if args.entry:
        run_entry(args.entry[0], float(args.entry[1]), int(args.entry[2]), args.folder)
        return
    minutes = args.minutes or (0.5 if args.quick else 10)
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cpus = cpus[: args.cores]
    print(f"{platform.processor() or platform.machine()}, {len(cpus)} cores, {minutes:g} minutes each")
    print(f"{'':22}{'tol':>7}{'batch':>6}" + "".join(f"{f'log L {goal:g}':>20}" for goal in GOALS))
    print(f"{'':35}" + f"{'seconds':>11}{'error':>9}" * len(GOALS))
    entries = [e for e in ENTRIES if (args.only or "") in e[0] and args.batch in (None, e[2])]
    kept = {} if entries == ENTRIES else {_which(e): e for e in json.loads(RESULT.read_text(encoding="utf-8"))}
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(len(cpus)) as pool:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--prepare", name], check=True)
        for entry, (lines, failed) in zip(
            entries, pool.map(lambda e: race(e, folder, minutes, cpus), entries), strict=True
        ):
            cells = [f"{line['seconds']:>11.3g}{line['error']:>9.0e}" for line in lines]
            cells += [f"{'failed' if failed else '–':>11}{'':>9}"] * (len(GOALS) - len(cells))
            print(f"{entry[0]:22}{entry[1]:>7.0e}{entry[2]:>6}" + "".join(cells), flush=True)
            kept[entry] = {"name": entry[0], "tolerance": entry[1], "batch": entry[2], "goals": lines, "failed": failed}
            if not args.quick:
                RESULT.write_text(json.dumps(list(kept.values()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
