"""Ranks against dense matrices, and the table that the paper's models must give."""

import io
import json

import matplotlib
import pytest
import torch
from torch import nn

from gradguard.chain import LayerSystem, walk
from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.leakage.constraint_rank import ConstraintRank
from gradguard.leakage.rank import _blocking_filters, rank_analysis, rank_check
from gradguard.zoo import models

# DESIGN.md, section 4.1: unknowns, outputs, weights, rank W, rank K, rank of both, deficit.
CNN6 = {
    "0": (3072, 3468, 576, 3072, 576, 3072, 0),
    "2": (3468, 2916, 3888, 2916, 2928, 3468, 0),
    "4": (2916, 2916, 11664, 2916, 2916, 2916, 0),
    "6": (2916, 2916, 11664, 2916, 2916, 2916, 0),
    "8": (2916, 1600, 20736, 1600, 2916, 2916, 0),
    "10": (1600, 3200, 73728, 1600, 1600, 1600, 0),
    "13": (3200, 1, 3200, 1, 3200, 3200, 0),
}
CNN6_D_SECOND = (3468, 1620, 2160, 1620, 1968, 3188, 280)


def numbers(row):
    return (
        row.unknowns,
        row.outputs,
        row.weights,
        row.rank_weights,
        row.rank_gradients,
        row.rank,
        row.deficit,
    )


# ---------------------------------------------------------------------- the paper's models


def test_cnn6_is_determined_layer_by_layer():
    found = rank_analysis(models.cnn6(), (3, 32, 32))
    assert {row.name: numbers(row) for row in found.layers} == CNN6
    assert {row.verdict for row in found.layers} == {"closed form"}
    assert found.verdict == "closed form"
    assert found.blocking == ()


def test_cnn6_d_owes_280_constraints_that_only_an_optimisation_can_use():
    found = rank_analysis(models.cnn6(second_channels=20), (3, 32, 32))
    row = found.layers[1]
    assert numbers(row) == CNN6_D_SECOND
    assert [row.virtual_constraints for row in found.layers] == [0, 396, 0, 1296, 1296, 0, 1600]
    assert row.verdict == found.verdict == "optimisation only"
    assert found.blocking == (row,)
    assert row.method == "exact"


def test_fcn3_is_determined():
    found = rank_analysis(models.fcn((784, 1000, 100, 1)), (1, 28, 28))
    assert [numbers(row)[3:] for row in found.layers] == [(784, 784, 784, 0), (100, 1000, 1000, 0), (1, 100, 100, 0)]
    assert [row.virtual_constraints for row in found.layers] == [0, 216, 0]
    assert [row.blocking_filters for row in found.layers] == [None, None, None]


# ---------------------------------------------------------------------- against dense matrices

LAYERS = {
    "too few filters": (nn.Conv2d(4, 3, 3, padding=1, bias=False), (4, 6, 6)),
    "stride, padding": (nn.Conv2d(3, 5, 3, stride=2, padding=1), (3, 7, 7)),
    "stride beyond the kernel": (nn.Conv2d(2, 6, 1, stride=2), (2, 6, 6)),
    "more padding than the picture needs": (nn.Conv2d(3, 9, 3, padding=2), (3, 4, 4)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, stride=2), (4, 7, 7)),
    "depthwise": (nn.Conv2d(3, 3, 3, groups=3, padding=1), (3, 5, 5)),
    "dilation": (nn.Conv2d(2, 2, 3, dilation=2), (2, 7, 7)),
    "tall": (nn.Conv2d(2, 40, 3), (2, 5, 5)),
    "linear": (nn.Linear(6, 4), (6,)),
}


def dense_rank(rows):
    return int(torch.linalg.matrix_rank(rows)) if len(rows) else 0


