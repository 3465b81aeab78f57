"""Teachers: how many switches, where, and how often a network disagrees with one."""

from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from oracles import ExactNetwork, exact_error, switches_on_grid
from scipy import stats

import gradflow as gf

FALSE_ALARM = 1e-6


@eqx.filter_jit
def draw(keys, neurons, switches=None, min_run=0.0, law=None):
    """One teacher per key; `min_run` is an array where one compilation is to serve several."""
    return jax.vmap(lambda key: gf.Teacher.random(key, neurons, switches=switches, min_run=min_run, distribution=law))(
        keys
    )


switches_of = eqx.filter_jit(jax.vmap(lambda teacher: teacher.switches))
error_of = eqx.filter_jit(gf.population_error)


def exact(net):
    return ExactNetwork.of(net.w, net.b, net.v)


def each(batch):
    """The members of a batch of networks or teachers, on the host."""
    batch = jax.tree.map(np.asarray, batch)
    return [jax.tree.map(lambda a, i=i: a[i], batch) for i in range(len(jax.tree.leaves(batch)[0]))]


def exact_switches(teacher):
    """Label switches of the very floats in hand, in rational arithmetic, independent of gradflow's root finding."""
    return np.array([float(position) for position in exact(teacher.net).label_switches()])


# --- How many ---------------------------------------------------------------------------------------------------------


def test_the_formula():
    assert [gf.max_switches(r) for r in range(1, 11)] == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="at least one neuron, got 0"):
        gf.max_switches(0)


@pytest.mark.parametrize("neurons, points", [(1, 12), (2, 10), (3, 8)])
def test_three_neurons_never_realise_three_switches(neurons, points):
    """Every placement of breakpoints and test positions on a grid, every facing, and all output weights at once.

    Eight points hold every order that three breakpoints and four test positions can stand in.
    """
    assert switches_on_grid(neurons, points) == 0


@pytest.mark.parametrize(
    "neurons, switches",
    [
        pytest.param(r, m, marks=() if r <= 4 or m >= 11 or (r, m) == (5, 5) else pytest.mark.slow)
        for r in range(1, 11)
        for m in range(gf.max_switches(r) + 1)
    ],
)
def test_every_number_of_switches_up_to_the_maximum_at_prescribed_places(neurons, switches):
    """With bins of equal mass and runs as long as can be, the switches are the inner edges of the histogram."""
    rng = np.random.default_rng(neurons)
    runs = switches + 1
    min_run = jnp.asarray((1 - 1e-10) / runs)
    # The last two supports are shifted and scaled; gaps differ by up to a factor of nine.
    for low, width in ((-1.0, 2.0), (0.0, 1.0), (30.0, 4.0), (-2e-3, 1e-3)):
        gaps = rng.uniform(0.25, 2.25, runs)
        edges = low + width * np.concatenate([[0.0], np.cumsum(gaps)]) / gaps.sum()
        law = gf.Histogram(edges, np.ones(runs))
        (teacher,) = each(draw(jr.split(jr.key(0), 1), neurons, switches, min_run, law))
        w, b, v = teacher.net.w, teacher.net.b, teacher.net.v
        assert w.shape == (neurons,) and np.isfinite(np.concatenate([w, b, v])).all()
        found = exact_switches(teacher)
        assert len(found) == switches
        np.testing.assert_allclose(found, edges[1:-1], rtol=0, atol=1e-9 * (abs(low) + width))
        # Balanced neurons, none of them dead.
        np.testing.assert_allclose(np.hypot(w, b), np.abs(v), rtol=1e-12)
        assert (v != 0).all()


LAWS = {
    "uniform": gf.Uniform(2.0, 5.0),
    "truncated normal": gf.TruncatedNormal(0.3, 0.2, -0.2, 1.0),
    "histogram": gf.Histogram([-1.0, -0.5, 2.0, 3.0], [3.0, 0.0, 1.0]),
}


@pytest.mark.parametrize("law, neurons, switches", [(LAWS["uniform"], 6, 3), (LAWS["truncated normal"], 4, 5)])
def test_random_switches_under_other_laws(law, neurons, switches):
    """Exactly as many as asked for, all inside the support."""
    teachers = draw(jr.split(jr.key(2), 40), neurons, switches, law=law)
    low, high = (float(end) for end in law.support)
    found = np.array([exact_switches(teacher) for teacher in each(teachers)])
    assert found.shape == (40, switches) and (found > low).all() and (found < high).all()
    ours = np.asarray(switches_of(teachers))
    assert ours.shape == (40, 2 * neurons + 1) and np.isinf(ours[:, switches:]).all()
    np.testing.assert_allclose(ours[:, :switches], found, rtol=1e-9, atol=1e-9)


