"""Every form a gradient comes in is the same dictionary; what does not fit is refused by name."""

import numpy as np
import pytest
import torch
from torch import nn

import gradguard as gg
from gradguard.functional.as_gradient import sort_message


class Tied(nn.Module):
    """A frozen layer, a tied head and buffers: what makes order and names hard."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.norm(self.frozen(x))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tied().eval()


@pytest.fixture
def gradient(model):
    loss = nn.functional.mse_loss(model(torch.rand(3, 4)), torch.rand(3, 6))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parts = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return dict(zip(names, parts, strict=True))


def with_grad(model, gradient):
    for name, parameter in model.named_parameters():
        parameter.grad = gradient.get(name)
    return model


def wrapped(prefix):
    return lambda model, g: {prefix + n: v for n, v in g.items()}


FORMS = {
    "dictionary": lambda model, g: g,
    "list": lambda model, g: list(g.values()),
    "iterator": lambda model, g: (p.grad for p in with_grad(model, g).parameters()),
    "pairs": lambda model, g: iter(g.items()),
    "state_dict's order": lambda model, g: (
        [g.get(n) for n in list(model.state_dict())[:-2]] + [g["first.weight"], g["second.bias"]]
    ),
    "numpy": lambda model, g: [v.numpy() for v in g.values()],
    "numpy, big endian and reversed": lambda model, g: {
        n: np.flip(np.flip(v.numpy()).astype(">f8").copy()) for n, v in g.items()
    },
    "sparse": lambda model, g: {n: v.to_sparse() for n, v in g.items()},
    "float64": lambda model, g: {n: v.double() for n, v in g.items()},
    "vector": lambda model, g: torch.cat([v.flatten() for v in g.values()]),
    "module": lambda model, g: with_grad(model, g),
    "other order": lambda model, g: dict(reversed(g.items())),
    "second name": lambda model, g: {n.replace("first.weight", "second.weight"): v for n, v in g.items()},
    "both names": lambda model, g: g | {"second.weight": g["first.weight"].clone()},
    "inference mode": lambda model, g: inference(g),
    "nested lists of numbers": lambda model, g: {n: v.tolist() for n, v in g.items()},
    "DataParallel": wrapped("module."),
    "compiled Opacus": wrapped("_orig_mod._module."),
    "Fabric over DDP": wrapped("_forward_module.module."),
    "compiled part": lambda model, g: {n.replace("first.", "first._orig_mod."): v for n, v in g.items()},
    "numbers and buffers": lambda model, g: (
        {"module." + n: g.get(n) for n in model.state_dict()}
        | {"module.second.weight": g["first.weight"], "module.norm.running_mean": torch.ones(6)}
    ),
}


def inference(gradient):
    with torch.inference_mode():
        return {n: v.clone() for n, v in gradient.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_gradient(model, gradient, form):
    expected = {n: g.clone() for n, g in gradient.items()}
    found = gg.as_gradient(model, FORMS[form](model, gradient))
    assert list(found) == [n for n, p in model.named_parameters() if p.requires_grad]
    for name, value in found.items():
        torch.testing.assert_close(value.float(), expected[name])
        assert value.layout == torch.strided
        assert not value.requires_grad
        assert not value.is_inference()


def test_a_wrapped_model_takes_a_bare_gradient(model, gradient):
    found = gg.as_gradient(nn.DataParallel(model), gradient)
    assert list(found) == ["module." + n for n in gradient]
    compiled = torch.compile(model, backend="eager")
    assert list(gg.as_gradient(compiled, wrapped("module.")(model, gradient))) == ["_orig_mod." + n for n in gradient]


def test_half_precision_gains_the_models_and_no_digits_are_lost(model, gradient):
    found = gg.as_gradient(model, {n: g.half() for n, g in gradient.items()})
    assert all(g.dtype == torch.float32 for g in found.values())
    found = gg.as_gradient(model.half(), gradient)
    assert all(torch.equal(found[n], g) for n, g in gradient.items())


def test_none_is_a_parameter_that_got_no_gradient(model, gradient):
    gradient["first.bias"] = None
    for form in (gradient, list(gradient.values())):
        assert torch.equal(gg.as_gradient(model, form)["first.bias"], torch.zeros(6))


def test_an_update_is_before_minus_after(model, gradient):
    before = {n: v.clone() for n, v in model.state_dict().items()}
    after = {n: v.clone() for n, v in before.items()}
    for name, value in gradient.items():
        after[name] = before[name] - 0.5 * value
    after["second.weight"] = after["first.weight"]
    found = gg.as_gradient(model, {"module." + n: v for n, v in after.items()}, before=before)
    for name, value in gradient.items():
        torch.testing.assert_close(found[name], 0.5 * value, rtol=1e-4, atol=1e-7)
    model.load_state_dict(after)
    again = gg.as_gradient(model, model, before=list(before.values()))
    assert all(torch.equal(again[n], found[n]) for n in found)


def test_what_was_not_sent_is_left_out_only_if_asked(model, gradient):
    bias = gradient.pop("second.bias")
    with pytest.raises(gg.InputError, match=r"missing \['second\.bias'\]"):
        gg.as_gradient(model, gradient)
    assert "second.bias" not in gg.as_gradient(model, gradient, missing="unsent")
    found = sort_message(model, {"second.bias": bias, "norm.running_mean": torch.ones(6)}, missing="unsent")
    assert list(found.gradient) == ["second.bias"]
    assert found.unsent == ("norm.weight", "norm.bias", "first.weight", "first.bias")
    assert found.buffers == ("norm.running_mean",)


def replace(**values):
    return lambda model, g: g | values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, g: g | {"frist.weight": torch.zeros(6, 6)}, r"unexpected \['frist\.weight'\].*'first\.weight'"),
        (lambda model, g: g | {3: torch.zeros(1)}, r"unexpected \[3\]"),
        (lambda model, g: {}, "missing"),
        (lambda model, g: [], "A list of 0 tensors fits no order"),
        (lambda model, g: list(g.values())[:-1], r"5 trainable parameters, 7 parameters, 11 tensors in `state_dict"),
        (lambda model, g: g | {"first.bias": torch.zeros(5)}, r"'first\.bias' has shape \(5,\), the parameter \(6,\)"),
        (lambda model, g: g | {"first.bias": torch.full((6,), torch.nan)}, r"'first\.bias' holds NaN"),
        (lambda model, g: g | {"first.bias": np.full(6, np.inf)}, r"'first\.bias' holds NaN or infinite"),
        (lambda model, g: g | {"first.bias": "zero"}, r"'first\.bias'"),
        (lambda model, g: g | {"first.bias": object()}, r"'first\.bias'"),
        (lambda model, g: g | {"first.bias": [[1.0], [1.0, 2.0]]}, r"'first\.bias' is no tensor, but a list"),
        (
            lambda model, g: g | {"first.bias": torch.zeros(6, dtype=torch.complex64)},
            r"'first\.bias' is torch.complex64",
        ),
        (lambda model, g: g | {"first.bias": torch.zeros(6, dtype=torch.bool)}, r"'first\.bias' is torch.bool"),
        (lambda model, g: g | {"first.bias": torch.zeros(6, device="meta")}, r"'first\.bias' is on meta"),
        (lambda model, g: g | {"frozen.bias": torch.ones(6)}, r"'frozen\.bias' is frozen"),
        (lambda model, g: [torch.ones_like(p) for p in model.parameters()], r"'frozen\.weight' is frozen"),
        (lambda model, g: g | {"second.weight": torch.ones(6, 6)}, "are one parameter of the model"),
        (lambda model, g: g | {"module.first.bias": torch.ones(6)}, "are one parameter of the model"),
        (lambda model, g: model.state_dict(), "is the model's own parameter, not its gradient"),
        (lambda model, g: (p for p in model.parameters() if p.requires_grad), "is the model's own parameter"),
        (lambda model, g: model, "call `loss.backward\\(\\)` first"),
        (lambda model, g: None, "got NoneType"),
        (lambda model, g: "gradient.pt", "got str"),
        (lambda model, g: 3.0, "got float"),
        (lambda model, g: set(g.values()), "sets have no order"),
        (lambda model, g: torch.zeros(3), "must hold all 60 elements"),
    ],
)
def test_what_does_not_fit_is_refused(model, gradient, change, message):
    with pytest.raises(gg.InputError, match=message):
        gg.as_gradient(model, change(model, gradient))


def test_a_scalar_parameter():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.logit_scale = nn.Parameter(torch.tensor(2.0))

    for form in (3.0, np.float64(3.0), torch.tensor(3.0), np.array(3.0)):
        assert gg.as_gradient(Scaled(), {"logit_scale": form})["logit_scale"].item() == 3.0
    assert gg.as_gradient(Scaled(), [3])["logit_scale"].item() == 3.0


def test_a_models_own_part_called_module_is_kept_apart():
    model = nn.ModuleDict({"module": nn.Linear(2, 1, bias=False), "other": nn.Linear(2, 1, bias=False)})
    gradient = {"module.weight": torch.ones(1, 2), "other.weight": torch.zeros(1, 2)}
    found = gg.as_gradient(model, {"module." + n: g for n, g in gradient.items()})
    assert all(torch.equal(found[n], g) for n, g in gradient.items())


def test_lazy_and_frozen_models_are_refused():
    with pytest.raises(gg.InputError, match="lazy"):
        gg.as_gradient(nn.LazyLinear(2), [])
    with pytest.raises(gg.InputError, match="no trainable parameter"):
        gg.as_gradient(nn.Linear(2, 2).requires_grad_(False), [])
