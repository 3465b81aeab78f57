"""An independent event-driven integrator of the Clarke flow: NumPy and SciPy, dense n × k arrays, DOP853 at 1e-12.

It shares no code and no idea with gradflow's loop beyond the mathematics: patterns are full 0/1 matrices, every pair of
neuron and point is watched by its own event function, events are located by SciPy's root finder. Slow; for a few
neurons and points.
"""

import numpy as np
from scipy.integrate import solve_ivp


class Reference:
    """dθ/dτ = Σ_i p_i y_i ∂N(x_i) for the exponential loss, with sliding."""

    def __init__(self, w, b, v, x, y):
        self.x, self.y = np.asarray(x, float), np.asarray(y, float)
        self.lift = np.stack([self.x, np.ones_like(self.x)])
        self.theta = np.concatenate([w, b, v]).astype(float)
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
            # 1e-13 late, lest a neuron that dies exactly on its last point be seen to cross for ever.
            for i in range(self.x.size):
                sign = 1 if self.active[j, i] else -1
                out.append((lambda t, s, j=j, i=i, g=sign: g * (s[j] * self.x[i] + s[self.k + j]) + 1e-13, j, i, ""))
        return out

    def run(self, time, rtol=1e-12):
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
                self.velocity, (now, time), self.theta, method="DOP853", rtol=rtol, atol=1e-14, events=functions
            )
            self.theta, now = found.y[:, -1], found.t[-1]
            hits = [event for (_, *event), times in zip(watch, found.t_events, strict=True) if times.size]
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
        return self.theta.reshape(3, self.k)