@pytest.mark.parametrize("sent", [True, False], ids=["sent", "frozen"])
@pytest.mark.parametrize("name", LAYERS)
def test_ranks_are_those_of_the_dense_matrices(name, sent):
    module, shape = LAYERS[name]
    layer = walk(LossGradient(module, nn.MSELoss(), dtype=torch.float64), shape).layers[0]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
    k = torch.randn(layer.output_shape, generator=generator, dtype=torch.float64)
    system = LayerSystem.of(layer, weight, k, k, weight if sent else None)
    identity = torch.eye(layer.unknowns, dtype=torch.float64)
    dense = torch.stack([system.operator.matvec(e[None])[0] for e in identity], dim=1)
    found = ConstraintRank(layer, weight, k, sent=sent, limit=1000)
    assert found.rank_weights == dense_rank(dense[: layer.outputs])
    assert found.rank_gradients == dense_rank(dense[layer.outputs :])
    assert found.rank == dense_rank(dense)
    assert found.rank <= layer.rank_bound(gradients=sent)
    # The probes know nothing of matrices.
    deficit = found.probed_deficit(30, generator)
    spread = (2 * (layer.unknowns - found.rank) / 30) ** 0.5
    assert deficit == pytest.approx(layer.unknowns - found.rank, abs=4 * spread)


def test_what_is_too_large_to_form_is_probed_and_said_to_be():
    model = nn.Sequential(nn.Conv2d(4, 1, 3, padding=1, bias=False), nn.Tanh(), nn.Conv2d(1, 8, 3), nn.Flatten())
    exact, probed = (rank_analysis(model, (4, 6, 6), max_unknowns=n, probes=50) for n in (1000, 10))
    assert [row.method for row in exact.layers] == ["exact", "exact"]
    assert [row.method for row in probed.layers] == ["estimated", "exact"]  # nothing missing is exact
    assert exact.layers[0].deficit > 0
    assert probed.layers[0].deficit == pytest.approx(exact.layers[0].deficit, abs=8)
    assert probed.layers[1].deficit == exact.layers[1].deficit == 0
    assert probed.layers[0].rank_weights is None


def test_a_probe_that_does_not_converge_computes_nothing_but_the_count_still_counts(monkeypatch):
    monkeypatch.setattr("gradguard.leakage.constraint_rank._MOST_ITERATIONS", 2)
    model = nn.Sequential(nn.Conv2d(4, 1, 3, stride=2), nn.Tanh(), nn.Conv2d(1, 8, 3, padding=1), nn.Flatten())
    found = rank_analysis(model, (4, 9, 9), max_unknowns=10)
    assert [(row.rank, row.deficit, row.method) for row in found.layers] == [(None, None, "not computed")] * 2
    assert [row.verdict for row in found.layers] == ["not recoverable", "unknown"]
    assert found.verdict == "not recoverable"


# ---------------------------------------------------------------------- verdicts


