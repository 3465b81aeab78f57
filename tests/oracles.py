"""Answers known in closed form, in plain Python, NumPy and mpmath: nothing here imports gradflow or JAX.

The derivations are in README.md beside this file, under the names used here. `test_oracles.py` tests this table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, combinations_with_replacement, pairwise, product

import mpmath
import numpy as np

# --- O1 and O2: one point, label +1 ----------------------------------------------------------------------------------


def ei_gap(x: float, time: float) -> mpmath.mpf:
    """O1: Ei(f(t)) − Ei(f(0)) at physical time `time`."""
    return 2 * mpmath.sqrt(1 + mpmath.mpf(x) ** 2) * mpmath.mpf(time)


def aligned_neuron_log_time(x: float, start: float, end: float) -> mpmath.mpf:
    """O1: the log of the physical time that the margin of one aligned balanced neuron needs from `start` to `end`."""
    gap = mpmath.ei(mpmath.mpf(end)) - mpmath.ei(mpmath.mpf(start))
    return mpmath.log(gap / ei_gap(x, 1))


@dataclass(frozen=True)
class OnePoint:
    """O2: gradient flow on one point (x, +1), every neuron active or dead there, for any decreasing loss.

    `w`, `b`, `v` are the initial weights. Everything is a function of the clock s ≥ 0, ds = ‖x̃‖ (−ℓ'(f)) dt.
    """

    x: float
    w: tuple[float, ...]
    b: tuple[float, ...]
    v: tuple[float, ...]

    @property
    def reach(self) -> mpmath.mpf:
        """‖x̃‖, x̃ = (x, 1)."""
        return mpmath.sqrt(1 + mpmath.mpf(self.x) ** 2)

    def _start(self):
        """Per neuron: the component a of u = (w, b) along x̃, and v."""
        for w, b, v in zip(self.w, self.b, self.v, strict=True):
            yield (mpmath.mpf(w) * self.x + mpmath.mpf(b)) / self.reach, mpmath.mpf(v)

    def deaths(self) -> list[mpmath.mpf]:
        """The clock at which each neuron stops being active at the point (inf: never)."""
        ends = []
        for a, v in self._start():
            if a <= 0:
                ends.append(mpmath.mpf(0))
            elif a + v < 0:
                ends.append(mpmath.log((a - v) / -(a + v)) / 2)
            else:
                ends.append(mpmath.inf)
        return ends

    def weights(self, s) -> tuple[list, list, list]:
        """(w, b, v) of every neuron at clock `s`."""
        s = mpmath.mpf(s)
        moved = ([], [], [])
        for (a, v), death, w, b in zip(self._start(), self.deaths(), self.w, self.b, strict=True):
            clock = min(s, death)
            new_a = a * mpmath.cosh(clock) + v * mpmath.sinh(clock)
            new_v = v * mpmath.cosh(clock) + a * mpmath.sinh(clock)
            moved[0].append(mpmath.mpf(w) + (new_a - a) * self.x / self.reach)
            moved[1].append(mpmath.mpf(b) + (new_a - a) / self.reach)
            moved[2].append(new_v)
        return moved

    def margin(self, s) -> mpmath.mpf:
        """f(s) = N(x)."""
        s, total = mpmath.mpf(s), mpmath.mpf(0)
        for (a, v), death in zip(self._start(), self.deaths(), strict=True):
            if s < death:
                total += ((a + v) ** 2 * mpmath.exp(2 * s) - (a - v) ** 2 * mpmath.exp(-2 * s)) / 4
        return self.reach * total

    def rescaled_time(self, s) -> mpmath.mpf:
        """τ, dτ = (−ℓ'(f)) dt: the same for every loss."""
        return mpmath.mpf(s) / self.reach

    def log_time(self, s, log_weight: Callable) -> mpmath.mpf:
        """log t, with `log_weight(f)` = log(−ℓ'(f)) in mpmath: t = ∫ dτ/(−ℓ'(f))."""
        s = mpmath.mpf(s)
        cuts = [mpmath.mpf(0), *sorted(death for death in self.deaths() if 0 < death < s), s]
        # The integrand grows like e^f, f like e^{2s}: short panels keep the quadrature honest.
        grid = [c for a, b in pairwise(cuts) for c in mpmath.linspace(a, b, 3)]
        return mpmath.log(mpmath.quad(lambda r: mpmath.exp(-log_weight(self.margin(r))), grid) / self.reach)


def exponential_log_weight(q):
    return -q


def logistic_log_weight(q):
    return -mpmath.log1p(mpmath.exp(q))


# --- O3: the square loss, two orthogonal points -----------------------------------------------------------------------


def orthogonal_square_value(x: float, y: float, start: float, time: float) -> mpmath.mpf:
    """O3: f(t) at a point with label `y`, whose neuron starts with value `start` > 0 in the label's direction."""
    reach, target = mpmath.sqrt(1 + mpmath.mpf(x) ** 2), abs(mpmath.mpf(y))
    decay = mpmath.exp(-2 * reach * target * mpmath.mpf(time))
    return mpmath.sign(y) * target / (1 + (target / mpmath.mpf(start) - 1) * decay)


# --- Networks in exact fractions --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactNetwork:
    """x ↦ Σ v_j max(0, w_j x + b_j) in rational arithmetic. Floats are taken at their exact binary value."""

    w: tuple[Fraction, ...]
    b: tuple[Fraction, ...]
    v: tuple[Fraction, ...]

    @classmethod
    def of(cls, w, b, v) -> "ExactNetwork":
        return cls(*(tuple(Fraction(value) for value in np.asarray(a).tolist()) for a in (w, b, v)))

    def __call__(self, x: Fraction) -> Fraction:
        zero = Fraction(0)
        return sum((v * max(zero, w * x + b) for w, b, v in zip(self.w, self.b, self.v, strict=True)), zero)

    def breakpoints(self) -> list[Fraction]:
        return sorted({-b / w for w, b in zip(self.w, self.b, strict=True) if w})

    def knots(self) -> list[Fraction]:
        """Breakpoints at which the slope really changes."""
        change = dict.fromkeys(self.breakpoints(), Fraction(0))
        for w, b, v in zip(self.w, self.b, self.v, strict=True):
            if w:
                change[-b / w] += v * abs(w)
        return [t for t in sorted(change) if change[t]]

    def regions(self) -> int:
        return 1 + len(self.knots())

    def cells(self) -> list[tuple[Fraction | None, Fraction | None, int]]:
        """The line cut into open intervals (left, right, sign of N there); None is ∓∞. Touching zeros cut too."""
        knots = self.breakpoints()
        cuts = set(knots)
        for t, far in ((knots[0], -1), (knots[-1], 1)) if knots else ():
            # On an outer half-line N is the line through its values at t and t + far.
            slope = self(t + far) - self(t)
            if slope and self(t) and (self(t) > 0) != (slope > 0):
                cuts.add(t - self(t) * far / slope)
        for s, t in pairwise(knots):
            if self(s) * self(t) < 0:
                cuts.add(s - self(s) * (t - s) / (self(t) - self(s)))
        edges = [None, *sorted(cuts), None]
        return [(a, b, _sign(self(_between(a, b)))) for a, b in pairwise(edges)]

    def sign_changes(self) -> list[Fraction]:
        """Where N changes sign; across an interval on which N vanishes, its right end."""
        last, found = 0, []
        for left, _, sign in self.cells():
            if sign:
                if last and sign != last:
                    found.append(left)
                last = sign
        return found

    def label_switches(self) -> list[Fraction]:
        """Where the label switches: +1 where N ≥ 0, single points apart."""
        labels = [(left, 1 if sign >= 0 else -1) for left, _, sign in self.cells()]
        return [right[0] for left, right in pairwise(labels) if left[1] != right[1]]


def _sign(value) -> int:
    return (value > 0) - (value < 0)


def _between(left: Fraction | None, right: Fraction | None) -> Fraction:
    if left is None:
        return Fraction(0) if right is None else right - 1
    return left + 1 if right is None else (left + right) / 2


def exact_error(net: ExactNetwork, teacher: ExactNetwork, edges, masses) -> Fraction:
    """P(sign N(X) ≠ label) for a piecewise-constant density, all in fractions. N(x) = 0 is an error."""
    edges, masses = [Fraction(e) for e in edges], [Fraction(m) for m in masses]
    cuts = {e for e in edges}
    for network in (net, teacher):
        cuts |= {left for left, _, _ in network.cells() if left is not None and edges[0] < left < edges[-1]}
    cuts, wrong = sorted(cuts), Fraction(0)
    for a, b in pairwise(cuts):
        middle = (a + b) / 2
        if _sign(net(middle)) != (1 if teacher(middle) >= 0 else -1):
            bin_ = max(i for i, edge in enumerate(edges[:-1]) if edge <= a)
            wrong += masses[bin_] * (b - a) / (edges[bin_ + 1] - edges[bin_])
    return wrong / sum(masses)


# --- How many switches r neurons can realise --------------------------------------------------------------------------


def switches_on_grid(neurons: int, points: int) -> int:
    """How many placements on the grid 0 … points−1 let r neurons realise r switches, whatever their output weights.

    A placement is r breakpoints with facings and r + 1 increasing test positions. Which signs r neurons can show there
    is a question of linear algebra, decided in exact integers: see "The grid search" in README.md.
    """
    tests = np.array(list(combinations(range(points), neurons + 1)))
    alternating = (-1) ** np.arange(neurons + 1)
    found = 0
    for facing in combinations_with_replacement((1, -1), neurons):
        for knots in product(range(points), repeat=neurons):
            # Neurons with the same facing are interchangeable.
            if any(f == g and s > t for f, g, s, t in zip(facing, facing[1:], knots, knots[1:], strict=False)):
                continue
            hidden = np.maximum(np.array(facing) * (tests[:, :, None] - np.array(knots)), 0)
            signed = alternating[:, None] * hidden
            cofactors = np.stack(
                [(-1) ** i * _determinants(np.delete(signed, i, axis=1)) for i in range(neurons + 1)], axis=1
            )
            # Full rank: feasible unless a non-negative combination of the rows vanishes.
            found += int(np.sum((cofactors > 0).any(axis=1) & (cofactors < 0).any(axis=1)))
    return found


def _determinants(matrices: np.ndarray) -> np.ndarray:
    """Determinants of a stack of small integer matrices, exactly, by expansion along the first column."""
    size = matrices.shape[-1]
    if size == 1:
        return matrices[:, 0, 0]
    minors = (np.delete(matrices[:, :, 1:], i, axis=1) for i in range(size))
    return sum((-1) ** i * matrices[:, i, 0] * _determinants(minor) for i, minor in enumerate(minors))


# --- The maximum margin -----------------------------------------------------------------------------------------------


def best_value(x, y) -> float:
    """K7: ½‖θ*‖² for m ≥ 3 label switches: Σ of the distances between the lines through the points at the switches."""
    order = np.argsort(x)
    x, y = np.asarray(x, float)[order], np.asarray(y, float)[order]
    at = np.flatnonzero(y[1:] != y[:-1])
    slope = (y[at + 1] - y[at]) / (x[at + 1] - x[at])
    offset = y[at] - slope * x[at]
    return float(np.hypot(np.diff(slope), np.diff(offset)).sum())


# --- Losses and the normal law ----------------------------------------------------------------------------------------


def logistic_log_value(q) -> mpmath.mpf:
    """log log(1 + e^{−q})."""
    return mpmath.log(mpmath.log1p(mpmath.exp(-mpmath.mpf(q))))


def normal_mass(low, high) -> mpmath.mpf:
    """Φ(high) − Φ(low) without cancellation, in the tail that both lie in."""
    low, high = mpmath.mpf(low), mpmath.mpf(high)
    if low > 0:
        low, high = -high, -low
    return (mpmath.erfc(-high / mpmath.sqrt(2)) - mpmath.erfc(-low / mpmath.sqrt(2))) / 2


# --- The table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """A closed form with its own equation: `residual()` is 0 up to mpmath's precision if the closed form is right."""

    name: str
    source: str
    residual: Callable[[], mpmath.mpf]


def _o1_residual():
    """d/dt Ei(f(t)) along df/dt = 2 ‖x̃‖ e^{−f} f, in the middle of the path."""
    x, f = mpmath.mpf("0.7"), mpmath.mpf("1.3")
    velocity = 2 * mpmath.sqrt(1 + x**2) * mpmath.exp(-f) * f
    return mpmath.diff(mpmath.ei, f) * velocity - ei_gap(x, 1)


_O2 = OnePoint(x=0.7, w=(0.3, -0.2, 0.5, -1.0), b=(0.4, 0.9, -0.1, 0.2), v=(0.6, -0.5, -1.2, 0.8))


def _o2_residual():
    """dθ/dτ = ∂f at clock 0.2 for every weight of four neurons: two that live, one that dies later, one dead."""
    s, worst = mpmath.mpf("0.2"), mpmath.mpf(0)
    w, b, v = _O2.weights(s)
    for j in range(len(w)):
        inner = w[j] * _O2.x + b[j]
        active = inner > 0
        expected = (v[j] * active * _O2.x, v[j] * active, inner * active)
        for part, velocity in enumerate(expected):
            moving = mpmath.diff(lambda r, part=part, j=j: _O2.weights(r)[part][j], s) * _O2.reach
            worst = max(worst, abs(moving - velocity))
    value = sum(v[j] * max(w[j] * _O2.x + b[j], 0) for j in range(len(w)))
    return max(worst, abs(value - _O2.margin(s)))


def _o2_clock_residual():
    """dt/ds = 1/(‖x̃‖ (−ℓ'(f))), for both losses."""
    worst = mpmath.mpf(0)
    for log_weight in (exponential_log_weight, logistic_log_weight):
        s = mpmath.mpf("0.9")
        rate = mpmath.diff(lambda r, log_weight=log_weight: mpmath.exp(_O2.log_time(r, log_weight)), s)
        worst = max(worst, abs(rate * _O2.reach * mpmath.exp(log_weight(_O2.margin(s))) - 1))
    return worst


def _o3_residual():
    """df/dt = 2 ‖x̃‖ |f| (y − f) at a negative label."""
    x, y, start, t = 2.0, -1.5, 0.02, mpmath.mpf("0.3")
    f = orthogonal_square_value(x, y, start, t)
    moving = mpmath.diff(lambda r: orthogonal_square_value(x, y, start, r), t)
    return moving - 2 * mpmath.sqrt(1 + mpmath.mpf(x) ** 2) * abs(f) * (y - f)


def _balance_residual():
    """v² − ‖u‖² along O2, through the death of a neuron."""
    worst = mpmath.mpf(0)
    for s in (0.1, 0.5, 2.0):
        w, b, v = _O2.weights(s)
        for j in range(len(w)):
            before = mpmath.mpf(_O2.v[j]) ** 2 - mpmath.mpf(_O2.w[j]) ** 2 - mpmath.mpf(_O2.b[j]) ** 2
            worst = max(worst, abs(v[j] ** 2 - w[j] ** 2 - b[j] ** 2 - before))
    return worst


def _regions_residual():
    """The second difference of N over a short step around t is non-zero exactly at the knots."""
    net = ExactNetwork.of([1, 2, -1, 0, 3, 4], [-1, -2, 1, 5, -1, 2], [2, -1, 1, 1, 1, -1])
    h = Fraction(1, 1000)
    bends = [t for t in net.breakpoints() if net(t + h) - 2 * net(t) + net(t - h)]
    return mpmath.mpf(0 if bends == net.knots() and len(net.breakpoints()) == 3 else 1)


def _error_residual():
    """Hand computation: N = relu(x) against labels sign(x − ¼) on [−1, 1]: wrong on (−1, ¼), share 5/8."""
    net = ExactNetwork.of([1], [0], [1])
    teacher = ExactNetwork.of([1, -1], [Fraction(-1, 4), Fraction(1, 4)], [1, -1])
    return mpmath.mpf(0 if exact_error(net, teacher, [-1, 1], [3]) == Fraction(5, 8) else 1)


def _normal_residual():
    """The derivative of the mass in its upper end is the normal density, 20 standard deviations out."""
    at = mpmath.mpf(20)
    slope = mpmath.diff(lambda z: normal_mass(19, z), at)
    return slope / mpmath.npdf(at) - 1


ORACLES = (
    Oracle("O1 one aligned neuron", "README.md, O1", _o1_residual),
    Oracle("O2 one point, many neurons", "README.md, O2", _o2_residual),
    Oracle("O2 physical time", "README.md, O2", _o2_clock_residual),
    Oracle("O3 two orthogonal points, square loss", "README.md, O3", _o3_residual),
    Oracle("balancedness", "README.md, Balancedness", _balance_residual),
    Oracle("regions in fractions", "README.md, Regions and roots in fractions", _regions_residual),
    Oracle("population error in fractions", "README.md, Population error", _error_residual),
    Oracle("normal mass", "README.md, Laws", _normal_residual),
)
