"""The command line: what it prints and writes, and what it says about files that are not right."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import planted
import pytest

import gradflow
from gradflow.__main__ import default_folder, main, read_points
from gradflow.archive import load
from gradflow.statistics import estimate_probability
from gradflow.trial import Trial
from gradflow.watch import Progress

ROOT = Path(__file__).parents[1]
X, Y = [-0.5, 0.25, 1.0], [-1.0, 1.0, 1.0]


def run(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, in this process."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("content", "header"),
    [
        (b"-0.5,-1\n0.25,1\n1,1\n", ""),
        (b"x,y\n-0.5,-1\n0.25,+1\n1,1.0\n", "x,y"),
        (b"\xef\xbb\xbfx,y\r\n-0.5,-1\r\n0.25,1\r\n1,1\r\n", "x,y"),
        (b"\n  \n-0.5, -1\n\n 0.25 ,1\n1,1", ""),
        (b"input;label\n-0.5;-1\n0.25;1\n1;1\n", "input;label"),
        (b"-0.5\t-1\n0.25\t1\n1\t1\n", ""),
        (b"-0.5 -1\n  0.25   1\n1 1\n", ""),
        (b'"x","y"\n"-0.5","-1"\n"0.25","1"\n"1","1"\n', '"x","y"'),
        (b"# made by hand\n-0.5,-1\n# more\n0.25,1\n1,1\n", ""),
        (b"y,x\n-1,-0.5\n1,0.25\n1,1\n", "y,x"),
        ("−0.5,−1\n0.25,1\n1,1\n".encode(), ""),
        (b"-5e-1,-1\r0.25,1\r1,1\r", ""),
    ],
    ids=[
        "plain",
        "header",
        "bom crlf",
        "blank",
        "semicolon",
        "tab",
        "space",
        "quotes",
        "comment",
        "y,x",
        "minus",
        "cr",
    ],
)
def test_read_points_takes_what_people_have(tmp_path, content, header):
    file = tmp_path / "points.csv"
    file.write_bytes(content)
    points = read_points(file)
    assert (points.x, points.y, points.header) == (X, Y, header)


BAD = {
    "word": (b"0.1,1\n0.2,one\n", "line 2", "y = 'one' is not a number"),
    "word in first line": (b"0.1,up\n0.2,1\n", "line 1", "y = 'up' is not a number"),
    "decimal comma": (b"0,5;1\n", "line 1", "write 0.5"),
    "one column": (b"0.1\n0.2\n", "line 1", "1 column"),
    "three columns": (b"x,y\n0.1,1\n0.2,1,7\n", "line 3", "3 columns"),
    "missing cell": (b"0.1,1\n0.2,\n", "line 2", "y is missing"),
    "empty": (b"", "points.csv", "empty"),
    "blank": (b"\n \r\n\n", "points.csv", "empty"),
    "header only": (b"\nx,y\n", "line 2", "no points"),
    "label": (b"x,y\n0.1,1\n0.2,2\n", "line 3", "labels must be -1 or +1"),
    "labels 0 and 1": (b"0.1,1\n0.2,0\n0.3,0\n", "lines 2, 3", "write -1 instead of 0"),
    "conflict": (b"x,y\n0.1,1\n0.5,1\n\n0.1,-1\n", "lines 2, 5", "x = 0.1 carries both labels"),
    "nan": (b"0.1,1\nnan,1\n", "line 2", "not finite"),
    "overflow": (b"0.1,1\n0.2,1\n1e999,1\n", "line 3", "not finite"),
    "nan label": (b"0.1,nan\n", "line 1", "y = nan is not finite"),
    "spreadsheet": (b"PK\x03\x04\xff\xfe\x00", "points.csv", "UTF-8"),
    "missing file": (None, "points.csv", "No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_points_are_named_with_file_and_line(tmp_path, monkeypatch, capsys, name):
    content, where, what = BAD[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("points.csv").write_bytes(content)
    code, out, err = run(capsys, "flow", "points.csv")
    assert code == 2
    assert out == ""
    assert err.startswith("gradflow: error: points.csv") and err.count("\n") == 1
    assert where in err and what in err
    assert not Path("points.png").exists()


def test_many_bad_lines_are_counted_not_listed(tmp_path):
    file = tmp_path / "points.csv"
    file.write_text("".join(f"0.{i},3\n" for i in range(1, 9)))
    with pytest.raises(ValueError, match="lines 1, 2, 3, 4, 5 and 3 more"):
        read_points(file)


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        ((), "required"),
        (("study", "--trials", "0"), "trials must be at least 1"),
        (("study", "--quick", "--trials", "5"), "not allowed with"),
        (("study", "--switches", "9"), "label switches"),
        (("study", "--log-loss", "-3"), "unrecognized"),
        (("study", "--confidence", "1"), "confidence"),
        (("study", "--confidence", "0.9999999999999999"), "confidence"),
        (("study", "--delta", "1e-17"), "delta"),
        (("study", "--sweep", "wide"), "invalid choice"),
        (("study", "--full", "--quick"), "not allowed with"),
        (("study", "--width", "many"), "invalid int"),
        (("study", "--tria", "5"), "unrecognized"),
        (("flow", "points.csv", "--loss", "hinge"), "invalid choice"),
        (("flow", "points.csv", "--figure", "points.doc"), ".png"),
        (("flow", "points.csv", "--figure", "nowhere/points.png"), "no folder nowhere"),
        (("flow", "points.csv", "--width", "0"), "width"),
        (("flow", "points.csv", "--max-steps", "0"), "max_steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_options_are_refused_before_any_work(tmp_path, monkeypatch, capsys, argv, what):
    monkeypatch.chdir(tmp_path)
    Path("points.csv").write_text("-0.5,-1\n0.5,1\n")
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert what in err
    assert [file.name for file in tmp_path.iterdir()] == ["points.csv"]


def test_version_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "gradflow", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, f"gradflow {gradflow.__version__}\n")


def test_errors_leave_no_traceback_in_a_process_of_its_own(tmp_path):
    (tmp_path / "points.csv").write_text("0.1,1\n0.2,x\n")
    done = subprocess.run(
        [sys.executable, "-m", "gradflow", "flow", str(tmp_path / "points.csv")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "line 2" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("header", ["", "x,y\n"], ids=["no header", "header"])
def test_flow_reports_and_draws(tmp_path, monkeypatch, capsys, header):
    monkeypatch.chdir(tmp_path)
    Path("points.csv").write_text(header + "-0.5,-1\n0.25,1\n1,1\n")
    code, out, err = run(capsys, "flow", "points.csv", "--width", 8, "--log-loss", -4, "--seed", 1)
    assert code == 0, err
    assert "points.csv: 3 points in [-0.5, 1]" in out
    assert "Flow of 8 neurons" in out and "of 3 points on their side, 1 label switch" in out
    assert "effective linear regions" in out and "knots at x" in out
    assert ("header" in out) == bool(header)
    assert Path("points.png").read_bytes().startswith(b"\x89PNG")


def test_flow_goes_to_the_certified_limit_unless_told_otherwise(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("points.csv").write_text("-0.5,-1\n0.25,1\n1,1\n")
    code, out, err = run(capsys, "flow", "points.csv", "--width", 8, "--seed", 1)
    assert code == 0, err
    assert "Limit: Certified" in out and "Maximum margin" in out and "margin of the limit over the largest" in out


def test_flow_draws_where_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("points.csv").write_text("-0.5,-1\n0.25,1\n1,1\n")
    argv = ("flow", "points.csv", "--width", 8, "--log-loss", -4, "--seed", 1, "--figure", "drawn.pdf")
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "figure   drawn.pdf" in out and Path("drawn.pdf").read_bytes().startswith(b"%PDF")
    assert not Path("points.png").exists()


SMALL = ("--neurons", 2, "--switches", 1, "--samples", 20, "--width", 32, "--sweep", "none")


@pytest.mark.slow
def test_study_prints_claims_and_writes_dataset_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "study", *SMALL, "--trials", 8, "--key", 5, "--confidence", 0.9)
    assert code == 0, err
    assert "perfect training accuracy" in out and "90 %" in out
    (folder,) = Path("runs").iterdir()
    assert f"dataset  {folder / 'study.nc'}" in out and f"figures  {folder / 'study.png'}\n" in out
    dataset = load(folder)
    assert dataset.sizes["trial"] == 8
    assert np.all(dataset["sample_switches"].values <= 1)
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    assert {"manifest.json", "study.nc", "study.png"} < {file.name for file in folder.iterdir()}
    # Another experiment must not overwrite this one, and has a folder of its own unless told otherwise.
    code, _, err = run(capsys, "study", *SMALL, "--trials", 8, "--key", 6, "--path", folder)
    assert code == 2 and str(folder) in err
    assert load(folder).identical(dataset)


@pytest.mark.parametrize(
    ("argv", "cells", "trials"),
    [((), 7, 64), (("--trials", 9), 7, 9), (("--full",), 31, 330), (("--full", "--sweep", "around"), 7, 330)],
)
def test_study_sweeps_around_the_trial(tmp_path, monkeypatch, capsys, argv, cells, trials):
    asked = {}

    def run_sweep(cells, *, key, trials, path, progress):
        asked.update(cells=list(cells), trials=trials, path=path)
        progress(Progress(1, 2, {"holds": 1}, estimate_probability(1, 1), 0.5, 2.0))
        path.mkdir()
        return planted.sweep(*(planted.study(cell, 12, population_error=0.01) for cell in cells))

    monkeypatch.setattr("gradflow.__main__.run_sweep", run_sweep)
    folder = tmp_path / "sweep"
    code, out, err = run(capsys, "study", *argv, "--path", folder, "--delta", 0.2)
    assert code == 0, err
    if argv == ("--full", "--sweep", "around"):  # what is said last counts
        trials = asked["trials"]
    assert (len(asked["cells"]), asked["trials"], asked["path"]) == (cells, trials, folder)
    assert asked["cells"][0] == Trial() and ">= 0.8" in out and f"in {cells} cells" in out
    assert f"dataset  {folder / 'sweep-'}" in out
    assert sorted(file.name for file in folder.iterdir()) == ["study.png", "sweep.png"]


def test_each_experiment_has_a_folder_of_its_own():
    trials, sweeps = (Trial(), Trial(width=8), Trial()), ("none", "around")
    assert len({default_folder(trial, key, sweep) for trial in trials for key in (0, 1) for sweep in sweeps}) == 8
