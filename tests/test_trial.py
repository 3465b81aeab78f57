"""One trial: its description, its draws, its verdict, and that it compiles once."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf
import gradflow.record
import gradflow.teacher
import gradflow.trial
from gradflow.distribution import Distribution, Histogram, TruncatedNormal, Uniform
from gradflow.flow import integrate
from gradflow.limit import LIMIT_STATUSES, LimitStatus
from gradflow.optimum import max_margin
from gradflow.outcome import STATUSES, Flow, Status
from gradflow.record import Record, Verdict, judge
from gradflow.theory import region_bound
from gradflow.trial import Trial

# Separates in well under a second; shared, for each new size compiles anew.
QUICK = Trial(neurons=2, switches=1, width=32, samples=20, max_steps=2000)
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
    others |= dict(loss="logistic", rtol=1e-7, atol=1e-7, max_steps=1)
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
        (dict(rtol=0.0), "rtol must be positive"),
        (dict(atol=-1e-9), "atol must not be negative"),
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
    assert STATUSES[int(found.status)] == "certified"
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
    assert flow.path is not None and 2 <= int(flow.path.count) <= 200


def test_record_against_plain_numpy(record, flow):
    teacher, data, _ = QUICK.draw(KEY)
    assert flow.limit is not None
    w, b, v = (np.asarray(a) for a in (flow.limit.network.w, flow.limit.network.b, flow.limit.network.v))

    def network(x):
        return np.maximum(np.outer(x, w) + b, 0) @ v

    x, y = np.asarray(data.x), np.asarray(data.y)
    assert record.training_accuracy == np.mean(y * network(x) > 0) == 1
    assert record.value == pytest.approx(0.5 * (w @ w + b @ b + v @ v))
    assert record.optimality == pytest.approx(float(gf.max_margin(data).value) / record.value)
    bends = np.unique(np.round(-b[v != 0] / w[v != 0], 9))
    assert record.regions == 1 + bends.size  # none of this limit's bends cancel
    assert record.pinned == sum(np.abs(x - bend).min() < 1e-9 for bend in bends)
    assert record.sample_switches == np.sum(np.diff(y[np.argsort(x)]) != 0)
    assert record.teacher_switches == 1
    # Midpoints of a grid: each sign change of either function misjudges one cell at most.
    fine = np.linspace(-1, 1, 200_001)
    fine = 0.5 * (fine[1:] + fine[:-1])
    wrong = np.sign(network(fine)) != np.asarray(teacher(fine))
    assert float(record.population_error) == pytest.approx(wrong.mean(), abs=(32 + 2) / 200_000)


def test_record_lists_what_it_should(record):
    types = {name: np.asarray(value).dtype.kind for name, value in zip(Record._fields, record, strict=True)}
    floats = {"training_accuracy", "population_error", "time", "log_time", "log_loss", "margin", "residual", "drift"}
    floats |= {"survivors", "entry_time", "entry_log_time", "value", "optimality", "kkt", "law", "rise", "fall"}
    assert {name for name, kind in types.items() if kind == "f"} == floats
    assert {name for name, kind in types.items() if kind == "b"} == {"separated", "optimum_proved"}


def test_status_names_are_complete():
    for names, kind in ((STATUSES, Status), (LIMIT_STATUSES, LimitStatus)):
        assert len(names) == len(kind) and all(hasattr(kind, name) for name in names)


# Verdicts, on flows made by hand

BOUND = region_bound(1)


# A limit on five points has 13 neurons: with r so small that they are few, and so large that they are many.
FEW, MANY = 13, 2


@pytest.mark.parametrize(
    "bound, status, limit, separated, verdicts",
    [
        (FEW, "certified", "certified", True, "holds holds holds holds"),
        (FEW, "certified", "certified_function", True, "holds holds holds holds"),
        (MANY, "certified", "certified", True, "holds fails fails holds"),
        # Without a certified limit nothing is decided about regions.
        (FEW, "uncertified", "not_settled", True, "holds unresolved unresolved unresolved"),
        (FEW, "uncertified", "not_unique", True, "holds unresolved unresolved unresolved"),
        (MANY, "step_limit", "not_stationary", True, "holds unresolved unresolved unresolved"),
        (FEW, "step_limit", "not_separated", False, "unresolved unresolved unresolved unresolved"),
        (FEW, "step_too_small", "not_separated", False, "unresolved unresolved unresolved unresolved"),
        (FEW, "non_finite", "not_separated", False, "unresolved unresolved unresolved unresolved"),
        (FEW, "running", "not_separated", False, "unresolved unresolved unresolved unresolved"),
        (FEW, "stalled", "not_separated", False, "fails unresolved fails fails"),
    ],
)
def test_verdicts(monkeypatch, flow, bound, status, limit, separated, verdicts):
    monkeypatch.setattr(gradflow.record, "region_bound", lambda _: bound)
    teacher, data, net = QUICK.draw(KEY)
    found = judge(
        2, QUICK.distribution, teacher, data, max_margin(data), net, made_by_hand(flow, status, limit, separated)
    )
    assert (STATUSES[int(found.status)], LIMIT_STATUSES[int(found.limit_status)]) == (status, limit)
    codes = (found.accuracy_verdict, found.regions_verdict, found.verdict, found.optimum_verdict)
    assert [Verdict(int(v)).name for v in codes] == verdicts.split()
    certified = limit.startswith("certified")
    assert bool(found.regions > 0) == certified and bool(np.isnan(found.optimality)) != certified


def test_a_limit_that_is_worse_than_the_best_fails_to_be_it(flow):
    teacher, data, net = QUICK.draw(KEY)
    worse = eqx.tree_at(lambda f: f.limit.value, flow, flow.limit.value * (1 + 1e-6))
    best = max_margin(data)
    assert judge(2, QUICK.distribution, teacher, data, best, net, worse).optimum_verdict == Verdict.fails
    assert judge(2, QUICK.distribution, teacher, data, best, net, flow).optimum_verdict == Verdict.holds


def made_by_hand(flow, status, limit, separated):
    end = (getattr(Status, status), getattr(LimitStatus, limit), jnp.asarray(separated))
    return eqx.tree_at(lambda f: (f.status, f.limit.status, f.separated), flow, end)


def test_region_bound():
    assert [region_bound(r) for r in (1, 3, 5)] == [99, 163, 227]


@pytest.mark.slow
def test_a_teacher_that_cannot_be_drawn_decides_nothing(monkeypatch):
    monkeypatch.setattr(gradflow.teacher, "_ATTEMPTS", 0)
    # A size of its own, so that no compiled draw is found or left behind.
    trial = dataclasses.replace(QUICK, samples=22, switches=None)
    teacher, _, net = trial.draw(KEY)
    # There is nothing to learn, and no number may look as if there was.
    assert np.isnan(teacher.net.w).all() and np.isnan(net.w).all()
    found = trial.run(KEY)
    assert STATUSES[int(found.status)] == "non_finite"
    assert found.verdict == found.accuracy_verdict == found.regions_verdict == Verdict.unresolved
    assert np.isnan(found.population_error) and found.regions == 0


# Compilation and precision


def test_new_numbers_do_not_retrace(monkeypatch):
    traces = []

    def counted(*args, **kwargs):
        traces.append(1)
        return integrate(*args, **kwargs)

    monkeypatch.setattr(gradflow.trial, "integrate", counted)
    trial = dataclasses.replace(QUICK, samples=21)  # a size that no other test traces
    changes = dict(rtol=1e-5, atol=1e-5, scale=1.5, min_run=0.2, max_steps=99)
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
    assert changed(scale=2.0).entry_time < record.entry_time
    assert changed(rtol=1e-4, atol=1e-4).steps < record.steps


def test_float32_is_refused_before_compiling(float32):
    for use in (QUICK.run, QUICK.flow, QUICK.draw):
        with pytest.raises(ValueError, match="needs float64"):
            use(jr.key(0))


def test_float32_distribution_is_taken_along(float32):
    single = Uniform(-1, 2)
    jax.config.update("jax_enable_x64", True)
    _, data, net = dataclasses.replace(QUICK, distribution=single).draw(jr.key(0))
    assert data.x.dtype == net.w.dtype == jnp.float64
