"""The limit, its certificate and the optimum, against conic solvers, closed forms and planted faults."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from oracles import best_value

import gradflow as gf
from gradflow.program import lower_bound


def draw(i):
    """Trial i of `benchmarks/exact_flow.py`."""
    teacher, sample, weights = jr.split(jr.fold_in(jr.key(2024), i), 3)
    data = gf.Teacher.random(teacher, 4, switches=4).sample(sample, 50)
    return gf.ReluNetwork.random(weights, 32), data


@pytest.fixture(scope="module")
def limits():
    """Trials 3, 5, 8 and 20 handed over at log loss −60 and −1000."""
    out = []
    for i in (3, 5, 8, 20):
        net, data = draw(i)
        flows = [gf.integrate(net, data, until=gf.Until(log_loss=log_loss)) for log_loss in (-60.0, -1000.0)]
        out.append((data, flows, [gf.limit(flow, data) for flow in flows]))
    return out


def test_handing_over_later_gives_the_same_certified_limit(limits):
    for data, flows, (early, late) in limits:
        assert late.check().certified
        assert float(late.value) <= 0.5 / float(flows[1].margin)
        assert float(jnp.min(data.margins(late.network))) == pytest.approx(1, abs=1e-12)
        if early.certified:
            assert float(early.value) == pytest.approx(float(late.value), rel=1e-9)
            assert early.regions == late.regions
    assert sum(bool(early.certified) for *_, (early, _) in limits) >= 3


def test_certificate_is_recomputed_from_the_limit_and_can_fail(limits):
    data, _, (_, limit) = limits[1]
    net, lam = limit.network, limit.multipliers
    assert gf.kkt_residual(net, data, lam) <= 1e-10
    first, support = int(jnp.argmax(jnp.abs(net.v))), int(jnp.argmax(lam))
    # A neuron, a multiplier, a facing and an unbalanced pair, each wrong by little.
    faults = (
        (gf.ReluNetwork(net.w.at[first].multiply(1 + 1e-6), net.b, net.v), lam),
        (net, lam.at[support].multiply(1 + 1e-6)),
        (gf.ReluNetwork(net.w.at[first].multiply(2), net.b.at[first].multiply(2), net.v.at[first].divide(2)), lam),
        (net, lam.at[int(jnp.argmin(lam))].set(-1e-6 * jnp.sum(lam))),
        (gf.ReluNetwork(net.w, net.b, -net.v), lam),
    )
    for wrong, multipliers in faults:
        assert gf.kkt_residual(wrong, data, multipliers) > 1e-9


def test_limit_is_no_better_than_the_optimum_which_meets_its_bound(limits):
    for data, _, (_, limit) in limits:
        best = gf.max_margin(data)
        assert best.proved
        assert float(limit.value) >= float(best.value) * (1 - 1e-10)
        if int(data.switches) >= 3:
            assert float(best.value) == pytest.approx(best_value(data.x, data.y), rel=1e-12)


def test_multipliers_sum_to_the_value_and_regions_do_not_hang_on_the_merge_tolerance(limits):
    for _, _, (_, limit) in limits:
        assert float(jnp.sum(limit.multipliers)) == pytest.approx(float(limit.value), rel=1e-9)
        counts = {int(gf.linear_regions(limit.network, merge=m)) for m in (1e-11, 1e-10, 1e-9, 1e-8, 1e-7)}
        assert counts == {int(limit.regions)}


def test_a_flow_that_has_not_separated_has_no_limit():
    net, data = draw(5)
    limit = gf.limit(gf.integrate(net, data, until=gf.Until(time=0.1)), data)
    assert limit.status == gf.LimitStatus.not_separated and not limit.certified
    with pytest.raises(RuntimeError, match="not classified"):
        limit.check()


# One switch: a neuron for each side with its breakpoint on the other point (or along x̃, if that is cheaper).
@pytest.mark.parametrize(
    ("x", "y", "value"),
    [
        ([0.2], [1], 1 / np.hypot(1, 0.2)),
        ([-0.5, 0.5], [1, 1], 1.0),
        ([-0.1, 0.3], [-1, 1], (np.hypot(1, 0.1) + np.hypot(1, 0.3)) / 0.4),
        ([-2.0, 3.0], [-1, 1], 1 / np.hypot(1, 2) + 1 / np.hypot(1, 3)),
        ([-0.9, -0.1, 0.3, 0.8], [-1, -1, 1, 1], (np.hypot(1, 0.1) + np.hypot(1, 0.3)) / 0.4),
        ([-0.1, -0.1, 0.3, 0.3], [-1, -1, 1, 1], (np.hypot(1, 0.1) + np.hypot(1, 0.3)) / 0.4),
    ],
)
def test_optimum_of_small_problems_in_closed_form(x, y, value):
    best = gf.max_margin(gf.Dataset(np.array(x), np.array(y)))
    assert best.proved
    assert float(best.value) == pytest.approx(value, rel=1e-9)


def test_two_switches_cost_more_than_the_formula_with_a_free_line():
    data = gf.Dataset(np.array([-0.5, -0.2, 0.3, 0.7]), np.array([-1, 1, 1, -1]))
    best = gf.max_margin(data)
    assert best.proved and float(best.value) > best_value(data.x, data.y) * 1.001


def test_optimum_by_vmap():
    datas = [draw(i)[1] for i in (0, 2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *datas)
    values = jax.vmap(lambda data: gf.max_margin(data).value)(stacked)
    np.testing.assert_allclose(values, [gf.max_margin(data).value for data in datas], rtol=1e-9)


def test_any_multipliers_give_a_lower_bound():
    data = gf.Dataset(np.array([-0.5, -0.2, 0.3, 0.7]), np.array([-1, 1, 1, -1]))
    value = float(gf.max_margin(data).value)
    for lam in jr.normal(jr.key(0), (50, 4)):
        assert float(lower_bound(data.x, data.y, lam)) < value
