"""Datasets: what comes in is checked, and refused in words."""

import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.clarke import Points

BAD = {
    "nan in x": ([0.0, np.nan, 2.0], [1, -1, 1], r"x must be finite; 1 bad value\(s\): x\[1\] = nan"),
    "infinities in x": ([np.inf, 0.0, -np.inf], [1, -1, 1], r"2 bad value\(s\): x\[0\] = inf, x\[2\] = -inf"),
    "labels 0 and 1": ([0.0, 1.0], [0, 1], r"labels must be -1 or \+1; .*y\[0\] = 0; write -1 instead of 0.*2\*y - 1"),
    "label 2": ([0.0, 1.0], [2, 1], r"labels must be -1 or \+1; 1 bad value\(s\): y\[0\] = 2$"),
    "label nan": ([0.0, 1.0], [1.0, np.nan], r"labels must be -1 or \+1; 1 bad value\(s\): y\[1\] = nan$"),
    "label almost 1": ([0.0], [0.9999999], "labels must be -1 or"),
    "boolean labels": ([0.0, 1.0], [True, False], "write -1 instead of 0"),
    "empty": ([], [], "there is no data"),
    "column": ([[0.0], [1.0]], [1, -1], r"shapes \(2, 1\) and \(2,\).*pass x\[:, 0\]"),
    "two columns": ([[0.0], [1.0]], [[1], [-1]], r"shapes \(2, 1\) and \(2, 1\)"),
    "scalar": (0.0, 1, r"shapes \(\) and \(\)"),
    "one label short": ([0.0, 1.0], [1], r"equally long, got shapes \(2,\) and \(1,\)"),
    "one point short": ([0.0], [1, 1], r"equally long, got shapes \(1,\) and \(2,\)"),
    "words": (["a", "b"], [1, -1], "x must hold real numbers, got dtype <U1"),
    "labels in words": ([0.0, 1.0], ["+", "-"], "y must hold real numbers"),
    "missing values": ([0.0, None], [1, -1], "x must hold real numbers, got dtype object"),
    "complex": ([0.0, 1j], [1, -1], "x must hold real numbers, got dtype complex128"),
    "conflict": (
        [3.0, 0.5, 1.0, 0.5, 3.0],
        [1, 1, -1, -1, -1],
        r"2 position\(s\) of x carry both labels, the first x = 0.5 at rows 1, 3",
    ),
    "conflict of signed zeros": ([0.0, 1.0, -0.0], [1, 1, -1], r"carry both labels, the first x = -?0.0 at rows 0, 2"),
    "conflict of integers": ([2**53, 2**53 + 1], [1, -1], "carry both labels"),
    "many conflicts": ([1.0] * 8, [1, -1] * 4, r"at rows 0, 1, 2, 3, 4 and 3 more"),
}


@pytest.mark.parametrize("x, y, message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("convert", [lambda a: a, np.asarray], ids=["list", "numpy"])
def test_bad_input_is_a_clear_error(x, y, message, convert):
    with pytest.raises(ValueError, match=message):
        gf.Dataset(convert(x), convert(y))


def test_errors_come_before_anything_compiles(caplog):
    def compiled(build):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.DEBUG):
            build()
        return any("ompil" in record.getMessage() for record in caplog.records)

    def refused(x, y):
        with pytest.raises(ValueError):
            gf.Dataset(x, y)

    for x, y, _ in BAD.values():
        assert not compiled(lambda x=x, y=y: refused(x, y))
    # The listener does hear a computation of a shape never seen before.
    assert compiled(lambda: gf.Dataset(np.arange(1237.0), np.ones(1237)).margins(gf.ReluNetwork([1.0], [0.0], [1.0])))


def test_jax_arrays_are_checked_too():
    with pytest.raises(ValueError, match=r"x\[1\] = nan"):
        gf.Dataset(jnp.asarray([0.0, jnp.nan]), jnp.ones(2))
    with pytest.raises(ValueError, match="no classifier can fit them"):
        gf.Dataset(jnp.zeros(2), jnp.asarray([1.0, -1.0]))


@pytest.mark.parametrize(
    "x, y",
    [
        ([2, 0, 1], [1, -1, 1]),
        (np.array([2, 0, 1], np.int32), np.array([1, -1, 1], np.int8)),
        ((2.0, 0.0, 1.0), (1.0, -1.0, 1.0)),
        (jnp.asarray([2, 0, 1]), jnp.asarray([1, -1, 1])),
    ],
)
def test_integers_and_lists_become_floats(x, y):
    data = gf.Dataset(x, y)
    assert data.x.dtype == data.y.dtype == jnp.float64
    np.testing.assert_array_equal(data.x, [2, 0, 1])
    np.testing.assert_array_equal(data.y, [1, -1, 1])
    assert data.samples == 3


def test_float32_is_kept():
    data = gf.Dataset(np.array([0.0, 1.0], np.float32), [1, -1])
    assert data.x.dtype == data.y.dtype == jnp.float32


