"""A pass over a data set: right per example, the same however it is cut, interrupted or fed."""

import io
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import gradguard as gg
from gradguard import InputError, Survey, survey
from gradguard.defenses import GaussianNoise, PriorNoise, Pruning, SmallEigenspaceNoise
from gradguard.report.survey_report import DTYPES, EXPOSED_IS_HIGH, NO_CLASS
from gradguard.survey import _Measurement, _seed_of
from gradguard.zoo.models import digits_convnet
from gradguard.zoo.pictures import Pictures
from references import dense_influence, dense_jacobian, flat_gradient

MODULE = sys.modules["gradguard.survey"]  # the package's own `survey` is the function
MEASUREMENT = sys.modules["gradguard.evaluation.measurement"]
NOISE = GaussianNoise(std=0.01)


@pytest.fixture(scope="module")
def some(digit_pictures):
    """Twelve digits in float64."""
    p = digit_pictures
    return Pictures(p.images[:12].double(), p.labels[:12], p.class_names, p.name)


@pytest.fixture
def run(convnet, cross_entropy, some):
    """`survey` with everything but the options at hand."""

    def run(data=some, **options):
        options = {"defense": NOISE, "batch_size": 5, "progress": False} | options
        return survey(options.pop("model", convnet), options.pop("loss_fn", cross_entropy), data, **options)

    return run


@pytest.fixture(scope="module")
def whole(some, tmp_path_factory):
    """The plain survey of all twelve, and its checkpoint: what `run()` gives, made once."""
    torch.manual_seed(0)  # as the model of `run`
    path = tmp_path_factory.mktemp("whole") / "survey.safetensors"
    model = digits_convnet().double()
    found = survey(model, nn.CrossEntropyLoss(), some, defense=NOISE, batch_size=5, progress=False, checkpoint=path)
    return found, path


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the whole survey's checkpoint."""
    return shutil.copy(whole[1], tmp_path / "survey.safetensors")


def assert_same(a: Survey, b: Survey, *, exactly=True):
    assert len(a) == len(b)
    for name in DTYPES:
        x, y = getattr(a, name), getattr(b, name)
        if exactly:
            assert torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0)) if x.is_floating_point() else torch.equal(x, y)
        else:
            torch.testing.assert_close(x, y, rtol=1e-7, atol=0, equal_nan=True)


# ---------------------------------------------------------------------- the numbers


def test_every_column_is_that_of_a_plain_loop(run, convnet, cross_entropy, some):
    found = run(exact=True, lanczos_steps=64)
    assert found.measure == "predicted_error"
    for i in range(len(some)):
        x, y = some.images[i : i + 1], some.labels[i : i + 1]
        gradient = gg.LossGradient(convnet, cross_entropy)(x, y)
        generator = torch.Generator().manual_seed(_seed_of(0, i))
        torch.randn(64, generator=generator, dtype=torch.float64)  # the start vector
        delta = NOISE.perturbation(gradient, generator=generator)
        delta = torch.cat([delta[n].flatten() for n, _ in convnet.named_parameters()])
        jacobian = dense_jacobian(convnet, cross_entropy, x, y)
        largest = torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1]
        projection = (jacobian @ delta).norm()
        expected = {
            "label": y[0],
            "loss": cross_entropy(convnet(x), y),
            "gradient_norm": flat_gradient(convnet, cross_entropy, x, y).norm(),
            "noise_norm": delta.norm(),
            "projection": projection,
            "lambda_max": largest,
            "lower_bound": projection / largest,
            "predicted_error": dense_influence(jacobian, delta).norm(),
        }
        for name, value in expected.items():
            assert getattr(found, name)[i].item() == pytest.approx(value.item(), rel=1e-6), name
    assert found.converged.all()
    assert (found.lower_bound <= found.predicted_error).all()


def test_twenty_steps_are_close_to_all_of_them(run, whole):
    some, full = whole[0], run(lanczos_steps=64)
    torch.testing.assert_close(some.lambda_max, full.lambda_max, rtol=1e-4, atol=0)
    torch.testing.assert_close(some.lower_bound, full.lower_bound, rtol=1e-2, atol=0)
    assert (some.lower_bound <= full.lower_bound * (1 + 1e-9)).all()
    assert some.measure == "lower_bound"
    assert some.predicted_error.isnan().all()


