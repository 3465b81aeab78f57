"""The losses, against mpmath, from q = −2000 to 2000."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from oracles import exponential_log_weight, logistic_log_value, logistic_log_weight

import gradflow as gf
from gradflow.loss import LOSSES

# Dense around 0 and around 36.04, where the logistic loss changes formula.
MARGINS = np.concatenate(
    [
        np.linspace(-2000, 2000, 81),
        np.linspace(-1, 1, 21),
        np.linspace(35.5, 36.5, 41),
        [-709.8, -37.0, -1e-8, 1e-300, 709.8, 745.2],
    ]
)
EXACT = {
    "exponential": (lambda q: -mpmath.mpf(q), exponential_log_weight),
    "logistic": (logistic_log_value, logistic_log_weight),
}
losses = pytest.mark.parametrize("name", LOSSES)


def exactly(function, margins):
    # exp(2000) + 1 needs its 869 digits.
    with mpmath.workdps(900):
        return np.array([float(function(mpmath.mpf(float(q)))) for q in margins])


def test_the_table_is_complete():
    assert set(LOSSES) == set(EXACT)


@losses
def test_log_value_and_log_weight(name):
    loss = LOSSES[name]()
    for ours, exact in zip((loss.log_value, loss.log_weight), EXACT[name], strict=True):
        expected = exactly(exact, MARGINS)
        # log ℓ passes through 0 near q = −0.54, where only an absolute error makes sense.
        np.testing.assert_allclose(ours(jnp.asarray(MARGINS)), expected, rtol=1e-14, atol=4e-16)


@losses
def test_weight_is_the_derivative_of_the_value(name):
    """log(−ℓ') = log ℓ + log(−d log ℓ/dq), everywhere, and the derivatives are finite."""
    loss = LOSSES[name]()
    q = jnp.asarray(MARGINS)
    slope = jax.vmap(jax.grad(loss.log_value))(q)
    assert np.isfinite(slope).all() and (slope < 0).all()
    # Where ℓ is about −q the slope is −1/q times a logistic function, known to its own relative accuracy only.
    np.testing.assert_allclose(loss.log_value(q) + jnp.log(-slope), loss.log_weight(q), rtol=2e-14, atol=2e-14)


@losses
def test_log_weight_has_the_right_derivative(name):
    loss = LOSSES[name]()
    slope = jax.vmap(jax.grad(loss.log_weight))(jnp.asarray(MARGINS))
    with mpmath.workdps(900):
        # d/dq −log(1 + e^q) = −1/(1 + e^{−q})
        exact = [
            -1.0 if name == "exponential" else float(-1 / (1 + mpmath.exp(-mpmath.mpf(float(q))))) for q in MARGINS
        ]
    np.testing.assert_allclose(slope, exact, rtol=1e-14, atol=1e-300)


@losses
def test_inverse_inverts(name):
    loss = LOSSES[name]()
    # A margin of −700 has a loss of 700 or e^700; beyond, the loss is not the interesting thing to invert.
    q = jnp.asarray(MARGINS[np.abs(MARGINS) <= 2000])
    q = q[q > -700] if name == "logistic" else q
    back = jax.vmap(loss.inverse)(loss.log_value(q))
    np.testing.assert_allclose(back, q, rtol=1e-12, atol=4e-16 * 36 if name == "logistic" else 0)
    slope = jax.vmap(jax.grad(loss.inverse))(loss.log_value(q))
    assert np.isfinite(slope).all() and (slope < 0).all()


@losses
def test_means_and_weights(name):
    loss = LOSSES[name]()
    value, weight = EXACT[name]
    for margins in ([3.0], [0.5, -0.5, 2.0], [1990.0, 2000.0, 1995.5], [-2000.0, 2000.0, 0.0]):
        q = jnp.asarray(margins)
        with mpmath.workdps(900):
            parts = [mpmath.exp(weight(mpmath.mpf(m))) for m in margins]
            log_mean = mpmath.log(sum(mpmath.exp(value(mpmath.mpf(m))) for m in margins) / len(margins))
            log_mean_weight = mpmath.log(sum(parts) / len(margins))
            shares = [float(part / sum(parts)) for part in parts]
        np.testing.assert_allclose(loss.log_mean(q), float(log_mean), rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(loss.log_mean_weight(q), float(log_mean_weight), rtol=1e-14, atol=1e-15)
        # p is an exponential of differences of thousands: their rounding is its relative error.
        np.testing.assert_allclose(loss.weights(q), shares, rtol=1e-12, atol=1e-300)
        assert float(jnp.sum(loss.weights(q))) == pytest.approx(1, abs=1e-15)
        assert (loss.weights(q) >= 0).all()


@losses
def test_gradient_of_the_mean_is_minus_the_weights(name):
    """∂ log L/∂q_i = −p_i e^{s}/L, and nothing is NaN at any size."""
    loss = LOSSES[name]()
    for q in (
        jnp.asarray([0.3, -1.0, 4.0]),
        jnp.asarray([-2000.0, 0.0, 2000.0]),
        jnp.asarray([2000.0, 2001.0, 1999.0]),
    ):
        gradient = jax.grad(loss.log_mean)(q)
        expected = -loss.weights(q) * jnp.exp(loss.log_mean_weight(q) - loss.log_mean(q))
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-300)
        jacobian = jax.jacobian(loss.weights)(q)
        assert np.isfinite(jacobian).all()


@losses
def test_separation_threshold(name):
    """Below log(ℓ(0)/n) every margin is positive; at it, one margin may still be 0."""
    loss = LOSSES[name]()
    at_zero = {"exponential": 1.0, "logistic": float(mpmath.log(2))}[name]
    assert loss.log_at_zero == pytest.approx(np.log(at_zero), abs=1e-16)
    for samples in (1, 7, 1000):
        threshold = float(loss.log_separated(samples))
        assert threshold == pytest.approx(np.log(at_zero / samples), rel=1e-15, abs=1e-15)
        # The worst case: one margin at 0 and the others as large as can be.
        q = jnp.full(samples, 2000.0).at[0].set(0.0)
        assert float(loss.log_mean(q)) == pytest.approx(threshold, abs=1e-14)
        assert float(loss.log_mean(q.at[0].set(-1e-3))) > threshold
        assert float(loss.log_mean(q.at[0].set(1e-3))) < threshold


@losses
def test_float32_stays_float32(name):
    loss = LOSSES[name]()
    q = jnp.asarray([-80.0, -1.0, 0.0, 10.0, 20.0, 80.0], jnp.float32)
    for values, exact in zip((loss.log_value(q), loss.log_weight(q)), EXACT[name], strict=True):
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values, exactly(exact, np.asarray(q)), rtol=1e-6, atol=1e-7)
    assert loss.weights(q).dtype == loss.log_mean(q).dtype == loss.inverse(q).dtype == jnp.float32


def test_losses_are_public():
    assert isinstance(gf.Exponential(), gf.Loss) and isinstance(gf.Logistic(), gf.Loss)