def test_positions_are_draws_from_the_law_and_both_labels_come_first():
    """Kolmogorov-Smirnov and a sign test, each at FALSE_ALARM."""
    law = LAWS["truncated normal"]
    teachers = each(draw(jr.split(jr.key(2), 400), 2, 1, law=law))
    places = np.ravel([exact_switches(teacher) for teacher in teachers])
    assert stats.kstest(places, lambda x: np.asarray(law.cdf(jnp.asarray(x)))).pvalue > FALSE_ALARM
    first = sum(exact(teacher.net)(Fraction(-1000)) > 0 for teacher in teachers)
    assert stats.binomtest(first, 400).pvalue > FALSE_ALARM


# --- Runs and impossible requests ------------------------------------------------------------------------------------


def shortest_runs(teachers, law):
    """The least probability of a label run inside the support, per teacher."""
    low, high = (float(end) for end in law.support)
    shortest = []
    for teacher in each(teachers):
        switches = exact_switches(teacher)
        inside = switches[(switches > low) & (switches < high)]
        padded = np.concatenate([inside, np.full(16 - len(inside), high)])
        runs = np.diff(np.concatenate([[0.0], law.cdf(jnp.asarray(padded)), [1.0]]))
        shortest.append(runs[: len(inside) + 1].min())
    return np.array(shortest)


def test_min_run_is_honoured_with_prescribed_switches():
    law = LAWS["truncated normal"]
    shortest = shortest_runs(draw(jr.split(jr.key(9), 30), 5, 4, 0.15, law), law)
    assert shortest.min() >= 0.15 - 1e-9
    # Room is left over: the runs are not all as short as can be.
    assert shortest.max() > 0.16


def test_min_run_is_honoured_by_rejection():
    law, keys = gf.Uniform(3.0, 7.0), jr.split(jr.key(4), 60)
    teachers = [draw(keys, 4, None, jnp.asarray(min_run), law) for min_run in (0.0, 0.2)]
    free, kept = (shortest_runs(some, law) for some in teachers)
    assert (free < 0.2).any() and (kept >= 0.2 - 1e-12).all()
    # A draw that meets the condition at once is left as it is.
    same = free >= 0.2
    assert same.any()
    np.testing.assert_array_equal(*(np.asarray(some.net.w)[same] for some in teachers))


def test_a_teacher_that_cannot_be_found_says_so():
    """No run of probability above 1 exists; inside jit, where `min_run` is a tracer, only NaN can say so."""
    teachers = draw(jr.split(jr.key(4), 60), 4, None, jnp.asarray(1.5), gf.Uniform(3.0, 7.0))
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(teachers))
    failed = gf.Teacher(gf.ReluNetwork(*np.full((3, 2), np.nan)))
    assert np.isnan(failed(0.5)) and np.isnan(failed.switches).all()
    assert np.isnan(error_of(gf.ReluNetwork([1.0], [0.0], [1.0]), failed, gf.Uniform()))
    assert np.isnan(error_of(failed.net, STEP, gf.Uniform()))
    with pytest.raises(ValueError, match="labels must be"):
        failed.sample(jr.key(0), 3)


def test_a_number_that_jit_only_closes_over_is_checked_too():
    some, much = jnp.asarray(0.1), jnp.asarray(0.6)
    teacher = eqx.filter_jit(lambda key: gf.Teacher.random(key, 2, switches=1, min_run=some))(jr.key(0))
    assert teacher.switches.size == 1
    with pytest.raises(ValueError, match="lower min_run"):
        jax.eval_shape(lambda key: gf.Teacher.random(key, 2, switches=1, min_run=much), jr.key(0))


@pytest.mark.parametrize(
    "request_, message",
    [
        (dict(neurons=3, switches=3), "3 neurons can realise 0 to 2 label switches, not 3"),
        (dict(neurons=4, switches=6), "4 neurons can realise 0 to 5 label switches, not 6"),
        (dict(neurons=4, switches=-1), "0 to 5 label switches, not -1"),
        (dict(neurons=0), "at least one neuron"),
        (dict(neurons=4, switches=3, min_run=0.25), r"4 label run\(s\) cannot each have probability 0.25"),
        (dict(neurons=4, min_run=1.0), r"1 label run\(s\) cannot each have probability 1.0"),
        (dict(neurons=4, min_run=-0.1), "cannot each have probability -0.1"),
    ],
)
def test_impossible_requests_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        gf.Teacher.random(jr.key(0), **request_)


# --- Labels -----------------------------------------------------------------------------------------------------------


