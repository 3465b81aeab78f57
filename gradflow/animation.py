"""A flow as a moving picture: the function bends, breakpoints stick and freeze, neurons gather on a few rays.

Frames follow the snapshots of the flow, which are evenly spread over its steps: slow where much happens.
"""

from collections.abc import Callable

import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradflow.flow_plot import neurons, runs, window
from gradflow.network import ReluNetwork
from gradflow.piecewise import Piecewise
from gradflow.style import BLACK, BLUE, GREEN, GREY, PURPLE, VERMILLION, Picture, finish, legend_above

_SIZE = (7.0, 3.2)  # inches


def moving_function(ax: Axes, path, data, teacher=None) -> Callable[[int], list[Artist]]:
    """Draws N(x)/‖θ‖², over the smallest margin of the last snapshot if that is positive, with the breakpoints as
    circles and the points with the colour and marker of their labels. **Returns** what moves all that to snapshot `i`.
    """
    low, high = window(None, data)
    last = int(path.count) - 1
    scale = float(path.margin[last])
    unit = scale if scale > 0 else 1.0
    if teacher is not None:
        runs(ax, teacher, low, high)
    for y in (-1, 1) if scale > 0 else ():
        ax.axhline(y, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=1)
    ax.axhline(0, color=GREY, lw=0.6, zorder=1)
    (curve,) = ax.plot([], [], color=BLACK, lw=1.3, zorder=3, label="N(x)")
    (bends,) = ax.plot([], [], "o", ms=6, mfc="none", mec=BLACK, mew=0.8, alpha=0.6, zorder=6, label="breakpoints")
    x, y = np.asarray(data.x), np.asarray(data.y)
    kinds: list[tuple[np.ndarray, Line2D]] = []
    for label, colour, marker, name in ((1, BLUE, "^", "y = +1"), (-1, VERMILLION, "v", "y = −1")):
        (line,) = ax.plot([], [], marker, ms=4, color=colour, mew=0, alpha=0.8, zorder=5, label=name)
        kinds.append((x[y == label], line))

    def frame(i: int):
        net = _network(path, i)
        at = np.asarray(Piecewise(net).breakpoints)
        inside = np.unique(at[(at > low) & (at < high)])
        grid = np.concatenate([[low], inside, [high]])
        size = unit * float(net.squared_norm)
        return grid, np.asarray(net(grid)) / size, [np.asarray(net(mine)) / size for mine, _ in kinds]

    def update(i: int) -> list[Artist]:
        grid, value, heights = frame(i)
        curve.set_data(grid, value)
        bends.set_data(grid[1:-1], value[1:-1])
        for (mine, line), height in zip(kinds, heights, strict=True):
            line.set_data(mine, height)
        return [curve, bends, *(line for _, line in kinds)]

    # The scale is that of the end, where the picture comes to rest; early values may leave it.
    highest = 1.25 * float(np.max(np.abs(frame(last)[1]))) or 1.0
    ax.set(xlim=(low, high), ylim=(-highest, highest))
    ax.set_xlabel("input x (units of the data)")
    ax.set_ylabel("N(x) / min q at the end" if scale > 0 else "N(x) / ‖θ‖²")
    update(0)
    return update


def moving_neurons(ax: Axes, path, data) -> Callable[[int], list[Artist]]:
    """Draws `neurons`, their whole way faintly, and a dot for each. **Returns** what moves the dots to snapshot `i`."""
    neurons(ax, path, data)
    for artist in ax.collections:
        artist.set_alpha(0.25)
    if (legend := ax.get_legend()) is not None:
        legend.remove()
    colours = np.where(np.asarray(path.network.v)[int(path.count) - 1] > 0, GREEN, PURPLE)
    dots = ax.scatter([], [], s=22, linewidths=0, zorder=6)

    def update(i: int) -> list[Artist]:
        net = _network(path, i)
        size = float(net.squared_norm) ** 0.5
        dots.set_offsets(np.stack([np.asarray(net.w), np.asarray(net.b)], axis=1) / size)
        dots.set_facecolor(list(colours))
        return [dots]

    update(0)
    return update


def flow_animation(flow, data, teacher=None, *, frames: int = 100, interval: float = 60.0) -> FuncAnimation:
    """A flow as an animation: the function on the left, the (w, b) plane on the right.

    **Arguments** `frames`: at most so many, evenly spread over the snapshots; `interval`: milliseconds for each. Save
    it with `.save("flow.gif", writer="pillow")`, show it in a notebook with `IPython.display.HTML(….to_jshtml())`.

    **Raises** `ValueError` for a flow without snapshots, and for fewer than two frames.
    """
    if flow.path is None:
        raise ValueError("this flow kept no snapshots: integrate with save=200")
    if frames < 2:
        raise ValueError(f"frames must be at least 2, got {frames}")
    figure = Picture(figsize=_SIZE, layout="constrained")
    left, right = figure.subplots(1, 2)
    updates = moving_function(left, flow.path, data, teacher), moving_neurons(right, flow.path, data)
    legend_above(left)
    for ax in (left, right):
        finish(ax, "")
    title = figure.suptitle(" ", fontsize=9)
    shown = np.unique(np.linspace(0, int(flow.path.count) - 1, frames).round().astype(int))

    def update(i: int):
        log_time, log_loss = float(flow.path.log_time[i]), float(flow.path.log_loss[i])
        title.set_text(f"log t = {log_time:.1f}    log L = {log_loss:.1f}".replace("-", "−"))
        return [title, *(artist for move in updates for artist in move(i))]

    return FuncAnimation(figure, update, frames=[int(i) for i in shown], interval=interval, blit=False)


def _network(path, i: int) -> ReluNetwork:
    return ReluNetwork(path.network.w[i], path.network.b[i], path.network.v[i])
