"""The global maximum margin: what it finds is right, and proved, on inputs of every kind."""

import runpy
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from conic import exact_bound, exact_optimum, least_norm_of_any_width
from oracles import best_value

import gradflow as gf
from gradflow.closed_form import closed_form, solved
from gradflow.optimum import by_program
from gradflow.two_switches import _least, _proof

OPTIMA = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "optima.py"))

ALTERNATING = (
    [
        *(-0.9078162366067559, -0.6494679279670323, -0.4038003947869233, 0.0009813383070365056),
        *(0.055213182448148324, 0.07606889083232815, 0.5487860101730528, 0.9026974720161913),
    ],
    [1, -1, 1, -1, 1, -1, 1, -1],
)
YEARS = ([1990.0, 1995.0, 2003.0, 2010.0, 2020.0], [1, -1, -1, 1, 1])
WIDE = ([-90000.0, -50000.0, 20000.0, 80000.0, 130000.0], [1, -1, -1, 1, 1])


def best_of(x, y):
    return gf.max_margin(gf.Dataset(np.array(x, float), np.array(y)))


@pytest.mark.parametrize(("x", "y"), [ALTERNATING, YEARS, WIDE])
def test_what_was_once_right_and_not_proved(x, y):
    best = best_of(x, y)
    assert best.proved
    if np.sum(np.diff(y) != 0) > 2:
        with mp.workdps(60):
            assert float(float(best.value) / exact_optimum(x, y) - 1) == pytest.approx(0, abs=1e-14)


def test_two_labels_at_any_distance():
    for gap in 10.0 ** -np.arange(1, 16):
        best = best_of([0.3, 0.3 + gap], [-1, 1])
        b = np.float64(0.3) + gap
        assert best.proved
        assert float(best.value) == pytest.approx((np.hypot(1, 0.3) + np.hypot(1, b)) / (b - 0.3), rel=1e-14)


def test_years_by_hand_in_units_of_fifteen():
    best = best_of((np.array(YEARS[0]) - 2005) / 15, YEARS[1])
    assert best.proved and float(best.value) == pytest.approx(12.508, abs=1e-3)


# The outer line turns about its outer point, where the formula of lines through both labels asks for λ < 0.
STEEP = (
    ([-8.0, -7.0, 4.0, 7.0, 11.0], [-1, -1, 1, -1, 1]),
    ([-2.0, 3.0, 6.0, 10.0, 11.0], [1, -1, 1, 1, -1]),
    ([-10.0, -8.0, 2.0, 8.0, 9.0, 10.0], [1, 1, -1, -1, 1, -1]),
    ([-10.0, -9.0, -8.0, -2.0, 8.0, 10.0], [-1, 1, -1, -1, 1, 1]),
)


@pytest.mark.parametrize(("x", "y"), STEEP)
def test_wide_inputs_want_steeper_outer_lines(x, y):
    best, conic = best_of(x, y), least_norm_of_any_width(x, y)
    assert best.proved and float(best.value) == pytest.approx(conic, rel=1e-7)
    assert best_value(x, y) > conic * (1 + 1e-4)
    with mp.workdps(60):
        assert float(float(best.value) / exact_optimum(x, y) - 1) == pytest.approx(0, abs=1e-14)


SMALL = jax.jit(jax.vmap(lambda x, y, n: gf.max_margin(gf.Dataset(x, y).padded(n))))


