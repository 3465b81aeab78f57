"""README's table of the race, from `race.json`, which `race.py` writes.

python benchmarks/race_table.py            # rewrite it
python benchmarks/race_table.py --check    # is it the one that race.json gives?
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULT, README = HERE / "race.json", HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks/race_table.py: table -->\n", "<!-- race ends -->\n"
BATCH, MINUTES = 64, 10
SHOWN = (-10.0, -60.0, -1000.0)


def table(told) -> str:
    """README's table: seconds to each of the goals shown, and the error at the last that was reached."""
    head = ["solver", "rtol = atol", *(f"log L = {goal:,g}".replace("-", "−") for goal in SHOWN), "error"]
    head += [f"{BATCH} trials: {SHOWN[0]:g}".replace("-", "−"), *(f"{goal:,g}".replace("-", "−") for goal in SHOWN[1:])]
    rows = {}
    for entry in told:
        reached = {goal["goal"]: goal for goal in entry["goals"]}
        missing = "fails" if entry["failed"] else f"> {60 * MINUTES}"
        cells = [_figures(reached[goal]["seconds"]) if goal in reached else missing for goal in SHOWN]
        row = rows.setdefault((entry["name"], entry["tolerance"]), {})
        row[entry["batch"]] = cells
        if entry["batch"] == 1:
            row["error"] = power(entry["goals"][-1]["error"]) if entry["goals"] else ""
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for (name, tolerance), row in rows.items():
        cells = [*row.get(1, [""] * 3), row.get("error", ""), *row.get(BATCH, [""] * 3)]
        lines.append(f"| {name} | {power(tolerance)} | " + " | ".join(cells) + " |")
    return "\n".join(["", *lines, ""]) + "\n"


def _figures(seconds: float) -> str:
    """Two figures, without an exponent."""
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def power(number: float) -> str:
    """To one figure: 3·10⁻⁵."""
    digit, exponent = f"{number:.0e}".split("e")
    tens = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return tens if digit == "1" else f"{digit}·{tens}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README has another table")
    args = parser.parse_args()
    text, told = README.read_text(encoding="utf-8"), json.loads(RESULT.read_text(encoding="utf-8"))
    new = text[: text.index(BEGIN) + len(BEGIN)] + table(told) + text[text.index(END) :]
    if args.check:
        sys.exit(None if new == text else "README.md has another table than benchmarks/race.json gives")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
