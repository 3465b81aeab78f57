"""Figures of a sweep: when training succeeds, how regions grow with r, and how the error falls with n.

Every function draws on the `ax` it is given, labels it, and returns the artists it drew. Where a sweep has no
cells to compare it draws the first.
"""

from fractions import Fraction

import numpy as np
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.archive import studies
from gradflow.claim import CONFIDENCE, DELTA, coded, estimated, has_limit, tally, trial_of
from gradflow.scaling import alike, all_but, family, proportional, proportional_but_width, quantile_of
from gradflow.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SIZE, VERMILLION, Picture, finish, legend_above
from gradflow.theory import generalisation_bound

_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, BLACK)
_MARKERS = "os^Dv*"


def phase_diagram(ax: Axes, sweep: xr.Dataset, confidence: float = CONFIDENCE, delta: float = DELTA) -> list[Artist]:
    """Probability of perfect training accuracy over n and k/r, for the first cell's r.

    The numbers are shares of trials, bold where the exact interval lies above 1 − `delta`; a dash where no cell is.
    """
    first = trial_of(studies(sweep)[0])
    kind = all_but("samples", "width")
    cells = [cell for cell in studies(sweep) if kind(trial_of(cell)) == kind(first)]
    ns, ks = (sorted({getattr(trial_of(cell), name) for cell in cells}) for name in ("samples", "width"))
    share = np.full((len(ks), len(ns)), np.nan)
    texts: list[Artist] = []
    for cell in cells:
        p = estimated(tally(cell, coded("accuracy_verdict")), confidence)
        row, column = ks.index(trial_of(cell).width), ns.index(trial_of(cell).samples)
        share[row, column] = p.estimate
        colour = "white" if p.estimate < 0.6 else BLACK
        weight = "bold" if p.low >= 1 - delta else "normal"
        texts.append(
            ax.text(column, row, f"{p.estimate:.2f}", color=colour, weight=weight, ha="center", va="center", fontsize=9)
        )
    for row, column in np.argwhere(np.isnan(share)):
        texts.append(ax.text(column, row, "–", color=GREY, ha="center", va="center", fontsize=9))
    image = ax.imshow(share, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto")
    ax.set_xticks(range(len(ns)), [str(n) for n in ns])
    ax.set_yticks(range(len(ks)), [str(Fraction(k, first.neurons)) for k in ks])
    ax.set_xlabel("samples n")
    ax.set_ylabel(f"width k/r, r = {first.neurons} teacher neurons")
    return [image, *texts]


def success_against_width(ax: Axes, sweep: xr.Dataset, confidence: float = CONFIDENCE, delta: float = DELTA):
    """Probability of perfect training accuracy against k/r, one line for each r, n in proportion; with exact intervals.

    Dotted: 1 − `delta`.
    """
    neurons = family(sweep, proportional, "neurons")
    cells = alike(sweep, proportional_but_width, trial_of(studies(sweep if neurons is None else neurons)[0]))
    sizes: dict[int, list[xr.Dataset]] = {}
    for cell in studies(cells):
        sizes.setdefault(trial_of(cell).neurons, []).append(cell)
    sizes = {r: group for r, group in sizes.items() if len(group) > 1} or sizes  # a single point is no line
    artists: list[Artist] = [ax.axhline(1 - delta, color=BLACK, lw=1.0, ls=":")]
    ratios: set[Fraction] = set()
    for i, (r, group) in enumerate(sorted(sizes.items())):
        group = sorted(group, key=lambda cell: trial_of(cell).width)
        each = [Fraction(trial_of(cell).width, r) for cell in group]
        ratios |= set(each)
        parts = [estimated(tally(cell, coded("accuracy_verdict")), confidence) for cell in group]
        # Side by side, so that intervals can be told apart.
        x = np.array(each, float) * 1.04 ** (i - (len(sizes) - 1) / 2)
        artists += _with_intervals(ax, x, parts, i, f"r = {r}")
    ax.set_xscale("log", base=2)
    ax.set_xticks([float(c) for c in sorted(ratios)], [str(c) for c in sorted(ratios)])
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("width over teacher neurons, k/r")
    ax.set_ylabel("P(perfect training accuracy)")
    legend_above(ax)
    return artists


def regions_against_neurons(ax: Axes, sweep: xr.Dataset, confidence: float = CONFIDENCE, delta: float = DELTA):
    """Linear regions of certified limits against r, k and n in proportion: their 1 − `delta` quantile with its exact
    interval, their mean, and the least possible, as many as label switches in the sample.
    """
    group = family(sweep, proportional, "neurons")
    cells = sorted(studies(sweep)[:1] if group is None else studies(group), key=lambda cell: trial_of(cell).neurons)
    x = np.array([trial_of(cell).neurons for cell in cells], float)
    parts = [quantile_of(cell, "regions", 1 - delta, confidence) for cell in cells]
    found = [cell["regions"].values[has_limit(cell)] for cell in cells]
    mean = np.array([np.mean(regions) if regions.size else np.nan for regions in found])
    least = np.array([np.mean(np.maximum(cell["sample_switches"].values, 1)) for cell in cells])
    artists = _with_intervals(ax, x, parts, 0, f"{100 * (1 - delta):g}% quantile")
    artists += ax.plot(x, mean, "s-", color=VERMILLION, ms=4, lw=1.0, label="mean")
    artists += ax.plot(x, least, ":", color=BLACK, lw=1.0, label="least (mean)")
    ratio = trial_of(cells[0]).width / trial_of(cells[0]).neurons
    ax.set_xlim(0, 1.05 * x.max())
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"teacher neurons r (k = {ratio:g} r)")
    ax.set_ylabel("linear regions of the limit")
    legend_above(ax)
    return artists


