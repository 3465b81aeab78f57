"""Independent oracles for limits and optima: a conic solver, rational arithmetic, and many digits."""

from fractions import Fraction
from itertools import pairwise
from math import isqrt

import cvxpy as cp
import mpmath as mp
import numpy as np


def patterns(x) -> list[np.ndarray]:
    """Every set of the points of ascending x that some neuron is active on: those right or left of a place."""
    n = len(x)
    sets = [np.arange(n) >= i for i in range(n + 1)] + [np.arange(n) < i for i in range(1, n)]
    return [active for active in sets if active.any()]


def least_norm(x, y, pairs) -> float:
    """min Σ‖g‖ over lines g for `pairs` of sign and pattern, with margins ≥ 1, by Clarabel (interior point).

    A line of a pattern is one that is ≥ 0 on its points and ≤ 0 on the others.
    """
    lifted = np.stack([x, np.ones(len(x))], axis=1)
    lines = [cp.Variable(2) for _ in pairs]
    total = sum(s * cp.multiply(active.astype(float), lifted @ g) for (s, active), g in zip(pairs, lines, strict=True))
    constraints = [cp.multiply(np.asarray(y, float), total) >= 1]
    for (_, active), g in zip(pairs, lines, strict=True):
        constraints.append(cp.multiply(np.where(active, 1.0, -1.0), lifted @ g) >= 0)
    problem = cp.Problem(cp.Minimize(sum(cp.norm(g) for g in lines)), constraints)
    return float(problem.solve(solver=cp.CLARABEL))


def least_norm_of_any_width(x, y) -> float:
    """½‖θ*‖² of the maximum-margin problem at unlimited width."""
    order = np.argsort(x)
    x, y = np.asarray(x)[order], np.asarray(y)[order]
    return least_norm(x, y, [(s, active) for active in patterns(x) for s in (1, -1)])


def least_norm_near(net, x, y, on=1e-9) -> float:
    """The same for networks whose neurons stay in the closed cells that those of `net` touch.

    θ is a KKT point only if it attains this, as the problem on these cells is convex and has the same KKT conditions.
    """
    order = np.argsort(x)
    x, y = np.asarray(x)[order], np.asarray(y)[order]
    pairs = set()
    for w, b, v in np.stack([net.w, net.b, net.v], axis=1):
        if v == 0:
            continue
        inner = w * x + b
        touching = np.abs(inner) <= on * np.hypot(w, b) * np.hypot(x, 1)
        for with_touching in (inner > 0) | touching, (inner > 0) & ~touching:
            pairs.add((int(np.sign(v)), tuple(with_touching.tolist())))
    return least_norm(x, y, [(s, np.array(active)) for s, active in pairs if any(active)])


def exact_residual(net, x, y, multipliers, on=Fraction(1, 10**11)) -> float:
    """The KKT residual of `net`, scaled to minimum margin 1, in rational arithmetic but for its square roots.

    A plain loop over neurons and points; a breakpoint on points (at one place) takes the activation in [0, 1] that
    leaves least.
    """
    x, y, lam = ([Fraction(float(a)) for a in values] for values in (x, y, multipliers))
    neurons = [tuple(Fraction(float(a)) for a in neuron) for neuron in zip(net.w, net.b, net.v, strict=True)]
    q = [y_ * sum(v * max(w * x_ + b, Fraction(0)) for w, b, v in neurons) for x_, y_ in zip(x, y, strict=True)]
    least = min(q)
    if least <= 0:
        return float("inf")
    # (w, b) and v all scale by 1/√least; u/v and residuals relative to ‖θ‖ do not scale.
    size = sum(w * w + b * b + v * v for w, b, v in neurons)
    off = Fraction(0)
    for w, b, v in neurons:
        lack, out, here = [w, b], v, []
        for x_, y_, lam_ in zip(x, y, lam, strict=True):
            inner = w * x_ + b
            if inner * inner <= on * on * (w * w + b * b) * (1 + x_ * x_):
                here.append((x_, lam_ * y_))
            elif inner > 0:
                lack = [lack[0] - v * lam_ * y_ * x_, lack[1] - v * lam_ * y_]
                out -= lam_ * y_ * inner
        push, place = sum((f for _, f in here), Fraction(0)) * v, here[0][0] if here else Fraction(0)
        if push != 0:
            share = min(max((lack[0] * place + lack[1]) / (1 + place**2) / push, Fraction(0)), Fraction(1))
            lack = [lack[0] - share * push * place, lack[1] - share * push]
        off += lack[0] ** 2 + lack[1] ** 2 + out**2
    whole = sum(abs(a) for a in lam)
    gap = sum(abs(a) * abs(q_ / least - 1) for a, q_ in zip(lam, q, strict=True)) / whole
    return float(max(_root(off / size), max(-a for a in lam) / whole, gap))