def test_the_label_at_zero_is_plus_one():
    teacher = gf.Teacher(gf.ReluNetwork([1.0], [0.0], [-1.0]))
    np.testing.assert_array_equal(teacher([-1.0, 0.0, 1e-300, 1.0]), [1, 1, -1, -1])
    np.testing.assert_array_equal(teacher.switches, [0.0])
    assert teacher(0.5).shape == () and teacher(jnp.ones((2, 3))).shape == (2, 3)


@pytest.mark.parametrize(
    "w, b, v, switches",
    [
        # −relu(−x) + relu(x − 2): negative, then 0 (hence +1), then positive.
        ([-1, 1], [0, -2], [-1, 1], [0]),
        # The other way round: 0 is +1 until the negative part begins.
        ([-1, 1], [0, -2], [1, -1], [2]),
        # Touching 0 from below at a point is no switch; from above neither.
        ([-1, 1], [0, 0], [-1, -1], []),
        ([-1, 1], [0, 0], [1, 1], []),
        # 0 everywhere.
        ([1.0], [1.0], [0.0], []),
        ([0.0], [1.0], [-1.0], []),
    ],
)
def test_switches_by_hand(w, b, v, switches):
    teacher = gf.Teacher(gf.ReluNetwork(np.asarray(w, float), np.asarray(b, float), np.asarray(v, float)))
    np.testing.assert_array_equal(teacher.switches, switches)
    np.testing.assert_array_equal(exact_switches(teacher), switches)


def test_switches_of_random_dyadic_networks_exactly():
    rng = np.random.default_rng(5)
    w = rng.choice([-2.0, -1.0, 0.0, 1.0, 2.0, 4.0], (400, 5))
    b, v = rng.integers(-4, 5, (400, 5)) / 2, rng.integers(-2, 3, (400, 5)).astype(float)
    found = eqx.filter_jit(jax.vmap(lambda w, b, v: gf.Teacher(gf.ReluNetwork(w, b, v)).switches))(w, b, v)
    assert found.shape == (400, 11)
    for i in range(400):
        expected = [float(z) for z in ExactNetwork.of(w[i], b[i], v[i]).label_switches()]
        np.testing.assert_allclose(found[i][np.isfinite(found[i])], expected, rtol=1e-13, atol=1e-13)


def test_switches_agree_with_dense_labels():
    """On a grid of step 1e-4; two switches within one step would hide each other, and these keys have none."""
    teachers = draw(jr.split(jr.key(0), 12), 6)
    x = np.linspace(-20, 20, 400_001)
    total = 0
    for teacher, switches in zip(each(teachers), np.asarray(switches_of(teachers)), strict=True):
        w, b, v = (np.asarray(a)[:, None] for a in jax.tree.leaves(teacher))
        positive = (v * np.maximum(w * x + b, 0)).sum(axis=0) >= 0
        seen = 0.5 * (x[1:] + x[:-1])[positive[1:] != positive[:-1]]
        inside = switches[np.abs(switches) < 20]
        assert len(inside) == len(seen)
        np.testing.assert_allclose(inside, seen, rtol=0, atol=0.51e-4)
        total += len(seen)
    assert total > 4


def test_samples_are_labelled_and_nested():
    teacher = gf.Teacher(gf.ReluNetwork([1.0, -2.0], [0.25, 0.5], [1.0, -1.0]))
    law = gf.TruncatedNormal()
    data, fewer = teacher.sample(jr.key(2), 9, law), teacher.sample(jr.key(2), 5, law)
    np.testing.assert_array_equal(data.y, teacher(data.x))
    np.testing.assert_array_equal(data.x[:5], fewer.x)
    np.testing.assert_array_equal(data.x, law.sample(jr.key(2), 9))
    assert (jnp.abs(teacher.sample(jr.key(3), 50).x) <= 1).all()
    with pytest.raises(ValueError, match="samples must be a whole number of at least 1, got 0"):
        teacher.sample(jr.key(0), 0)


# --- Population error -------------------------------------------------------------------------------------------------


STEP = gf.Teacher(gf.ReluNetwork([1.0, -1.0], [-0.25, 0.25], [1.0, -1.0]))  # labels sign(x − ¼)


@pytest.mark.parametrize(
    "w, b, v, error",
    [
        # relu(x): 0, hence wrong, on (−1, 0), wrong sign on (0, ¼).
        ([1], [0], [1], 5 / 8),
        # The label itself, its negative, and nothing at all.
        ([1, -1], [-0.25, 0.25], [1, -1], 0),
        ([1, -1], [-0.25, 0.25], [-1, 1], 1),
        ([0], [1], [0], 1),
        # Always +1: wrong on (−1, ¼).
        ([0], [1], [1], 5 / 8),
        # A switch at ½ instead of ¼.
        ([1, -1], [-0.5, 0.5], [1, -1], 1 / 8),
        # The gap [0, ½] on which N vanishes is wrong on both sides of ¼.
        ([-1, 1], [0, -0.5], [-1, 1], 1 / 4),
    ],
)
def test_population_error_by_hand(w, b, v, error):
    net = gf.ReluNetwork(np.asarray(w, float), np.asarray(b, float), np.asarray(v, float))
    assert float(gf.population_error(net, STEP, gf.Uniform())) == pytest.approx(error, abs=1e-15)


