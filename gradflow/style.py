"""What all figures share: colours, sizes, and how axes are finished.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart. Figures are made without pyplot:
nothing global is touched, and no window opens.
"""

import io

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.scale import AsinhScale
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

BLACK, GREY = "#000000", "#767676"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
SIZE, TALL = (7.0, 6.0), (7.0, 8.5)  # inches
_SHOWN = 110  # dots an inch, in Jupyter
LINEAR = 5.0  # how far from 0 a long axis of logs is about linear


class Picture(Figure):
    """A figure that Jupyter shows, without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=_SHOWN)
        return file.getvalue()


def log_time_axis(ax: Axes, time: np.ndarray) -> None:
    """The horizontal axis as one of log t, from the first to the last of `time`."""
    long_axis(ax, "x", time)
    if time.size > 1:
        ax.set_xlim(float(time[0]), float(time[-1]))
    ax.set_xlabel(f"log time, log t{' (asinh scale)' if is_long(time) else ''}")


def is_long(values: np.ndarray) -> bool:
    """Whether logs run so far that a linear axis would hide what is of the order of 10."""
    return float(np.max(np.abs(values), initial=0.0)) > 50


def long_axis(ax: Axes, which: str, values: np.ndarray) -> None:
    """A scale for logs that may run into the thousands: then linear near 0 and logarithmic beyond, else linear.

    Training succeeds or fails while log t is of order 10; what moves after that moves on the scale of log t itself.
    """
    if not is_long(values):
        return
    longest = np.max(np.abs(values))
    axis = ax.xaxis if which == "x" else ax.yaxis
    ax.set(**{f"{which}scale": AsinhScale(axis, linear_width=LINEAR)})
    decades = np.arange(1, np.floor(np.log10(longest)) + 1)
    powers = 10.0 ** decades[:: 1 + decades.size // 6]
    axis.set_major_locator(FixedLocator([*-powers[::-1], 0, *powers]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}".replace("-", "−") if abs(v) < 1000 else _power(v)))
    axis.set_minor_locator(NullLocator())


def legend_above(ax: Axes, **options) -> Artist:
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


def finish(ax: Axes, letter: str) -> None:
    """Sizes for a column's width, no frame where there is no scale, and the panel's letter."""
    for part in (ax, *(other for other in ax.figure.axes if other is not ax and other.bbox.bounds == ax.bbox.bounds)):
        part.tick_params(which="both", labelsize=8)
        part.xaxis.label.set_fontsize(9)
        part.yaxis.label.set_fontsize(9)
        part.spines["top"].set_visible(False)
        part.spines["right"].set_visible(part.yaxis.get_label_position() == "right")
    ax.set_title(letter, loc="left", fontsize=10, fontweight="bold")


def _power(value: float) -> str:
    return f"${'-' if value < 0 else ''}10^{{{np.log10(abs(value)):.0f}}}$"
