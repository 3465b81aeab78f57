"""Figures. Every function draws on the `ax` it is given, labels it, and returns the artists it drew.

`study_figure` and `flow_figure` compose them into one figure, 7 × 5 inches, legible at the width of a column. They
are made without pyplot: nothing global is touched, and no window opens. Colours are those of Okabe and Ito (2008),
which colour-blind readers can tell apart.
"""

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.scale import AsinhScale
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from gradflow.claim import CONFIDENCE, DELTA
from gradflow.piecewise import Piecewise, knots
from gradflow.record import Verdict
from gradflow.table import claims as study_claims
from gradflow.trial import Trial

BLACK, GREY = "#000000", "#767676"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
VERDICTS = {"holds": BLUE, "contradicted": VERMILLION, "undecided": GREY}
SIZE = (7.0, 6.0)  # inches
LINEAR = 5.0  # how far from 0 a long axis of logs is about linear


def function(ax: Axes, net, data=None, teacher=None, *, merge=0.0, drop=0.0) -> list[Artist]:
    """The network as a function of x, on a scale that makes its smallest margin 1.

    Draws N(x)/min_i q_i (N(x)/max|N| if some margin is not positive, or without `data`), the margin lines ±1, the
    points on the curve with the colour and marker of their labels, the knots by the counting rule of `piecewise` with
    `merge` and `drop`, and, as background, the labels that `teacher` gives. Knots beyond the data are named at the
    edge. The polyline through the breakpoints is N itself, not a sampling of it.
    """
    low, high = _window(net, data)
    bends = np.asarray(Piecewise(net).breakpoints)
    x = np.unique(np.concatenate([[low], bends[(bends > low) & (bends < high)], [high]]))
    value = np.asarray(net(x))
    smallest = -np.inf if data is None else float(np.min(data.margins(net)))
    largest = float(np.max(np.abs(value))) or 1.0
    scale, symbol = (smallest, "min q") if smallest > 0 else (largest, "max |N|")
    artists: list[Artist] = []
    if teacher is not None:
        artists += _runs(ax, teacher, low, high)
    if smallest > 0:
        artists += [ax.axhline(y, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=1) for y in (-1, 1)]
    artists.append(ax.axhline(0, color=GREY, lw=0.6, zorder=1))
    artists += ax.plot(x, value / scale, color=BLACK, lw=1.3, zorder=3, label="N(x)")
    at = np.asarray(knots(net, merge, drop))
    for side, beyond in ((0.0, at[at <= low]), (1.0, at[at >= high])):
        if beyond.size:
            text = f"{beyond.size} knot{'s' if beyond.size > 1 else ''} {'beyond' if side else 'before'}: "
            text += ", ".join(f"{x:.3g}" for x in beyond[:3]) + (" …" if beyond.size > 3 else "")
            artists.append(
                ax.annotate(
                    f"{text} →" if side else f"← {text}",
                    (side, 0.0),
                    xytext=(0, -26),
                    xycoords="axes fraction",
                    textcoords="offset points",
                    ha="right" if side else "left",
                    va="center",
                    fontsize=8,
                    color=GREY,
                )
            )
    at = at[(at > low) & (at < high)]
    # Wide rings: the points inside stay visible.
    artists += ax.plot(at, np.asarray(net(at)) / scale, "o", ms=8, mfc="none", mec=BLACK, zorder=6, label="knots")
    if data is not None:
        for label, colour, marker, name in ((1, BLUE, "^", "y = +1"), (-1, VERMILLION, "v", "y = −1")):
            mine = np.asarray(data.x)[np.asarray(data.y) == label]
            height = np.asarray(net(mine)) / scale
            artists += ax.plot(mine, height, marker, ms=4, color=colour, mew=0, alpha=0.8, zorder=5, label=name)
    ax.set_xlim(low, high)
    ax.set_xlabel("input x (units of the data)")
    ax.set_ylabel(f"N(x) / {symbol}")
    return artists


