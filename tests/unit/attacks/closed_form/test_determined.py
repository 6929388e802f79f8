"""Whether a layer's equations have one solution, against the dense matrix of the layer made by PyTorch's autograd."""

import pytest
import torch
from torch import nn

from gradguard import LossGradient
from gradguard.attacks._closed_form import determined
from gradguard.attacks._closed_form.determined import determines, weights_determine
from gradguard.chain import LayerSystem, walk


def system(module, shape, *, weight=None, known=None, k=None, sent=True, seed=0):
    """A layer's equations, `k` random, and the dense matrix of its rows, from autograd alone."""
    torch.manual_seed(seed)
    module = module.double()
    ((name, parameter),) = module.named_parameters()
    nn.init.normal_(parameter)
    if weight is not None:
        with torch.no_grad():
            parameter.copy_(weight(parameter))
    layer = walk(LossGradient(module, nn.MSELoss()), shape).layers[0]
    x, w = torch.randn(shape, dtype=torch.float64), parameter.detach()
    k = torch.randn(layer.output_shape, dtype=torch.float64) if k is None else k
    z = module(x[None])[0].detach()
    gradient = torch.autograd.grad(module(x[None])[0], parameter, k)[0]

    def both(x):
        out = torch.func.functional_call(module, {name: w}, (x[None],))[0]
        rows = [out.flatten() if known is None else out[known]]
        if sent:
            pull_back = torch.func.vjp(lambda w: torch.func.functional_call(module, {name: w}, (x[None],))[0], w)[1]
            rows.append(pull_back(k)[0].flatten())
        return torch.cat(rows)

    matrix = torch.func.jacrev(both)(x).flatten(1)
    return LayerSystem.of(layer, w, k, z, gradient if sent else None, known), matrix


PROVED = {
    "CNN6's first": (lambda: nn.Conv2d(3, 12, 4, stride=2, padding=2, bias=False), (3, 12, 12)),
    "two sides": (lambda: nn.Conv2d(3, 12, 4, stride=2, padding=2, bias=False), (3, 10, 14)),
    "stride 2, padding 1": (lambda: nn.Conv2d(2, 10, 3, stride=2, padding=1, bias=False), (2, 9, 9)),
    "all positions": (lambda: nn.Conv2d(2, 3, 3, padding=2, bias=False), (2, 6, 6)),
    "one pixel": (lambda: nn.Conv2d(3, 4, 1, bias=False), (3, 5, 5)),
    "a kernel larger than the picture": (lambda: nn.Conv2d(1, 2, 5, padding=4, bias=False), (1, 3, 3)),
    "tiles": (lambda: nn.Conv2d(1, 17, 4, stride=4, bias=False), (1, 8, 12)),
    "groups": (lambda: nn.Conv2d(4, 20, 2, stride=2, groups=2, bias=False), (4, 6, 6)),
    "two strides": (lambda: nn.Conv2d(1, 7, (4, 3), stride=(2, 3), padding=(2, 0), bias=False), (1, 6, 9)),
}


@pytest.mark.parametrize("name", PROVED)
def test_outputs_at_every_position_prove_the_input(name):
    make, shape = PROVED[name]
    for seed in range(3):
        equations, matrix = system(make(), shape, sent=False, seed=seed)
        assert weights_determine(equations)
        assert torch.linalg.matrix_rank(matrix) == equations.layer.unknowns


@pytest.mark.parametrize("name", PROVED)
@pytest.mark.parametrize("share", [1e-8, 1e-4, 1e-2, 1e-1])
def test_the_bound_is_below_the_smallest_singular_value(monkeypatch, name, share):
    """What is proved of the convolution at each frequency holds for the matrix, whose singular values are between."""
    monkeypatch.setattr(determined, "_SURE", share)
    make, shape = PROVED[name]
    for seed in range(3):
        equations, _ = system(make(), shape, sent=False, seed=seed)
        dense = torch.stack(
            [equations.operator.matvec(e[None])[0] for e in torch.eye(equations.layer.unknowns).double()]
        )
        values = torch.linalg.svdvals(dense)
        if weights_determine(equations):
            assert values[-1] ** 2 > share * values[0] ** 2


