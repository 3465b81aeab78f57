"""Figures of a study: its claims, the regions of its limits, their error, and its claims as a table.

Every function draws on the `ax` it is given, labels it, and returns the artists it drew.
"""

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from gradflow.archive import studies
from gradflow.claim import CONFIDENCE, DELTA, trial_of
from gradflow.record import Verdict
from gradflow.style import BLACK, BLUE, GREY, ORANGE, SIZE, VERMILLION, Picture, finish, legend_above
from gradflow.table import claims as study_claims

VERDICTS = {"holds": BLUE, "contradicted": VERMILLION, "undecided": GREY}


def claims(ax: Axes, claims) -> list[Artist]:
    """One row for each claim about a probability: what it is, with its exact interval, and the trials behind it.

    Blue: holds; vermillion: contradicted; grey: undecided. A claim that cannot fail by construction says so in its
    `note`; it is drawn hollow. Dotted: the probability that is asked for.
    """
    claims = [claim for claim in claims if claim.asked.startswith(">=")]
    if not claims:
        raise ValueError("there is no claim about a probability among these")
    rows = np.arange(len(claims))[::-1]
    artists: list[Artist] = []
    for row, claim in zip(rows, claims, strict=True):
        p, colour = claim.measured, VERDICTS[claim.verdict]
        face = "white" if "vacuous" in claim.note else colour
        reach = [[p.estimate - p.low], [p.high - p.estimate]]
        bar = ax.errorbar(p.estimate, row, xerr=reach, fmt="o", ms=5, mfc=face, color=colour, capsize=3, elinewidth=1.6)
        artists += bar.get_children()
        artists += ax.plot(2 * [float(claim.asked[2:])], [row - 0.35, row + 0.35], color=BLACK, lw=1.0, ls=":")
        number = f"{p.estimate:.3f}  [{p.low:.3f}, {p.high:.3f}]"
        artists.append(ax.text(1.02, row, number, transform=ax.get_yaxis_transform(), va="center", fontsize=8))
    names = [f"{c.name}{' (vacuous)' if 'vacuous' in c.note else ''}\n{_counts(c)}" for c in claims]
    ax.set_yticks(rows, names)
    ax.set_ylim(-0.6, len(claims) - 0.4)
    # From the next tenth below the widest interval: probabilities near 1 are the interesting ones.
    left = max(0.0, np.floor(10 * min(c.measured.low for c in claims) - 0.2) / 10)
    ax.set_xlim(left, 1 + 0.02 * (1 - left))
    verdicts = dict.fromkeys(claim.verdict for claim in claims)
    kinds = [Line2D([], [], color=VERDICTS[v], marker="o", ms=5, lw=1.6, label=v) for v in verdicts]
    artists.append(legend_above(ax, handles=[*kinds, Line2D([], [], color=BLACK, lw=1.0, ls=":", label="asked")]))
    ax.grid(axis="x", color="0.9", lw=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel(f"probability, with its exact {100 * claims[0].measured.confidence:g}% interval")
    return artists


def claim_table(ax: Axes, claims) -> list[Artist]:
    """All claims as a table: what is said, its verdict, the number that decides it with its exact interval, what was
    asked of that, and the trials behind it. Colours as in `claims`.
    """
    names = ("claim", "verdict", "number", "interval", "asked", "hold / fail / unres.")
    columns = tuple(
        zip(
            (0.0, 0.35, 0.555, 0.575, 0.725, 1.0),
            ("left", "left", "right", "left", "left", "right"),
            names,
            strict=True,
        )
    )
    rows = [
        (
            f"{c.name}{' (vacuous)' if 'vacuous' in c.note else ''}",
            c.verdict,
            f"{c.measured.estimate:.3f}".replace("-", "−"),
            f"[{c.measured.low:.3f}, {c.measured.high:.3f}]".replace("-", "−"),
            c.asked.replace(">=", "≥").replace("<=", "≤").replace("-", "−"),
            f"{c.holds} / {c.fails} / {c.unresolved}",
        )
        for c in claims
    ]
    artists: list[Artist] = []
    for y, row in enumerate([names, *rows]):
        for (x, side, name), text in zip(columns, row, strict=True):
            colour = VERDICTS.get(text, BLACK) if name == "verdict" else BLACK
            bold = "bold" if y == 0 or name == "verdict" else "normal"
            artists.append(ax.text(x, y, text, ha=side, va="center", fontsize=8, color=colour, weight=bold))
    artists += [ax.axhline(y, color=BLACK, lw=0.8) for y in (-0.6, 0.5, len(rows) + 0.6)]
    ax.set_xlim(0, 1)
    ax.set_ylim(len(rows) + 0.7, -0.7)
    ax.set_axis_off()
    return artists


def regions(ax: Axes, dataset) -> list[Artist]:
    """Histogram of the linear regions of certified limits, counted exactly, as shares of *all* trials.

    What is missing to 100 % has no certified limit. Orange: those of the limits that are the global optimum. A network
    with m sign changes needs at least m regions (one if m = 0): the dotted line is the mean of that over the samples.
    """
    dataset = _one(dataset)
    total = dataset.sizes["trial"]
    resolved = np.asarray(dataset["regions_verdict"]) != Verdict.unresolved
    count = np.asarray(dataset["regions"])[resolved]
    best = np.asarray(dataset["optimum_verdict"])[resolved] == Verdict.holds
    floors = np.maximum(np.asarray(dataset["sample_switches"]), 1)
    top = int(max(np.max(count, initial=1), np.max(floors))) + 1
    edges = np.arange(0.5, top + 1)

    def share(values):
        return np.histogram(values, edges)[0] / total

    centres = edges[:-1] + 0.5
    artists: list[Artist] = list(ax.bar(centres, share(count), width=0.8, color=BLUE, alpha=0.75, label="certified"))
    artists += ax.bar(centres, share(count[best]), width=0.45, color=ORANGE, label="global optimum")
    artists.append(ax.axvline(float(np.mean(floors)), color=BLACK, lw=1.0, ls=":", label="least"))
    ax.set_xlim(0.5, top + 0.5)
    ax.set_xlabel("linear regions of the limit")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylim(0, ax.get_ylim()[1] or 1.0)
    ax.set_ylabel(_share_label(resolved))
    artists.append(legend_above(ax))
    return artists


def population_error(ax: Axes, dataset) -> list[Artist]:
    """Share of *all* trials whose population error is at most x: the empirical distribution function, log x.

    It is that of the limit. Trials without a certified one are never counted as small, so the curve ends at the share
    of those with one. Dotted: 1/n, the weight of one training point. Errors of exactly 0 enter at the left edge.
    """
    dataset = _one(dataset)
    error = np.asarray(dataset["population_error"])
    resolved = np.asarray(dataset["regions_verdict"]) != Verdict.unresolved
    resolved = resolved & np.isfinite(error)
    samples = trial_of(dataset).samples
    positive = error[resolved & (error > 0)]
    # Whole decades, so that each has its label.
    edge = 10 ** np.floor(np.log10(0.99 * np.min(positive, initial=1 / samples)))
    x = np.sort(np.maximum(error[resolved], edge))
    share = np.arange(1, x.size + 1) / error.size
    right = 10 ** np.ceil(np.log10(np.max(x, initial=1.01 / samples)))
    zeros = int(np.sum(error[resolved] == 0))
    label = f"trials ({zeros} with error 0, at the edge)" if zeros else "trials"
    steps = np.concatenate([[edge], x, [right]]), np.concatenate([[0], share, share[-1:] if x.size else [0]])
    artists: list[Artist] = list(ax.step(*steps, where="post", color=BLUE, lw=1.5, label=label))
    artists.append(ax.axvline(1 / samples, color=BLACK, lw=1.0, ls=":", label=f"1/n, n = {samples}"))
    ax.set_xscale("log")
    ax.set_xlim(edge, right)
    ax.set_ylim(0, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.xaxis.set_minor_formatter(NullFormatter())  # within one decade they would run into each other
    ax.set_xlabel("population error, P(wrong label)")
    ax.set_ylabel(_share_label(resolved, "at or below"))
    artists.append(legend_above(ax))
    return artists


def study_figure(dataset, confidence: float = CONFIDENCE, delta: float = DELTA) -> Figure:
    """A study at a glance: the claims, the regions, the population error."""
    dataset = _one(dataset)
    figure = Picture(figsize=SIZE, layout="constrained")
    # Two subfigures, so that the long names of the claims do not squeeze the panels below.
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.3, 1.0], hspace=0.04)[:, 0]
    top, (left, right) = upper.subplots(), lower.subplots(1, 2)
    claims(top, study_claims(dataset, confidence, delta))
    regions(left, dataset)
    population_error(right, dataset)
    trial = trial_of(dataset)
    figure.suptitle(
        f"{dataset.sizes['trial']} random trials: r = {trial.neurons} teacher neurons, width k = {trial.width}, "
        f"n = {trial.samples} samples",
        fontsize=10,
    )
    for ax, letter in ((top, "a"), (left, "b"), (right, "c")):
        finish(ax, letter)
    return figure


def _one(dataset):
    """The study that this is; a sweep of several cells is none."""
    cells = studies(dataset)
    if len(cells) > 1:
        raise ValueError(f"this is a sweep: take sweep_figure, or one of its {len(cells)} cells, .isel(cell=0)")
    return cells[0]


def _counts(claim) -> str:
    return f"{claim.holds} hold, {claim.fails} fail, {claim.unresolved} unresolved"


def _share_label(resolved: np.ndarray, what: str = "") -> str:
    missing = int(np.sum(~resolved))
    label = f"share of trials {what}".strip()
    return f"{label}\n({missing} of {resolved.size} unresolved)" if missing else label