def test_equal_points_with_equal_labels_are_fine():
    data = gf.Dataset([1.0, 0.0, 1.0, 0.0], [1, -1, 1, -1])
    assert data.samples == 4 and int(data.switches) == 1


def test_points_that_differ_by_one_rounding_may_differ_in_label():
    assert gf.Dataset([1.0, np.nextafter(1.0, 2.0)], [1, -1]).samples == 2


def test_points_equal_in_float32_may_not():
    x = np.array([1.0, 1.0 + 1e-9])
    assert gf.Dataset(x, [1, -1]).samples == 2
    with pytest.raises(ValueError, match="carry both labels"):
        gf.Dataset(x.astype(np.float32), [1, -1])


@pytest.mark.parametrize(
    "x, y, switches",
    [([1], [1], 0), ([3, 1, 2], [1, 1, 1], 0), ([3, 1, 2], [1, 1, -1], 2), ([4, 1, 3, 2], [1, 1, -1, -1], 2)],
)
def test_switches_are_counted_along_the_line(x, y, switches):
    assert int(gf.Dataset(x, y).switches) == switches


def test_margins():
    net = gf.ReluNetwork([1.0], [1.0], [2.0])
    np.testing.assert_array_equal(gf.Dataset([0.0, -3.0, 1.0], [1, -1, -1]).margins(net), [2.0, 0.0, -4.0])


def test_tracers_are_let_through():
    x, y = jnp.asarray([0.0, jnp.nan]), jnp.asarray([0.0, 5.0])
    inside = jax.jit(lambda x, y: gf.Dataset(x, y))(x, y)
    np.testing.assert_array_equal(inside.x, x)
    np.testing.assert_array_equal(inside.y, y)
    many = jax.vmap(gf.Dataset)(jnp.arange(6.0).reshape(3, 2), jnp.ones((3, 2)))
    assert many.x.shape == (3, 2)
    slope = jax.grad(lambda x: gf.Dataset(x, [1.0, -1.0]).margins(gf.ReluNetwork([1.0], [0.0], [1.0])).sum())
    np.testing.assert_array_equal(slope(jnp.asarray([1.0, 2.0])), [1.0, -1.0])


def test_shapes_are_checked_even_for_tracers():
    for x, y in ((jnp.ones((2, 1)), jnp.ones(2)), (jnp.ones(2), jnp.ones(3)), (jnp.ones(0), jnp.ones(0))):
        with pytest.raises(ValueError, match=r"one shape \(n,\), n >= 1; got \("):
            eqx.filter_jit(gf.Dataset)(x, y)


def test_padding_takes_no_part():
    data = gf.Dataset([0.3, -1.0, 0.3, 2.0, 5.0], [1, -1, 1, 1, -1])
    padded = jax.jit(lambda count: data.padded(count))(jnp.asarray(4))
    assert int(padded.samples) == 4 and padded.real.tolist() == [True] * 4 + [False] and int(padded.switches) == 1
    plain, filled = Points(gf.Dataset(data.x[:4], data.y[:4])), Points(padded)
    np.testing.assert_array_equal(filled.x[:3], plain.x[:3])
    np.testing.assert_array_equal(filled.y[:3], plain.y[:3])
    np.testing.assert_array_equal(jnp.exp(filled.log_count), [1, 2, 1, 0, 0])
    assert not filled.conflict and jnp.all(filled.x[3:] > 2)
    net = gf.ReluNetwork([1.0], [2.0], [0.5])
    # The natural multipliers are those of the data alone.
    assert float(gf.kkt_residual(net, padded)) == pytest.approx(
        float(gf.kkt_residual(net, gf.Dataset(data.x[:4], data.y[:4])))
    )


def test_a_sample_may_be_padded():
    teacher = gf.Teacher.random(jax.random.key(0), 3)
    plain, padded = teacher.sample(jax.random.key(1), 6), teacher.sample(jax.random.key(1), 6, slots=8)
    np.testing.assert_array_equal(padded.x[:6], plain.x)
    np.testing.assert_array_equal(padded.x[6:], plain.x[0])
    assert plain.samples == 6 and int(padded.samples) == 6
    with pytest.raises(ValueError, match="at most 8"):
        teacher.sample(jax.random.key(1), 9, slots=8)


def test_constants_may_be_used_inside_jit():
    """JAX traces even what is asked of constants there."""
    x, y, half = jnp.linspace(-1.0, 1.0, 8), jnp.ones(8), jnp.asarray(0.5)

    @jax.jit
    def inside(a):
        until = gf.Until(time=half)
        wide, bars = gf.TruncatedNormal(std=half), gf.Histogram(x, jnp.ones(7))
        return a + gf.Dataset(x, y).x[0] + wide.low + bars.edges[0] + until.time

    assert float(inside(1.0)) == pytest.approx(1 - 1 - 2 - 1 + 0.5)
