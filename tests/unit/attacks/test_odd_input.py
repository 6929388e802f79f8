"""The closed-form attacks and the rank analysis on what they were not made for: an answer by name, no traceback."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradguard.attacks import HGAP, RGAP, SPEAR, Observation
from gradguard.errors import InputError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.leakage import advice, rank_analysis, rank_check

CE = nn.CrossEntropyLoss()


class Straight(torch.autograd.Function):
    """Another derivative than that of its values."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 3 * g


def calling(forward, **modules):
    modules = {"c": nn.Linear(64, 10), **modules}
    model = type("Custom", (nn.Module,), {"forward": forward})()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def lstm(self, x):
    return self.c(self.l(x[:, 0])[0].flatten(1))


def attention(self, x):
    x = x[:, 0]
    return self.c(self.l(x, x, x)[0].flatten(1))


MODELS = {
    "LSTM": lambda: calling(lstm, l=nn.LSTM(8, 8, batch_first=True)),
    "attention": lambda: calling(attention, l=nn.MultiheadAttention(8, 2, batch_first=True)),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True),
    "custom function": lambda: calling(lambda self, x: self.c(Straight.apply(x.flatten(1)))),
    "detached": lambda: calling(lambda self, x: self.c(x.detach().flatten(1))),
    "data-dependent": lambda: calling(lambda self, x: self.c(x.flatten(1) if float(x.sum()) > 0 else -x.flatten(1))),
    "no layer": lambda: calling(lambda self, x: x.flatten(1) @ self.c.weight.T),
    "dictionary": lambda: calling(lambda self, x: {"logits": self.c(x.flatten(1))}),
    "raises": lambda: calling(lambda self, x: self.missing(x)),
    "functional weight": lambda: calling(lambda self, x: F.linear(x.flatten(1), 2 * self.c.weight)),
    "layer twice": lambda: calling(lambda self, x: self.c(self.a(self.a(x.flatten(1)))), a=nn.Linear(64, 64)),
    "complex": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(torch.complex64),
    "meta": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to("meta"),
    "embedding": lambda: calling(lambda self, x: self.c(self.e(x).flatten(1)), e=nn.Embedding(10, 1)),
}


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("call", [rank_analysis, rank_check, advice], ids=lambda f: f.__name__)
def test_analyses_refuse_models_by_name(name, call):
    with pytest.raises(InputError) as error:
        call(MODELS[name](), (1, 8, 8))
    assert len(str(error.value)) > 40


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"complex", "meta"}))
@pytest.mark.parametrize("attack", [RGAP(), HGAP(), SPEAR()], ids=lambda a: a.name)
def test_attacks_refuse_models_by_name(name, attack):
    model = MODELS[name]()
    sent = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    with pytest.raises(InputError) as error:
        attack(Observation(loss_gradient=LossGradient(model, CE), sent=sent, input_shape=(1, 8, 8)))
    assert len(str(error.value)) > 40


@pytest.mark.parametrize(
    "shape", [64, -1, None, "abc", (), (1, 0, 8), (1.5, 8, 8), (1, 8, "a"), [[1, 8, 8]], (3, 9, 9)]
)
@pytest.mark.parametrize("call", [rank_analysis, rank_check, advice], ids=lambda f: f.__name__)
def test_shapes_that_are_none(shape, call):
    with pytest.raises(InputError, match="input_shape"):
        call(perceptron(), shape)


def test_a_list_is_a_shape():
    assert rank_analysis(perceptron(), [1, 8, 8]).input_shape == (1, 8, 8)


@pytest.mark.parametrize(
    "model", [lambda x: x, nn.Sequential(nn.Flatten(), nn.LazyLinear(10))], ids=["function", "lazy"]
)
def test_what_is_no_model_yet(model):
    with pytest.raises(InputError, match=r"nn\.Module|initialised"):
        rank_analysis(model, (1, 8, 8))


@pytest.mark.parametrize("options", [{"max_unknowns": "a"}, {"max_unknowns": 1.5}, {"probes": 0}, {"generator": 3}])
def test_options_of_the_wrong_kind(options):
    with pytest.raises(InputError, match=next(iter(options))):
        rank_analysis(perceptron(), (1, 8, 8), **options)


@pytest.mark.parametrize("attack", [RGAP(), HGAP(), SPEAR()], ids=lambda a: a.name)
@pytest.mark.parametrize(
    "labels",
    [torch.tensor([3.5]), torch.tensor([99]), torch.tensor([[1]]), [1]],
    ids=["float", "range", "shape", "list"],
)
def test_labels_that_the_loss_does_not_take(attack, labels, digit_pictures):
    model = perceptron()
    sent = LossGradient(model, CE)(digit_pictures.images[:1], digit_pictures.labels[:1])
    with pytest.raises(InputError, match="abel"):
        attack(Observation(loss_gradient=LossGradient(model, CE), sent=sent, input_shape=(1, 8, 8), labels=labels))


@pytest.mark.parametrize("attack", [RGAP(), HGAP(), SPEAR()], ids=lambda a: a.name)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_integer_dtype(attack, dtype, digit_pictures):
    model = perceptron().double()
    x, y = digit_pictures.images[:1].double(), digit_pictures.labels[:1]
    seen = Observation(
        loss_gradient=LossGradient(model, CE),
        sent=LossGradient(model, CE)(x, y),
        input_shape=(1, 8, 8),
        labels=y.to(dtype),
    )
    assert attack(seen).converged


# ---------------------------------------------------------------------- wrappers


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(768, 10))


def compiled(model):
    model.compile(backend="eager")
    return model


WRAPPED = {
    "torch.compile": lambda: torch.compile(convnet(), backend="eager"),
    "model.compile": lambda: compiled(convnet()),
    "compiled submodule": lambda: nn.Sequential(torch.compile(convnet()[:2], backend="eager"), *convnet()[2:]),
    "a layer compiled in place": lambda: nn.Sequential(compiled(convnet()[0]), *convnet()[1:]),
    "DataParallel submodule": lambda: nn.Sequential(nn.DataParallel(convnet()[:2]), *convnet()[2:]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_looked_through(name, digit_pictures):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    model = WRAPPED[name]()
    sent = LossGradient(model, CE, dtype=torch.float64)(x, y)
    result = RGAP()(Observation(loss_gradient=LossGradient(model, CE), sent=sent, input_shape=(1, 8, 8)))
    assert result.converged
    assert float((result.inputs - x).abs().max()) < 1e-6
    assert rank_analysis(model, (1, 8, 8)).verdict == "closed form"


def test_data_parallel_is_analysed_as_what_is_inside():
    assert rank_analysis(nn.DataParallel(convnet()), (1, 8, 8)).verdict == "closed form"
    assert not rank_check(nn.DataParallel(convnet()), (1, 8, 8)).fine
