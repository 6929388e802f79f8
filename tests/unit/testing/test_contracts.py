"""Every attack and every defense of the registries keeps its contract; and the contracts catch those that do not."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import gradguard.attacks
import gradguard.defenses
from gradguard import InputError
from gradguard.attacks import ATTACKS, MAP, Attack, MatchingAttack, Reconstruction, WienerFilter, register_attack
from gradguard.defenses import (
    DEFENSES,
    DPSGD,
    ClipPerExample,
    ClipUpdate,
    Compose,
    CorrelatedNoise,
    Defense,
    DirectionalNoise,
    Noise,
    register_defense,
)
from gradguard.functional.layers import LAYERS, BilinearLayer, layer_of, register_layer
from gradguard.functional.layers.linear import LinearLayer
from gradguard.testing import check_attack, check_defense, check_layer, check_options

#: Built from a defense's declaration, without which they refuse: not chosen by name.
BUILT = {MAP, WienerFilter}
#: They need a batch or a stream, which a single call has not: started, and tested by themselves.
STARTED = {ClipPerExample, ClipUpdate, CorrelatedNoise, DPSGD}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attack(name):
    check_attack(ATTACKS[name].make(quick=True))


@pytest.mark.parametrize("name", list(DEFENSES))
def test_defense(name):
    check_defense(DEFENSES[name].make(0.5))


LAYER_EXAMPLES = [
    pytest.param(module, shape, id=f"{kind.__name__}-{number}")
    for kind, entry in LAYERS.items()
    for number, (module, shape) in enumerate(entry.examples())
    if type(module) is kind
]


@pytest.mark.parametrize(("module", "shape"), LAYER_EXAMPLES)
def test_layer(module, shape):
    check_layer(module, shape)


def test_every_layer_has_an_example():
    shared = {nn.SyncBatchNorm}  # needs a process group; its function is BatchNorm's
    assert {type(p.values[0]) for p in LAYER_EXAMPLES} == set(LAYERS) - shared


class Shifted(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return super().forward(x) + self.weight.sum()


def test_a_subclass_of_a_known_layer_is_no_known_layer():
    assert layer_of(Shifted(2, 3), "weight", "bias") is None
    with pytest.raises(AssertionError, match="not registered"):
        check_layer(Shifted(2, 3), (2,))


class Doubled(nn.Linear):
    """A module of one's own: twice a linear layer."""

    def forward(self, x):
        return 2 * nn.functional.linear(x, self.weight)


class DoubledLayer(LinearLayer):
    """Right: the operand is doubled."""

    def operand(self, x, examples):
        return 2 * x


@pytest.fixture
def own_layer():
    yield lambda make: register_layer(Doubled, examples=lambda: [(Doubled(3, 2, bias=False), (3,))])(make)
    LAYERS.pop(Doubled, None)


def test_a_layer_of_ones_own(own_layer):
    own_layer(DoubledLayer)
    check_layer(Doubled(3, 2, bias=False), (3,))


def test_a_layer_of_ones_own_that_is_wrong_is_found_out(own_layer):
    own_layer(LinearLayer)  # forgets the factor
    with pytest.raises(AssertionError, match="goes forward over reverse"):
        check_layer(Doubled(3, 2, bias=False), (3,))


def test_what_is_no_module_is_not_registered():
    with pytest.raises(InputError, match="Only subclasses"):
        register_layer(BilinearLayer, examples=list)


def public(package, base, frames):
    found = {v for n in package.__all__ if isinstance(v := getattr(package, n), type) and issubclass(v, base)}
    return found - frames


def test_no_attack_and_no_defense_is_left_out():
    attacks = public(gradguard.attacks, Attack, {Attack, MatchingAttack, *BUILT})
    assert {entry.attack for entry in ATTACKS.values()} >= attacks
    defenses = public(gradguard.defenses, Defense, STARTED | {Compose, Defense, DirectionalNoise, Noise})
    assert {entry.defense for entry in DEFENSES.values()} >= defenses


@pytest.mark.parametrize("entry", list(ATTACKS.values()), ids=str)
def test_entries_say_what_there_is(entry):
    assert entry.recovers == ("inputs" if entry.attack.recovers_inputs else "labels")
    assert entry.needs
    assert entry.summary
    assert isinstance(entry.make(), entry.attack)


@dataclass(frozen=True, kw_only=True)
class Grey(Attack):
    """Answers with grey pictures."""

    level: float = 0.5

    def run(self, observation, generator):
        shape = (observation.batch_size, *observation.input_shape)
        return Reconstruction(
            attack=self.name, inputs=torch.full(shape, self.level).double(), labels=observation.labels
        )


def test_an_attack_of_ones_own(monkeypatch):
    monkeypatch.setattr("gradguard.attacks.registry.ATTACKS", dict(ATTACKS))
    assert register_attack("grey", needs="nothing")(Grey) is Grey
    check_attack(Grey())
    with pytest.raises(InputError, match="There is an attack 'dlg' already"):
        register_attack("dlg", needs="nothing")(Grey)
    with pytest.raises(InputError, match="Only subclasses of `Attack`"):
        register_attack("int", needs="nothing")(int)
    with pytest.raises(InputError, match="has no option 'level'"):
        register_defense("gaussian", strength="level")(gradguard.defenses.GaussianNoise)


@dataclass(frozen=True, kw_only=True)
class Careless(Grey):
    """What must not be."""

    fault: str = ""
    takes_local_training: ClassVar[bool] = False

    def run(self, observation, generator):
        result, model = super().run(observation, generator), observation.loss_gradient.model
        if self.fault == "global":
            torch.rand(1)
        elif self.fault == "hooks":
            model.register_forward_hook(lambda *a: None)
        elif self.fault == "training":
            model.train()
        elif self.fault == "parameters":
            next(model.parameters()).data.add_(1)
        elif self.fault == "forward":
            next(model.children()).forward = next(model.children()).forward
        elif self.fault == "sent":
            next(iter(observation.sent.values())).zero_()
        elif self.fault == "shape":
            result.details["x"] = torch.zeros(1)
        elif self.fault == "random":
            noise = torch.rand(result.inputs.shape, generator=torch.Generator().manual_seed(id(result)))
            result.inputs.add_(noise)
        return result


FAULTS = {
    "global": "torch's random numbers",
    "hooks": "hooks",
    "training": "training",
    "parameters": "0.weight of the model",
    "forward": "0: attributes",
    "sent": "tensor 0",
    "shape": "is a tensor; details are plain",
    "random": "the same generator gives other `inputs`",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_contract_catches(fault):
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_attack(Careless(fault=fault))


def test_the_contract_catches_options_that_can_be_set():
    @dataclass(kw_only=True)
    class Loose:
        level: float = 0.5

    @dataclass(frozen=True)
    class ByPosition:
        level: float = 0.5

    for options, message in ((Loose(), "is not frozen"), (ByPosition(), "by position"), (object(), "no dataclass")):
        with pytest.raises(AssertionError, match=message):
            check_options(options)
