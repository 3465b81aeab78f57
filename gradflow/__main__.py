"""`python -m gradflow`: `study` estimates probabilities over random trials, `flow` trains on your own points."""

import argparse
import hashlib
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

import gradflow
from gradflow.archive import FILE, studies, sweep_name
from gradflow.claim import CONFIDENCE, DELTA, check_levels
from gradflow.data import Dataset
from gradflow.design import around, thorough
from gradflow.flow import integrate
from gradflow.loss import LOSSES
from gradflow.network import SCHEMES, ReluNetwork
from gradflow.optimum import max_margin
from gradflow.outcome import Flow, Until
from gradflow.piecewise import knots, linear_regions
from gradflow.plot import flow_figure, study_figure, sweep_figure
from gradflow.study import run_study, run_sweep
from gradflow.table import summary
from gradflow.trial import Trial
from gradflow.watch import Progress

SWEEPS = {"none": lambda trial: [trial], "around": around, "thorough": thorough}
TRIALS = {"none": 384, "around": 64, "thorough": 330}  # in each cell
QUICK_TRIALS = 32
SNAPSHOTS = 200
DPI = 200
QUIET = 30.0  # seconds without a word, where there is no progress bar
MERGE, DROP = 0.01, 0.01  # of the effective region count before the limit: a share of the data's length, and of Σ|v w|
FIGURES = (".png", ".pdf", ".svg")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line on `argv` (default: the process's own) and returns its exit code."""
    jax.config.update("jax_enable_x64", True)
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.verb(arguments)
    except (ValueError, OSError) as error:
        print(f"gradflow: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"gradflow: {stopped or 'interrupted'}", file=sys.stderr)
        return 130
    except MemoryError as error:
        print(f"gradflow: error: {error}", file=sys.stderr)
        return 1
    return 0


def study(arguments: argparse.Namespace) -> None:
    """The verb `study`: draw, integrate, judge; print the claims; write the dataset and the figure."""
    trial = Trial(**{name: getattr(arguments, name) for name in TRIAL_OPTIONS})
    check_levels(arguments.confidence, arguments.delta)
    directory = arguments.path or default_folder(trial, arguments.key, arguments.sweep)
    cells = SWEEPS[arguments.sweep](trial)
    trials = TRIALS[arguments.sweep] if arguments.trials is None else arguments.trials
    told = time.monotonic()
    if not sys.stderr.isatty():
        print("gradflow: compiling, for about a minute unless it is cached", file=sys.stderr, flush=True)
    with tqdm(total=trials * len(cells), unit="trial", desc="compiling", disable=None) as bar:

        def progress(now: Progress) -> None:
            nonlocal told
            if not sys.stderr.isatty() and time.monotonic() - told > QUIET:
                told = time.monotonic()
                print(f"gradflow: {now}", file=sys.stderr, flush=True)
            bar.set_description("trials", refresh=False)
            p = now.interval
            interval = "" if p is None else f", {p.estimate:.2f} [{p.low:.2f}, {p.high:.2f}]"
            bar.set_postfix_str(", ".join(f"{n} {name}" for name, n in now.verdicts.items()) + interval, refresh=False)
            bar.update(now.done - bar.n)

        key = jax.random.key(arguments.key)
        if arguments.sweep == "none":
            dataset, file = run_study(trial, key=key, trials=trials, path=directory, progress=progress), FILE
        else:
            dataset, file = (
                run_sweep(cells, key=key, trials=trials, path=directory, progress=progress),
                sweep_name(cells),
            )
    figures = [directory / "study.png"]
    study_figure(studies(dataset)[0], arguments.confidence, arguments.delta).savefig(figures[0], dpi=DPI)
    if arguments.sweep != "none":
        figures.append(directory / "sweep.png")
        sweep_figure(dataset, arguments.confidence, arguments.delta).savefig(figures[1], dpi=DPI)
    print(summary(dataset, arguments.confidence, arguments.delta))
    print(f"\ndataset  {directory / file}\nfigures  {', '.join(map(str, figures))}")


def flow(arguments: argparse.Namespace) -> None:
    """The verb `flow`: read points, integrate one flow, print its report, draw its figure."""
    points = read_points(arguments.points)
    target = arguments.figure or Path(f"{arguments.points.stem}.png")
    if target.suffix.lower() not in FIGURES:
        raise ValueError(f"--figure {target}: the name must end in {', '.join(FIGURES)}")
    if not target.parent.is_dir():
        raise ValueError(f"--figure {target}: there is no folder {target.parent}")
    data = Dataset(points.x, points.y)
    key = jax.random.key(arguments.seed)
    net = ReluNetwork.random(key, arguments.width, arguments.scheme, arguments.scale)
    until = Until() if arguments.log_loss is None else Until(log_loss=arguments.log_loss)
    loss = LOSSES[arguments.loss]()
    print("gradflow: compiling and integrating", file=sys.stderr, flush=True)
    result = integrate(net, data, loss, until, save=SNAPSHOTS, max_steps=arguments.max_steps)
    print(report(f"{arguments.points}: {described(points)}", data, result))
    flow_figure(result, data, merge=MERGE * _length(data), drop=DROP).savefig(target, dpi=DPI)
    print(f"figure   {target}")


def _length(data: Dataset) -> float:
    return float(jnp.ptp(data.x)) or 1.0


def report(title: str, data: Dataset, flow: Flow) -> str:
    """One flow in words: the data, the outcome, and the function that was learned: its limit, or else effectively."""
    correct, switches = int(jnp.sum(data.margins(flow.final) > 0)), int(data.switches)
    lines = [
        title,
        repr(flow),
        f"  {correct} of {data.samples} points on their side, {switches} label switches among them",
    ]
    if flow.limit is not None and flow.limit.certified:
        at, best = flow.limit.knots, max_margin(data)
        lines.append(f"  margin of the limit over the largest possible: {best.value / flow.limit.value:.6g}\n{best}")
    else:
        scan = (10**-0.5, 1.0, 10**0.5)
        counts = [int(linear_regions(flow.final, MERGE * a * _length(data), DROP * b)) for a in scan for b in scan]
        at = knots(flow.final, MERGE * _length(data), DROP)
        lines.append(
            f"  {len(at) + 1} effective linear regions ({min(counts)} to {max(counts)} over tolerances half a decade "
            f"up and down), {max(switches, 1)} the least possible"
        )
    lines.append(f"  knots at x = {', '.join(f'{x:.4g}' for x in at) or 'none'}")
    return "\n".join(lines)


class Points(NamedTuple):
    """What a file of points holds; `header` is its first line if that is one, else empty."""

    x: list[float]
    y: list[float]
    header: str


def read_points(path: Path) -> Points:
    """The points in a text file of two columns, x and label y = ±1.

    Columns may be separated by commas, semicolons, tabs or spaces; the first line may name them (`y,x` too).
    Blank lines and lines that start with # are skipped. **Raises** `ValueError` that names file and line and says what
    to change.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this is not plain text in UTF-8; save it as CSV (UTF-8)") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    rows = [
        (number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip() and line.strip()[0] != "#"
    ]
    if not rows:
        raise ValueError(f"{path}: the file is empty; give one point a line, x,y with y = -1 or +1")
    # Semicolons and tabs come first: where they stand, a comma is a decimal comma.
    separator = next((mark for mark in ";\t," if mark in rows[0][1]), None)
    header, order = "", slice(None)
    x, y, lines = [], [], []
    for number, line in rows:
        cells = [cell.strip().strip('"').strip() for cell in line.strip().split(separator)]
        if len(cells) != 2:
            found = "1 column" if len(cells) == 1 else f"{len(cells)} columns"
            raise ValueError(f"{path}, line {number}: {found} in {line.strip()!r}; give two, x and y: 0.25,-1")
        if number == rows[0][0] and not any(map(_is_number, cells)):
            header = line.strip()
            order = slice(None, None, -1) if [cell.lower() for cell in cells] == ["y", "x"] else order
            continue
        point = [_number(path, number, name, cell) for name, cell in zip("xy", cells[order], strict=True)]
        x.append(point[0])
        y.append(point[1])
        lines.append(number)
    if not x:
        raise ValueError(f"{path}: there is a header, line {rows[0][0]}, but no points below it")
    _check_labels(path, x, y, lines)
    return Points(x, y, header)


def described(points: Points) -> str:
    """What was read, so that a reader sees whether it is what the file meant."""
    header = f', header "{points.header}"' if points.header else ""
    return f"{len(points.x)} points in [{min(points.x):g}, {max(points.x):g}]{header}"


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace("−", "-"))
    except ValueError:
        return False
    return True


def _number(path: Path, line: int, name: str, cell: str) -> float:
    where = f"{path}, line {line}"
    if not cell:
        raise ValueError(f"{where}: {name} is missing; fill it in or remove the line")
    if not _is_number(cell):
        hint = (
            f"write {cell.replace(',', '.')}" if _is_number(cell.replace(",", ".")) else "correct it or remove the line"
        )
        raise ValueError(f"{where}: {name} = {cell!r} is not a number; {hint}")
    value = float(cell.replace("−", "-"))  # a typographic minus, as word processors put it
    if not math.isfinite(value):
        raise ValueError(f"{where}: {name} = {cell} is not finite; correct it or remove the line")
    return value


def _check_labels(path: Path, x: list[float], y: list[float], lines: list[int]) -> None:
    wrong = [line for line, label in zip(lines, y, strict=True) if abs(label) != 1]
    if wrong:
        zeros = all(label in (0, 1) for label in y)
        hint = "labels are -1 and +1 here: write -1 instead of 0" if zeros else "labels must be -1 or +1"
        raise ValueError(f"{path}, {_line_numbers(wrong)}: y = {y[lines.index(wrong[0])]:g}; {hint}")
    seen: dict[float, list[int]] = {}
    for row, value in enumerate(x):
        seen.setdefault(value, []).append(row)
    for value, rows in seen.items():
        if len({y[row] for row in rows}) > 1:
            where = _line_numbers([lines[row] for row in rows])
            raise ValueError(f"{path}, {where}: x = {value:g} carries both labels; no classifier can fit it: keep one")


def _line_numbers(numbers: list[int], limit: int = 5) -> str:
    shown = ", ".join(map(str, numbers[:limit])) + (f" and {len(numbers) - limit} more" if len(numbers) > limit else "")
    return f"line{'s' if len(numbers) > 1 else ''} {shown}"


def default_folder(trial: Trial, key: int, sweep: str) -> Path:
    """A folder of its own for every trial, key and sweep, so that a study is resumed and never mixed with another."""
    name = hashlib.sha256(f"{trial.to_json()} {key}".encode()).hexdigest()[:8]
    return Path("runs") / f"{'study' if sweep == 'none' else sweep}-{name}"


TRIAL_OPTIONS = (
    "neurons",
    "width",
    "samples",
    "switches",
    "min_run",
    "scheme",
    "scale",
    "loss",
    "max_steps",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("gradflow", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gradflow {gradflow.__version__}")
    verbs = parser.add_subparsers(required=True, metavar="{study,flow}")
    default, trial = " (default: %(default)s)", Trial()

    def add(verb, text):
        sub = verbs.add_parser(verb.__name__, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(verb=verb)
        return sub

    def number(of, name, kind, value, text):
        of.add_argument(name, type=kind, default=value, help=text + default)

    several = add(study, "probabilities over random trials, with exact intervals, a dataset and a figure")
    count = several.add_mutually_exclusive_group()
    defaults = ", ".join(f"{number} for {sweep}" for sweep, number in TRIALS.items())
    count.add_argument("--trials", type=int, help=f"number of trials in each cell (default: {defaults})")
    quick = f"{QUICK_TRIALS} trials of one cell, to see it work"
    count.add_argument("--quick", action=_Preset, const=("none", QUICK_TRIALS), help=quick)
    full = "the thorough sweep: every claim, over 10,000 trials, half an hour or more on two cores"
    count.add_argument("--full", action=_Preset, const=("thorough", None), help=full)
    several.add_argument(
        "--sweep", choices=SWEEPS, default="around", help="experiments around the one described" + default
    )
    number(several, "--key", int, 0, "seed of all randomness; trial i depends on it and i only")
    number(several, "--neurons", int, trial.neurons, "r, neurons of the teacher")
    number(several, "--samples", int, trial.samples, "n, points in a sample")
    number(several, "--switches", _switches, trial.switches, "label switches of the teacher: a number, or any")
    number(several, "--min-run", float, trial.min_run, "least probability of a label run")
    number(several, "--confidence", float, CONFIDENCE, "of the intervals")
    number(several, "--delta", float, DELTA, 'what "with high probability" means: 1 - delta')
    several.add_argument("--path", type=Path, help="folder of the dataset and the figure (default: one under runs/)")

    one = add(flow, "one flow on your own points: a report and a figure")
    one.add_argument("points", type=Path, help="text file with columns x,y and labels y = -1 or +1")
    number(one, "--seed", int, 0, "of the initial network")
    one.add_argument(
        "--log-loss", type=float, help="natural log of the mean loss to stop at (default: when the limit is certified)"
    )
    one.add_argument("--figure", type=Path, help="where to draw (default: named after the points, in this folder)")

    for verb in (several, one):
        number(verb, "--width", int, trial.width, "k, neurons of the network that learns")
        verb.add_argument(
            "--scheme", choices=SCHEMES, default=trial.scheme, help="law of the initial weights" + default
        )
        number(verb, "--scale", float, trial.scale, "factor of all initial weights")
        verb.add_argument("--loss", choices=LOSSES, default=trial.loss, help="loss of one margin" + default)
        number(verb, "--max-steps", int, trial.max_steps, "most step attempts of one flow")
    return parser


class _Preset(argparse.Action):
    """A flag that stands for a sweep and a number of trials."""

    def __init__(self, option_strings, dest, **rest):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **rest)

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.sweep, namespace.trials = self.const


def _switches(text: str) -> int | None:
    return None if text == "any" else int(text)


if __name__ == "__main__":
    sys.exit(main())
