"""One trial: its description, its draws, its verdict, and that it compiles once."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow.teacher
import gradflow.trial
from gradflow.data import Dataset
from gradflow.distribution import Distribution, Histogram, TruncatedNormal, Uniform
from gradflow.flow import Flow, Status, integrate
from gradflow.network import ReluNetwork
from gradflow.piecewise import linear_regions
from gradflow.teacher import Teacher
from gradflow.trial import STATUSES, Record, Trial, Verdict, judge, region_bound

# Separates in well under a second; shared, for each new size compiles anew.
QUICK = Trial(neurons=2, switches=1, width=32, samples=20, log_loss=-5, max_steps=2000)
KEY = jr.key(3)


@pytest.fixture
def float32():
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


# The description


@pytest.mark.parametrize(
    "trial",
    [
        Trial(),
        QUICK,
        Trial(switches=None, min_run=0.1, scale=0.1 + 0.2, rtol=1 / 3, scheme="sphere", loss="logistic"),
        Trial(distribution=TruncatedNormal(0.1, 1 / 3, -1, 2)),
        # These masses do not survive being normalised twice: the last digit moves.
        Trial(distribution=Histogram(list(range(7)), list(range(1, 7)))),
        Trial(neurons=np.int64(3), switches=np.int32(2), scale=np.float64(2)),
    ],
)
def test_json_round_trip_is_exact(trial):
    text = trial.to_json()
    again = Trial.from_json(text)
    assert again == trial and hash(again) == hash(trial)
    assert again.to_json() == text
    for a, b in zip(jax.tree.leaves(again.distribution), jax.tree.leaves(trial.distribution), strict=True):
        np.testing.assert_array_equal(a, b)


def test_trials_differ_by_any_field():
    others = dict(
        neurons=5, width=65, samples=101, switches=2, min_run=0.06, distribution=Uniform(-1, 2), scheme="he", scale=2.0
    )
    others |= dict(loss="logistic", log_loss=-11.0, merge=0.02, drop=0.02, rtol=1e-7, atol=1e-7, max_steps=1)
    assert others.keys() == {field.name for field in dataclasses.fields(Trial)}
    for name, value in others.items():
        assert dataclasses.replace(Trial(), **{name: value}) != Trial(), name
    assert Trial() != Trial().to_json()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(neurons=0), "neurons must be at least 1"),
        (dict(neurons=2.0), "neurons must be a whole number"),
        (dict(neurons=True), "neurons must be a whole number"),
        (dict(width=0), "width must be at least 1"),
        (dict(width="64"), "width must be a whole number"),
        (dict(samples=0), "samples must be at least 1"),
        (dict(max_steps=0), "max_steps must be at least 1"),
        (dict(max_steps=2**31), "max_steps must be"),
        (dict(switches=-1), "switches must be at least 0"),
        (dict(switches=6), "0 to 5 label switches"),
        (dict(neurons=3, switches=3), "0 to 2 label switches"),
        (dict(switches=1.5), "switches must be a whole number"),
        (dict(min_run=-0.1), "min_run"),
        (dict(min_run=0.25), "lower min_run"),
        (dict(switches=None, min_run=1.0), "lower min_run"),
        (dict(min_run=float("nan")), "min_run must be finite"),
        (dict(distribution="uniform"), "can record only"),
        (dict(scheme="xavier"), "unknown scheme 'xavier'"),
        (dict(loss="hinge"), "unknown loss 'hinge'"),
        (dict(scale=0.0), "scale must be positive"),
        (dict(scale=float("inf")), "scale must be finite"),
        (dict(scale="big"), "scale must be a number"),
        (dict(log_loss=-3.9), "can prove that 50 points"),
        (dict(loss="logistic", log_loss=-4.2), "can prove that 50 points"),
        (dict(log_loss=-float("inf")), "log_loss must be finite"),
        (dict(merge=-0.01), "merge must be at least 0"),
        (dict(drop=-0.01), "drop in"),
        (dict(drop=1.0), "drop in"),
        (dict(rtol=0.0), "rtol must be positive"),
        (dict(atol=-1e-9), "atol must be positive"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Trial(**change)


def test_unknown_distributions_are_refused():
    class Point(Uniform):
        pass

    assert issubclass(Point, Distribution)
    with pytest.raises(ValueError, match="can record only the distributions Uniform"):
        Trial(distribution=Point())


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda content: content.pop("width"), "lacks width"),
        (lambda content: content.update(depth=2), "has unknown depth"),
        (lambda content: content.update(width=0), "width must be at least 1"),
        (lambda content: content.update(distribution="uniform"), "a distribution needs a law"),
        (lambda content: content.update(distribution={"law": "cauchy"}), "one of uniform"),
        (lambda content: content["distribution"].pop("low"), "a uniform distribution needs low, high"),
        (lambda content: content["distribution"].update(low=2.0), "finite low < high"),
    ],
)
def test_wrong_json_is_refused(edit, message):
    content = json.loads(Trial().to_json())
    edit(content)
    with pytest.raises(ValueError, match=message):
        Trial.from_json(json.dumps(content))


@pytest.mark.parametrize("text, message", [("{", "must be JSON"), ("[1]", "must be a JSON object")])
def test_text_that_is_no_trial_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Trial.from_json(text)


# Draws


def test_draw_is_what_the_trial_says():
    trial = Trial(neurons=4, width=16, samples=50, switches=5, min_run=0.1, scale=0.5)
    teacher, data, net = trial.draw(jr.key(3))
    assert teacher.net.width == 4 and data.samples == 50 and net.width == 16
    cuts = np.asarray(teacher.switches)
    assert cuts.shape == (5,)
    assert np.diff(np.concatenate([[-1], cuts, [1]])).min() >= 2 * 0.1 - 1e-12
    np.testing.assert_array_equal(teacher(data.x), data.y)
    np.testing.assert_allclose(net.balance, 0, atol=1e-12)


def test_draw_depends_on_the_key_only():
    keys = jr.split(jr.key(1), 3)
    together = jax.vmap(lambda key: QUICK.draw(key)[1:])(keys)
    for i, key in enumerate(keys):
        alone = QUICK.draw(key)[1:]
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-12)
    first, second = (QUICK.draw(key)[1].x for key in keys[:2])
    assert not np.isclose(first, second).any()


# The record


@pytest.fixture(scope="module")
def record() -> Record:
    """The record of a trial that separates."""
    found = QUICK.run(KEY)
    assert STATUSES[int(found.status)] == "reached"
    return found


@pytest.fixture(scope="module")
def flow() -> Flow:
    """The same trial as a flow."""
    return QUICK.flow(KEY, save=200)  # as many as a replay takes, so that one compilation serves both


def test_run_agrees_with_flow(record, flow):
    for name in ("time", "log_time", "log_loss", "margin", "residual"):
        np.testing.assert_allclose(getattr(record, name), getattr(flow, name), rtol=1e-5, err_msg=name)
    assert bool(record.separated) and bool(flow.separated)
    assert getattr(Status, STATUSES[int(record.status)]) == flow.status
    # The two are compiled apart and round differently, which may cost or save a step.
    assert abs(int(record.steps) - int(flow.steps)) <= 2
    assert float(record.log_loss) <= QUICK.log_loss
    assert flow.path is not None and 2 <= int(flow.path.count) <= 200


def test_record_against_plain_numpy(record, flow):
    teacher, data, _ = QUICK.draw(KEY)
    w, b, v = (np.asarray(a) for a in (flow.final.w, flow.final.b, flow.final.v))

    def network(x):
        return np.maximum(np.outer(x, w) + b, 0) @ v

    x, y = np.asarray(data.x), np.asarray(data.y)
    assert record.training_accuracy == np.mean(y * network(x) > 0) == 1
    assert record.sample_switches == np.sum(np.diff(y[np.argsort(x)]) != 0)
    assert record.switches == 1
    # Midpoints of a grid: each sign change of either function misjudges one cell at most.
    fine = np.linspace(-1, 1, 200_001)
    fine = 0.5 * (fine[1:] + fine[:-1])
    wrong = np.sign(network(fine)) != np.asarray(teacher(fine))
    assert float(record.population_error) == pytest.approx(wrong.mean(), abs=(32 + 2) / 200_000)
    steps = [10**-0.5, 1.0, 10**0.5]
    counts = [[int(linear_regions(flow.final, 0.02 * f, 0.01 * g)) for g in steps] for f in steps]
    assert (record.regions_low, record.regions, record.regions_high) == (np.min(counts), counts[1][1], np.max(counts))


def test_record_lists_what_it_should(record):
    types = {name: np.asarray(value).dtype.kind for name, value in zip(Record._fields, record, strict=True)}
    floats = {"training_accuracy", "population_error", "time", "log_time", "log_loss", "margin", "residual", "drift"}
    assert {name for name, kind in types.items() if kind == "f"} == floats
    assert {name for name, kind in types.items() if kind == "b"} == {"separated"}


def test_status_names_are_complete():
    assert len(STATUSES) == len(Status)
    assert all(getattr(Status, name) == getattr(Status, name) for name in STATUSES)


# Verdicts, on flows made by hand

BOUND = region_bound(1)


def comb_network(large, small=0, share=0.0):
    """A network of 120 neurons with evenly spaced knots: `large` slope changes ±1 and `small` ones of ±`share`."""
    count = large + small
    size = jnp.ones(count).at[jnp.arange(small) * 2].set(share)
    size = size * jnp.where(jnp.arange(count) % 4 < 2, 1.0, -1.0)
    # Neurons with w = 0 bend nothing; they keep all networks of one shape.
    rest = jnp.zeros(120 - count)
    w = jnp.concatenate([jnp.ones(count), rest])
    return ReluNetwork(w, jnp.concatenate([-jnp.linspace(-1, 1, count), rest]), jnp.concatenate([size, rest]))


FEW, MANY = comb_network(BOUND - 20), comb_network(BOUND + 20)
# 60 knots that always count and 60 that count with the smaller drop only: 61 regions or 121, and the bound is 99.
UNCLEAR = comb_network(60, 60, share=0.02)
NETS = {
    "few": (FEW, (BOUND - 19,) * 3),
    "many": (MANY, (BOUND + 21,) * 3),
    "unclear": (UNCLEAR, (61, 61, 121)),
}


@pytest.mark.parametrize(
    "net, status, separated, accuracy, regions, verdict",
    [
        ("few", "reached", True, "holds", "holds", "holds"),
        ("few", "certified", True, "holds", "holds", "holds"),
        ("many", "reached", True, "holds", "fails", "fails"),
        ("unclear", "reached", True, "holds", "unresolved", "unresolved"),
        # A run that was cut off decides nothing about regions, however few or many it has so far.
        ("few", "step_limit", True, "holds", "unresolved", "unresolved"),
        ("many", "step_limit", True, "holds", "unresolved", "unresolved"),
        ("few", "step_limit", False, "unresolved", "unresolved", "unresolved"),
        ("few", "step_too_small", False, "unresolved", "unresolved", "unresolved"),
        ("few", "non_finite", False, "unresolved", "unresolved", "unresolved"),
        ("few", "running", False, "unresolved", "unresolved", "unresolved"),
        ("few", "stalled", False, "fails", "unresolved", "fails"),
    ],
)
def test_verdicts(flow, net, status, separated, accuracy, regions, verdict):
    # Σ|c| of `unclear` is 61.2 and its small changes are 3.3e-4 of that: above this drop's smallest variant only.
    trial = Trial(neurons=1, switches=0, width=120, samples=5, log_loss=-5, merge=1e-4, drop=0.0005)
    teacher = Teacher(ReluNetwork([1.0], [2.0], [1.0]))
    data = Dataset([-1.0, -0.5, 0.0, 0.5, 1.0], [1.0] * 5)
    net, counts = NETS[net]
    found = judged(trial.sizes, trial.values, teacher, data, made_by_hand(flow, net, status, separated))
    assert STATUSES[int(found.status)] == status
    named = [Verdict(int(v)).name for v in (found.accuracy_verdict, found.regions_verdict, found.verdict)]
    assert named == [accuracy, regions, verdict]
    assert (found.regions_low, found.regions, found.regions_high) == counts


judged = eqx.filter_jit(judge)


def made_by_hand(flow, net, status, separated):
    end = (net, getattr(Status, status), jnp.asarray(separated))
    return eqx.tree_at(lambda f: (f.final, f.status, f.separated), flow, end)


def test_region_bound():
    assert [region_bound(r) for r in (1, 3, 5)] == [99, 163, 227]


def test_a_teacher_that_cannot_be_drawn_decides_nothing(monkeypatch, flow):
    monkeypatch.setattr(gradflow.teacher, "_ATTEMPTS", 0)
    # A size of its own, so that no compiled draw is found or left behind.
    trial = dataclasses.replace(QUICK, samples=22, switches=None)
    teacher, data, net = trial.draw(KEY)
    # There is nothing to learn, and no number may look as if there was.
    assert np.isnan(teacher.net.w).all() and np.isnan(net.w).all()
    found = judged(trial.sizes, trial.values, teacher, data, made_by_hand(flow, net, "non_finite", False))
    assert found.verdict == found.accuracy_verdict == found.regions_verdict == Verdict.unresolved
    assert np.isnan(found.population_error)
    assert found.regions == found.regions_low == found.regions_high == 0


# Compilation and precision


def test_new_numbers_do_not_retrace(monkeypatch):
    traces = []

    def counted(*args, **kwargs):
        traces.append(1)
        return integrate(*args, **kwargs)

    monkeypatch.setattr(gradflow.trial, "integrate", counted)
    trial = dataclasses.replace(QUICK, samples=21)  # a size that no other test traces
    changes = dict(rtol=1e-5, atol=1e-5, log_loss=-4.0, scale=1.5, min_run=0.2, merge=0.1, drop=0.1, max_steps=99)
    # Shapes only: tracing is what is counted, and compiling would take long.
    jax.eval_shape(trial.run, KEY)
    for name, value in changes.items():
        jax.eval_shape(dataclasses.replace(trial, **{name: value}).run, KEY)
    jax.eval_shape(dataclasses.replace(trial, distribution=Uniform(0, 3)).run, jr.key(1))
    assert len(traces) == 1
    # The count can fail: a new size does trace anew.
    jax.eval_shape(dataclasses.replace(trial, width=31).run, KEY)
    assert len(traces) == 2


def test_no_number_is_ignored(record):
    def changed(**change):
        return dataclasses.replace(QUICK, **change).run(KEY)

    stopped = changed(max_steps=5)
    assert int(stopped.steps) + int(stopped.rejected) == 5 and STATUSES[int(stopped.status)] == "step_limit"
    assert changed(log_loss=-4).time < record.time
    assert changed(scale=2.0).time < record.time
    assert changed(rtol=1e-4, atol=1e-4).steps < record.steps
    assert changed(merge=1.0).regions < record.regions
    assert changed(drop=0.2).regions < record.regions


def test_float32_refuses_deep_training_before_compiling(float32):
    deep = Trial(log_loss=-100)
    for use in (deep.run, deep.flow, deep.draw):
        with pytest.raises(ValueError, match="needs float64"):
            use(jr.key(0))
    assert Trial(log_loss=-50).values.scale.dtype == jnp.float32


def test_float32_distribution_is_taken_along(float32):
    single = Uniform(-1, 2)
    jax.config.update("jax_enable_x64", True)
    _, data, net = dataclasses.replace(QUICK, distribution=single).draw(jr.key(0))
    assert data.x.dtype == net.w.dtype == jnp.float64
