"""The page: self-contained, private, escaped, and true to the report."""

import base64
import dataclasses
import io
import math
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest
import torch

from gradguard.errors import InputError
from gradguard.report import AttackScore, LeakageReport, Verdict
from gradguard.report.html import picture_png, render_html, save_html

PNG = picture_png(torch.zeros(2, 2), (0.0, 1.0))
DATA_URI = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


@pytest.fixture(scope="module")
def page(report: LeakageReport) -> str:
    return render_html(report)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same picture for every figure: drawing is most of a page's time, and most tests look at its words."""
    monkeypatch.setattr("gradguard.report.html.figure_png", lambda *args, **options: PNG)


class Reader(HTMLParser):
    """The page's visible words, its tags, and whether every tag is closed."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(page)
        self.words = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.pieces.append(data)


def without_pictures(page: str) -> str:
    return DATA_URI.sub("", page)


def test_the_page_loads_nothing(page: str):
    text = without_pictures(page)
    assert "//" not in text
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    sources = [attrs.get("src") or attrs.get("srcset") for tag, attrs in Reader(page).tags if tag in ("img", "source")]
    assert sources
    assert all(DATA_URI.fullmatch(source) for source in sources)


def test_the_page_runs_nothing(page: str):
    tags = Reader(page).tags
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "embed", "link", "form"}
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    policy = next(attrs["content"] for tag, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["report", "bare", "vectors", "large"])
def test_every_tag_is_closed(name: str, request: pytest.FixtureRequest):
    reader = Reader(render_html(request.getfixturevalue(name)))
    assert reader.open == []
    assert "None" not in reader.words
    assert "nan" not in reader.words.split()


def test_embedded_pngs_decode(page: str):
    encoded = DATA_URI.findall(page)
    # Four figures in two themes, and the most exposed example with two reconstructions of it.
    assert len(encoded) == 4 * 2 + 3
    for data in encoded:
        picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(data, validate=True)), format="png")
        assert picture.ndim == 3


def test_every_picture_has_words_for_it(page: str):
    for tag, attrs in Reader(page).tags:
        if tag == "img":
            assert len(attrs["alt"]) > 5


def test_figures_are_there_for_light_and_dark(page: str):
    sources = [attrs for tag, attrs in Reader(page).tags if tag == "source"]
    assert len(sources) == 4
    assert all(attrs["media"] == "(prefers-color-scheme: dark)" for attrs in sources)


@pytest.mark.usefixtures("undrawn")
def test_names_are_escaped(report: LeakageReport):
    bad = "<script>alert(1)</script>"
    cases = report.attacks["DLG"]
    wicked = dataclasses.replace(
        report,
        model=bad,
        defense=bad,
        class_names=(bad,) * 10,
        attacks={bad: cases, "failed": {"with": AttackScore(failure=bad)}},
        environment={bad: bad},
        verdict=Verdict(decision="block", reasons=(bad,), noise_ratio=0.1, measures={bad: 1.0}),
        extra={"influence_check": [{**row, "perturbation": bad} for row in report.extra["influence_check"]]},
    )
    page = render_html(wicked)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    # The page's tags are as without the names, apart from their number.
    assert {tag for tag, _ in Reader(page).tags} <= {tag for tag, _ in Reader(render_html(report)).tags}


@pytest.mark.usefixtures("undrawn")
def test_quotes_in_names_do_not_leave_their_attribute(report: LeakageReport):
    page = render_html(dataclasses.replace(report, attacks={'x" onerror="alert(1)': report.attacks["DLG"]}))
    assert not any("onerror" in attrs for _, attrs in Reader(page).tags)


def test_files_are_private_and_complete(report: LeakageReport, tmp_path: Path):
    path = save_html(report, tmp_path / "new" / "page.html")
    assert path == tmp_path / "new" / "page.html"
    written = sorted(path.parent.iterdir())
    # Nothing temporary is left behind.
    assert [p.name for p in written] == [
        "attacks.png",
        "influence.png",
        "page.html",
        "reconstructions.png",
        "spectrum.png",
    ]
    for each in written:
        assert stat.S_IMODE(each.stat().st_mode) == 0o600
        if each.suffix == ".png":
            assert matplotlib.image.imread(each).ndim == 3
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.usefixtures("undrawn")
def test_saving_again_replaces(report: LeakageReport, bare: LeakageReport, tmp_path: Path):
    path = report.save_html(str(tmp_path / "page.html"))
    path.chmod(0o644)
    assert bare.save_html(path) == path
    assert "No verdict" in path.read_text(encoding="utf-8")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_is_no_path(report: LeakageReport, tmp_path: Path):
    with pytest.raises(InputError, match=r"must name a file.*try .*report\.html"):
        save_html(report, tmp_path)


def test_the_verdict_comes_first_with_its_reasons(page: str):
    words = Reader(page).words
    assert words.index("Send the perturbed gradient") < words.index("What was measured")
    assert "As given, an attack reconstructs an example at 57.6 dB, above 25.0 dB." in words


def test_the_page_explains_its_numbers(page: str, report: LeakageReport):
    words = Reader(page).words
    assert "Above about 30 dB a picture is recognisable in detail, below about 15 dB it is mostly gone" in words
    assert f"Prior only: {report.prior_psnr:.1f}" in words
    assert "Predicted error (I2F)" in words
    assert "A cheaper number that the predicted error cannot fall below" in words
    assert "Here, answering “none of any” already gets 0.400." in words
    assert "every other example of the batch" in words
    assert "the labels, except where recovering them is the attack." in words


def test_the_most_exposed_example_and_class_are_named(page: str):
    assert "Most exposed: example 2 (class 2): InvertingGradients reaches" in Reader(page).words


def test_numbers_are_the_report_s(page: str, report: LeakageReport):
    words = Reader(page).words
    for error in report.predicted_error:
        assert f"{error:#.3g}" in words
    assert "0.667" in words
    assert "95.2% → 94.4%" in words
    assert "2.13.0" in words


@pytest.mark.usefixtures("undrawn")
def test_sections_that_are_missing_are_left_out(bare: LeakageReport):
    words = Reader(render_html(bare)).words
    for title in (
        "What attacks get",
        "Which labels",
        "Does the prediction hold",
        "Test accuracy",
        "Noise ratio",
        "Most exposed",
    ):
        assert title not in words
    assert "There is no defense and so no perturbation" in words
    assert "Handle with care" not in words


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("decision", ["send", "perturb", "block"])
def test_every_decision_has_its_banner(bare: LeakageReport, decision):
    verdict = Verdict(decision=decision, reasons=("because",), noise_ratio=0.0)
    page = render_html(dataclasses.replace(bare, verdict=verdict))
    assert f'class="card banner {decision}"' in page
    assert "Because." in Reader(page).words


@pytest.mark.usefixtures("undrawn")
def test_a_block_names_what_there_is_to_block(report: LeakageReport, bare: LeakageReport):
    verdict = Verdict(decision="block", reasons=("because",), noise_ratio=0.0)
    assert "Do not send this gradient." in render_html(dataclasses.replace(bare, verdict=verdict))
    assert "neither the true gradient nor the perturbed one" in render_html(
        dataclasses.replace(report, verdict=verdict)
    )


@pytest.mark.usefixtures("undrawn")
def test_attacks_keep_their_order(report: LeakageReport):
    attacks = {"Zeta": report.attacks["DLG"], "Alpha": report.attacks["InvertingGradients"]}
    groups = re.findall(r'scope="rowgroup">(\w+)<', render_html(dataclasses.replace(report, attacks=attacks)))
    assert groups == ["Zeta", "Alpha"]


@pytest.mark.usefixtures("undrawn")
def test_a_report_of_failures_only(bare: LeakageReport):
    report = dataclasses.replace(bare, attacks={"RGAP": {"without": AttackScore(failure="cannot")}})
    words = Reader(render_html(report)).words
    assert "RGAP did not run: cannot" in words
    assert "Best attack" not in words


@pytest.mark.usefixtures("undrawn")
def test_an_exact_reconstruction(bare: LeakageReport):
    report = dataclasses.replace(bare, attacked=[0], attacks={"RGAP": {"without": AttackScore(psnr=[math.inf])}})
    words = Reader(render_html(report)).words
    assert "Best attack, PSNR exact" in words
    assert "exact dB" not in words


@pytest.mark.usefixtures("undrawn")
def test_a_gradient_sent_perturbed_without_a_named_defense(bare: LeakageReport):
    report = dataclasses.replace(
        bare,
        noise_ratio=0.1,
        attacked=[0],
        attacks={"A": {"without": AttackScore(psnr=[40.0]), "with": AttackScore(psnr=[20.0])}},
    )
    words = Reader(render_html(report)).words
    assert "40.0 → 20.0" in words
    assert "true gradient" in words
    assert "as sent" in words


@pytest.mark.usefixtures("undrawn")
def test_a_large_batch_is_folded(large: LeakageReport):
    words = Reader(render_html(large)).words
    assert "Quantiles over 40 examples" in words
    assert "The most exposed classes" in words


@pytest.mark.usefixtures("undrawn")
def test_an_unproven_verdict_is_an_instruction_not_to_send(report: LeakageReport):
    verdict = dataclasses.replace(report.verdict, decision="unproven", reasons=("no attack works",))
    page = render_html(dataclasses.replace(report, verdict=verdict))
    assert "<h2>unproven</h2>" in page
    assert "nothing proves that it is safe" in page
    assert ".banner.unproven" in page


def test_the_prediction_is_not_called_a_limit(page: str):
    assert "perfect attacker" not in page
    assert "One who also knows what pictures look like can come" in page