@pytest.mark.parametrize(
    "defense",
    [NOISE, GaussianNoise(noise_ratio=0.5), Pruning(fraction=0.5), PriorNoise(), SmallEigenspaceNoise()],
    ids=repr,
)
def test_the_batch_size_changes_nothing(run, defense):
    alone, together = run(defense=defense, batch_size=1), run(defense=defense, batch_size=12)
    assert_same(alone, together, exactly=False)
    assert (alone.noise_norm > 0).all()


def test_the_batch_size_changes_nothing_about_the_predicted_error(run):
    assert_same(run(exact=True, batch_size=1), run(exact=True, batch_size=12), exactly=False)


def test_large_inputs_go_through_the_iterative_solver(run, monkeypatch):
    monkeypatch.setattr(MEASUREMENT, "DENSE_SIZE", 1)
    iterative = run(exact=True)
    monkeypatch.undo()
    torch.testing.assert_close(iterative.predicted_error, run(exact=True).predicted_error, rtol=1e-5, atol=0)


def test_an_example_has_its_own_random_numbers(run):
    first, other = run(), run(seed=1)
    assert not torch.isclose(first.projection, other.projection, rtol=1e-3).any()
    twins = run((torch.zeros(3, 1, 8, 8).double() + 0.5, torch.zeros(3, dtype=torch.int64)))
    assert len(twins.projection.unique()) == 3
    torch.testing.assert_close(twins.loss, twins.loss[:1].expand(3))
    assert len({_seed_of(s, i) for s in range(30) for i in range(30)}) == 900


def test_a_sum_loss_is_the_same_for_one_example(run):
    assert_same(run(), run(loss_fn=nn.CrossEntropyLoss(reduction="sum")), exactly=False)


def test_the_model_is_left_alone(run, convnet):
    before = {n: p.clone() for n, p in convnet.named_parameters()}
    run()
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in convnet.named_parameters())


def test_an_example_without_a_trace_is_not_the_most_exposed(run, convnet):
    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = convnet

        def forward(self, x):
            return self.inner(x * (x.mean(dim=(1, 2, 3), keepdim=True) < 0.9))

    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    images[1] = 1.0
    found = run((images, torch.tensor([0, 0, 0])), model=Blind(), exact=True)
    assert found.error[1] == math.inf
    assert found.converged.all()
    assert found.worst(1)[0].index != 1
    assert math.isfinite(found.spread)
    assert json.loads(found.to_json())["examples"]["lower_bound"][1] is None


def test_binary_labels_and_targets_without_a_class(run, some):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    binary = (some.labels[:, None] % 2).double()
    found = run((some.images, binary), model=model, loss_fn=nn.BCEWithLogitsLoss())
    assert found.label.tolist() == (some.labels % 2).tolist()
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    soft = run((some.images, torch.rand(12, 2).double()), model=wide, loss_fn=nn.MSELoss())
    assert set(soft.label.tolist()) == {NO_CLASS}
    assert [row.name for row in soft.per_class()] == ["no class"]


# ---------------------------------------------------------------------- forms of data


class Items(Dataset):
    """The pictures one by one, counting them."""

    def __init__(self, pictures, fail_at=None, error=KeyboardInterrupt):
        self.pictures, self.fail_at, self.error, self.read = pictures, fail_at, error, []

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        if index == self.fail_at:
            raise self.error
        self.read.append(index)
        return self.pictures.images[index], int(self.pictures.labels[index])


def test_every_form_of_data_gives_the_same(run, some):
    class Stream(IterableDataset):
        def __iter__(self):
            return zip(some.images, some.labels, strict=True)

    pair = (some.images, some.labels)
    forms = [
        pair,
        list(pair),
        TensorDataset(*pair),
        Items(some),
        DataLoader(TensorDataset(*pair), batch_size=7),
        [(some.images[:2], some.labels[:2]), (some.images[2:], some.labels[2:])],
        ((some.images[i : i + 3], some.labels[i : i + 3]) for i in range(0, 12, 3)),
        [(some.images.numpy(), some.labels.numpy())],
        Stream(),
    ]
    expected = run(some)
    for form in forms:
        assert_same(expected, run(form))
    assert expected.class_names == some.class_names
    assert run(pair, class_names=("zero", "one")).class_name(1) == "one"


def test_the_first_examples_only(run, some):
    data = Items(some)
    found = run(data, examples=7)
    assert len(found) == 7
    assert data.read == list(range(7))
    assert_same(found, run().first(7), exactly=False)
    assert len(run(examples=100)) == 12


