"""Rodas5P as a Diffrax solver: order, stiffness, dense output, derivatives."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.rosenbrock import Rodas5P, RodasInterpolation, dense_resolvent

START = jnp.array([1.5, 0.3])


def van_der_pol(t, y, args):
    return jnp.stack([y[1], 5 * (1 - y[0] ** 2) * y[1] - y[0]])


@jax.jit
def step(start, h):
    """The end of a step, its error estimate and its dense output."""
    return Rodas5P().step(diffrax.ODETerm(van_der_pol), jnp.array(0.0), h, start, None, None, False)[:3]


def march(steps, length=1.0):
    """The end point, and the largest error estimate on the way."""
    y, worst = START, 0.0
    for _ in range(steps):
        y, error, _ = step(y, length / steps)
        worst = max(worst, float(jnp.max(jnp.abs(error))))
    return y, worst


@pytest.fixture(scope="module")
def exact():
    controller = diffrax.PIDController(rtol=1e-12, atol=1e-13)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(van_der_pol), diffrax.Dopri8(), 0.0, 1.0, None, START, stepsize_controller=controller
    ).ys[-1]


def slope(counts, errors):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def test_converges_with_order_5_and_its_estimate_with_order_5(exact):
    counts = (40, 80, 160, 320)
    ends, estimates = zip(*(march(n) for n in counts), strict=True)
    errors = [float(jnp.max(jnp.abs(end - exact))) for end in ends]
    assert slope(counts, errors) == pytest.approx(5, abs=0.4)
    # The local error of an embedded method of order 4 behaves like h⁵.
    assert slope(counts, estimates) == pytest.approx(5, abs=0.5)


def test_dense_output_is_of_order_4(exact):
    errors = []
    for h in (0.02, 0.01, 0.005):
        y1, _, dense = step(START, h)
        inside = RodasInterpolation(t0=jnp.array(0.0), t1=jnp.array(h), **dense)
        np.testing.assert_allclose(inside.evaluate(jnp.array(0.0)), START)
        np.testing.assert_allclose(inside.evaluate(jnp.array(h)), y1)
        controller = diffrax.PIDController(rtol=1e-12, atol=1e-13)
        middle = diffrax.diffeqsolve(
            diffrax.ODETerm(van_der_pol), diffrax.Dopri8(), 0.0, h / 2, None, START, stepsize_controller=controller
        ).ys[-1]
        errors.append(float(jnp.max(jnp.abs(inside.evaluate(jnp.array(h / 2)) - middle))))
    assert slope((1, 2, 4), errors) == pytest.approx(5, abs=0.6)  # one step: the local error is one order higher


def test_stiff_decay_is_damped_at_any_step():
    stiff = diffrax.ODETerm(lambda t, y, args: -1e8 * (y - 1))
    y, *_ = Rodas5P().step(stiff, jnp.array(0.0), jnp.array(1.0), jnp.array([7.0]), None, None, False)
    assert float(abs(y[0] - 1)) < 1e-6


def test_runs_in_diffeqsolve_under_vmap_jvp_and_grad(exact):
    def solve(start):
        controller = diffrax.PIDController(rtol=1e-8, atol=1e-10)
        return diffrax.diffeqsolve(
            diffrax.ODETerm(van_der_pol), Rodas5P(), 0.0, 1.0, 0.01, start, stepsize_controller=controller
        ).ys[-1]

    np.testing.assert_allclose(solve(START), exact, rtol=1e-6)
    batch = jax.vmap(solve)(jnp.stack([START, 1.1 * START]))
    np.testing.assert_allclose(batch[0], exact, rtol=1e-6)
    gradient = jax.grad(lambda y: solve(y)[0])(START)
    h = 1e-5
    finite = (solve(START + jnp.array([h, 0.0]))[0] - solve(START - jnp.array([h, 0.0]))[0]) / (2 * h)
    assert float(gradient[0]) == pytest.approx(float(finite), rel=1e-4)


def test_a_finished_lane_has_finite_derivatives():
    def end(start, h):
        return Rodas5P().step(diffrax.ODETerm(van_der_pol), jnp.array(0.0), h, start, None, None, False)[0]

    assert jnp.all(jnp.isfinite(jax.jacrev(end)(START, jnp.array(0.0))))


def test_dense_resolvent_solves_its_system():
    sigma = jnp.array(3.0)
    jacobian = jax.jacfwd(lambda y: van_der_pol(0.0, y, None))(START)
    right = jnp.array([0.3, -1.0])
    got = dense_resolvent(lambda y: van_der_pol(0.0, y, None), START, sigma)(right)
    np.testing.assert_allclose(got, np.linalg.solve(3 * np.eye(2) - np.asarray(jacobian), right), rtol=1e-12)
