"""The README keeps its promises: its example runs, and its commands, links and names are real."""

import re
import runpy
import sys
from pathlib import Path

import jax
import pytest

import gradflow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Without the strict promotion of types and ranks that other tests run in; Optax's Adam knows no other way."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_the_example_runs_and_is_short(capsys):
    assert len([line for line in EXAMPLES[0].splitlines() if line]) <= 15
    exec(compile(EXAMPLES[0], "README.md", "exec"), {"__name__": "readme"})
    out = capsys.readouterr().out
    for found in ("Limit: Certified", "(proved)", "perfect training accuracy"):
        assert found in out


@pytest.mark.slow
def test_what_else_a_flow_can_do(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup = "".join(line + "\n" for line in EXAMPLES[0].splitlines()[:4])
    exec(compile(setup + EXAMPLES[2], "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "flow.png").exists()
    out = capsys.readouterr().out
    assert "ReluNetwork(" in out and "Reached what `until` asked for." in out


@pytest.mark.slow
def test_derivatives(capsys):
    setup = "".join(line + "\n" for line in EXAMPLES[0].splitlines()[:4])
    names = {"__name__": "readme"}
    exec(compile(setup + EXAMPLES[3], "README.md", "exec"), names)
    assert jax.numpy.isfinite(names["by_x"]).all() and float(names["worst"].ratio) >= 1
    assert "nan" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_of_ones_own(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup = "".join(line + "\n" for line in EXAMPLES[0].splitlines()[:4])
    exec(compile(setup + EXAMPLES[1], "README.md", "exec"), {"__name__": "readme"})
    out = capsys.readouterr().out
    assert "samples" in out and "success does not depend on n" in out


@pytest.mark.parametrize("script", ["claims.py", "race_table.py"])
def test_tables_are_those_of_the_saved_measurements(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    assert stop.value.code is None


@pytest.mark.parametrize(
    "command",
    [
        "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m gradflow study",
        'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest',
    ],
)
def test_each_command_stands_once_on_a_line_of_its_own(command):
    assert README.splitlines().count(command) == 1


def test_files_and_names_it_mentions_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]
    names = set(re.findall(r"\bgf\.(\w+)", README))
    assert names and not [name for name in names if not hasattr(gradflow, name)]


def test_no_number_is_left_to_be_measured():
    assert "MEASURE" not in README
