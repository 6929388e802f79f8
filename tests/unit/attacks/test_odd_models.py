"""Attacks on models that `torch.func` does not take, and on models that fail: right, or refused by name."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gradguard import InputError, LossGradient, UnsupportedModelError
from gradguard.attacks import DLG, ILRG, InvertingGradients, LabelSystem, LevenbergMarquardt, Observation
from references import loss_of


class Square(torch.autograd.Function):
    """Without `setup_context`, as most custom functions are: `torch.func` refuses it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 2 * x * slope


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.two(Square.apply(torch.sigmoid(self.one(x))))


class DataDependent(Custom):
    def forward(self, x):
        h = self.one(x)
        return self.two(torch.tanh(h) if h.sum().item() > -1e9 else h)


class Failing(Custom):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        if type(self).calls > 3:
            raise KeyError("a table that is not there")
        return self.two(self.one(x))


def seen_by(model, **options):
    torch.manual_seed(0)
    model = model().double()
    x, y = torch.rand(1, 4).double(), torch.tensor([1])
    loss, parameters = loss_of(model, nn.CrossEntropyLoss(), x, y)
    names = [n for n, _ in model.named_parameters()]
    sent = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    function = LossGradient(model, nn.CrossEntropyLoss())
    return Observation(loss_gradient=function, sent=sent, input_shape=(4,), labels=y, num_classes=3, **options), x


@pytest.mark.parametrize("model", [Custom, DataDependent])
def test_the_matching_loss_needs_no_torch_func(model):
    seen, x = seen_by(model)
    assert seen.matching_loss(x, seen.labels) < 1e-25


def test_what_a_model_raises_is_named(monkeypatch):
    seen, _ = seen_by(Failing)
    monkeypatch.setattr(Failing, "calls", 1)
    with pytest.raises(UnsupportedModelError, match=r"Failing cannot.*KeyError: 'a table") as caught:
        DLG(restarts=1)(seen)
    assert isinstance(caught.value.__cause__, KeyError)


def test_running_out_of_memory_is_not_the_models_fault(monkeypatch):
    seen, _ = seen_by(Custom)

    def exhausted(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(ILRG, "run", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        ILRG()(seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_a_search_in_half_precision_is_refused(dtype):
    with pytest.raises(InputError, match=r"`dtype` must be torch\.float32 or torch\.float64"):
        DLG(dtype=dtype)


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        (DLG, {"restarts": "3"}, "`restarts` must be a whole number, got '3'"),
        (DLG, {"restarts": 1.5}, "`restarts` must be a whole number"),
        (DLG, {"polish": None}, "`polish` must be a whole number"),
        (DLG, {"evaluations": 0}, "evaluations"),
        (DLG, {"evaluations": "many"}, "`evaluations` must be a whole number"),
        (DLG, {"max_seconds": "ten"}, "`max_seconds` must be a number"),
        (DLG, {"chunk_size": 1.5}, "`chunk_size` must be a whole number"),
        (InvertingGradients, {"iterations": 2.5}, "`iterations` must be a whole number"),
        (InvertingGradients, {"total_variation": "strong"}, "`weight` must be a number"),
        (InvertingGradients, {"learning_rate": float("nan")}, "`learning_rate` positive"),
        (LevenbergMarquardt, {"iterations": "all"}, "`iterations` must be a whole number"),
        (ILRG, {"refinements": 0.5}, "`refinements` must be a whole number"),
        (LabelSystem, {"trust": None}, "`trust` must be a number"),
    ],
)
def test_odd_options_are_refused_when_they_are_given(attack, options, message):
    with pytest.raises(InputError, match=message):
        attack(**options)


def test_a_number_of_classes_that_is_not_the_models():
    seen, _ = seen_by(Custom)
    with pytest.raises(InputError, match="says `num_classes=7`, the model has 3 outputs"):
        DLG()(replace(seen, labels=None, num_classes=7))
    with pytest.raises(InputError, match="`Observation` objects, got NoneType"):
        DLG().attack_all([seen, None])


def test_a_gradient_sent_in_half_precision(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    function = LossGradient(convnet, cross_entropy)
    sent = {n: g.half() for n, g in function(x, y).items()}
    seen = Observation(loss_gradient=function, sent=sent, input_shape=(1, 8, 8), labels=y)
    found = DLG(restarts=1, evaluations=60, polish=5)(seen, generator=torch.Generator().manual_seed(0))
    assert found.matching_loss < 1e-5
