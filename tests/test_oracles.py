"""The table of oracles is itself tested: each closed form satisfies its own equation, by differentiation in mpmath."""

from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
from oracles import (
    ORACLES,
    ExactNetwork,
    OnePoint,
    aligned_neuron_log_time,
    ei_gap,
    exponential_log_weight,
    logistic_log_value,
    logistic_log_weight,
    normal_mass,
    orthogonal_square_value,
    switches_on_grid,
)


@pytest.fixture(autouse=True)
def thirty_digits():
    with mpmath.workdps(30):
        yield


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.name)
def test_oracle_satisfies_its_own_equation(oracle):
    assert abs(oracle.residual()) < mpmath.mpf(10) ** -18


def test_names_are_unique_and_sources_exist():
    names = [oracle.name for oracle in ORACLES]
    assert len(set(names)) == len(names)
    readme = (Path(__file__).parent / "README.md").read_text()
    for oracle in ORACLES:
        assert oracle.source.startswith("README.md, ")
        assert f"## {oracle.source.removeprefix('README.md, ')}" in readme


def test_a_wrong_closed_form_is_noticed():
    # The same check with the factor 2 of O1 forgotten.
    x, f = mpmath.mpf("0.7"), mpmath.mpf("1.3")
    velocity = mpmath.sqrt(1 + x**2) * mpmath.exp(-f) * f
    assert abs(mpmath.diff(mpmath.ei, f) * velocity - ei_gap(x, 1)) > 1


def test_one_aligned_neuron_in_numbers():
    assert float(ei_gap(0.7, 50)) == pytest.approx(122.0655561573, abs=5e-11)


def test_one_point_contains_one_aligned_neuron():
    x, v = 0.7, 0.1
    reach = float(np.hypot(1, x))
    flow = OnePoint(x, (v * x / reach,), (v / reach,), (v,))
    for s in (0.5, 2.0, 2.8):
        start, end = flow.margin(0), flow.margin(s)
        # The balance of these floats is off by their rounding.
        assert abs(flow.log_time(s, exponential_log_weight) - aligned_neuron_log_time(x, start, end)) < 1e-14


def test_one_point_follows_a_plain_euler_integration():
    """Euler in physical time, with nothing shared but the initial weights; the error falls with the step."""
    flow = OnePoint(0.7, (0.3, -0.2, 0.5, -1.0), (0.4, 0.9, -0.1, 0.2), (0.6, -0.5, -1.2, 0.8))
    for log_weight in (exponential_log_weight, logistic_log_weight):
        errors = []
        for steps in (4000, 8000):
            s = 0.9
            w, b, v = (np.array(a) for a in (flow.w, flow.b, flow.v))
            step = float(mpmath.exp(flow.log_time(s, log_weight))) / steps
            for _ in range(steps):
                inner = w * flow.x + b
                on = inner > 0
                force = step * np.exp(float(log_weight(mpmath.mpf(float(v @ np.maximum(inner, 0))))))
                w, b, v = w + force * v * on * flow.x, b + force * v * on, v + force * np.maximum(inner, 0)
            exact = np.array([[float(value) for value in part] for part in flow.weights(s)])
            errors.append(np.abs(np.array([w, b, v]) - exact).max())
        assert errors[0] < 2e-3
        # First order at least: the step in which a neuron dies may be luckier in one of the two.
        assert errors[1] < errors[0] / 1.6


def test_a_dying_neuron_freezes_at_zero_preactivation():
    flow = OnePoint(0.7, (0.5,), (-0.1,), (-1.2,))
    (death,) = flow.deaths()
    w, b, v = flow.weights(death)
    assert 0 < death < mpmath.inf
    assert abs(w[0] * flow.x + b[0]) < mpmath.mpf(10) ** -26
    assert flow.weights(death + 1) == (w, b, v)
    assert flow.margin(death + 1) == 0


def test_orthogonal_points_start_and_end_where_they_should():
    assert orthogonal_square_value(-0.5, 2.0, 0.01, 0) == mpmath.mpf(0.01)
    assert abs(orthogonal_square_value(-0.5, 2.0, 0.01, 100) - 2) < mpmath.mpf(10) ** -26
    assert orthogonal_square_value(2.0, -1.0, 0.01, 1) < 0


def test_exact_network_on_a_hand_made_case():
    """N = relu(x + 1) − relu(x) − 2 relu(x − 1) + 0 · relu(x − 5), and a pair at 3 whose bends cancel."""
    net = ExactNetwork.of([1, 1, 1, 1, 1, -2], [1, 0, -1, -5, -3, 6], [1, -1, -2, 0, 2, -1])
    assert net.knots() == [-1, 0, 1]
    assert net.regions() == 4
    # Left of 3 the last neuron adds −2 (3 − x): N(−∞) < 0, and N(0) = 1 − 6 < 0 as well.
    assert net(Fraction(0)) == -5
    plateau = ExactNetwork.of([-1, 1], [0, -2], [-1, 1])
    assert plateau.sign_changes() == [2]
    assert plateau.label_switches() == [0]
    touching = ExactNetwork.of([1, -1], [0, 0], [1, 1])
    assert touching.sign_changes() == [] == touching.label_switches()


def test_a_network_with_no_breakpoint():
    flat = ExactNetwork.of([0, 0], [1, 2], [3, -2])
    assert flat.regions() == 1 and flat(Fraction(7)) == -1 and flat.sign_changes() == []


def test_grid_search_finds_what_exists():
    # Four neurons do realise four switches, so the search is not blind.
    assert switches_on_grid(4, 6) > 0


def test_logistic_and_normal_far_out():
    assert abs(logistic_log_value(2000) + 2000) < mpmath.mpf(10) ** -26
    assert abs(normal_mass(-1, 1) - mpmath.erf(1 / mpmath.sqrt(2))) < mpmath.mpf(10) ** -27
    # Mills' ratio: the mass beyond z is φ(z)/z (1 − 1/z² + …).
    ratio = normal_mass(30, 90) * 30 / mpmath.npdf(30)
    assert 1 - mpmath.mpf(1) / 900 < ratio < 1 - mpmath.mpf(1) / 900 + 3 / mpmath.mpf(900) ** 2
