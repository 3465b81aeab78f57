"""An independent event-driven integrator of the Clarke flow: NumPy and SciPy, dense n × k arrays, DOP853 at 1e-12.

It shares no code and no idea with gradflow's loop beyond the mathematics: patterns are full 0/1 matrices, every pair of
neuron and point is watched by its own event function, events are located by SciPy's root finder. Slow; for a few
neurons and points.
"""

import numpy as np
from scipy.integrate import solve_ivp


class Reference:
    """dθ/dτ = Σ_i p_i y_i ∂N(x_i) for the exponential loss, with sliding."""

    dtype = float
    late = 1e-13

    def __init__(self, w, b, v, x, y):
        self.x, self.y = np.asarray(x, self.dtype), np.asarray(y, self.dtype)
        self.lift = np.stack([self.x, np.ones_like(self.x)])
        self.theta = np.concatenate([w, b, v]).astype(self.dtype)
        self.k = len(w)
        self.active = self._inner(self.theta) > 0
        self.pinned = np.full(self.k, -1)
        self.events = self.slides = 0

    def _inner(self, theta):
        w, b, _ = theta.reshape(3, self.k)
        return np.outer(w, self.x) + b[:, None]

    def weights(self, theta):
        q = self.y * (theta[2 * self.k :] @ (self.active * self._inner(theta)))
        p = np.exp(-(q - q.min()))
        return p / p.sum()

    def pull(self, theta):
        """z_j, without the point that a pinned neuron sits on."""
        return (self.active * (self.weights(theta) * self.y)[None]) @ self.lift.T

    def velocity(self, _, theta):
        w, b, v = theta.reshape(3, self.k)
        z = self.pull(theta)
        for j in np.flatnonzero(self.pinned >= 0):
            normal = self.lift[:, self.pinned[j]]
            z[j] -= normal * (z[j] @ normal) / (normal @ normal)
        return np.concatenate([v * z[:, 0], v * z[:, 1], z[:, 0] * w + z[:, 1] * b])

    def sides(self, theta, j, i):
        """The velocity of w_j x_i + b_j with point i inactive and active."""
        v, p = theta[2 * self.k + j], self.weights(theta)
        others = self.active[j] & (np.arange(self.x.size) != i)
        z = self.lift @ (others * p * self.y)
        off = v * (z @ self.lift[:, i])
        return off, off + v * p[i] * self.y[i] * (self.lift[:, i] @ self.lift[:, i])

    def _watch(self):
        """(event function, neuron, point, side of a release) for everything that can happen in the present mode."""
        out = []
        for j in range(self.k):
            i = self.pinned[j]
            if i >= 0:
                out.append((lambda t, s, j=j, i=i: self.sides(s, j, i)[0], j, i, "off"))
                out.append((lambda t, s, j=j, i=i: -self.sides(s, j, i)[1], j, i, "on"))
                continue
            # Somewhat late, lest a neuron that dies exactly on its last point be seen to cross for ever.
            for i in range(self.x.size):
                sign = 1 if self.active[j, i] else -1
                out.append(
                    (lambda t, s, j=j, i=i, g=sign: g * (s[j] * self.x[i] + s[self.k + j]) + self.late, j, i, "")
                )
        return out

    def run(self, time, rtol=1e-12, method="DOP853"):
        """The parameters at `time`, (3, k), by SciPy's `method` and its event location."""
        now = 0.0
        while now < time:
            watch = self._watch()
            functions = []
            for function, *_ in watch:

                def event(t, s, function=function):
                    return function(t, s)

                event.terminal, event.direction = True, -1
                functions.append(event)
            found = solve_ivp(
                self.velocity, (now, time), self.theta, method=method, rtol=rtol, atol=1e-14, events=functions
            )
            self.theta, now = found.y[:, -1], found.t[-1]
            self._decide([event for (_, *event), times in zip(watch, found.t_events, strict=True) if times.size])
        return self.theta.reshape(3, self.k)

    def _decide(self, hits):
        """The mode after the events `hits`, by the velocities on both sides."""
        for j, i, side in hits:
            self.events += 1
            off, on = self.sides(self.theta, j, i)
            if self.pinned[j] >= 0:
                # Neurons pinned to one point from one side share their weight there and come off together.
                together = (self.pinned == i) & (self.active == self.active[j]).all(axis=1)
                self.active[together, i], self.pinned[together] = side == "on", -1
            elif side == "" and off > 0 > on:
                self.active[j, i], self.pinned[j] = False, i
                self.slides += 1
            elif side == "":
                self.active[j, i] = ~self.active[j, i]


class LongDouble(Reference):
    """The same in extended precision (64 bits of mantissa on x86), by our own extrapolation and event location.

    A step is the modified midpoint rule with 2, 4, …, 16 substeps, extrapolated to step zero in h² (Gragg, Bulirsch and
    Stoer; Hairer, Nørsett and Wanner 1993, II.9): order 16. Events are met by taking steps again, to 1e-17.
    """

    dtype = np.longdouble
    late = np.longdouble(1e-17)

    def _step(self, theta, h):
        table = []
        for row in range(8):
            count = 2 * (row + 1)
            small = h / count
            before, here = theta, theta + small * self.velocity(0, theta)
            for _ in range(count - 1):
                before, here = here, before + 2 * small * self.velocity(0, here)
            new = [(before + here + small * self.velocity(0, here)) / 2]
            for column in range(row):
                ratio = np.longdouble((row + 1) ** 2) / np.longdouble((row - column) ** 2) - 1
                new.append(new[column] + (new[column] - table[column]) / ratio)
            table = new
        return table[-1], np.abs(table[-1] - table[-2]).max()

    def run(self, time, rtol=1e-17, method=None):
        now, h = np.longdouble(0), np.longdouble(0.01)
        while now < time:
            step = min(h, time - now)
            new, error = self._step(self.theta, step)
            allowed = rtol * np.abs(new).max()
            if error > allowed:
                h = step * max(0.3, 0.9 * float(allowed / error) ** (1 / 15))
                continue
            h = step * min(2.0, 0.9 * float(allowed / max(error, 1e-30)) ** (1 / 15))
            watch = self._watch()
            hits = []
            while violated := [w for w in watch if w[0](0, new) < -1e-17 and w[0](0, self.theta) > -1e-16]:
                # The earliest of them so far; steps to it are taken again and may show an earlier one yet.
                roots = [(self._root(w[0], step), w) for w in violated]
                step, first = min(roots, key=lambda pair: pair[0])
                hits = [first[1:]]
                new = self._step(self.theta, step)[0]
                if all(w[0](0, new) >= -1e-16 for w in watch):
                    break
            self.theta, now = new, now + step
            self._decide(hits)
        return self.theta.reshape(3, self.k)

    def _root(self, function, step):
        """Where `function` falls through zero within a step: bisection, then Illinois, on steps taken anew."""
        low, high = np.longdouble(0), step
        at_low, at_high = function(0, self.theta), function(0, self._step(self.theta, step)[0])
        for _ in range(60):
            middle = (low * at_high - high * at_low) / (at_high - at_low)
            value = function(0, self._step(self.theta, middle)[0])
            if abs(value) < 1e-17:
                return middle
            if value > 0:
                low, at_low, at_high = middle, value, at_high / 2
            else:
                high, at_high, at_low = middle, value, at_low / 2
        return high
