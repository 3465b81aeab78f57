"""Figures: what is drawn is what is there, every axis is labelled, and nothing is too small to read."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from gradflow import Dataset, Path, ReluNetwork, Teacher, Until, integrate, plot, study_plot, style
from gradflow.certificate import kkt_residual
from gradflow.claim import Claim
from gradflow.design import around
from gradflow.record import Verdict
from gradflow.statistics import Estimate, estimate_probability
from gradflow.table import claims as study_claims
from gradflow.trial import Trial

# N(x) = |x| − (x + 1/4): right on all of these points but the last.
NET = ReluNetwork([1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.25, -0.25], [1.0, 1.0, -1.0, 1.0])
DATA = Dataset([-1.0, -0.5, 0.5, 2.0], [1.0, 1.0, -1.0, 1.0])


@pytest.fixture
def ax():
    return Figure(figsize=(3.5, 2.5)).add_subplot()


def labels(ax):
    return ax.get_xlabel(), ax.get_ylabel()


def by_label(artists, label):
    (found,) = [artist for artist in artists if artist.get_label() == label]
    return found


def snapshots(log_time, w, b, v):
    """A path through the given weights, (S, k) each, with one empty slot at its end."""
    empty = [np.nan] * len(w[0])
    net = jax.vmap(ReluNetwork)(*(jnp.asarray([*a, empty]) for a in (w, b, v)))
    time = jnp.asarray([*log_time, np.nan])
    return Path(time, time, -time, 0.1 * time, net, jnp.asarray(len(log_time)), jnp.asarray(1))


H, F, U = Verdict.holds.value, Verdict.fails.value, Verdict.unresolved.value


def trials(verdicts, regions, errors):
    """A study of these trials, by hand; limits with less than 5 regions are the global optimum."""
    regions, verdicts = np.asarray(regions), np.asarray(verdicts, np.int8)
    return planted.study(
        Trial(),
        len(verdicts),
        verdict=verdicts,
        accuracy_verdict=verdicts,
        regions_verdict=verdicts,
        regions=regions,
        optimum_verdict=np.where(verdicts == U, U, np.where(regions < 5, H, F)).astype(np.int8),
        limit_status=np.where(verdicts == U, 3, 0),
        sample_switches=np.full_like(regions, 3),
        population_error=errors,
    )


STUDY = trials([H, H, F, U], [4, 5, 5, 9], [0.001, 0.02, 0.5, np.nan])


def test_function_is_the_network_itself(ax):
    points = np.array([-1.3, 0.9, 2.0])
    net = ReluNetwork([1.0, -2.0, 0.5], [0.3, 0.1, -0.4], [1.0, 0.7, -2.0])
    data = Dataset(points, np.sign(np.asarray(net(points))))
    artists = plot.function(ax, net, data)
    x, y = by_label(artists, "N(x)").get_data()
    dense = np.linspace(*ax.get_xlim(), 1001)
    smallest = np.min(np.abs(np.asarray(net(points))))
    np.testing.assert_allclose(np.interp(dense, x, y) * smallest, net(dense), rtol=0, atol=1e-13)
    assert np.min(np.abs(np.interp(points, x, y))) == pytest.approx(1)
    assert {line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"} == {-1, 1}
    assert labels(ax) == ("input x (units of the data)", "N(x) / min q")


def test_function_shows_labels_knots_and_misclassified_points(ax):
    artists = plot.function(ax, NET, DATA)
    assert ax.get_ylabel() == "N(x) / max |N|"  # N(2) = −1/4 is on the wrong side: no margin
    np.testing.assert_array_equal(by_label(artists, "y = +1").get_xdata(), [-1, -0.5, 2])
    np.testing.assert_array_equal(by_label(artists, "y = −1").get_xdata(), [0.5])
    assert not [line for line in ax.lines if line.get_linestyle() == "--"]


def test_function_marks_knots_by_the_counting_rule():
    net = ReluNetwork([1.0, 1.0, 1.0], [0.0, -0.001, -1.0], [1.0, 1.0, -3.0])
    drawn = [plot.function(Figure().add_subplot(), net, merge=merge) for merge in (0.0, 0.01)]
    counts = [by_label(artists, "knots").get_xdata().size for artists in drawn]
    assert counts == [3, 2]


def test_function_paints_the_teacher(ax):
    teacher = Teacher(ReluNetwork([1.0, 1.0, -1.0, 1.0], [0.0, -1.0, 0.0, 1.0], [1.0, -3.0, 2.0, -0.5]))
    patches = [artist for artist in plot.function(ax, NET, DATA, teacher) if artist in ax.patches]
    switches = np.asarray(teacher.switches)
    low, high = ax.get_xlim()
    inside = switches[(switches > low) & (switches < high)]
    assert inside.size
    np.testing.assert_allclose([p.get_x() for p in patches], [low, *inside])
    middles = np.array([p.get_x() + p.get_width() / 2 for p in patches])
    colours = [style.BLUE if label > 0 else style.VERMILLION for label in np.asarray(teacher(middles))]
    assert [to_hex(p.get_facecolor()).upper() for p in patches] == colours


def test_knots_beyond_the_data_are_named(ax):
    bends = np.array([-30.0, 0.0, 0.5, 40.0, 72.1])  # the net bends at each of them by 1
    net = ReluNetwork(np.ones(5), -bends, np.ones(5))
    plot.function(ax, net, DATA)
    assert ax.get_xlabel().endswith("\n← 1 knot before: −30, 2 knots beyond: 40, 72.1 →")


def test_breakpoints_follow_the_neurons_and_break_where_they_turn_round(ax):
    # The first neuron moves from −1 to 1/2; the second turns round between the snapshots (w changes sign).
    path = snapshots([-np.inf, 1.0, 3.0], [[1, 1], [1, 1], [1, -1]], [[1, 0], [1, 0], [-0.5, 0]], [[1, -1]] * 3)
    artists = plot.breakpoints(ax, path, DATA)
    (lines,) = [artist for artist in artists if isinstance(artist, LineCollection)]
    np.testing.assert_array_equal(lines.get_segments(), [[[1, -1], [3, 0.5]]])
    assert to_hex(lines.get_colors()[0]).upper() == style.GREEN
    assert len(artists) == 2 + DATA.samples  # and the legend
    assert labels(ax) == ("log time, log t", "breakpoint −b/w (units of x)")
    assert ax.get_xlim() == (1, 3)


@pytest.mark.parametrize(("last", "scale"), [(40.0, "linear"), (4000.0, "asinh")])
def test_convergence_shows_loss_and_margin_over_log_time(ax, last, scale):
    path = snapshots([1.0, 2.0, last], [[1.0]] * 3, [[0.0]] * 3, [[1.0]] * 3)
    artists = plot.convergence(ax, path)
    np.testing.assert_array_equal(by_label(artists, "log L").get_xydata(), [[1, -1], [2, -2], [last, -last]])
    np.testing.assert_allclose(by_label(artists, "γ").get_ydata(), [0.1, 0.2, 0.1 * last])
    said = " (asinh scale)" if scale == "asinh" else ""
    assert labels(ax) == (f"log time, log t{said}", f"log mean loss, log L{said}")
    assert by_label(artists, "γ").axes.get_ylabel() == "margin γ = min q / ‖θ‖²"
    assert (ax.get_xscale(), ax.get_yscale()) == (scale, scale)


def test_claims_show_estimate_interval_counts_and_verdict(ax):
    rows = [
        Claim("first", "undecided", estimate_probability(90, 98, unresolved=2), ">= 0.9", 90, 8, 2, ""),
        Claim("second", "holds", estimate_probability(100, 100), ">= 0.9", 100, 0, 0, "vacuous"),
        Claim("third", "contradicted", Estimate(2.0, 1.9, 2.1, 0.99), "exponent <= 1", 100, 0, 0, ""),
    ]
    artists = plot.claims(ax, rows)
    bars = [artist for artist in artists if isinstance(artist, LineCollection)]
    for bar, row in zip(bars, rows[:2], strict=True):  # an exponent is no probability
        np.testing.assert_allclose(bar.get_segments()[0][:, 0], [row.measured.low, row.measured.high])
        assert to_hex(bar.get_color()[0]).upper() == study_plot.VERDICTS[row.verdict].upper()
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == ["first\n90 hold, 8 fail, 2 unresolved", "second (vacuous)\n100 hold, 0 fail, 0 unresolved"]
    assert ax.get_xlabel() == "probability, with its exact 99% interval"
    assert ax.get_xlim()[0] <= min(row.measured.low for row in rows)


def test_regions_are_shares_of_all_trials(ax):
    artists = plot.regions(ax, STUDY)

    def shares(width):
        bars = [bar for bar in ax.patches if round(bar.get_width(), 2) == width]
        return {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in bars if bar.get_height()}

    assert shares(0.8) == {4: 0.25, 5: 0.5} and shares(0.45) == {4: 0.25}
    assert by_label(artists, "least").get_xdata()[0] == 3
    assert labels(ax) == ("linear regions of the limit", "share of trials\n(1 of 4 unresolved)")


def test_population_error_never_counts_the_unresolved_as_small(ax):
    artists = plot.population_error(ax, STUDY)
    x, share = by_label(artists, "trials").get_data()
    np.testing.assert_allclose(x[1:-1], [0.001, 0.02, 0.5])
    np.testing.assert_allclose(share, [0, 0.25, 0.5, 0.75, 0.75])
    assert by_label(artists, "1/n, n = 50").get_xdata()[0] == 0.02
    assert labels(ax) == ("population error, P(wrong label)", "share of trials at or below\n(1 of 4 unresolved)")


@pytest.mark.parametrize(
    "study",
    [STUDY, trials([U, U], [0, 0], [np.nan, np.nan]), trials([H], [3], [0.0])],
    ids=["mixed", "all unresolved", "one, without error"],
)
def test_study_figure_is_legible_whatever_the_outcome(study):
    check_legible(plot.study_figure(study), panels=3)


def some_sweep(**columns):
    return planted.sweep(*(planted.study(trial, 40, **columns) for trial in around(Trial())))


@pytest.mark.parametrize(
    "columns",
    [
        dict(population_error=np.linspace(0.001, 0.2, 40), regions=[4] * 30 + [6] * 10),
        dict(accuracy_verdict=["fails"] * 40),
        dict(accuracy_verdict=["unresolved"] * 40),
    ],
    ids=["mixed", "all failed", "all unresolved"],
)
def test_sweep_figure_is_legible_whatever_the_outcome(columns):
    check_legible(plot.sweep_figure(some_sweep(**columns)), panels=4)


def test_what_a_phase_diagram_shows(ax):
    cells = [Trial(width=k, samples=n) for k, n in ((32, 50), (8, 50), (32, 100))]
    good = [40, 10, 30]
    outcomes = [["holds"] * g + ["fails"] * (40 - g) for g in good]
    studies = [planted.study(t, 40, accuracy_verdict=o) for t, o in zip(cells, outcomes, strict=True)]
    image, *texts = plot.phase_diagram(ax, planted.sweep(*studies))
    np.testing.assert_array_equal(image.get_array(), np.ma.masked_invalid([[0.25, np.nan], [1.0, 0.75]]))
    assert [text.get_text() for text in texts] == ["1.00", "0.25", "0.75", "–"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["2", "8"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["50", "100"]


def test_what_is_drawn_against_r_and_n(ax):
    sweep = some_sweep(population_error=np.arange(1, 41) / 400, regions=[4] * 20 + [6] * 20)
    lines = {line.get_label(): line for line in plot.regions_against_neurons(ax, sweep)}
    np.testing.assert_array_equal(lines["mean"].get_xydata(), [[4, 5], [8, 5]])
    np.testing.assert_array_equal(lines["least (mean)"].get_ydata(), [4, 4])
    ax.clear()
    lines = {line.get_label(): line for line in plot.error_against_samples(ax, sweep)}
    np.testing.assert_allclose(lines["r/n"].get_ydata(), [4 / 25, 4 / 50, 4 / 100])
    assert not ax.texts


def test_success_of_one_r_is_drawn_against_every_width(ax):
    sweep = planted.sweep(*(planted.study(Trial(width=k), 40) for k in (8, 16, 32)))
    artists = plot.success_against_width(ax, sweep)
    (line,) = [a for a in artists if hasattr(a, "get_xdata") and len(a.get_xdata()) == 3 and a.get_linestyle() == "-"]
    np.testing.assert_allclose(line.get_xdata(), [2, 4, 8])


def test_ratios_that_are_no_whole_numbers_are_fractions(ax):
    cells = [Trial(neurons=3, switches=2, width=k) for k in (4, 8)]
    plot.phase_diagram(ax, planted.sweep(*(planted.study(trial, 40) for trial in cells)))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["4/3", "8/3"]


def test_a_median_of_zero_stands_at_the_foot_of_the_log_axis(ax):
    plot.error_against_samples(ax, some_sweep(population_error=[0.0] * 30 + [0.1] * 10))
    assert [text.get_text() for text in ax.texts] == ["0", "0", "0"]


def test_breakpoints_are_black_where_they_stick(ax):
    x = float(DATA.x[0])  # of two neurons with w = 1 the first stays there, the second passes
    path = snapshots([1.0, 2.0, 3.0], [[1, 1]] * 3, [[-x, 0.5 - x], [-x, -x], [-x, -0.5 - x]], [[1, 1]] * 3)
    artists = plot.breakpoints(ax, path, DATA)
    (held,) = [a for a in artists if isinstance(a, LineCollection) and to_hex(a.get_colors()[0]) == style.BLACK]
    np.testing.assert_array_equal([line[:, 1] for line in held.get_segments()], [[x, x], [x, x]])


def test_neurons_are_drawn_over_the_norm_with_the_lines_of_the_points(ax):
    path = snapshots([1.0, 2.0], [[3, 0], [0, 0]], [[0, 0], [8, 0]], [[4, 0], [-6, 0]])
    artists = plot.neurons(ax, path, DATA)
    (ways,) = [a for a in artists if isinstance(a, LineCollection)]
    np.testing.assert_allclose(ways.get_segments()[0], [[0.6, 0], [0, 0.8]])
    assert to_hex(ways.get_colors()[0]).upper() == style.PURPLE  # v < 0 at the end
    slopes = [a.get_slope() for a in artists if hasattr(a, "get_slope")]
    np.testing.assert_array_equal(slopes, -np.asarray(DATA.x))


def test_residual_is_that_of_the_certificate_where_points_are_classified(ax):
    net = ReluNetwork.random(jax.random.key(1), width=8)
    path = integrate(net, DATA, until=Until(log_loss=-20.0), save=20).check().path
    (line,) = plot.residual(ax, path, DATA)
    time, value = line.get_data()
    last = int(path.count) - 1
    assert time[-1] == path.log_time[last]
    end = jax.tree.map(lambda a: a[last], path.network)
    assert value[-1] == pytest.approx(float(kkt_residual(end, DATA)), rel=1e-12)
    margins = [float(path.margin[i]) for i in range(last + 1) if np.isfinite(path.log_time[i])]
    np.testing.assert_array_equal(np.isnan(value), np.asarray(margins) <= 0)


def test_figures_of_one_study_take_a_cell_of_a_sweep_and_no_sweep(ax):
    cells = planted.sweep(*(planted.study(Trial(samples=n), 3, regions=[4, 5, n]) for n in (10, 20)))
    for draw in (lambda d: plot.regions(ax, d), lambda d: plot.population_error(ax, d), plot.study_figure):
        with pytest.raises(ValueError, match="this is a sweep"):
            draw(cells)
        draw(cells.isel(cell=1))
    assert "n = 20 samples" in str(plot.study_figure(cells.isel(cell=1)).get_suptitle())
    with pytest.raises(ValueError, match="no claim about a probability"):
        plot.claims(ax, [])


def test_claim_table_says_what_the_claims_say(ax):
    rows = study_claims(STUDY)
    texts = [a.get_text() for a in plot.claim_table(ax, rows) if isinstance(a, Text)]
    for claim in rows:
        assert claim.name in " ".join(texts) and f"{claim.holds} / {claim.fails} / {claim.unresolved}" in texts
    verdicts = [a for a in ax.texts if a.get_text() in study_plot.VERDICTS]
    assert [a.get_color() for a in verdicts] == [study_plot.VERDICTS[claim.verdict] for claim in rows]


def test_animation_ends_where_the_flow_does(flow, tmp_path):
    animation = plot.flow_animation(flow, DATA, Teacher(NET), frames=3)
    animation.save(tmp_path / "flow.gif", writer="pillow", dpi=40)
    assert (tmp_path / "flow.gif").read_bytes().startswith(b"GIF89a")
    figure = Figure()
    update = plot.moving_function(figure.subplots(), flow.path, DATA)
    curve = update(int(flow.path.count) - 1)[0]
    expected = np.asarray(flow.final(jnp.asarray(curve.get_xdata()))) / float(flow.final.squared_norm)
    unit = float(flow.margin) if flow.margin > 0 else 1.0
    np.testing.assert_allclose(curve.get_ydata(), expected / unit, rtol=1e-9)
    with pytest.raises(ValueError, match="frames"):
        plot.flow_animation(flow, DATA, frames=1)


def test_figures_show_themselves_in_jupyter(flow):
    assert plot.flow_figure(flow, DATA)._repr_png_().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def flow():
    net = ReluNetwork.random(jax.random.key(0), width=4)
    return integrate(net, DATA, until=Until(time=1.0), save=10)


def test_flow_figure_is_legible(flow):
    check_legible(plot.flow_figure(flow, DATA, Teacher(NET)), panels=6)


def test_a_flow_that_has_not_begun_cannot_be_drawn():
    flow = integrate(NET, DATA, until=Until(time=0.0), save=8)
    with pytest.raises(ValueError, match="finite log time"):
        plot.flow_figure(flow, DATA)


def test_flow_figure_needs_snapshots(flow):
    with pytest.raises(ValueError, match="save="):
        plot.flow_figure(dataclasses.replace(flow, path=None), DATA)


def check_legible(figure, panels):
    figure.savefig(io.BytesIO(), dpi=50)  # warnings, such as a missing glyph, are errors
    assert len(figure.axes) == panels
    assert tuple(figure.get_size_inches()) in (style.SIZE, style.TALL)
    for ax in figure.axes:
        assert ax.get_ylabel() or ax.get_yticklabels()
    small = [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_fontsize() < 8]
    assert not small
