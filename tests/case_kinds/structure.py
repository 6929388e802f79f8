"""How a model holds and uses its parameters: shared, tied, aliased, frozen, free of modules, parametrised, hooked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from case_kinds.case import Case, case, labels, pictures


def vectors(make_model, loss_fn=nn.CrossEntropyLoss, targets=labels, size=4):
    return lambda: (make_model(), loss_fn(), torch.rand(3, size), targets())


def two_names():
    shared = nn.Linear(4, 4)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 3))


def two_names_of_a_block():
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    return nn.Sequential(block, nn.ModuleDict({"inner": block})["inner"], nn.Linear(4, 3))


def two_names_with_buffers():
    norm = nn.BatchNorm1d(4)
    norm.running_mean.uniform_(0, 1)
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.Tanh(), norm, nn.Linear(4, 3)).eval()


class Alias(nn.Module):
    """One module under two attributes, both used."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.again = self.encoder

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.encoder(x)))))


class Siamese(nn.Module):
    """Two halves of the input through one encoder that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(2, 4), nn.Tanh())
        self.right, self.head = self.left, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.cat([self.left(x[:, :2]), self.right(x[:, 2:])], dim=1))


class Tied(nn.Module):
    """A decoder that is its encoder's transpose, and two layers that share a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.encoder.weight

    def forward(self, x):
        return F.linear(torch.tanh(self.second(torch.tanh(self.encoder(x)))), self.encoder.weight.T)


class Functional(nn.Module):
    """Parameters that no module knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4) / 2), nn.Parameter(torch.randn(5))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, self.weight, self.bias))) * self.scale.exp()


class UsedBesideItsModule(nn.Module):
    """A layer's weight that `forward` uses a second time, beside the call of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x))) + x @ self.inner.weight[:, :3]


class Penalised(nn.Module):
    """Weight decay within the model's own output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x))), self.inner.weight.square().sum()


class LogitScale(nn.Module):
    """A scalar temperature, as CLIP has it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.classes = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 3))
        self.logit_scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.logit_scale.exp() * F.normalize(self.encoder(x), dim=1) @ F.normalize(self.classes, dim=1).T


class Lists(nn.Module):
    """`ParameterList`, `ParameterDict` and `ModuleList`."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4) / 2) for _ in range(2)])
        self.named = nn.ParameterDict({"bias": nn.Parameter(torch.randn(4))})
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])

    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x @ weight + self.named["bias"])
        for layer in self.layers:
            x = layer(x)
        return x


class AliasInAList(nn.Module):
    """A plain list keeps the parameter, and `forward` reads it from there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.kept = [self.inner.weight]

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, self.kept[0], self.inner.bias)))


class ModulesInAList(nn.Module):
    """A plain list keeps modules that are registered under other names, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.order = [self.inner, torch.tanh, self.head]

    def forward(self, x):
        for step in self.order:
            x = step(x)
        return x


class Square(torch.autograd.Function):
    """A function in the old form: no `vmap`, no forward mode, but twice differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, by_output):
        (x,) = ctx.saved_tensors
        return 2 * x * by_output


class SquareOnce(Square):
    """The same, once differentiable."""

    @staticmethod
    @once_differentiable
    def backward(ctx, by_output):
        return 2 * ctx.saved_tensors[0] * by_output


class Rule(nn.Module):
    """An inner layer, a rule, a head."""

    def __init__(self, rule) -> None:
        super().__init__()
        self.inner, self.head, self.rule = nn.Linear(4, 4), nn.Linear(4, 3), rule

    def forward(self, x):
        return self.head(self.rule(self.inner(x)))


def straight_through(x):
    return x + (torch.round(4 * x) / 4 - x).detach()


class Checkpointed(nn.Module):
    """The inner part is computed again in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), nn.Linear(4, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return self.head(torch.tanh(checkpoint(self.inner, x, use_reentrant=self.use_reentrant)))


def not_checkpointed():
    model = Checkpointed(False)
    model.forward = lambda x: model.head(torch.tanh(model.inner(x)))
    return model


class Branches(nn.Module):
    """Each example takes its own way, by its values."""

    def __init__(self) -> None:
        super().__init__()
        self.dark, self.bright, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        rows = [torch.tanh(self.bright(r)) if r.mean() > 0.5 else self.dark(r).square() for r in x]
        return self.head(torch.stack(rows))


class Loop(nn.Module):
    """As many steps as the batch asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        for _ in range(1 + int(x.sum().item()) % 3):
            x = torch.tanh(self.inner(x))
        return self.head(x)


class Auxiliary(nn.Module):
    """A head that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head, self.auxiliary = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)))


class Constant(nn.Module):
    """Outputs that no input moves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(0 * x)