def breakpoints(ax: Axes, path, data) -> list[Artist]:
    """Where the neurons bend, −b_j/w_j, against log time, with the data as thin lines.

    Green neurons bend N upwards (v > 0), purple ones downwards; the more of Σ|v_j w_j| a neuron carries, the stronger
    its line. Points labelled +1 are blue, −1 vermillion. Snapshots at t = 0, where log t = −∞, are left out.
    """
    time, net = _snapshots(path)
    low, high = _window(None, data)
    bends = np.abs(net["v"] * net["w"])
    strength = np.sqrt(bends / np.maximum(bends.max(axis=1, keepdims=True), np.finfo(float).tiny))
    with np.errstate(divide="ignore", invalid="ignore"):
        position = -net["b"] / net["w"]
    start, end = position[:-1], position[1:]
    # A neuron that turns round (w changes sign) leaves at one infinity and returns from the other: no line joins them.
    joined = (net["w"][:-1] * net["w"][1:] > 0) & (np.minimum(start, end) < high) & (np.maximum(start, end) > low)
    when, _ = np.nonzero(joined)
    lines = np.stack(
        [np.stack([time[:-1][when], start[joined]], axis=1), np.stack([time[1:][when], end[joined]], axis=1)], axis=1
    )
    colours = np.where(net["v"][1:][joined] > 0, GREEN, PURPLE)
    alpha = 0.08 + 0.92 * strength[1:][joined]
    artists: list[Artist] = []
    faint = float(np.clip(10 / data.samples, 0.12, 0.35))
    for x, y in zip(np.asarray(data.x), np.asarray(data.y), strict=True):
        artists.append(ax.axhline(x, color=BLUE if y > 0 else VERMILLION, lw=0.5, alpha=faint, zorder=1))
    collection = LineCollection(list(lines), colors=list(colours), alpha=alpha, linewidths=1.1, zorder=2)
    artists.append(ax.add_collection(collection))
    kinds = [Line2D([], [], color=c, label=name) for c, name in ((GREEN, "bends up"), (PURPLE, "bends down"))]
    artists.append(_legend_above(ax, handles=kinds))
    _log_time(ax, time)
    ax.set_ylim(low, high)
    ax.set_ylabel("breakpoint −b/w (units of x)")
    return artists


def convergence(ax: Axes, path) -> list[Artist]:
    """Log-loss (left) and normalised margin γ = min_i q_i/‖θ‖² (right) against log time.

    Where the margin becomes positive, all points are classified. The right-hand axis keeps to the margins from there
    on; those of early times are far below it.
    """
    time, _ = _snapshots(path)
    log_loss, margin = (np.asarray(a)[_filled(path)] for a in (path.log_loss, path.margin))
    artists: list[Artist] = list(ax.plot(time, log_loss, color=BLACK, lw=1.3, label="log L"))
    _log_time(ax, time)
    _long(ax, "y", log_loss)
    if log_loss.size > 1 and np.ptp(log_loss) > 0:
        ax.set_ylim(float(np.min(log_loss)), float(np.max(log_loss)))
    ax.set_ylabel(f"log mean loss, log L{' (asinh scale)' if _is_long(log_loss) else ''}")
    right = ax.twinx()
    artists += right.plot(time, margin, color=ORANGE, lw=1.3, label="γ")
    best = float(np.max(margin, initial=-np.inf))
    if best > 0:
        right.set_ylim(-0.25 * best, 1.15 * best)
        artists.append(right.axhline(0, color=ORANGE, lw=0.6, ls=(0, (4, 3))))
    right.set_ylabel("margin γ = min q / ‖θ‖²", color="#9A6A00")
    right.tick_params(axis="y", colors="#9A6A00")
    return artists