def error_against_samples(ax: Axes, sweep: xr.Dataset, confidence: float = CONFIDENCE, delta: float = DELTA):
    """Population error of certified limits against n: 1 − `delta` quantile with its exact interval, and median.

    Dashed: r/n; dotted: our VC bound for the median number of regions, where it is below 1. A median of 0 is a 0 at the
    foot of the log axis.
    """
    group = family(sweep, all_but("samples"), "samples")
    cells = sorted(studies(sweep)[:1] if group is None else studies(group), key=lambda cell: trial_of(cell).samples)
    x = np.array([trial_of(cell).samples for cell in cells], float)
    high, middle = ([quantile_of(cell, "population_error", q, confidence) for cell in cells] for q in (1 - delta, 0.5))
    artists = _with_intervals(ax, x, high, 0, f"{100 * (1 - delta):g}% quantile") + _with_intervals(
        ax, x, middle, 1, "median"
    )
    r = trial_of(cells[0]).neurons
    artists += ax.plot(x, r / x, "--", color=GREY, lw=1.0, label="r/n")
    regions = [np.median(cell["regions"].values[has_limit(cell)]) if has_limit(cell).any() else 1 for cell in cells]
    bound = np.array([float(generalisation_bound(a, int(b), delta)) for a, b in zip(regions, x, strict=True)])
    if np.sum(bound < 1) > 1:
        artists += ax.plot(x[bound < 1], bound[bound < 1], ":", color=BLACK, lw=1.0, label="VC bound")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(x, [f"{n:g}" for n in x])
    foot = ax.get_xaxis_transform()
    artists += [
        ax.text(n, 0.01, "0", transform=foot, color=_COLOURS[1], ha="center", va="bottom", fontsize=8)
        for n, p in zip(x, middle, strict=True)
        if p.estimate == 0
    ]
    ax.set_xlabel("samples n")
    ax.set_ylabel("population error, P(wrong label)")
    legend_above(ax)
    return artists


def sweep_figure(sweep: xr.Dataset, confidence: float = CONFIDENCE, delta: float = DELTA) -> Figure:
    """A sweep at a glance: phase diagram, success against width, regions against r, error against n."""
    figure = Picture(figsize=SIZE, layout="constrained")
    axes = figure.subplots(2, 2)
    draws = (phase_diagram, success_against_width, regions_against_neurons, error_against_samples)
    for ax, draw, letter in zip(axes.flat, draws, "abcd", strict=True):
        draw(ax, sweep, confidence, delta)
        finish(ax, letter)
    cells = sweep.sizes["cell"]
    figure.suptitle(f"{sweep.sizes['trial']} random trials in each of {cells} cells", fontsize=10)
    return figure


def _with_intervals(ax: Axes, x, parts, i: int, label: str) -> list[Artist]:
    """Points with the intervals of estimates; an infinite end is not drawn."""
    middle, low, high = np.array([(p.estimate, p.low, p.high) for p in parts]).T
    middle = np.where(np.isfinite(middle), middle, np.nan)  # nothing is known: nothing is drawn
    low, high = np.where(np.isfinite(low), low, middle), np.where(np.isfinite(high), high, middle)
    colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
    reach = np.maximum([middle - low, high - middle], 0)
    bar = ax.errorbar(x, middle, yerr=reach, fmt=f"{marker}-", ms=4, lw=1.0, capsize=2, color=colour, label=label)
    return list(bar.get_children())