def test_a_conic_solver_and_the_program_find_the_same():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 60)
    x = [np.sort(rng.uniform(-1, 1, n)) * 10 ** rng.uniform(-1, 1) for n in sizes]
    y = [rng.choice([-1.0, 1.0], n) if i % 4 else np.ones(n) for i, n in enumerate(sizes)]
    padded = [np.stack([np.pad(a, (0, 8 - a.size), mode="edge") for a in part]) for part in (x, y)]
    found = SMALL(*padded, sizes)
    assert np.all(np.abs(found.value - found.lower_bound) <= 1e-12 * found.value)
    program = jax.jit(jax.vmap(lambda x, y, n: by_program(gf.Dataset(x, y).padded(n))))(*padded, sizes)
    proved = np.abs(program.value - program.lower_bound) <= 1e-9 * program.value
    assert np.mean(proved) > 0.9
    np.testing.assert_allclose(program.value[proved], found.value[proved], rtol=1e-9)
    for i, (x_, y_) in enumerate(zip(x, y, strict=True)):
        net = jax.tree.map(lambda a, i=i: a[i], found.network)
        assert float(np.min(y_ * net(x_))) == pytest.approx(1, abs=1e-9)
        assert float(found.value[i]) == pytest.approx(least_norm_of_any_width(x_, y_), rel=1e-6)
        with mp.workdps(40):  # the multipliers, as they are
            assert float(exact_bound(x_, y_, np.asarray(found.multipliers[i])[: x_.size])) >= float(found.value[i]) * (
                1 - 1e-9
            )


def test_inputs_of_every_kind_are_proved():
    _, proved, gap, _, switches = OPTIMA["measure"](1, 400, 100)
    assert np.all(proved) and np.max(np.abs(gap)) < 1e-10
    assert {0, 1, 2, 3} <= set(switches.tolist())


@pytest.mark.slow
def test_ten_thousand_inputs_of_every_kind_are_proved():
    _, proved, gap, *_ = OPTIMA["measure"](2, 10_000, 100)
    assert np.all(proved) and np.max(np.abs(gap)) < 1e-9


def hard(rng, n):
    """Two switches: both narrow, one, or the run between; by 1e-9 to 1e-3 of the length, up to 1e6, some shifted."""
    x, d = np.sort(rng.uniform(-1, 1, (n, 2)), axis=1), 2 * 10 ** rng.uniform(-9, -3, (n, 2))
    left, right, near, apart = x[:, 0], x[:, 1] + 0.01, d[:, 0], d[:, 1]
    shapes = [
        (left, left + near, right, right + apart),
        (left, left + near, right, right + 0.5),
        (left - 1, left, left + near, right + 1),
        (left, left + near, left + near + apart, right + 1),
        (left, left + near, left + near, right + 1),
    ]
    at = np.stack([np.stack(shape, axis=1)[i] for i, shape in zip(range(n), shapes * n, strict=False)])
    at = at * 10.0 ** rng.integers(0, 7, (n, 1)) * rng.choice([-1, 1], (n, 1))
    at = np.sort(np.where(rng.random((n, 1)) < 0.3, at + np.ptp(at, axis=1)[:, None] * rng.uniform(-1e3, 1e3), at))
    return at[(np.diff(at[:, :2]) > 0)[:, 0] & (np.diff(at[:, 2:]) > 0)[:, 0]]


def proofs(at):
    def of(at):
        at = jnp.where(at[1] - at[0] > at[3] - at[2], -at[::-1], at)
        found = _least(at, jnp.array(True))
        return found.cost, found.within, *_proof(at, found)

    return jax.jit(jax.vmap(of))(at)


@pytest.mark.slow
def test_two_switches_of_every_shape_are_proved():
    cost, within, bound, lam = proofs(hard(np.random.default_rng(0), 4_000))
    assert np.all(within) and np.min(lam) >= 0
    np.testing.assert_allclose(bound, cost, rtol=1e-9)