def test_too_few_weights_in_the_first_layer_are_not_recoverable():
    model = nn.Sequential(nn.Conv2d(3, 1, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(49, 2))
    found = rank_analysis(model, (3, 16, 16))
    first = found.layers[0]
    assert first.deficit == 768 - 49 - 27 + 1  # one filter: one equation is there twice
    assert first.virtual_constraints == 0
    assert found.verdict == first.verdict == "not recoverable"


@pytest.mark.parametrize(("filters", "deficit"), [(2, 4), (3, 0)])
def test_blocking_filters_are_the_edge_of_the_count(filters, deficit):
    """144 unknowns, 36 outputs and 36 weights a filter: two filters give 144 - 2^2 equations, three are enough."""
    found = rank_analysis(nn.Sequential(nn.Conv2d(4, filters, 3, padding=1), nn.Flatten()), (4, 6, 6)).layers[0]
    assert found.blocking_filters == 2
    assert found.deficit == deficit


def test_cnn6_d_is_cnn6_at_the_edge():
    layer = walk(LossGradient(models.cnn6(), nn.BCEWithLogitsLoss()), (3, 32, 32)).layers[1]
    assert _blocking_filters(layer, True) == 20


def test_relu_is_let_through_and_noted():
    model = models.lenet(activation="relu")
    found = rank_analysis(model, (1, 28, 28))
    assert [bool(row.note) for row in found.layers] == [True, True, True, True, False]
    assert "ReLU is not one-to-one" in found.layers[0].note
    assert rank_analysis(models.lenet(), (1, 28, 28)).layers[0].note == ""


def test_the_architecture_counts_and_not_the_weights():
    zero = models.digits_convnet()
    with torch.no_grad():
        for parameter in zero.parameters():
            parameter.zero_()
    assert rank_analysis(zero, (1, 8, 8)) == rank_analysis(models.digits_convnet(), (1, 8, 8))


def test_the_same_generator_gives_the_same_ranks_and_the_global_one_is_left_alone():
    model, state = models.digits_convnet(), torch.get_rng_state()
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = (rank_analysis(model, (1, 8, 8), max_unknowns=5, generator=g) for g in generators)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def jacobian_rank(model, x):
    """The rank of the gradient's derivative by the input: what any attack can determine, to first order."""
    parameters = dict(model.named_parameters())

    def gradient(x):
        def loss(parameters):
            outputs = torch.func.functional_call(model, parameters, (x[None],))
            return nn.functional.cross_entropy(outputs, torch.zeros(1, dtype=torch.int64))

        return torch.cat([g.flatten() for g in torch.func.grad(loss)(parameters).values()])

    values = torch.linalg.svdvals(torch.func.jacrev(gradient)(x).reshape(-1, x.numel()))
    return int((values > 1e-10 * values[0]).sum())


def random_picture():
    return torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_earlier_gradients_can_make_up_for_more_than_the_virtual_constraints():
    """The third layer lacks 217 and owes 192 at most, and still the gradient determines the picture."""
    torch.manual_seed(0)
    pool = nn.Conv2d(4, 1, 3, stride=4, padding=1, bias=False)
    model = nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.Tanh(), pool, nn.Tanh(), nn.Flatten(), nn.Linear(4, 4))
    row = rank_analysis(model, (1, 8, 8)).layers[1]
    assert (row.deficit, row.virtual_constraints, row.earlier_gradients) == (217, 192, 104)
    assert jacobian_rank(model.double(), random_picture()) == 64
    assert row.verdict == "optimisation only"


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_what_is_not_recoverable_the_gradient_does_not_determine(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), activation(), nn.Flatten(), nn.Linear(32, 10))
    row = rank_analysis(model, (1, 8, 8)).layers[0]
    assert row.verdict == "not recoverable"
    if activation is nn.Tanh:  # ReLU's zeros depend on the weights, so the ranks differ by a few
        assert jacobian_rank(model.double(), random_picture()) <= row.rank < 64
    assert jacobian_rank(model.double(), random_picture()) < 64


# ---------------------------------------------------------------------- ReLU, pooling, sums


@pytest.mark.parametrize("sent", [True, False], ids=["sent", "frozen"])
@pytest.mark.parametrize("name", LAYERS)
def test_ranks_with_unknown_outputs_are_those_of_the_dense_matrices(name, sent):
    module, shape = LAYERS[name]
    layer = walk(LossGradient(module, nn.MSELoss(), dtype=torch.float64), shape).layers[0]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
    known = torch.rand(layer.output_shape, generator=generator) < 0.4
    k = torch.randn(layer.output_shape, generator=generator, dtype=torch.float64) * known
    system = LayerSystem.of(layer, weight, k, k, weight if sent else None, known)
    identity = torch.eye(layer.unknowns, dtype=torch.float64)
    dense = torch.stack([system.operator.matvec(e[None])[0] for e in identity], dim=1)
    u = torch.randn(1, len(dense), generator=generator, dtype=torch.float64)
    assert torch.allclose(system.operator.rmatvec(u)[0], dense.mT @ u[0], atol=1e-10)
    found = ConstraintRank(layer, weight, k, sent=sent, limit=1000, known=known)
    assert found.rank_weights == dense_rank(dense[: layer.outputs])
    assert found.rank_gradients == dense_rank(dense[layer.outputs :])
    assert found.rank == dense_rank(dense)
    assert found.rank <= layer.rank_bound(gradients=sent, known=known)


