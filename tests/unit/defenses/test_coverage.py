"""Nothing leaves bare: tensors that a directional defense does not reach are covered or refused by name."""

import pytest
import torch
from torch import nn

import gradguard as gg
from gradguard.defenses import Defense, GaussianNoise, PriorNoise, Pruning, SmallEigenspaceNoise
from gradguard.defenses.coverage import cover, isotropic
from gradguard.functional.vectors import norm


class TwoHeads(nn.Module):
    """A classifier with an auxiliary head that only another loss term reaches."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Sigmoid())
        self.head = nn.Linear(16, 10)
        self.auxiliary = nn.Linear(64, 64)

    def forward(self, x):
        return self.head(self.trunk(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoHeads().double()


@pytest.fixture
def function(model, cross_entropy):
    return gg.LossGradient(model, cross_entropy)


@pytest.fixture
def message(model, cross_entropy, batch):
    """What a training step with a reconstruction loss on the auxiliary head sends: it holds the picture."""
    x, y = batch
    loss = cross_entropy(model(x), y) + nn.functional.mse_loss(model.auxiliary(x.flatten(1)), x.flatten(1))
    loss.backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return gradient


def generator():
    return torch.Generator().manual_seed(0)


def ratio(sent, given, names):
    return (norm({n: sent[n] - given[n] for n in names}) / norm({n: given[n] for n in names})).item()


@pytest.mark.parametrize("defense", [PriorNoise(noise_ratio=0.4), SmallEigenspaceNoise(noise_ratio=0.4)])
def test_what_directional_noise_does_not_reach_is_covered(model, function, batch, message, defense):
    """By the defense itself, which knows what `J^T` does not reach; `cover` adds nothing to it."""
    jacobian = gg.InputJacobian(function, *batch)
    covered = cover(defense, message, jacobian, generator=generator())
    for name in ("auxiliary.weight", "auxiliary.bias"):
        assert ratio(covered.message, message, [name]) == pytest.approx(0.4, rel=0.25)
    alone = defense(message, jacobian, generator=generator())
    assert all(torch.equal(covered.message[n], alone[n]) for n in message)
    sent = gg.Guard(defense=defense).perturb(jacobian, message, generator=generator())
    assert all(torch.equal(sent[n], g) for n, g in covered.message.items())


def test_covering_can_be_refused(model, function, cross_entropy, batch, message):
    guard = gg.Guard(defense=PriorNoise(), attacks=(), uncovered="refuse")
    jacobian = gg.InputJacobian(function, *batch)
    for call in (
        lambda: guard.perturb(jacobian, message),
        lambda: guard.protect(model, cross_entropy, *batch, message),
    ):
        with pytest.raises(gg.InputError, match=r"leaves the tensors \['auxiliary\.weight', 'auxiliary\.bias'\]"):
            call()
    with pytest.raises(gg.InputError, match='`uncovered` must be "noise" or "refuse"'):
        gg.Guard(uncovered="maybe")


def test_protect_names_what_it_covers_and_does_not_measure(model, cross_entropy, batch, message):
    guard = gg.Guard(defense=PriorNoise(), attacks=())
    sent, verdict = guard.protect(model, cross_entropy, *batch, message, generator=generator())
    assert verdict.decision == "perturb"
    said = " ".join(verdict.reasons)
    assert "'auxiliary.weight', 'auxiliary.bias' would leave bare" in said
    assert "covered by isotropic noise at the same ratio, what they give away is not measured" in said
    assert ratio(sent, message, ["auxiliary.weight"]) == pytest.approx(0.5, rel=0.1)


def test_a_bare_tensor_is_never_sent_however_lenient_the_policy(model, cross_entropy, batch, message):
    policy = gg.Policy(minimum_predicted_error=None, maximum_attacked_psnr=None)
    sent, verdict = gg.Guard(attacks=(), policy=policy).protect(model, cross_entropy, *batch, message)
    assert (sent, verdict.decision) == (None, "block")
    assert "'auxiliary.weight', 'auxiliary.bias' would leave bare" in verdict.reasons[0]
    message["auxiliary.weight"].zero_()
    message["auxiliary.bias"] = None
    _, verdict = gg.Guard(attacks=(), policy=policy).protect(model, cross_entropy, *batch, message)
    assert verdict.decision != "block"


class Table(nn.Module):
    """Tokens are embedded outside of what is measured."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_a_table_beside_its_embeddings_is_covered_in_every_row(cross_entropy):
    """Which rows are zero tells which words there are: noise goes on all of them."""
    torch.manual_seed(0)
    model, tokens, labels = Table().double(), torch.tensor([[1, 5, 7]]), torch.tensor([2])
    cross_entropy(model(tokens), labels).backward()
    message = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert int(message["embed.weight"].any(1).sum()) == 3
    function = gg.LossGradient(model, cross_entropy, input_module="embed")
    jacobian = gg.InputJacobian(function, function.embed(tokens), labels)
    covered = cover(PriorNoiseInRange(), message, jacobian, generator=generator())
    assert covered.bare == ("embed.weight",)
    assert (covered.message["embed.weight"] != message["embed.weight"]).all()


