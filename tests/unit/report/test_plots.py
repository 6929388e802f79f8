"""The figures: they draw on any report, and what they draw is the report's numbers."""

import dataclasses
import io
import math
import warnings

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from gradguard.report import AttackScore, LeakageReport, pictures, plots
from gradguard.report import summaries as s

PLOTS = (
    plots.plot_reconstructions,
    plots.plot_spectrum,
    plots.plot_attacks,
    plots.plot_influence_check,
    plots.plot_report,
)


def drawn(figure: Figure) -> Figure:
    """Really draw it; whatever matplotlib complains about (layout, glyphs, NaN) is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png", dpi=30)
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]


@pytest.mark.parametrize("name", ["report", "bare", "vectors", "large"])
def test_every_report_is_drawn_whole(name: str, request: pytest.FixtureRequest):
    assert isinstance(drawn(plots.plot_report(request.getfixturevalue(name))), Figure)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_a_theme_changes_colours_only(plot, report: LeakageReport):
    light, dark = drawn(plot(report)), drawn(plot(report, theme=plots.DARK))
    assert to_hex(light.get_facecolor()) == plots.LIGHT.background
    assert to_hex(dark.get_facecolor()) == plots.DARK.background
    assert texts(light) == texts(dark)


def test_pyplot_is_left_alone(report: LeakageReport):
    import matplotlib
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    plots.plot_report(report)
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def test_reconstructions_show_every_picture_and_its_psnr(report: LeakageReport):
    figure = plots.plot_reconstructions(report)
    shown_pictures = [image.get_array() for axes in figure.axes for image in axes.images]
    # The originals, and two attacks on two gradients; the failed attack has none.
    assert len(shown_pictures) == 6 * 5
    assert report.originals is not None
    np.testing.assert_array_equal(shown_pictures[0], report.originals[0, 0])
    shown = texts(figure)
    for row in s.attack_rows(report):
        if row.failure is None:
            for psnr in report.attacks[row.attack][row.case].psnr:
                assert f"{psnr:.1f} dB" in shown
    assert "RGAP" not in shown


def test_the_most_exposed_are_shown_of_many(large: LeakageReport):
    figure = plots.plot_reconstructions(large)
    shown = texts(figure)
    assert "the 8 most exposed of 10 attacked" in shown
    assert sum(text.startswith("#") for text in shown) == pictures.COLUMNS
    assert len(pictures.shown_columns(large)) == pictures.COLUMNS
    assert pictures.shown_columns(large)[0] == large.attacked.index(2)


def test_pictures_are_clamped_for_display():
    picture = pictures.as_picture(torch.tensor([[[-1.0, 0.5], [2.0, math.nan]]]))
    np.testing.assert_array_equal(picture, [[0.0, 0.5], [1.0, 0.5]])


def test_pictures_are_shown_in_their_value_range(report: LeakageReport):
    assert pictures.as_picture(torch.tensor([[[-1.0, 0.0, 1.0]]]), (-1.0, 1.0)).tolist() == [[0.0, 0.5, 1.0]]
    signed = dataclasses.replace(report, extra={"threat": {"value_range": [-1.0, 1.0]}})
    lowest = plots.plot_reconstructions(signed).axes[0].images[0].get_array().min()
    assert lowest == 0.5


def test_colour_pictures(report: LeakageReport):
    assert report.originals is not None
    colour = {
        name: {
            case: dataclasses.replace(
                score, pictures=None if score.pictures is None else score.pictures.expand(-1, 3, -1, -1)
            )
            for case, score in cases.items()
        }
        for name, cases in report.attacks.items()
    }
    rgb = dataclasses.replace(
        report, input_shape=(3, 8, 8), originals=report.originals.expand(-1, 3, -1, -1), attacks=colour
    )
    figure = drawn(plots.plot_reconstructions(rgb))
    assert figure.axes[0].images[0].get_array().shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("shape", "picture"),
    [
        ((1, 8, 8), True),
        ((3, 8, 8), True),
        ((8, 8), True),
        ((784,), False),
        ((2, 8, 8), False),
        ((1, 30), False),
        ((3, 8, 8, 8), False),
    ],
)
def test_what_is_a_picture(shape, picture):
    assert pictures.is_picture(shape) == picture


def test_inputs_that_are_no_pictures_are_lines(vectors: LeakageReport):
    figure = plots.plot_reconstructions(vectors)
    assert not any(axes.images for axes in figure.axes)
    # A line each, and below the first row the original behind it.
    assert [len(axes.lines) for axes in figure.axes] == [1] * 3 + [2] * 6


def test_the_spectrum_is_a_line_per_example_on_a_log_axis(report: LeakageReport):
    axes = plots.plot_spectrum(report).axes[0]
    assert axes.get_yscale() == "log"
    assert len(axes.lines) == len(report.spectrum)
    np.testing.assert_allclose(axes.lines[3].get_ydata(), report.spectrum[3])
    colours = [line.get_color() for line in axes.lines]
    assert colours.count(plots.LIGHT.worst) == 1
    assert colours[2] == plots.LIGHT.worst
    assert "all 64" in axes.get_xlabel()


def test_a_spectrum_with_zeros_and_one_without_anything(report: LeakageReport, bare: LeakageReport):
    drawn(plots.plot_spectrum(dataclasses.replace(report, spectrum=[[1.0, 0.0, -1e-20], [0.0, 0.0, 0.0]])))
    empty = drawn(plots.plot_spectrum(dataclasses.replace(bare, spectrum=[])))
    assert "No spectrum was computed." in texts(empty)


def test_attacks_have_their_best_as_label_and_the_prior_as_line(report: LeakageReport):
    shown = texts(plots.plot_attacks(report))
    for row in s.attack_rows(report):
        if row.failure is None:
            assert f"{row.worst_psnr:.1f} dB {s.case_words(report, row.case)}" in shown
    assert f"average picture, {report.prior_psnr:.1f} dB" in shown


def test_an_exact_reconstruction_is_drawn(bare: LeakageReport):
    report = dataclasses.replace(
        bare, input_shape=(1, 2, 2), attacked=[0], attacks={"RGAP": {"without": AttackScore(psnr=[math.inf])}}
    )
    shown = texts(drawn(plots.plot_attacks(report)))
    assert "exact without defense" in shown


def test_a_psnr_beyond_the_axis_stands_at_its_edge(report: LeakageReport):
    scores = report.attacks["DLG"]
    attacks = {"RGAP": {"without": AttackScore(psnr=[153.0, 156.7]), "with": scores["with"]}}
    figure = drawn(plots.plot_attacks(dataclasses.replace(report, attacks=attacks, attacked=[0, 1])))
    assert "156.7 dB without defense" in texts(figure)
    assert figure.axes[0].get_xlim()[1] < 90


def test_few_pictures_make_a_narrow_figure(report: LeakageReport, large: LeakageReport):
    one, full = (plots.plot_reconstructions(r) for r in (dataclasses.replace(report, attacked=[0]), large))
    assert one.get_figwidth() < 0.7 * full.get_figwidth()
    assert plots.plot_report(dataclasses.replace(report, attacked=[0])).get_figwidth() == full.get_figwidth()


def test_the_influence_check_is_hollow_out_of_range(report: LeakageReport):
    both = plots.plot_influence_check(report).axes[0]
    assert (both.get_xscale(), both.get_yscale()) == ("log", "log")
    rows = s.influence_rows(report)
    marks = both.lines[-len(rows) :]
    for row, mark in zip(rows, marks, strict=True):
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (row["predicted"], row["observed"])
        assert (mark.get_markerfacecolor() == "none") == (not row["in_range"])


@pytest.mark.parametrize(
    ("plot", "text"),
    [
        (plots.plot_reconstructions, "No reconstructions: nothing was attacked, or no pictures were kept."),
        (plots.plot_attacks, "No attack came back with anything."),
        (plots.plot_influence_check, "The influence prediction was not checked."),
    ],
)
def test_what_is_missing_is_said(bare: LeakageReport, plot, text: str):
    assert texts(drawn(plot(bare))) == [text]


def test_reports_without_pictures_still_plot(report: LeakageReport):
    stripped = {
        name: {case: dataclasses.replace(score, pictures=None) for case, score in cases.items()}
        for name, cases in report.attacks.items()
    }
    drawn(plots.plot_report(dataclasses.replace(report, originals=None, attacks=stripped)))


def test_dollars_and_control_characters_in_names_are_text(report: LeakageReport):
    wicked = dataclasses.replace(
        report,
        class_names=("$\\frac{", "a$b$c", "\x1b[31m", "3", "4", "5"),
        attacks={"$\\bad{": report.attacks["DLG"]},
        extra={"influence_check": [{**row, "perturbation": "$\\bad{"} for row in s.influence_rows(report)]},
    )
    shown = texts(drawn(plots.plot_report(wicked)))
    assert "$\\bad{" in shown


@pytest.mark.parametrize(
    "plot", [plots.plot_attacks, plots.plot_spectrum, plots.plot_influence_check], ids=lambda plot: plot.__name__
)
def test_labels_do_not_overlap(report: LeakageReport, plot):
    figure = plot(report)
    figure.draw_without_rendering()
    boxes = []
    for axes in figure.axes:
        # A text of an axis that is off, or of no extent, is not seen.
        labels = [t for t in axes.texts if t.get_visible() and t.get_text()]
        boxes += [(t.get_text(), t.get_window_extent()) for t in labels]
    for i, (one, box) in enumerate(boxes):
        for other, other_box in boxes[i + 1 :]:
            assert not box.overlaps(other_box), (one, other)
