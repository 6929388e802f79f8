"""The terminal's tables: what they say, at 80 columns, whatever names they are given."""

import dataclasses
import io
import math

import pytest
from rich.console import Console

from gradguard.report import AttackScore, LabelScore, LeakageReport
from gradguard.report import summaries as s
from gradguard.report.tables import print_report

EXPOSED = 2


def printed(report: LeakageReport, width: int = 80) -> str:
    file = io.StringIO()
    print_report(report, Console(width=width, file=file))
    return file.getvalue()


def words(text: str) -> str:
    """`text` with its line breaks and columns gone."""
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_wider_than_the_terminal(report: LeakageReport, large: LeakageReport, width: int):
    for each in (report, large):
        lines = printed(each, width).splitlines()
        assert max(map(len, lines)) <= width
        # Nothing was cut: rich marks what it cuts.
        assert not any("…" in line for line in lines)


def test_the_summary_says_what_to_do_and_who_is_exposed(report: LeakageReport):
    text = words(printed(report))
    assert "PERTURB" in text
    assert "As given, an attack reconstructs an example at 57.6 dB, above 25.0 dB." in text
    assert f"noise 20% of |g| = {report.gradient_norm:.2f}" in text
    assert f"example {EXPOSED} (class 2): InvertingGradients reaches" in text
    assert "95.2% without, 94.4% with the defense (-0.8 points)" in text


def test_every_attack_with_mean_and_worst(report: LeakageReport):
    text = printed(report)
    for row in s.attack_rows(report):
        if row.failure is None:
            assert f"{row.mean_psnr:.1f}" in text
            assert f"{row.worst_psnr:.1f}" in text
    assert text.count(f"#{EXPOSED} ") >= 4
    assert f"{report.prior_psnr:.1f} dB" in text


def test_a_failed_attack_says_why_once(report: LeakageReport):
    text = words(printed(report))
    assert text.count("RGAP did not run: Tanh cannot be inverted in float32 here; R-GAP needs LeakyReLU.") == 1


def test_an_attack_that_failed_on_one_gradient_only(report: LeakageReport):
    attacks = {"A": {"without": report.attacks["DLG"]["without"], "with": AttackScore(failure="out of luck")}}
    text = words(printed(dataclasses.replace(report, attacks=attacks)))
    assert "A did not run with defense: out of luck" in text


def test_predicted_errors_per_example_or_in_quantiles(report: LeakageReport, large: LeakageReport):
    small, folded = printed(report), printed(large)
    assert "example 5 (class 5)" in small
    assert "median" not in small
    assert "example 5 (class 5)" not in folded
    for name in ("lowest", "median", "90% quantile", "Most exposed classes"):
        assert name in folded


def test_what_did_not_converge_is_marked(report: LeakageReport):
    unfinished = dataclasses.replace(report, predicted_converged=[False, *report.predicted_converged[1:]])
    text = printed(unfinished)
    assert f"{report.predicted_error[0]:#.3g}*" in text
    assert "1 prediction did not converge" in text


def test_label_recovery_with_its_caveat(report: LeakageReport):
    text = words(printed(report))
    assert "with defense 0.800 0.700 0.667" in text
    assert "already gets 0.400. Read IRec." in text


def test_the_influence_check(report: LeakageReport):
    text = words(printed(report))
    assert "GaussianNoise, 1% #0 0.300 0.291 -3%" in text
    assert "out of range" in text
    assert "8 of 8 predictions in range came within 10%" in text


def test_the_least_report(bare: LeakageReport):
    text = printed(bare)
    assert "none: no policy was given" in text
    assert "none: the gradient as it is" in text
    assert "What attacks get" not in text
    assert "Label recovery" not in text
    # One example, no perturbation: nothing stands out.
    assert "most exposed" not in text


def test_names_are_plain_text(report: LeakageReport):
    wicked = dataclasses.replace(
        report,
        model="[red]model[/red]",
        class_names=("a\x1b[31mb", "[bold]", "[/nonsense]", "d", "e", "f"),
        defense="[link=x]",
    )
    text = printed(wicked)
    for name in ("[red]model[/red]", "[bold]", "[/nonsense]", "[link=x]", "a?[31mb"):
        assert name in text


def test_an_exact_reconstruction_is_called_so(bare: LeakageReport):
    report = dataclasses.replace(
        bare, attacked=[0], attacks={"RGAP": {"without": AttackScore(psnr=[math.inf], ssim=[1.0])}}
    )
    text = words(printed(report))
    assert "RGAP recovers it exactly without defense, recognisable in detail." in text
    assert "exact exact #0" in text


def test_a_gradient_sent_perturbed_without_a_named_defense(bare: LeakageReport):
    report = dataclasses.replace(
        bare,
        noise_ratio=0.1,
        attacked=[0],
        attacks={"A": {"without": AttackScore(psnr=[40.0]), "with": AttackScore(psnr=[20.0])}},
    )
    text = words(printed(report))
    assert "none; what is sent differs by 10%" in text
    assert "true gradient 40.0" in text
    assert "as sent 20.0" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.12345, "0.123"),
        (1.5, "1.50"),
        (99.96, "100"),
        (999.7, "1000"),
        (12345.6, "12346"),
        (1e-5, "1.00e-05"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str):
    assert s.number(value) == text


def test_numbers_that_are_none():
    assert [s.number(v) for v in (None, math.nan, math.inf)] == ["–", "–", "inf"]
    assert [s.percent(v) for v in (None, 0.2, 0.952, 1.0)] == ["–", "20%", "95.2%", "100%"]
    assert [s.duration(v) for v in (math.nan, 0.0123, 3.2, 142.3, 1200)] == ["–", "12 ms", "3.2 s", "142 s", "20 min"]


def test_psnr_in_words():
    assert s.psnr_words(35) == "recognisable in detail"
    assert s.psnr_words(20) == "partly visible"
    assert s.psnr_words(12) == "mostly gone"
    assert s.psnr_words(12, prior=13) == "no better than guessing the average picture"


def test_quantiles_skip_what_is_missing():
    assert s.quantile([3.0, math.nan, 1.0], 0.5) == 2.0
    assert s.quantile([math.inf, math.inf], 0.3) == math.inf
    assert math.isnan(s.quantile([], 0.5))


def test_empty_guess_is_the_share_of_absent_classes():
    assert s.empty_guess(LabelScore(le_acc=1, ln_acc=1, i_rec=1, true=[0, 0, 3, 1])) == 0.5
    assert s.empty_guess(LabelScore(le_acc=1, ln_acc=1, i_rec=1)) is None