class PriorNoiseInRange(Defense):
    """The range of J^T for inputs that are no pictures."""

    needs_jacobian = True

    def perturbation(self, gradient, jacobian=None, *, generator=None):
        direction = torch.randn(jacobian.inputs.shape, generator=generator, dtype=jacobian.inputs.dtype)
        return jacobian.joint().rmatvec(direction)


class LastLayerOnly(Defense):
    """A user's own: noise on one tensor."""

    def perturbation(self, gradient, jacobian=None, *, generator=None):
        delta = {n: torch.zeros_like(g) for n, g in gradient.items()}
        delta["head.weight"] = torch.randn(gradient["head.weight"].shape, generator=generator).double()
        return delta


def test_a_users_own_defense_is_covered_too(message):
    covered = cover(LastLayerOnly(), message, generator=generator())
    assert set(covered.bare) == set(message) - {"head.weight"}
    assert all((covered.message[n] != g).any() for n, g in message.items())


def test_half_a_tensor_is_covered_where_it_is_bare():
    class HalfTheRows(Defense):
        def perturbation(self, gradient, jacobian=None, *, generator=None):
            delta = torch.zeros(100, 10)
            delta[:50] = torch.randn(50, 10, generator=generator)
            return {"w": delta}

    gradient = {"w": torch.ones(100, 10)}
    covered = cover(HalfTheRows(), gradient, generator=generator())
    assert covered.bare == ("w",)
    assert (covered.message["w"] != 1).all()
    alone = HalfTheRows()(gradient, generator=generator())
    assert torch.equal(covered.message["w"][:50], alone["w"][:50])


def test_what_needs_no_cover_gets_none(message):
    for defense in (GaussianNoise(noise_ratio=0.3), Pruning(fraction=0.5)):
        covered = cover(defense, message, generator=generator())
        assert covered.bare == ()
        alone = defense(message, generator=generator())
        assert all(torch.equal(covered.message[n], g) for n, g in alone.items())
    zero = {n: torch.zeros_like(g) for n, g in message.items()}
    assert cover(GaussianNoise(noise_ratio=0.3), zero, generator=generator()).bare == ()


def test_a_defense_that_adds_nothing_is_refused(message):
    class Nothing(Defense):
        def perturbation(self, gradient, jacobian=None, *, generator=None):
            return {n: torch.zeros_like(g) for n, g in gradient.items()}

    with pytest.raises(gg.InputError, match="Nothing adds nothing to this gradient"):
        cover(Nothing(), message)


def test_parameters_of_the_loss_are_named(convnet, batch):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, outputs, targets):
            return nn.functional.cross_entropy(outputs * self.temperature, targets)

    guard = gg.Guard(defense=PriorNoise(), attacks=())
    _, verdict = guard.protect(convnet, Weighted(), *batch, generator=generator())
    assert any("the loss has parameters of its own ('temperature')" in r for r in verdict.reasons)
    gradient = gg.LossGradient(convnet, Weighted())(*batch)
    with pytest.raises(gg.InputError, match=r"unexpected \['temperature'\].*must become part of `model`"):
        guard.protect(convnet, Weighted(), *batch, gradient | {"temperature": torch.ones(())})


def test_isotropic_noise_for_what_no_model_holds():
    sent = isotropic({"t": torch.ones(10_000), "zero": torch.zeros(3)}, 0.5, generator())
    assert (sent["t"] - 1).std().item() == pytest.approx(0.5, rel=0.05)
    assert not sent["zero"].any()