def pairs(count, law):
    """Students and teachers that disagree somewhere on the support of `law`."""
    low, high = (float(end) for end in law.support)
    centre, half = 0.5 * (low + high), 0.5 * (high - low)

    def draw(rng, neurons):
        w, b, v = rng.standard_normal((3, neurons))
        return gf.ReluNetwork(w / half, b - w * centre / half, v)

    for seed in range(count):
        rng = np.random.default_rng(seed)
        yield draw(rng, 7), gf.Teacher(draw(rng, 5))


@pytest.mark.parametrize("law", [LAWS["uniform"], LAWS["histogram"]], ids=["uniform", "histogram"])
def test_population_error_exactly(law):
    uniform = isinstance(law, gf.Uniform)
    edges = np.asarray(law.support if uniform else law.edges).tolist()
    masses = [1] if uniform else [Fraction(3), Fraction(0), Fraction(1)]
    seen = set()
    for student, teacher in pairs(12, law):
        error = float(error_of(student, teacher, law))
        assert error == pytest.approx(float(exact_error(exact(student), exact(teacher.net), edges, masses)), abs=1e-12)
        seen.add(error)
    assert len(seen) > 5


def test_population_error_against_quadrature():
    """The midpoint rule with 400 000 cells: each sign change of either network costs at most one cell."""
    law = LAWS["truncated normal"]
    cells = 400_000
    edges = np.linspace(*(float(end) for end in law.support), cells + 1)
    masses = np.diff(np.asarray(law.cdf(jnp.asarray(edges))))
    x = 0.5 * (edges[1:] + edges[:-1])
    for student, teacher in pairs(3, law):
        wrong = np.sign(np.asarray(student(x))) != np.asarray(teacher(x))
        error = float(error_of(student, teacher, law))
        assert error == pytest.approx(masses[wrong].sum(), abs=14 * masses.max())


def test_population_error_has_the_symmetries_it_must_have():
    law = gf.TruncatedNormal(0.2, 0.6, -1.0, 1.0)
    mirrored = gf.TruncatedNormal(-0.2, 0.6, -1.0, 1.0)

    def flip(net):
        return gf.ReluNetwork(-net.w, net.b, net.v)

    compared = 0
    for student, teacher in pairs(4, law):
        error = float(error_of(student, teacher, law))
        close = pytest.approx(error, abs=1e-13)
        assert 0 <= error <= 1
        # Only the direction of θ counts.
        assert float(error_of(student.scaled(1e3), gf.Teacher(teacher.net.scaled(1e-3)), law)) == close
        # Reflection of the line.
        assert float(error_of(flip(student), gf.Teacher(flip(teacher.net)), mirrored)) == close
        # Where neither vanishes, −N is wrong exactly where N is right, and the two may change places.
        if not any(sign == 0 for net in (student, teacher.net) for _, _, sign in exact(net).cells()):
            opposite = gf.ReluNetwork(student.w, student.b, -student.v)
            assert 1 - float(error_of(opposite, teacher, law)) == close
            assert float(error_of(teacher.net, gf.Teacher(student), law)) == close
            compared += 1
        # Dead neurons change nothing.
        dead = gf.ReluNetwork(
            *(jnp.append(a, p) for a, p in zip((student.w, student.b, student.v), (0, -1, 3), strict=True))
        )
        assert float(error_of(dead, teacher, law)) == close
        # A teacher agrees with itself, except where it vanishes.
        gaps = [(a, b) for a, b, sign in exact(teacher.net).cells() if sign == 0]
        assert gaps or float(error_of(teacher.net, teacher, law)) == 0
    assert compared >= 2


def test_population_error_under_jit_and_vmap():
    students = jax.vmap(gf.ReluNetwork)(*np.random.default_rng(0).standard_normal((3, 4, 7)))
    together = eqx.filter_jit(jax.vmap(gf.population_error, in_axes=(0, None, None)))(students, STEP, gf.Uniform())
    one = [float(error_of(jax.tree.map(lambda a, i=i: a[i], students), STEP, gf.Uniform())) for i in range(4)]
    np.testing.assert_allclose(together, one, atol=1e-14)
