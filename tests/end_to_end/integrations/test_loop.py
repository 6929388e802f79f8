"""The plain loop: the optimiser gets exactly what the defense sent, and a stream goes on after an interruption."""

import pytest
import torch
from torch import nn

from gradguard.defenses import Compose, GaussianNoise, PriorNoise, Pruning
from gradguard.errors import InputError
from gradguard.integrations.loop import ProtectedSteps

KEY = b"k" * 32


def setting():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.rand(4, 1, 4, 4, generator=generator), torch.arange(4) % 3) for _ in range(4)]
    return model, optimiser, batches


def backward(model, optimiser, batch):
    optimiser.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()


@pytest.mark.parametrize(
    "defense",
    [GaussianNoise(noise_ratio=0.5), PriorNoise(), Compose(steps=(Pruning(fraction=0.5), GaussianNoise(std=0.1)))],
    ids=lambda d: d.name,
)
def test_the_optimiser_gets_what_was_sent(defense):
    model, optimiser, batches = setting()
    protect = ProtectedSteps(model, nn.CrossEntropyLoss(), defense, optimiser=optimiser, key=KEY)
    for batch in batches:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        backward(model, optimiser, batch)
        bare = {n: p.grad.clone() for n, p in model.named_parameters()}
        sent = protect(*batch)
        assert any(not torch.equal(bare[n], sent.message[n]) for n in bare)
        optimiser.step()
        for name, parameter in model.named_parameters():
            assert torch.allclose(before[name] - parameter, 0.1 * sent.message[name], atol=1e-6)
    assert protect.protector.rounds == len(batches)


def test_an_interrupted_training_goes_on_as_if_it_had_not_been():
    runs = []
    for interrupted in (False, True):
        model, optimiser, batches = setting()
        protect = ProtectedSteps(model, nn.CrossEntropyLoss(), GaussianNoise(std=0.1), key=KEY, run=b"a")
        for step, batch in enumerate(batches):
            if interrupted and step == 2:
                state = protect.state_dict()
                protect = ProtectedSteps(model, nn.CrossEntropyLoss(), GaussianNoise(std=0.1), key=KEY, run=b"a")
                protect.load_state_dict(state)
            backward(model, optimiser, batch)
            protect()
            optimiser.step()
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)


def test_two_runs_without_a_key_have_different_noise():
    found = []
    for _ in range(2):
        model, optimiser, batches = setting()
        backward(model, optimiser, batches[0])
        found.append(ProtectedSteps(model, nn.CrossEntropyLoss(), GaussianNoise(std=0.1))().message)
    assert not any(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_wrong_use_is_refused_and_changes_nothing():
    model, optimiser, batches = setting()
    protect = ProtectedSteps(model, nn.CrossEntropyLoss(), PriorNoise(), key=KEY)
    with pytest.raises(InputError, match="backward"):
        protect(*batches[0])
    backward(model, optimiser, batches[0])
    bare = {n: p.grad.clone() for n, p in model.named_parameters()}
    with pytest.raises(InputError, match="loss_gradient"):
        protect()  # this defense has to see the batch
    assert all(torch.equal(bare[n], p.grad) for n, p in model.named_parameters())
    assert protect.protector.rounds == 0
    with pytest.raises(InputError, match="`defense` must be"):
        ProtectedSteps(model, nn.CrossEntropyLoss(), "gaussian")
    two = torch.optim.SGD([{"params": model[1].parameters(), "lr": 0.1}, {"params": model[3].parameters()}], lr=0.2)
    with pytest.raises(InputError, match="learning rates"):
        ProtectedSteps(model, nn.CrossEntropyLoss(), GaussianNoise(std=0.1), optimiser=two)()