def test_maximum_pooling_counts_the_maxima_and_says_what_it_takes_for_granted():
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 4))
    first, last = rank_analysis(model, (1, 8, 8)).layers
    assert (first.outputs, first.unknowns, last.unknowns) == (128, 64, 128)
    assert "MaxPool2d is taken to tell where the maxima were" in first.note


@pytest.mark.parametrize("batch_norm", [False, True])
def test_what_r_gap_cannot_undo_is_for_an_optimisation_at_best(batch_norm):
    """Nothing is short, and still R-GAP does not know which element was the largest."""
    norm = [nn.BatchNorm2d(16)] if batch_norm else []
    layers = (nn.Conv2d(1, 16, 3, padding=1), *norm, nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1))
    model = nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(512, 10)).eval()
    found = rank_analysis(model, (1, 8, 8))
    assert [row.verdict for row in found.layers] == ["optimisation only", "closed form", "closed form"]
    assert found.index == 0
    check = rank_check(model, (1, 8, 8))
    assert not check.fine
    assert "what R-GAP cannot undo" in check.reasons[0]


def test_gelu_s_branches_count_as_known():
    found = rank_analysis(models.digits_convnet(activation="gelu"), (1, 8, 8))
    assert found.verdict == "closed form"
    assert "which of two arguments" in found.layers[0].note


