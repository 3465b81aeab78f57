"""Pictures of a network and of a flow.

Every function draws on the `ax` it is given, labels it, and returns the artists it drew. `flow_figure` composes them
into one figure, 7 inches wide, legible at the width of a column. Times are logs of physical time t.
"""

import jax
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gradflow.certificate import kkt_residual
from gradflow.outcome import Status
from gradflow.piecewise import Piecewise, knots
from gradflow.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    TALL,
    VERMILLION,
    Picture,
    finish,
    is_long,
    legend_above,
    log_time_axis,
    long_axis,
)

_STUCK = 1e-9  # distance from a data point, over the length of the data, up to which a breakpoint sticks to it


def function(ax: Axes, net, data=None, teacher=None, *, merge=0.0, drop=0.0) -> list[Artist]:
    """The network as a function of x, on a scale that makes its smallest margin 1.

    Draws N(x)/min_i q_i (N(x)/max|N| if some margin is not positive, or without `data`), the margin lines ±1, the
    points on the curve with the colour and marker of their labels, the knots by the counting rule of `piecewise` with
    `merge` and `drop`, and, as background, the labels that `teacher` gives. Knots beyond the data are named at the
    edge. The polyline through the breakpoints is N itself, not a sampling of it.
    """
    low, high = window(net, data)
    bends = np.asarray(Piecewise(net).breakpoints)
    x = np.unique(np.concatenate([[low], bends[(bends > low) & (bends < high)], [high]]))
    value = np.asarray(net(x))
    smallest = -np.inf if data is None else float(np.min(data.margins(net)))
    largest = float(np.max(np.abs(value))) or 1.0
    scale, symbol = (smallest, "min q") if smallest > 0 else (largest, "max |N|")
    artists: list[Artist] = []
    if teacher is not None:
        artists += runs(ax, teacher, low, high)
    if smallest > 0:
        artists += [ax.axhline(y, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=1) for y in (-1, 1)]
    artists.append(ax.axhline(0, color=GREY, lw=0.6, zorder=1))
    artists += ax.plot(x, value / scale, color=BLACK, lw=1.3, zorder=3, label="N(x)")
    at = np.asarray(knots(net, merge, drop))
    before, beyond = at[at <= low], at[at >= high]
    named = [f"← {_named(before, 'before')}"] * (before.size > 0) + [f"{_named(beyond, 'beyond')} →"] * (
        beyond.size > 0
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
    ax.set_xlabel("\n".join(["input x (units of the data)", ", ".join(named)][: 1 + bool(named)]))
    ax.set_ylabel(f"N(x) / {symbol}")
    return artists


def breakpoints(ax: Axes, path, data) -> list[Artist]:
    """Where the neurons bend, −b_j/w_j, against log time, with the data as thin lines.

    Green neurons bend N upwards (v > 0), purple ones downwards; the more of Σ|v_j w_j| a neuron carries, the stronger
    its line; black and thick where it sticks to a point. Points labelled +1 are blue, −1 vermillion. Snapshots at
    t = 0, where log t = −∞, are left out.
    """
    time, net = _snapshots(path)
    low, high = window(None, data)
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
    x = np.sort(np.asarray(data.x))
    with np.errstate(invalid="ignore"):
        nearest = [x[np.argmin(np.abs(ends[:, None] - x), axis=1)] for ends in (start[joined], end[joined])]
        off = [np.abs(ends - near) for ends, near in zip((start[joined], end[joined]), nearest, strict=True)]
    stuck = (np.maximum(*off) <= _STUCK * (high - low)) & (nearest[0] == nearest[1])
    if stuck.any():
        strong = np.maximum(alpha, 0.3)[stuck]
        held = LineCollection(list(lines[stuck]), colors=BLACK, alpha=strong, linewidths=2.2, zorder=3)
        artists.append(ax.add_collection(held))
    kinds = [
        Line2D([], [], color=c, lw=w, label=name)
        for c, w, name in ((GREEN, 1.3, "up"), (PURPLE, 1.3, "down"), (BLACK, 2.2, "stuck"))
    ]
    artists.append(legend_above(ax, handles=kinds))
    log_time_axis(ax, time)
    ax.set_ylim(low, high)
    ax.set_ylabel("breakpoint −b/w (units of x)")
    return artists


def neurons(ax: Axes, path, data) -> list[Artist]:
    """The input weights (w_j, b_j) of all neurons on their way, over ‖θ‖, which converge as the direction does.

    Circles: the start; dots: the end. Green neurons bend N upwards (v > 0), purple ones downwards. The thin lines
    w x_i + b = 0 are where a breakpoint is on a data point, blue for labels +1, vermillion for −1: between two of them
    a neuron is active on the same points, and a neuron that sticks moves along one.
    """
    net = _weights(path, np.arange(np.asarray(path.time).size) < int(path.count))
    norm = np.sqrt(sum(np.sum(a**2, axis=1) for a in net.values()))[:, None]
    w, b = net["w"] / norm, net["b"] / norm
    reach = 1.08 * float(max(np.max(np.abs(w)), np.max(np.abs(b))))
    artists: list[Artist] = []
    faint = float(np.clip(10 / data.samples, 0.12, 0.35))
    for x, y in zip(np.asarray(data.x), np.asarray(data.y), strict=True):
        artists.append(ax.axline((0, 0), slope=-x, color=BLUE if y > 0 else VERMILLION, lw=0.5, alpha=faint, zorder=1))
    up = net["v"][-1] > 0
    lines = [np.stack([w[:, j], b[:, j]], axis=1) for j in range(w.shape[1])]
    colours = np.where(up, GREEN, PURPLE)
    artists.append(ax.add_collection(LineCollection(lines, colors=list(colours), linewidths=1.0, alpha=0.8, zorder=2)))
    artists.append(ax.scatter(w[0], b[0], s=14, facecolors="none", edgecolors=list(colours), linewidths=0.7, zorder=3))
    artists.append(ax.scatter(w[-1], b[-1], s=16, color=list(colours), linewidths=0, zorder=4))
    ends = [Line2D([], [], color=c, label=name) for c, name in ((GREEN, "v > 0"), (PURPLE, "v < 0"))]
    ends.append(Line2D([], [], color=GREY, marker="o", mfc="none", ms=4, lw=0, label="start"))
    ends.append(Line2D([], [], color=GREY, marker="o", ms=4, lw=0, label="end"))
    artists.append(legend_above(ax, handles=ends))
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
    ax.set_xlabel("input weight w / ‖θ‖")
    ax.set_ylabel("bias b / ‖θ‖")
    return artists


def convergence(ax: Axes, path) -> list[Artist]:
    """Log-loss (left) and normalised margin γ = min_i q_i/‖θ‖² (right) against log time.

    Where the margin becomes positive, all points are classified. The right-hand axis keeps to the margins from there
    on; those of early times are far below it.
    """
    time, _ = _snapshots(path)
    log_loss, margin = (np.asarray(a)[_filled(path)] for a in (path.log_loss, path.margin))
    artists: list[Artist] = list(ax.plot(time, log_loss, color=BLACK, lw=1.3, label="log L"))
    log_time_axis(ax, time)
    long_axis(ax, "y", log_loss)
    if log_loss.size > 1 and np.ptp(log_loss) > 0:
        ax.set_ylim(float(np.min(log_loss)), float(np.max(log_loss)))
    ax.set_ylabel(f"log mean loss, log L{' (asinh scale)' if is_long(log_loss) else ''}")
    right = ax.twinx()
    artists += right.plot(time, margin, color=ORANGE, lw=1.3, label="γ")
    best = float(np.max(margin, initial=-np.inf))
    if best > 0:
        right.set_ylim(-0.25 * best, 1.15 * best)
        artists.append(right.axhline(0, color=ORANGE, lw=0.6, ls=(0, (4, 3))))
    right.set_ylabel("margin γ = min q / ‖θ‖²", color="#9A6A00")
    right.tick_params(axis="y", colors="#9A6A00")
    return artists


def residual(ax: Axes, path, data) -> list[Artist]:
    """KKT residual of the network, scaled to minimum margin 1, for natural multipliers (`kkt_residual`), against log
    time; from where all points are classified. It falls like 1/log t: the flow reaches its limit at no finite time.
    """
    time, _ = _snapshots(path)
    net = jax.tree.map(lambda a: a[_filled(path)], path.network)
    value = np.asarray(jax.vmap(lambda net: kkt_residual(net, data))(net))
    shown = np.isfinite(value) & (value > 0)
    artists: list[Artist] = list(ax.plot(time, np.where(shown, value, np.nan), color=BLACK, lw=1.3))
    ax.set_yscale("log")
    log_time_axis(ax, time)
    ax.set_ylabel("KKT residual (relative)")
    if not shown.any():
        artists.append(
            ax.text(0.5, 0.5, "not all points\nare classified", transform=ax.transAxes, ha="center", fontsize=9)
        )
        ax.set_ylim(0.1, 1)
    return artists


def flow_figure(flow, data, teacher=None, *, merge=0.0, drop=0.0) -> Figure:
    """One flow at a glance: the certified limit or else the final network, breakpoints and neurons on their way, loss
    and margin, KKT residual.

    `merge` (units of x) and `drop` say which knots count, as in `linear_regions`. **Raises** `ValueError` for a flow
    without snapshots, or none after time 0.
    """
    if flow.path is None:
        raise ValueError("this flow kept no snapshots: integrate with save=200")
    if not _filled(flow.path).any():
        raise ValueError(f"this flow has no snapshot at a finite log time: {Status[flow.status]}")
    figure = Picture(figsize=TALL, layout="constrained")
    grid = figure.add_gridspec(3, 2)
    top = figure.add_subplot(grid[0, :])
    if flow.limit is not None and bool(flow.limit.certified):
        function(top, flow.limit.network, data, teacher, merge=flow.limit.resolution)
    else:
        function(top, flow.final, data, teacher, merge=merge, drop=drop)
    legend_above(top)
    panels = [figure.add_subplot(grid[row, column]) for row in (1, 2) for column in (0, 1)]
    breakpoints(panels[0], flow.path, data)
    neurons(panels[1], flow.path, data)
    convergence(panels[2], flow.path)
    residual(panels[3], flow.path, data)
    for ax, letter in zip((top, *panels), "abcde", strict=True):
        finish(ax, letter)
    return figure


def _named(at: np.ndarray, where: str) -> str:
    places = ", ".join(f"{x:.3g}".replace("-", "−") for x in at[:3]) + (" …" if at.size > 3 else "")
    return f"{at.size} knot{'s' if at.size > 1 else ''} {where}: {places}"


def window(net, data) -> tuple[float, float]:
    """The stretch of x worth showing: the data's, or else that of the breakpoints, and a little more."""
    if data is not None:
        x = np.asarray(data.x)
    else:
        x = np.asarray(Piecewise(net).breakpoints)
        x = x[np.isfinite(x)]
    low, high = (float(np.min(x)), float(np.max(x))) if x.size else (-1.0, 1.0)
    pad = 0.06 * (high - low) or 1.0
    return low - pad, high + pad


def runs(ax: Axes, teacher, low: float, high: float) -> list[Artist]:
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
    return np.asarray(path.log_time)[filled], _weights(path, filled)


def _weights(path, which: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.asarray(getattr(path.network, name))[which] for name in ("w", "b", "v")}