def zeroed(w):
    return w * (torch.arange(len(w)) > 5).reshape(-1, 1, 1, 1)


OPEN = {
    "skipped pixels": (lambda: nn.Conv2d(1, 8, 1, stride=2, bias=False), (1, 8, 8), None),
    "a last row that no filter meets": (lambda: nn.Conv2d(1, 8, 2, stride=2, bias=False), (1, 7, 7), None),
    "equal filters": (lambda: nn.Conv2d(3, 12, 4, stride=2, padding=2, bias=False), (3, 12, 12), lambda w: w[[0] * 12]),
    "zero filters": (lambda: nn.Conv2d(3, 12, 4, stride=2, padding=2, bias=False), (3, 12, 12), zeroed),
    "an empty channel": (
        lambda: nn.Conv2d(2, 8, 3, padding=2, bias=False),
        (2, 6, 6),
        lambda w: w * torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1),
    ),
    "equal channels": (lambda: nn.Conv2d(2, 8, 3, padding=2, bias=False), (2, 6, 6), lambda w: w[:, [0, 0]]),
    "zero": (lambda: nn.Conv2d(1, 4, 2, stride=2, bias=False), (1, 6, 6), lambda w: 0 * w),
    "fewer filters than pixels of a tile": (lambda: nn.Conv2d(1, 3, 2, stride=2, bias=False), (1, 6, 6), None),
}


@pytest.mark.parametrize("name", OPEN)
def test_what_the_outputs_leave_open_is_not_proved(name):
    make, shape, weight = OPEN[name]
    equations, matrix = system(make(), shape, weight=weight, sent=False)
    assert torch.linalg.matrix_rank(matrix) < equations.layer.unknowns
    assert not weights_determine(equations)
    assert not determines(equations, max_iterations=1000)


def test_hidden_outputs_prove_nothing():
    shape = (12, 7, 7)
    known = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    equations, matrix = system(
        nn.Conv2d(3, 12, 4, stride=2, padding=2, bias=False), (3, 12, 12), known=known, sent=False
    )
    assert torch.linalg.matrix_rank(matrix) < equations.layer.unknowns
    assert not weights_determine(equations)
    assert not determines(equations, max_iterations=1000)


def test_padding_of_another_kind_is_left_to_the_probe():
    module = nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(1, 4, 3, bias=False))
    equations, matrix = system(module, (1, 6, 6))
    assert torch.linalg.matrix_rank(matrix) == 36
    assert not weights_determine(equations)
    assert determines(equations, max_iterations=1000)


@pytest.mark.parametrize("shape", [(1, 6, 6), (2, 7, 5)])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("filters", [1, 3, 9])
def test_the_verdict_is_the_rank_of_the_dense_matrix(shape, padding, dilation, filters):
    module = nn.Conv2d(shape[0], filters, 3, padding=padding, dilation=dilation, bias=False)
    equations, matrix = system(module, shape)
    full = int(torch.linalg.matrix_rank(matrix)) == equations.layer.unknowns
    assert determines(equations, max_iterations=10_000) == full


def test_the_probe_stops_when_enough_is_found(monkeypatch):
    """A well-conditioned layer needs no more iterations than the verdict does."""
    seen = []

    def spied(*arguments, **options):
        seen.append(cgls(*arguments, **options))
        return seen[-1]

    cgls = determined.cgls
    monkeypatch.setattr(determined, "cgls", spied)
    equations, _ = system(nn.Conv2d(2, 12, 3, padding=1, bias=False), (2, 8, 8))
    assert determines(equations, max_iterations=1000)
    assert not seen[0].converged.all()
    full = cgls(equations.operator, equations.target, column_lengths=equations.column_lengths, tolerance=1e-10)
    assert seen[0].iterations < full.iterations
