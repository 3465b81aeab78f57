"""A study in other processes: by executors, on two devices, joined by `jax.distributed`, killed; on the stand-in."""

# ruff: noqa: F811 (a test's argument is the fixture of that name)

import itertools
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import stand_in
from stand_in import KEY, QUICK, same, traces, trial  # noqa: F401 (fixtures)

from gradflow.archive import VARIABLES, load
from gradflow.store import Store
from gradflow.study import run_study, run_sweep

HERE = pathlib.Path(__file__).parent
TRIALS = 600


def spawn(**options):
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(2, context, initializer=stand_in.install, **options)


def command(folder, trials, segment=50, *joined):
    return [sys.executable, str(HERE / "run_stand_in.py"), str(folder), str(trials), str(segment), *map(str, joined)]


# Executors


def test_threads_of_an_executor_change_nothing(trial):
    with ThreadPoolExecutor(2) as executor:
        assert same(run_study(trial, key=KEY, trials=50, executor=executor), run_study(trial, key=KEY, trials=50))


def test_a_process_pool_changes_nothing(trial, tmp_path):
    expected = run_study(trial, key=KEY, trials=TRIALS)
    with spawn() as executor:
        found = run_study(trial, key=KEY, trials=TRIALS, executor=executor, path=tmp_path, batch=4)
        cells = [trial, stand_in.dataclasses.replace(trial, scale=2.0)]
        sweep = run_sweep(cells, key=KEY, trials=70, executor=executor, batch=4)
    assert same(found, expected) and same(load(tmp_path), expected)
    assert same(sweep, run_sweep(cells, key=KEY, trials=70))
    assert 0.3 < int(expected["steps"].sum()) / found.attrs["lane_attempts"] <= 1


@pytest.mark.slow
def test_a_worker_that_dies_leaves_a_study_that_goes_on(trial, tmp_path):
    with spawn() as executor:

        def kill(now):
            if 0 < now.done < TRIALS:
                for process in executor._processes.values():
                    process.kill()

        with pytest.raises(RuntimeError, match="a worker of the executor died; its trials are run again if you go on"):
            run_study(trial, key=KEY, trials=8 * TRIALS, executor=executor, path=tmp_path, batch=4, progress=kill)
    done = Store(trial, KEY, tmp_path, 8 * TRIALS).done(8 * TRIALS)
    assert 0 < done < 8 * TRIALS
    whole = run_study(trial, key=KEY, trials=8 * TRIALS, path=tmp_path)
    assert same(whole, run_study(trial, key=KEY, trials=8 * TRIALS))


@pytest.mark.filterwarnings("default")
def test_a_dask_cluster_loses_a_worker_and_no_trial(trial, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    trials = 8 * TRIALS
    killed = []

    def kill(now):
        if now.done and not killed:
            killed.append(next(iter(client.run(os.getpid).values())))
            os.kill(killed[0], signal.SIGKILL)

    class StandIn(distributed.WorkerPlugin):
        def setup(self, worker):
            stand_in.install()

    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.register_plugin(StandIn())
        found = run_study(trial, key=KEY, trials=trials, executor=client.get_executor(), path=tmp_path, progress=kill)
    assert killed and same(found, run_study(trial, key=KEY, trials=trials))


@pytest.mark.slow
def test_real_trials_do_not_depend_on_who_runs_them(tmp_path):
    """Bit by bit where the batch is the same, and to rounding and its consequences where it is not."""
    trials = 40
    expected = run_study(QUICK, key=KEY, trials=trials, batch=8)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        assert same(run_study(QUICK, key=KEY, trials=trials, batch=8, executor=executor), expected)

    def stop(now):
        if now.done > stop.after:
            stop.after += 10
            raise KeyboardInterrupt

    stop.after = 0
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_study(QUICK, key=KEY, trials=trials, batch=8, path=tmp_path, progress=stop)
    assert same(run_study(QUICK, key=KEY, trials=trials, batch=8, path=tmp_path), expected)
    for batch in (3, 16):
        found = run_study(QUICK, key=KEY, trials=trials, batch=batch)
        for name, (kind, *_) in VARIABLES.items():
            a, b = found[name].values, expected[name].values
            if kind is np.float64:
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9, err_msg=name)
            elif name in ("steps", "rejected", "events"):
                assert np.mean(a != b) <= 0.1, name
            else:
                np.testing.assert_array_equal(a, b, err_msg=name)


# Devices and processes


def test_two_devices_change_nothing(trial, tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    run = subprocess.run(
        command(tmp_path, TRIALS), env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert same(load(tmp_path), run_study(trial, key=KEY, trials=TRIALS))


def test_two_joined_processes_share_a_study(trial, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    runs = [
        subprocess.Popen(
            command(tmp_path, TRIALS, 50, f"localhost:{port}", 2, i),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0 and out.split()[-1] == str(TRIALS), err
    assert same(load(tmp_path), run_study(trial, key=KEY, trials=TRIALS))
    mine = [set(part) for part in numbers_in(trial, tmp_path, TRIALS).values()]
    assert {len({number % 2 for number in part}) for part in mine} == {1}  # each ran its own half


# Killed


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_again_and_again_nothing_is_lost_or_doubled(trial, tmp_path, kills):
    clock, trials = random.Random(0), 60 * kills + 400
    kept = {}
    for _ in range(kills):
        run = subprocess.Popen(command(tmp_path, trials, 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and len(list(tmp_path.glob("part-*.nc"))) == len(kept):
            time.sleep(0.001)
        time.sleep(clock.uniform(0, 0.2))
        run.kill()
        assert run.wait() == -signal.SIGKILL  # it had not ended
        now = numbers_in(trial, tmp_path, trials)
        assert len(now) > len(kept) and {name: now[name] for name in kept} == kept
        kept = now
    found = run_study(trial, key=KEY, trials=trials, path=tmp_path)
    assert same(found, run_study(trial, key=KEY, trials=trials))
    numbers = list(itertools.chain(*numbers_in(trial, tmp_path, trials).values()))
    assert sorted(numbers) == list(range(trials))


def numbers_in(trial, folder, trials) -> dict[str, list[int]]:
    """The trials in each part; a damaged one would be a warning, which is an error here."""
    store = Store(trial, KEY, folder, trials)
    return {part.source.name: store._read(part.source)[0].tolist() for part in store.parts}
