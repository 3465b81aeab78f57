"""Trials a second against the batch, and the share of the lanes' time that goes into trials.

The reference trial: 50 points with 4 label switches, 32 neurons, to the certified limit, judged.

    python benchmarks/batches.py                    # 400 trials or 12 batches at each size, 10 minutes
    python benchmarks/batches.py --quick            # 64 trials or 2 batches at 4 and 8
    python benchmarks/batches.py --trials 10000 --batch 8

On two cores (Intel Xeon), JAX 0.10, float64, November 2026, 400 trials at each size (--trials 400 --batch 4 8 16), a
median of 500 attempts each, 857 at most. `us/attempt` is all of the wall time, limits and Python included, over all
attempts; `useful` the share of the lanes' attempts that belong to a trial, `(naive)` what it would be in one batch of
all that waits for its slowest, 58.5 %:

     batch   4     8     16
  trials/s   18.9  21.2  19.8
us/attempt   106   94    101
    useful   99 %  98 %  96 %

Of 10,000 trials (version b689eca) the median took 490 attempts, the longest 1,083, and one stayed open. On two other
cores (AMD EPYC), shared with others, batches of 8 made 20.0 to 24.5 trials/s. One core makes half of what
two do: of 85 ms a trial there, 62 went into step attempts (126 µs a lane), 14 into limits at the ends of rounds, 4 into
the global optimum, the rest into drawing trials, filling lanes and Python.

What did not help: other safety factors of the step (0.8 and 0.7 instead of 0.9: 492 to 504 attempts; `pieces.py` says
what an attempt is made of, and what did not make it cheaper).

Counted once over 64 trials of version aa94089: of 445 attempts before the limit 163 end where a breakpoint crosses a
point without sticking, 12 % are rejected for their error, 6 % because an event was missed; the jumps at those crossings
are a hundred to ten thousand tolerances, too large to be put right afterwards.
"""

import argparse
import platform
import time

import jax
import numpy as np

import gradflow as gf


def measure(batch: int, trials: int, key) -> str:
    """One study, its programs compiled beforehand."""
    trial = gf.Trial()
    gf.run_study(trial, key=key, trials=1, batch=batch)
    begun = time.monotonic()
    study = gf.run_study(trial, key=key, trials=trials, batch=batch)
    seconds = time.monotonic() - begun
    attempts = study["steps"].values + study["rejected"].values
    useful = attempts.sum() / study.attrs["lane_attempts"]
    waiting = trials * np.max(attempts)  # attempts of a batch of all that waits for its slowest
    open_ = int(np.sum(~np.isin(study["status"].values, [gf.STATUSES.index(s) for s in ("certified", "stalled")])))
    return (
        f"{batch:>6}{trials:>8}{seconds:>9.1f}{trials / seconds:>11.1f}{1e6 * seconds / attempts.sum():>12.1f}"
        f"{useful:>9.1%}{attempts.sum() / waiting:>9.1%}"
        f"{int(np.median(attempts)):>9}{int(np.max(attempts)):>7}{open_:>6}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--batch", type=int, nargs="+")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    device = jax.devices()[0]
    batches = args.batch or ([4, 8] if args.quick else [1, 2, 4, 8, 16, 32])
    print(f"{device.device_kind or platform.processor()}, {jax.local_device_count()} device(s), JAX {jax.__version__}")
    print(
        f"{'batch':>6}{'trials':>8}{'seconds':>9}{'trials/s':>11}{'us/attempt':>12}{'useful':>9}{'(naive)':>9}", end=""
    )
    print(f"{'median':>9}{'most':>7}{'open':>6}")
    for batch in batches:
        trials = args.trials or (max(64, 2 * batch) if args.quick else max(400, 12 * batch))
        print(measure(batch, trials, jax.random.key(0)), flush=True)


if __name__ == "__main__":
    main()