def claims(ax: Axes, claims) -> list[Artist]:
    """One row for each claim about a probability: what it is, with its exact interval, and the trials behind it.

    Blue: holds; vermillion: contradicted; grey: undecided. A claim that cannot fail by construction says so in its
    `note`; it is drawn hollow. Dotted: the probability that is asked for.
    """
    claims = [claim for claim in claims if claim.asked.startswith(">=")]
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
    ax.grid(axis="x", color="0.9", lw=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel(f"probability, with its exact {claims[0].measured.confidence:.0%} interval")
    return artists


def regions(ax: Axes, dataset) -> list[Artist]:
    """Histogram of the linear regions of certified limits, counted exactly, as shares of *all* trials.

    What is missing to 100 % has no certified limit. Orange: those of the limits that are the global optimum. A network
    with m sign changes needs at least m regions (one if m = 0): the dotted line is the mean of that over the samples.
    """
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
    artists.append(_legend_above(ax))
    return artists


def population_error(ax: Axes, dataset) -> list[Artist]:
    """Share of *all* trials whose population error is at most x: the empirical distribution function, log x.

    It is that of the limit. Trials without a certified one are never counted as small, so the curve ends at the share
    of those with one. Dotted: 1/n, the weight of one training point. Errors of exactly 0 enter at the left edge.
    """
    error = np.asarray(dataset["population_error"])
    resolved = np.asarray(dataset["regions_verdict"]) != Verdict.unresolved
    resolved = resolved & np.isfinite(error)
    samples = Trial.from_json(dataset.attrs["trial"]).samples
    positive = error[resolved & (error > 0)]
    # Whole decades, so that each has its label.
    edge = 10 ** np.floor(np.log10(0.99 * np.min(positive, initial=1 / samples)))
    x = np.sort(np.maximum(error[resolved], edge))
    share = np.arange(1, x.size + 1) / error.size
    right = 10 ** np.ceil(np.log10(np.max(x, initial=1.01 / samples)))
    steps = np.concatenate([[edge], x, [right]]), np.concatenate([[0], share, share[-1:] if x.size else [0]])
    artists: list[Artist] = list(ax.step(*steps, where="post", color=BLUE, lw=1.5, label="trials"))
    artists.append(ax.axvline(1 / samples, color=BLACK, lw=1.0, ls=":", label=f"1/n, n = {samples}"))
    ax.set_xscale("log")
    ax.set_xlim(edge, right)
    ax.set_ylim(0, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.xaxis.set_minor_formatter(NullFormatter())  # within one decade they would run into each other
    ax.set_xlabel("population error, P(wrong label)")
    ax.set_ylabel(_share_label(resolved, "at or below"))
    artists.append(_legend_above(ax))
    return artists


def study_figure(dataset, confidence: float = CONFIDENCE, delta: float = DELTA) -> Figure:
    """A study at a glance: the claims, the regions, the population error."""
    figure = Figure(figsize=SIZE, layout="constrained")
    # Two subfigures, so that the long names of the claims do not squeeze the panels below.
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.3, 1.0], hspace=0.04)[:, 0]
    top, (left, right) = upper.subplots(), lower.subplots(1, 2)
    claims(top, study_claims(dataset, confidence, delta))
    regions(left, dataset)
    population_error(right, dataset)
    trial = Trial.from_json(dataset.attrs["trial"])
    figure.suptitle(
        f"{dataset.sizes['trial']} random trials: r = {trial.neurons} teacher neurons, width k = {trial.width}, "
        f"n = {trial.samples} samples",
        fontsize=10,
    )
    for ax, letter in ((top, "a"), (left, "b"), (right, "c")):
        finish(ax, letter)
    return figure


def flow_figure(flow, data, teacher=None, *, merge=0.0, drop=0.0) -> Figure:
    """One flow at a glance: the certified limit or else the final network, breakpoints on their way, loss and margin.

    `merge` (units of x) and `drop` say which knots count, as in `linear_regions`. **Raises** `ValueError` for a flow
    without snapshots.
    """
    if flow.path is None:
        raise ValueError("this flow kept no snapshots: integrate with save=200")
    figure = Figure(figsize=SIZE, layout="constrained")
    grid = figure.add_gridspec(2, 2)
    top, left, right = (figure.add_subplot(cell) for cell in (grid[0, :], grid[1, 0], grid[1, 1]))
    if flow.limit is not None and bool(flow.limit.certified):
        function(top, flow.limit.network, data, teacher, merge=flow.limit.resolution)
    else:
        function(top, flow.final, data, teacher, merge=merge, drop=drop)
    _legend_above(top)
    breakpoints(left, flow.path, data)
    convergence(right, flow.path)
    for ax, letter in ((top, "a"), (left, "b"), (right, "c")):
        finish(ax, letter)
    return figure