# ---------------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize(
    ("error", "at"), [*((KeyboardInterrupt, at) for at in (0, 3, 5, 9, 11)), (RuntimeError, 5), (OSError, 5)]
)
def test_an_interrupted_survey_goes_on_and_ends_as_an_uninterrupted_one(run, some, whole, tmp_path, error, at):
    path = tmp_path / "survey.safetensors"
    with pytest.raises(error):
        run(Items(some, fail_at=at, error=error), checkpoint=path)
    whole_chunks = at // 5 * 5
    assert path.exists() == (whole_chunks > 0)
    if whole_chunks:
        stopped = Survey.load(path)
        assert (len(stopped), stopped.complete) == (whole_chunks, False)
    assert_same(run(Items(some), checkpoint=path), whole[0])
    assert Survey.load(path).complete


def test_what_is_measured_is_not_measured_again(run, whole, tmp_path, monkeypatch):
    path = tmp_path / "survey.safetensors"
    first = run(checkpoint=path, examples=10)
    measured = []
    plain = _Measurement.__call__

    def counting(self, inputs, targets, start):
        measured.append((start, len(inputs)))
        return plain(self, inputs, targets, start)

    monkeypatch.setattr(_Measurement, "__call__", counting)
    assert_same(run(checkpoint=path, examples=10), first)
    assert measured == []
    assert_same(run(checkpoint=path), whole[0])
    assert measured[0] == (10, 2)
    measured.clear()
    # Fewer than are there: the checkpoint keeps them all.
    assert len(run(checkpoint=path, examples=4)) == 4
    assert measured == []
    assert len(Survey.load(path)) == 12


def test_another_batch_size_may_go_on(run, some, whole, tmp_path):
    path = tmp_path / "survey.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(Items(some, fail_at=9), checkpoint=path)
    assert_same(run(checkpoint=path, batch_size=4), whole[0], exactly=False)


def test_a_finished_survey_takes_in_new_examples(run, digit_pictures, some, finished):
    more = Pictures(digit_pictures.images[:14].double(), digit_pictures.labels[:14], some.class_names, "more")
    assert_same(run(more, checkpoint=finished), run(more), exactly=False)