class ComplexWeight(nn.Module):
    """A complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(3, dtype=torch.complex64)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4))


def plain_mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def changed(change, model=plain_mlp):
    def make():
        built = model()
        change(built)
        return built

    return make


def freeze(model, *names):
    for name, p in model.named_parameters():
        if name in names:
            p.requires_grad_(False)


def scaling_hook(model):
    model[0].register_forward_hook(lambda module, inputs, output: output * 1.5)
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))


def parameter_hook(model):
    model[0].weight.register_hook(lambda g: 0.5 * g)


def backward_hook(model):
    # Run again in the backward pass of the backward pass: no derivative of what it makes of the gradient.
    model[1].register_full_backward_hook(lambda module, by_input, by_output: (0.5 * by_input[0],))


def loss_of_pair(outputs, targets):
    return F.cross_entropy(outputs[0], targets) + 0.1 * outputs[1]


def on_layer(function, model=plain_mlp):
    """`function` applied to the first layer."""
    return changed(lambda m: function(m[0]), model)


CASES: list[Case] = [
    case("one module twice in a chain", vectors(two_names), "shared"),
    case("one block under two names", vectors(two_names_of_a_block), "shared"),
    case("one norm under two names, in eval", vectors(two_names_with_buffers), "shared"),
    case("one module under two attributes", vectors(Alias), "shared"),
    case("Siamese encoder", vectors(Siamese), "shared"),
    case("tied weights", vectors(Tied, nn.MSELoss, lambda: torch.randn(3, 4)), "shared"),
    case("parameters used functionally", vectors(Functional), "functional"),
    case("a layer's weight used beside it", vectors(UsedBesideItsModule), "functional"),
    case("a penalty among the outputs", vectors(Penalised, lambda: loss_of_pair), "functional"),
    case("logit_scale", vectors(LogitScale), "functional"),
    case("lists and dictionaries of parameters", vectors(Lists), "functional"),
    case(
        "a plain list keeps a parameter",
        vectors(AliasInAList),
        "functional",
        may_refuse="(?i)kept|alias|outside|inner.weight",
    ),
    case("a plain list keeps modules", vectors(ModulesInAList), "functional"),
    case("custom Function", vectors(lambda: Rule(Square.apply)), "function"),
    case(
        "custom Function, once differentiable",
        vectors(lambda: Rule(SquareOnce.apply)),
        "function",
        plain=vectors(lambda: Rule(Square.apply)),
        may_refuse="(?i)differentia",
    ),
    case("straight through", vectors(lambda: Rule(straight_through)), "function"),
    case("checkpointing", vectors(lambda: Checkpointed(False)), "checkpoint"),
    case(
        "re-entrant checkpointing",
        vectors(lambda: Checkpointed(True)),
        "checkpoint",
        plain=vectors(not_checkpointed),
        may_refuse="(?i)checkpoint|re-?entrant",
    ),
    case("a branch per example", vectors(Branches), "data-dependent"),
    case("a loop by the batch", vectors(Loop), "data-dependent"),
    case("auxiliary head that is not reached", vectors(Auxiliary), "frozen"),
    case("frozen layer", vectors(changed(lambda m: freeze(m, "0.weight", "0.bias"))), "frozen"),
    case("frozen bias", vectors(changed(lambda m: freeze(m, "0.bias", "2.bias"))), "frozen"),
    case("only the head", vectors(changed(lambda m: m[0].requires_grad_(False))), "frozen"),
    case("only the first bias", vectors(changed(lambda m: freeze(m, "0.weight", "2.weight", "2.bias"))), "frozen"),
    case("constant outputs", vectors(Constant), "degenerate"),
    case("complex parameter", vectors(ComplexWeight), "degenerate", refused="(?i)complex"),
    case("weight_norm, old", vectors(on_layer(nn.utils.weight_norm)), "reparametrised"),
    case("weight_norm", vectors(on_layer(parametrizations.weight_norm)), "reparametrised"),
    case("spectral_norm, old", vectors(on_layer(nn.utils.spectral_norm)), "reparametrised"),
    case("spectral_norm", vectors(on_layer(parametrizations.spectral_norm)), "reparametrised"),
    case("spectral_norm in eval", vectors(lambda: on_layer(parametrizations.spectral_norm)().eval()), "reparametrised"),
    case(
        "orthogonal",
        vectors(on_layer(lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley"))),
        "reparametrised",
    ),
    case("pruned", vectors(on_layer(lambda m: prune.random_unstructured(m, "weight", 0.5))), "reparametrised"),
    case("forward hooks", vectors(changed(scaling_hook)), "hooks"),
    case("a hook on a parameter", vectors(changed(parameter_hook)), "hooks", may_refuse="(?i)hook"),
    case("a backward hook", vectors(changed(backward_hook)), "hooks", refused="(?i)hook"),
    case(
        "lone pictures without channels",
        lambda: (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), nn.CrossEntropyLoss(), pictures()[:, 0], labels()),
        "layer",
    ),
]
