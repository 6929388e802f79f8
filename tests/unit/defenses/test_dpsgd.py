"""Our clip-and-noise against a real Opacus engine."""

import copy
import warnings

import pytest
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradguard.defenses as gd
from gradguard.functional.loss_gradient import LossGradient
from gradguard.privacy import OpacusAccountant

B = 8


@pytest.fixture
def setting():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    return net, torch.randn(B, 1, 6, 6), torch.randint(3, (B,))


def with_opacus(net, x, y, sigma, accountant="rdp"):
    net = copy.deepcopy(net)
    engine = PrivacyEngine(accountant=accountant)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer, _ = engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=B),
            noise_multiplier=sigma,
            max_grad_norm=0.5,
            poisson_sampling=False,
        )
        nn.CrossEntropyLoss()(model(x), y).backward()
        optimizer.step()
    return [p.grad for p in net.parameters()], engine


def ours(net, x, y, sigma):
    release = gd.Release(loss_gradient=LossGradient(net, nn.CrossEntropyLoss()), inputs=x, targets=y)
    return gd.DPSGD(max_norm=0.5, noise_multiplier=sigma).start().protect(release)


def test_without_noise_the_clipped_sums_agree(setting):
    theirs, _ = with_opacus(*setting, 0.0)
    for got, want in zip(ours(*setting, 0.0).message.values(), theirs, strict=True):
        # Opacus divides by the norm plus 1e-6.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_noise_is_as_large_and_costs_as_much(setting):
    bare, sent = ours(*setting, 0.0).message, [ours(*setting, 20.0).message for _ in range(20)]
    ours_std = torch.cat([(s[n] - g).flatten() for s in sent for n, g in bare.items()]).std().item()
    clean, _ = with_opacus(*setting, 0.0)
    noise = []
    for _ in range(20):
        noisy, engine = with_opacus(*setting, 20.0)
        noise += [(a - b).flatten() for a, b in zip(noisy, clean, strict=True)]
    # 4700 numbers each: their spread is known to 1%.
    assert ours_std == pytest.approx(20.0 * 0.5 / B, rel=0.05)
    assert ours_std == pytest.approx(torch.cat(noise).std().item(), rel=0.07)
    claim = gd.claim(gd.DPSGD(max_norm=0.5, noise_multiplier=20.0), delta=1e-5, rounds=1, secure=True)
    assert claim.epsilon == pytest.approx(engine.get_epsilon(1e-5), rel=1e-9)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_the_engines_default_accountant_can_be_asked_for(setting):
    _, engine = with_opacus(*setting, 2.0, accountant="prv")
    ours = OpacusAccountant(rounds=1, kind="prv").epsilon(2.0, 1e-5)
    assert ours == pytest.approx(engine.get_epsilon(1e-5), rel=1e-9)