def _window(net, data) -> tuple[float, float]:
    """The stretch of x worth showing: the data's, or else that of the breakpoints, and a little more."""
    if data is not None:
        x = np.asarray(data.x)
    else:
        x = np.asarray(Piecewise(net).breakpoints)
        x = x[np.isfinite(x)]
    low, high = (float(np.min(x)), float(np.max(x))) if x.size else (-1.0, 1.0)
    pad = 0.06 * (high - low) or 1.0
    return low - pad, high + pad


def _runs(ax: Axes, teacher, low: float, high: float) -> list[Artist]:
    """The teacher's label runs as background."""
    switches = np.asarray(teacher.switches)
    ends = np.concatenate([[low], switches[(switches > low) & (switches < high)], [high]])
    labels = np.asarray(teacher(0.5 * (ends[1:] + ends[:-1])))
    return [
        ax.axvspan(start, end, color=BLUE if label > 0 else VERMILLION, alpha=0.09, lw=0, zorder=0)
        for start, end, label in zip(ends[:-1], ends[1:], labels, strict=True)
    ]


def _filled(path) -> np.ndarray:
    """Which slots of a path hold a snapshot with a finite log time."""
    time = np.asarray(path.log_time)
    return (np.arange(time.size) < int(path.count)) & np.isfinite(time)


def _snapshots(path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log times and weights (S, k) of the snapshots that can be drawn over log time."""
    filled = _filled(path)
    weights = {name: np.asarray(getattr(path.network, name))[filled] for name in ("w", "b", "v")}
    return np.asarray(path.log_time)[filled], weights


def _log_time(ax: Axes, time: np.ndarray) -> None:
    """The axis of log t."""
    _long(ax, "x", time)
    if time.size > 1:
        ax.set_xlim(float(time[0]), float(time[-1]))
    ax.set_xlabel(f"log time, log t{' (asinh scale)' if _is_long(time) else ''}")


def _is_long(values: np.ndarray) -> bool:
    return float(np.max(np.abs(values), initial=0.0)) > 50


def _long(ax: Axes, which: str, values: np.ndarray) -> None:
    """A scale for logs that may run into the thousands: then linear near 0 and logarithmic beyond, else linear.

    Training succeeds or fails while log t is of order 10; what moves after that moves on the scale of log t itself.
    """
    if not _is_long(values):
        return
    longest = np.max(np.abs(values))
    axis = ax.xaxis if which == "x" else ax.yaxis
    ax.set(**{f"{which}scale": AsinhScale(axis, linear_width=LINEAR)})
    decades = np.arange(1, np.floor(np.log10(longest)) + 1)
    powers = 10.0 ** decades[:: 1 + decades.size // 6]
    axis.set_major_locator(FixedLocator([*-powers[::-1], 0, *powers]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}".replace("-", "−") if abs(v) < 1000 else _power(v)))
    axis.set_minor_locator(NullLocator())


def _legend_above(ax: Axes, **options) -> Artist:
    """Above the panel, where nothing that is drawn can run through it."""
    return ax.legend(
        frameon=False,
        fontsize=8,
        ncols=4,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.2,
        columnspacing=0.7,
        handlelength=1.0,
        handletextpad=0.4,
        **options,
    )


def _power(value: float) -> str:
    return f"${'-' if value < 0 else ''}10^{{{np.log10(abs(value)):.0f}}}$"


def _counts(claim) -> str:
    return f"{claim.holds} hold, {claim.fails} fail, {claim.unresolved} unresolved"


def _share_label(resolved: np.ndarray, what: str = "") -> str:
    missing = int(np.sum(~resolved))
    label = f"share of trials {what}".strip()
    return f"{label}\n({missing} of {resolved.size} unresolved)" if missing else label


def finish(ax: Axes, letter: str) -> None:
    """Sizes for a column's width, no frame where there is no scale, and the panel's letter."""
    for part in (ax, *(other for other in ax.figure.axes if other is not ax and other.bbox.bounds == ax.bbox.bounds)):
        part.tick_params(which="both", labelsize=8)
        part.xaxis.label.set_fontsize(9)
        part.yaxis.label.set_fontsize(9)
        part.spines["top"].set_visible(False)
        part.spines["right"].set_visible(part.yaxis.get_label_position() == "right")
    ax.set_title(letter, loc="left", fontsize=10, fontweight="bold")