def test_checkpoints_are_private_and_leave_nothing_beside_them(run, tmp_path):
    run(checkpoint=tmp_path / "new" / "survey.safetensors")
    (path,) = (tmp_path / "new").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_checkpoint_is_written_while_the_survey_runs(run, some, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "SAVE_EVERY", -1.0)
    path = tmp_path / "survey.safetensors"
    seen = []

    class Watching(Items):
        def __getitem__(self, index):
            seen.append(len(Survey.load(path)) if path.exists() else 0)
            return super().__getitem__(index)

    run(Watching(some), checkpoint=path)
    assert seen[6] == 5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"defense": GaussianNoise(std=0.02)}, "std=0.02"),
        ({"exact": True}, "exact False there, True here"),
        ({"lanczos_steps": 30}, "lanczos_steps 20 there, 30 here"),
        ({"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss CrossEntropyLoss"),
        ({"loss_fn": nn.CrossEntropyLoss(weight=torch.ones(10).double())}, "loss CrossEntropyLoss"),
        ({"model": digits_convnet().double()}, "model Sequential"),
        ({"model": digits_convnet(activation="sigmoid").double()}, "model Sequential"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_survey_is_refused(run, finished, change, named):
    before = finished.read_bytes()
    with pytest.raises(InputError, match="of another survey") as caught:
        run(checkpoint=finished, **change)
    assert named in str(caught.value)
    assert "delete this one" in str(caught.value)
    assert finished.read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused(run, some, tmp_path):
    path = tmp_path / "survey.safetensors"
    run(checkpoint=path)
    images, labels = some.images.clone(), some.labels.clone()
    images[8, 0, 3, 3] = 0.123
    labels[6] = 1
    for other, index in (((images, some.labels), 8), ((some.images, labels), 6)):
        with pytest.raises(InputError, match=f"of other data: example {index} is not"):
            run(other, checkpoint=path)
    with pytest.raises(InputError, match="holds 12 examples and the data only 9"):
        run((some.images[:9], some.labels[:9]), checkpoint=path)


def test_a_shuffled_loader_is_noticed(run, some, tmp_path):
    path = tmp_path / "survey.safetensors"
    run(checkpoint=path)
    loader = DataLoader(
        TensorDataset(some.images, some.labels), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    with pytest.raises(InputError, match="shuffle=False"):
        run(loader, checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04nonsense", b"PK\x03\x04"])
def test_a_file_that_is_no_survey_is_refused_and_kept(run, tmp_path, content):
    path = tmp_path / "survey.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a survey that gradguard wrote"):
        run(checkpoint=path)
    assert path.read_bytes() == content


def test_other_safetensors_and_folders_are_refused(run, convnet, tmp_path):
    path = tmp_path / "gradient.safetensors"
    gg.save_gradient(path, dict(convnet.named_parameters()))
    with pytest.raises(InputError, match="is not a survey that gradguard wrote"):
        Survey.load(path)
    with pytest.raises(InputError, match="is a folder"):
        run(checkpoint=tmp_path)
    with pytest.raises(InputError, match="There is no survey file"):
        Survey.load(tmp_path / "missing")


def test_a_broken_column_is_refused(run, tmp_path):
    found = run()
    object.__setattr__(found, "loss", found.loss[:3])
    found.save(tmp_path / "survey.safetensors")
    with pytest.raises(InputError, match="unequal length"):
        Survey.load(tmp_path / "survey.safetensors")


def test_save_and_load(run, tmp_path):
    found = run()
    found.save(tmp_path / "survey.safetensors")
    read = Survey.load(tmp_path / "survey.safetensors")
    assert_same(found, read)
    assert (read.conditions, read.input_shape, read.class_names) == (
        found.conditions,
        found.input_shape,
        found.class_names,
    )
    assert read.to_dict() == found.to_dict()


# ---------------------------------------------------------------------- bad input


def test_bad_examples_are_named(run, some):
    images, labels = some.images.clone(), some.labels.clone()
    images[7, 0, 0, 0] = math.nan
    labels[8] = 10
    with pytest.raises(InputError, match="Example 7 of the data: `inputs` hold NaN"):
        run((images, some.labels))
    with pytest.raises(InputError, match="Example 8 of the data: Label 10 is out of range"):
        run((some.images, labels))
    labels[8] = -100
    with pytest.raises(InputError, match="Example 8 of the data: its loss is nan"):
        run((some.images, labels))


def test_a_bad_example_in_memory_is_found_before_anything_is_measured(run, some, tmp_path):
    labels = some.labels.clone()
    labels[11] = 10
    with pytest.raises(InputError, match="Example 11"):
        run((some.images, labels), checkpoint=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_bad_example_costs_nothing_that_was_measured(run, some, tmp_path):
    images = some.images.clone()
    images[7] = math.inf
    with pytest.raises(InputError, match="Example 7"):
        run(TensorDataset(images, some.labels), checkpoint=tmp_path / "s")
    assert len(Survey.load(tmp_path / "s")) == 5
    assert_same(run(checkpoint=tmp_path / "s"), run())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)), "hold no example"),
        ([], "hold no example"),
        (TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0)), "hold no example"),
        ((torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.int64)), "one target per example"),
        (torch.zeros(3, 1, 8, 8), "got Tensor"),
        ("digits", "got str"),
        (7, "got int"),
        ([torch.zeros(1, 8, 8)], "must give pairs"),
        ([("a picture", 3)], "transform to tensors"),
        ((torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)), "floating point"),
        ((torch.zeros(3), torch.zeros(3, dtype=torch.int64)), "got"),
        (
            [(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])), (torch.zeros(2, 1, 9, 9), torch.tensor([0, 1]))],
            "one shape",
        ),
    ],
)
def test_data_that_cannot_be_measured(run, data, message):
    with pytest.raises(InputError, match=message):
        run(data)


@pytest.mark.parametrize("option", ["examples", "batch_size", "lanczos_steps", "max_iterations"])
def test_options_are_checked(run, option):
    with pytest.raises(InputError, match=f"`{option}` must be at least 1, got 0"):
        run(**{option: 0})


def test_a_survey_needs_noise(run):
    with pytest.raises(InputError, match="`defense` must be the noise"):
        run(defense=None)


def test_a_model_in_training_mode_is_refused(run):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).double().train()
    with pytest.raises(gg.UnsupportedModelError, match="Dropout"):
        run(model=model)
    assert len(run(model=model, train_mode="eval")) == 12


# ---------------------------------------------------------------------- what follows


@pytest.fixture
def digits_survey(digit_pictures, cross_entropy):
    torch.manual_seed(0)
    p = digit_pictures
    names = ("[bold]zero[/bold]", "<b>one</b>", *p.class_names[2:])
    data = Pictures(p.images[:100], p.labels[:100], names, p.name)
    return survey(digits_convnet(), cross_entropy, data, progress=False)