def test_the_bound_for_two_switches_is_one_in_extended_precision():
    """Its forces and multipliers, exactly as they are, in 60 digits: λ from forces, as λ rounded would be others."""
    at = hard(np.random.default_rng(1), 60)[:40]

    def of(at):
        at = jnp.where(at[1] - at[0] > at[3] - at[2], -at[::-1], at)
        found = _least(at, jnp.array(True))
        return at, _proof(at, found)[0], found.forces, found.bound

    places, bounds, forces, pushes = jax.jit(jax.vmap(of))(at)
    with mp.workdps(60):
        for x, bound, (left, right), push in zip(places, bounds, forces, pushes, strict=True):
            a, b, c, e = (mp.mpf(float(t)) for t in x)
            (l1, l2), (r1, r2) = ([mp.mpf(float(t)) for t in f] for f in (left, right))
            lam = [
                (l1 - b * l2) / (a - b),
                (l1 - a * l2) / (a - b) + mp.mpf(float(push[0])),
                (r1 - e * r2) / (e - c) + mp.mpf(float(push[1])),
                (r1 - c * r2) / (e - c),
            ]
            # Less than rounding may be missing to λ ≥ 0.
            lam = [max(a, 0) for a in lam]
            assert float(bound) <= float(exact_bound([a, b, c, e], [1, -1, -1, 1], lam)) * (1 + 1e-9)


@pytest.mark.parametrize("y", [[1, 1, -1, -1, 1, -1], [1, 1, 1, -1, -1, 1], [1, 1, 1, 1, -1, -1], [1, 1, 1, 1, 1, 1]])
def test_a_planted_fault_is_not_proved(y):
    """Breakpoints, lines or amplitudes a little off are no optimum, and multipliers that are no proof are found out."""
    x = np.array([-0.9, -0.7, -0.2, 0.1, 0.3, 0.9])
    found = gf.max_margin(gf.Dataset(x, np.array(y)))
    off = eqx.tree_at(lambda f: f.value, found, found.value * (1 + 2e-9))
    assert found.proved and not off.proved
    with mp.workdps(40):
        lam = np.asarray(found.multipliers)
        assert float(exact_bound(x, y, lam)) == pytest.approx(float(found.value), rel=1e-12)
        for i in np.flatnonzero(lam):
            worse = np.where(np.arange(6) == i, 1.01 * lam, lam)
            assert float(exact_bound(x, y, worse)) < float(found.value) * (1 - 1e-7)


def test_negative_multipliers_prove_nothing():
    x, y = jnp.array(STEEP[0][0]), jnp.array(STEEP[0][1], float)
    real = jnp.ones(5, bool)
    assert float(closed_form(x, y, real).bound) > 0
    lam = jnp.array([1.0, -1e-6, 1.0, 1.0, 1.0])
    assert solved(jnp.ones((2, 1)), jnp.ones(1), jnp.ones(1), lam).bound == 0
    assert solved(jnp.ones((2, 1)), jnp.ones(1), jnp.ones(1), jnp.abs(lam)).bound > 0


def test_an_optimum_that_is_elsewhere_is_not_proved_for_two_switches():
    at = jnp.array([-0.5, -0.2, 0.3, 0.7])
    found = _least(at, jnp.array(True))
    assert float(_proof(at, found)[0]) == pytest.approx(float(found.cost), rel=1e-14)
    for turned in (found.forces @ jnp.array([[1, 1e-3], [-1e-3, 1]]), found.forces * 1.001):
        worse = eqx.tree_at(lambda f: f.forces, found, turned)
        assert float(_proof(at, worse)[0]) < float(found.cost) * (1 - 1e-5)
    pushed = eqx.tree_at(lambda f: f.bound, found, found.bound + 0.01)
    assert float(_proof(at, pushed)[0]) < float(found.cost) * (1 - 1e-6)


@pytest.mark.parametrize("y", [[1, -1, -1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, 1, 1, 1]])
def test_both_modes_agree_where_formulas_that_do_not_apply_are_singular(y):
    """In reverse mode the derivative of a branch that is not taken has the weight 0, and 0 · NaN is NaN."""
    x = jnp.array([-1.0, -0.5, 0.5, 1.0])

    def value(x):
        return gf.max_margin(eqx.tree_at(lambda d: d.x, gf.Dataset(np.asarray([-1.0, -0.5, 0.5, 1.0]), y), x)).value

    forward = [jax.jvp(value, (x,), (seed,))[1] for seed in jnp.eye(4)]
    np.testing.assert_allclose(jax.grad(value)(x), forward, rtol=1e-12, atol=1e-12)
