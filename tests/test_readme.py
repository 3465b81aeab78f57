"""The README keeps its promises: its example runs, and its commands, links and names are real."""

import re
from pathlib import Path

import pytest

import gradflow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_examples_run_and_the_first_is_short(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len([line for line in EXAMPLES[0].splitlines() if line]) <= 15
    names = {"__name__": "readme"}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), names)
    out = capsys.readouterr().out
    for found in ("Limit: Certified", "(proved)", "Reached what `until` asked for.", "perfect training accuracy"):
        assert found in out
    assert (tmp_path / "flow.png").exists()


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