def test_per_class_is_that_of_a_plain_loop(digits_survey, digit_pictures):
    labels = digit_pictures.labels[:100].tolist()
    for measure in [m for m in EXPOSED_IS_HIGH if m != "predicted_error"]:
        column = getattr(digits_survey, measure).tolist()
        rows = digits_survey.per_class(measure)
        assert sum(row.count for row in rows) == 100
        for row in rows:
            mine = sorted(v for v, y in zip(column, labels, strict=True) if y == row.label)
            assert row.count == len(mine)
            assert row.mean == pytest.approx(sum(mine) / len(mine))
            assert row.median == mine[(len(mine) - 1) // 2]
            assert row.quantiles[0.05] == mine[math.floor(0.05 * (len(mine) - 1))]
            assert (row.quantiles[0.0], row.quantiles[1.0]) == (mine[0], mine[-1])
            assert row.worst == (mine[-1] if EXPOSED_IS_HIGH[measure] else mine[0])
            assert column[row.worst_example] == row.worst
            assert labels[row.worst_example] == row.label
        order = [row.worst for row in rows]
        assert order == sorted(order, reverse=EXPOSED_IS_HIGH[measure])
    with pytest.raises(InputError, match="`measure` must be one of"):
        digits_survey.per_class("label")


def test_the_worst_come_first(digits_survey):
    errors = digits_survey.error
    assert [row.index for row in digits_survey.worst(7)] == errors.argsort(stable=True)[:7].tolist()
    assert digits_survey.worst(1)[0].lower_bound == errors.min()
    assert digits_survey.worst(1, "lambda_max")[0].lambda_max == digits_survey.lambda_max.max()
    assert len(digits_survey.worst(1000)) == 100
    assert digits_survey.spread == pytest.approx((errors.max() / errors.min()).item())
    torch.testing.assert_close(digits_survey.per_element, errors / 8)
    assert digits_survey.quantiles(at=(0.25,)) == {0.25: errors.sort().values[24].item()}


def test_to_dict_is_plain_and_complete(digits_survey):
    found = json.loads(digits_survey.to_json())
    assert found == json.loads(json.dumps(digits_survey.to_dict()))
    assert (found["count"], found["measure"], found["complete"]) == (100, "lower_bound", True)
    assert len(found["examples"]["lambda_max"]) == 100
    assert len(found["classes"]["lower_bound"]) == 10
    assert found["worst"][0]["index"] == digits_survey.worst(1)[0].index
    assert "digest" not in found["examples"]
    assert "examples" not in digits_survey.to_dict(examples=False)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_names_the_exposed(digits_survey, width):
    out = io.StringIO()
    digits_survey.print(Console(file=out, width=width))
    text = out.getvalue()
    worst = digits_survey.worst(1)[0]
    assert f"Example {worst.index} (class {worst.name})" in text
    assert "[bold]zero[/bold]" in text
    assert "times the most exposed one's" in text
    assert max(len(line) for line in text.splitlines()) <= width
    assert all(word in text for word in ("examples", "worst", "5%", "median"))


def test_a_stopped_survey_says_so(run, some, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Items(some, fail_at=9), checkpoint=tmp_path / "s")
    out = io.StringIO()
    Survey.load(tmp_path / "s").print(Console(file=out, width=100))
    assert "stopped after 5 examples" in out.getvalue()


def test_one_example_and_one_class(run, some):
    found = run((some.images[:1], some.labels[:1]))
    out = io.StringIO()
    found.print(Console(file=out, width=80))
    assert found.spread == 1.0
    assert len(found.plot().axes) == 2


def test_the_plot_has_every_class_and_its_worst(digits_survey):
    left, right = digits_survey.plot().axes
    assert len(left.get_yticklabels()) == 10
    assert left.get_xscale() == right.get_yscale() == "log"
    rings = [line.get_xdata()[0] for line in left.lines if line.get_markerfacecolor() == "none"]
    np.testing.assert_allclose(rings, [row.worst for row in digits_survey.per_class()])


def test_the_page_is_private_escaped_and_without_pictures_of_examples(digits_survey, tmp_path):
    page = digits_survey.save_html(tmp_path / "out" / "index.html")
    text = page.read_text(encoding="utf-8")
    assert "<b>one</b>" not in text
    assert "&lt;b&gt;one&lt;/b&gt;" in text
    assert text.count("data:image/png") == 2  # one figure, for light and dark pages
    assert {p.name for p in page.parent.iterdir()} == {"index.html", "survey.png"}
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in page.parent.iterdir())
    with pytest.raises(InputError, match="is a folder"):
        digits_survey.save_html(tmp_path)