def test_a_maximum_pooling_lets_no_more_through_than_it_puts_out():
    """2 filters, 4 by 4 maxima each and 9 weights: at most 2 (16 + 9 - 1) equations for 64 pixels."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(2, 16, 3, padding=1), nn.Tanh())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
    found = rank_analysis(model, (1, 8, 8))
    assert found.verdict == found.layers[0].verdict == "not recoverable"
    assert jacobian_rank(model.double(), random_picture()) <= found.layers[0].rank == 48


@pytest.mark.parametrize(
    ("pool", "outputs"),
    [(nn.AvgPool2d(2), 64), (nn.AdaptiveAvgPool2d(1), 4), (nn.AvgPool2d(3, 1, 1), 256), (nn.AdaptiveAvgPool2d(5), 100)],
    ids=repr,
)
def test_average_pooling_has_a_row_of_its_own(pool, outputs):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), pool, nn.Flatten(), nn.Linear(outputs, 4))
    row = rank_analysis(model, (1, 8, 8)).layers[1]
    matrix = pool(torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)).reshape(64, -1)
    assert (row.kind, row.outputs, row.weights) == (type(pool).__name__, outputs, 0)
    assert row.rank == 4 * int(torch.linalg.matrix_rank(matrix))
    assert (row.verdict == "closed form") == (row.rank == 256)


def test_average_pooling_to_the_same_size_is_nothing():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(256, 4))
    assert [row.kind for row in rank_analysis(model, (1, 8, 8)).layers] == ["Conv2d", "Linear"]


def test_batch_normalisation_changes_no_rank():
    plain = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 4))
    normal = nn.Sequential(plain[0], nn.BatchNorm2d(2), *plain[1:])
    found = [rank_analysis(model, (1, 8, 8)).layers for model in (plain, normal)]
    assert [numbers(row) for row in found[0]] == [numbers(row) for row in found[1]]
    assert found[1][1].earlier_gradients == found[0][1].earlier_gradients + 4


def test_residual_blocks_are_analysed_and_the_sum_is_said_not_to_be_separated():
    torch.manual_seed(0)
    model = models.resnet(10, width=4)
    found = {row.name: row for row in rank_analysis(model, (3, 16, 16)).layers}
    assert len(found) == 14  # 12 convolutions, the pooling and the head
    assert "part of a sum" in found["3.0.residual.3"].note
    assert "part of a sum" not in found["0"].note  # the block's first layer gives its input
    assert "goes another way" in found["3.0.residual.0"].note
    assert "goes another way" in found["4.0.shortcut.0"].note
    inside = [row for name, row in found.items() if "residual" in name or "shortcut" in name]
    assert not any(row.inevitable for row in inside)
    assert {row.verdict for row in inside} <= {"optimisation only", "closed form"}
    assert all(row.verdict == "optimisation only" for name, row in found.items() if name.endswith("residual.3"))
    assert rank_analysis(model, (3, 16, 16)).verdict == "optimisation only"


class Block(nn.Module):
    """A residual block with the activations first."""

    def __init__(self, channels):
        super().__init__()
        layers = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        self.branch = nn.Sequential(nn.ReLU(), layers[0], nn.ReLU(), layers[1], nn.BatchNorm2d(channels))

    def forward(self, x):
        return x + self.branch(x)


@pytest.mark.parametrize(
    ("channels", "between", "verdict"),
    [(12, nn.Identity, "closed form"), (4, nn.Identity, "optimisation only"), (12, nn.ReLU, "optimisation only")],
    ids=["more gradients than inputs", "fewer", "hidden by ReLU"],
)
def test_a_summand_that_the_gradient_gives_is_told_apart(channels, between, verdict):
    blocks = [Block(channels), between(), Block(channels)]
    model = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(channels * 64, 10))
    found = rank_analysis(model.eval(), (1, 8, 8))
    rows = {row.name: row for row in found.layers}
    assert rows["1.branch.3"].verdict == found.verdict == verdict
    assert "part of a sum" in rows["1.branch.3"].note


def test_scaled_sums_are_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return torch.add(x, self.a(x), alpha=2)

    with pytest.raises(UnsupportedModelError, match="scaled ones"):
        rank_analysis(Scaled(), (4,))


# ---------------------------------------------------------------------- the index, and the check


def test_the_index_is_the_largest_share_that_is_missing():
    assert rank_analysis(models.lenet(), (1, 28, 28)).index == 0
    model = nn.Sequential(nn.Conv2d(3, 1, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(49, 2))
    found = rank_analysis(model, (3, 16, 16))
    assert found.index == found.layers[0].deficit / 768
    assert found.to_dict()["index"] == found.index


def test_rank_check():
    found = rank_check(models.lenet(), (1, 28, 28))
    assert not found.fine
    assert found.reasons == ("every layer gives its input away in closed form (R-GAP)",)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 10))
    fine = rank_check(model, (1, 8, 8))
    assert (fine.fine, fine.reasons) == (True, ())
    assert 0 < fine.analysis.index < 0.9
    (reason,) = rank_check(model, (1, 8, 8), min_index=0.9).reasons
    assert reason.endswith("below 0.9")
    with pytest.raises(InputError, match="`min_index`"):
        rank_check(model, (1, 8, 8), min_index=2)


# ---------------------------------------------------------------------- forms of it


@pytest.fixture(scope="module")
def analysis():
    model = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    return rank_analysis(model, (3, 8, 8))


def test_json_holds_every_row(analysis):
    found = json.loads(analysis.to_json())
    assert found == analysis.to_dict()
    assert found["verdict"] == analysis.verdict
    assert found["input_shape"] == [3, 8, 8]
    assert [row["name"] for row in found["layers"]] == ["0", "3"]
    assert found["layers"][0]["deficit"] == analysis.layers[0].deficit


def test_print_fits_80_columns_and_shows_every_number(analysis):
    out = io.StringIO()
    analysis.print(out)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if line.startswith("0 "))
    assert row.split()[1:9] == [str(n) for n in (*numbers(analysis.layers[0]), 0)]
    assert analysis.layers[0].verdict in row
    assert "0: ReLU is not one-to-one" in text


def test_plot_stacks_what_is_determined_and_what_is_missing(analysis):
    backend = matplotlib.get_backend()
    figure = analysis.plot()
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    first, second = analysis.layers
    assert heights == [first.rank, second.rank, first.deficit, second.deficit]
    assert matplotlib.get_backend() == backend


# ---------------------------------------------------------------------- refusals


def test_a_model_that_is_no_chain_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).eval()
    with pytest.raises(UnsupportedModelError, match=r"'1' \(GroupNorm\)"):
        rank_analysis(model, (3, 8, 8))


@pytest.mark.parametrize("options", [{"max_unknowns": 0}, {"probes": 0}])
def test_options(options):
    with pytest.raises(InputError, match="must be at least 1"):
        rank_analysis(models.digits_convnet(), (1, 8, 8), **options)
