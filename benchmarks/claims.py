"""The claim table and the figure of README.md, from the sweep that they were measured in.

    python -m gradflow study --full --path runs/full    # 31 cells of 330 trials; goes on where it stopped
    python benchmarks/claims.py --sweep runs/full       # keep what the claims need of it in claims.nc, then as below
    python benchmarks/claims.py                         # from claims.nc: rewrite README's table, redraw its figure
    python benchmarks/claims.py --check                 # is README's table the one that claims.nc gives?

Two cores, float64, November 2026: 10,230 trials in 1,234 s (beside other work, compiling not counted), with 99 % of the
lanes' time in trials. 8 met the step limit, 2 a step too small, 1 has no certified limit.
"""

import argparse
import sys
from pathlib import Path

import xarray as xr

import gradflow as gf
from gradflow.archive import write
from gradflow.plot import sweep_figure

HERE = Path(__file__).parent
DATASET, FIGURE, README = HERE / "claims.nc", HERE / "figures" / "sweep.png", HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks/claims.py: table -->\n", "<!-- table ends -->\n"
KEPT = (
    "verdict status limit_status accuracy_verdict regions_verdict optimum_verdict sample_switches separated regions "
    "optimality population_error log_loss law fall steps rejected"
).split()


def table(sweep: xr.Dataset) -> str:
    """README's table: every claim with its verdict, and the notes of those that have one."""
    found = gf.claims(sweep)
    rows = ["| claim | verdict | number | 99 % interval | asked | hold / fail / unresolved |", "| --- " * 6 + "|"]
    for claim in found:
        p = claim.measured
        asked = claim.asked.replace(">=", "≥").replace("<=", "≤")
        counts = f"{claim.holds} / {claim.fails} / {claim.unresolved}"
        verdict = f"**{claim.verdict}**" if claim.verdict != "undecided" else claim.verdict
        number, limits = f"{p.estimate:.3f}", f"[{p.low:.3f}, {p.high:.3f}]"
        rows.append(f"| {claim.name} | {verdict} | {number} | {limits} | {asked} | {counts} |".replace("-", "−"))
    notes = [f"* *{claim.name}*: {claim.note}." for claim in found if claim.note]
    return "\n".join(["", *rows, "", *notes, ""]).replace("<=", "≤") + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, help="a folder with a sweep to take what is needed from")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README has another table")
    args = parser.parse_args()
    if args.sweep is not None:
        write(gf.load(args.sweep)[KEPT], DATASET)
    sweep = xr.load_dataset(DATASET)
    text = README.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    new = before + table(sweep) + after
    if args.check:
        sys.exit(None if new == text else "README.md has another table than benchmarks/claims.nc gives")
    README.write_text(new, encoding="utf-8")
    sweep_figure(sweep).savefig(FIGURE, dpi=200)


if __name__ == "__main__":
    main()
