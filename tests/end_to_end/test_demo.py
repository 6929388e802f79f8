"""The demo, run once: what it promises on the bundled digits."""

import json

import pytest

from gradguard.demo import Demo, summary


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report = Demo(attacked=1).run(folder)
    return json.loads(json.dumps(summary(report), allow_nan=False)), folder


def test_predicted_and_observed_influence_agree(outcome):
    numbers, _ = outcome
    pairs = list(zip(numbers["influence_predicted"], numbers["influence_observed"], strict=True))
    in_range = [pair for pair, inside in zip(pairs, numbers["influence_in_range"], strict=True) if inside]
    assert len(pairs) >= 16
    assert len(in_range) >= 12
    assert all(abs(observed / predicted - 1) < 0.1 for predicted, observed in in_range)


def test_attacks_succeed_without_and_fail_with_the_defense(outcome):
    numbers, _ = outcome
    assert min(numbers["attacks"]["DLG"]["without"]) > 60
    assert min(numbers["attacks"]["RGAP"]["without"]) > 60
    assert all(max(cases["with"]) < 22 for cases in numbers["attacks"].values())


def test_all_keys_are_there(outcome):
    numbers, _ = outcome
    assert set(numbers["labels"]["without"]) == {"LeAcc", "LnAcc", "IRec"}
    assert set(numbers["accuracy"]) == {"without", "with"}
    assert numbers["accuracy"]["with"] > 0.8


def test_the_page_and_its_pictures_are_written(outcome):
    _, folder = outcome
    assert (folder / "index.html").stat().st_mode & 0o777 == 0o600
    assert {p.name for p in folder.glob("*.png")} >= {
        "reconstructions.png",
        "spectrum.png",
        "attacks.png",
        "influence.png",
    }
