"""Initialisations side by side on real digits, against one picture at a time with a dense `J`."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from gradguard import InputError, LossGradient
from gradguard.benchmark import INITIALISATIONS, InitialisationComparison, compare_initialisations
from gradguard.benchmark.initialisation import normal_, uniform_
from gradguard.zoo.models import fcn, resnet

MODELS = {
    "wide": partial(fcn, (64, 24, 10), activation="sigmoid", bias=True),
    "narrow": partial(fcn, (64, 12, 10), activation="sigmoid", bias=True),
}


def compare(batch, models=MODELS, **options) -> InitialisationComparison:
    return compare_initialisations(models, nn.CrossEntropyLoss(), *batch, **options)


def kept_models(batch, **options):
    """The comparison of one architecture, and the very models that it measured, in its order."""
    kept = []

    def noticed(model, generator):
        uniform_(model, generator)
        kept.append(model)

    return compare(batch, {"wide": MODELS["wide"]}, initialisations={"uniform": noticed}, **options), kept


def dense_jacobian(function, x, y):
    """`J^T` of one picture by reverse over reverse: `(P, D)`."""

    def gradient(z):
        g = torch.func.grad(function.loss)(function.parameters(), z[None], y[None])
        return torch.cat([v.flatten() for v in g.values()])

    return torch.func.jacrev(gradient)(x).flatten(1)


def test_every_measure_is_that_of_each_picture_alone(batch):
    found, kept = kept_models(batch, seeds=(3, 4), noise_std=1e-3)
    (row,) = found.rows
    inputs, targets = batch
    place = 0
    for seed, model in zip((3, 4), kept, strict=True):
        function = LossGradient(model, nn.CrossEntropyLoss(), dtype=torch.float64)
        draw = torch.Generator().manual_seed(seed)
        delta = torch.cat(
            [1e-3 * torch.randn(p.shape, generator=draw, dtype=torch.float64).flatten() for p in model.parameters()]
        )
        for x, y in zip(inputs, targets, strict=True):
            transposed = dense_jacobian(function, x, y)
            largest = torch.linalg.matrix_norm(transposed, ord=2).item() ** 2
            projected = (transposed.T @ delta).norm().item()
            gradient = function(x[None], y[None])
            assert row.lambda_max[place] == pytest.approx(largest, rel=1e-3)
            assert row.projected[place] == pytest.approx(projected, rel=1e-9)
            # Below the quotient, by the tolerance that the bound's sure denominator has.
            assert row.bound[place] == pytest.approx(projected / largest, rel=1e-2)
            assert row.bound[place] <= projected / largest * (1 + 1e-9)
            exact = torch.linalg.lstsq(transposed, delta[:, None], driver="gelsd").solution.norm().item()
            assert row.exact[place] == pytest.approx(exact, rel=1e-6)
            length = torch.cat([g.flatten() for g in gradient.values()]).norm().item()
            assert row.gradient_norm[place] == pytest.approx(length, rel=1e-9)
            place += 1
    assert row.converged == 1
    assert row.num_parameters == 64 * 24 + 24 + 24 * 10 + 10


def test_relative_noise_is_scaled_to_each_gradient(batch):
    fixed, _ = kept_models(batch, seeds=(0,), noise_std=1.0)
    relative, _ = kept_models(batch, seeds=(0,), noise_ratio=0.5)
    size = fixed.rows[0].num_parameters ** 0.5
    (a,), (b,) = fixed.rows, relative.rows
    for measure in ("projected", "bound", "exact"):
        for one, other, length in zip(getattr(a, measure), getattr(b, measure), a.gradient_norm, strict=True):
            assert other == pytest.approx(one * 0.5 * length / size, rel=1e-9)


def test_rows_ranking_table_and_figure(batch, capsys, monkeypatch):
    found = compare(batch, seeds=range(2))
    names = ["uniform", "normal", "kaiming", "xavier"]
    assert [(r.model, r.initialisation) for r in found.rows] == [(m, n) for m in MODELS for n in names]
    assert all(len(r.bound) == len(r.exact) == 2 * len(batch[0]) for r in found.rows)
    assert all(b <= e for r in found.rows for b, e in zip(r.bound, r.exact, strict=True))

    for measure, rising in (("bound", True), ("exact", True), ("lambda_max", False)):
        medians = [r.median(measure) for r in found.ranking(measure)]
        assert medians == sorted(medians, reverse=not rising)
    # Zhang et al. 2023: weights uniform on (-0.5, 0.5) tell most.
    assert found.ranking("lambda_max")[0].initialisation == "uniform"

    monkeypatch.setenv("COLUMNS", "160")
    found.print()
    printed = capsys.readouterr().out
    assert all(word in printed for word in (*names, *MODELS, "lambda_max", "0.00316"))
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"][0]["initialisation"] == "uniform"

    figure = found.plot()
    assert [a.get_xlabel() for a in figure.axes][-1].startswith("I2F, ")
    assert len(figure.axes) == 4
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [r.name for r in found.rows]
    assert len(compare(batch, seeds=(0,), exact=False).plot().axes) == 3


def test_the_same_seeds_give_the_same_and_nothing_global_is_touched(batch):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = compare(batch, seeds=(5,))
    assert torch.equal(torch.get_rng_state(), before)
    assert compare(batch, seeds=(5,)) == first
    assert compare(batch, seeds=(6,)) != first
    # The neighbours in a chunk decide on the steps, and these on how tight the sure denominator is.
    assert compare(batch, seeds=(5,), chunk_size=3).rows[0].bound == pytest.approx(first.rows[0].bound, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("uniform", (1 / 12**0.5, 1 / 12**0.5)),
        ("normal", (0.1, 0.1)),
        ("kaiming", ((2 / 200) ** 0.5, (2 / 300) ** 0.5)),
        ("xavier", ((2 / 500) ** 0.5, (2 / 400) ** 0.5)),
    ],
)
def test_initialisers_draw_what_they_say(name, deviation):
    model = fcn((200, 300, 100), bias=True)
    INITIALISATIONS[name](model, torch.Generator().manual_seed(0))
    for layer, expected in zip((model[1], model[3]), deviation, strict=True):
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.03)
        if name in ("kaiming", "xavier"):
            assert not layer.bias.any()
        else:
            assert layer.bias.std().item() == pytest.approx(expected, rel=0.2)


def test_normalisation_layers_keep_their_own(batch):
    model = resnet(10, width=2, in_channels=1)
    normal_(model, torch.Generator().manual_seed(0))
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    # Measured in eval mode, as built.
    built = partial(resnet, 10, width=2, in_channels=1, activation="softplus")
    (row,) = compare((batch[0][:1], batch[1][:1]), {"r": built}, initialisations=("as built",), seeds=(0,)).rows
    assert row.bound[0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initialisations": ("uniform", "orthogonal")}, r"must be among .* got 'orthogonal'"),
        ({"initialisations": ()}, "`initialisations` must not be empty"),
        ({"models": {}}, "`models` and `seeds` must not be empty"),
        ({"seeds": ()}, "`models` and `seeds` must not be empty"),
        ({"noise_std": 1.0, "noise_ratio": 1.0}, "at most one of `noise_std` and `noise_ratio`"),
        ({"noise_std": -1.0}, "`std` must be positive and finite, got -1.0"),
        ({"noise_ratio": 0.0}, "`noise_ratio` must be positive and finite, got 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(batch, options, message):
    with pytest.raises(InputError, match=message):
        compare(batch, **options)


def test_ranking_refuses_an_unknown_measure():
    empty = InitialisationComparison(rows=(), noise="", seeds=(), examples=0)
    with pytest.raises(InputError, match="`measure` must be"):
        empty.ranking("risk")