def _root(value: Fraction) -> Fraction:
    scale = 10**40
    return Fraction(isqrt(value.numerator * scale**2 // value.denominator), scale)


def exact_bound(x, y, multipliers) -> mp.mpf:
    """Σλ/max |G|, a lower bound on ½‖θ‖² for any width, from λ ≥ 0 and G(u) = Σ λ_i y_i max(0, u·x̃_i) on ‖u‖ = 1, at
    the working precision of mpmath.

    |G| is largest at a ray through a point or along the force of the points on one side of a place.
    """
    x, y, lam = ([mp.mpf(a) for a in values] for values in (x, y, multipliers))
    assert min(lam) >= 0
    n, forces = len(x), [a * s for a, s in zip(lam, y, strict=True)]
    sides = [range(k, n) for k in range(n)] + [range(k) for k in range(1, n)]
    directions = [(a, -a * x_) for x_ in x for a in (mp.mpf(1), mp.mpf(-1))]
    directions += [(mp.fsum(forces[i] * x[i] for i in s), mp.fsum(forces[i] for i in s)) for s in sides]
    largest = mp.mpf(0)
    for w, b in directions:
        size = mp.sqrt(w * w + b * b)
        for sign in (1, -1) if size > 0 else ():
            value = mp.fsum(f * max(0, sign * (w * x_ + b)) for f, x_ in zip(forces, x, strict=True)) / size
            largest = max(largest, abs(value))
    return mp.fsum(lam) / largest


def exact_optimum(x, y) -> mp.mpf:
    """½‖θ*‖² of at least three label switches, proved at the working precision of mpmath: from the breakpoints of the
    formula, the multipliers by 2 × 2 systems; with `exact_bound`.
    """
    pairs = sorted({(float(a), float(b)) for a, b in zip(x, y, strict=True)})
    switches = [(mp.mpf(a), mp.mpf(b), mp.mpf(s)) for (a, s), (b, t) in pairwise(pairs) if s != t]
    lines = [(-2 * s / (b - a), s + 2 * s * a / (b - a)) for a, b, s in switches]
    knots = [-(d - d_) / (a - a_) for (a_, d_), (a, d) in pairwise(lines)]
    if 1 + switches[0][0] * knots[0] < 0:
        knots[0] = -1 / switches[0][0]
    if 1 + switches[-1][1] * knots[-1] < 0:
        knots[-1] = -1 / switches[-1][1]
    bends = [s * mp.matrix([1, -k]) / mp.sqrt(1 + k * k) for (*_, s), k in zip(switches, knots, strict=False)]
    zero, lam = mp.matrix([0, 0]), {}
    for (a, b, s), before, after in zip(switches, [zero, *bends], [*bends, zero], strict=True):
        force = mp.lu_solve(mp.matrix([[a, b], [1, 1]]), before - after)
        for place, f in ((a, force[0] * s), (b, -force[1] * s)):
            lam[place] = lam.get(place, 0) + (0 if abs(f) < mp.mpf(10) ** (10 - mp.mp.dps) / (b - a) else f)
    labels = dict(pairs)
    return exact_bound(list(lam), [labels[float(place)] for place in lam], list(lam.values()))
