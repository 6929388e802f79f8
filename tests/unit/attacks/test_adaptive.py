"""Adaptive attacks: what a defense declares is used, and it makes the attack better."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from gradguard import Guard, InputError, InputJacobian, LossGradient, Policy, ThreatModel
from gradguard.attacks import DLG, ILRG, RGAP, InvertingGradients, Observation
from gradguard.attacks.adaptive import MAP, WienerFilter, adaptive, adaptive_attacks
from gradguard.defenses import GaussianNoise, Pruning, Quantisation, RandomPruning, Release, Sign, Soteria
from gradguard.evaluation.judgement import Judge
from gradguard.evaluation.scoring import observe
from gradguard.leakage import bayes_floor, fidelity, spectrum
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.threats.knowledge import Knowledge
from gradguard.zoo.models import lenet, uniform_init_
from gradguard.zoo.pictures import photos


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def seen(model, loss_fn, x, y, defense):
    """What is seen of one example's gradient behind a defense, and what is declared of it."""
    function = LossGradient(model, loss_fn)
    gradient = function(x, y)
    message = defense(gradient, InputJacobian(function, x, y), generator=gen(3))
    known = defense.knowledge(Release(gradient, loss_gradient=function, inputs=x, targets=y), message)
    return Observation(loss_gradient=function, sent=message, input_shape=tuple(x.shape[1:]), labels=y, knowledge=known)


def psnr(attack, observation, x):
    return fidelity(attack(observation, generator=gen()).inputs, x).psnr.item()


# ---------------------------------------------------------------------- transforms


@pytest.mark.parametrize(
    ("defense", "gain"),
    [
        (Sign(), 10),
        (Pruning(fraction=0.4), 30),
        (RandomPruning(fraction=0.4), 30),
        (Quantisation(bits=2), 8),
        (Quantisation(bits=4), 5),
        (Soteria(fraction=0.4), 30),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_knowing_the_transform_beats_not_knowing_it(convnet, cross_entropy, batch, defense, gain):
    x, y = batch[0][:1], batch[1][:1]
    observation = seen(convnet, cross_entropy, x, y, defense)
    plain = DLG(restarts=1, evaluations=100)
    knowing = adaptive(plain, observation.knowledge)
    assert knowing.name == "DLG, adaptive"
    assert psnr(knowing, observation, x) > psnr(plain, observation, x) + gain


def test_a_plain_attack_does_not_look_at_the_declaration(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    observation = seen(convnet, cross_entropy, x, y, Pruning(fraction=0.4))
    attack = DLG(restarts=1, evaluations=20, polish=2)
    one, other = (attack(o, generator=gen()).inputs for o in (observation, replace(observation, knowledge=None)))
    assert torch.equal(one, other)


def test_with_nothing_declared_the_adaptive_attack_is_the_plain_one(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    observation = replace(seen(convnet, cross_entropy, x, y, Pruning(fraction=0.4)), knowledge=None)
    attack = DLG(restarts=1, evaluations=20, polish=2)
    one, other = (a(observation, generator=gen()).inputs for a in (attack, replace(attack, adaptive=True)))
    assert torch.equal(one, other)


def test_layers_that_are_left_out_are_not_matched(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    function = LossGradient(convnet, cross_entropy)
    gradient = function(x, y)
    name = list(gradient)[-2]  # the head, replaced by noise
    sent = gradient | {name: torch.randn(gradient[name].shape, generator=gen(), dtype=torch.float64)}
    known = Knowledge(left_out=(name,))
    observation = Observation(loss_gradient=function, sent=sent, input_shape=(1, 8, 8), labels=y, knowledge=known)
    plain = DLG(restarts=1, evaluations=100)
    assert psnr(adaptive(plain, known), observation, x) > 60 > 30 > psnr(plain, observation, x)


def test_a_secret_factor_is_solved_for(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    function = LossGradient(convnet, cross_entropy)
    sent = {n: 0.3 * g for n, g in function(x, y).items()}
    known = Knowledge(scale=None)
    observation = Observation(loss_gradient=function, sent=sent, input_shape=(1, 8, 8), labels=y, knowledge=known)
    assert psnr(adaptive(DLG(restarts=1, evaluations=100), known), observation, x) > 60


def test_noise_that_differs_over_layers_is_weighed(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    function = LossGradient(convnet, cross_entropy)
    gradient = function(x, y)
    stds = {n: (0.1 if g.shape == (10, 512) else 1e-4) for n, g in gradient.items()}
    noise = {n: s * torch.randn(gradient[n].shape, generator=gen(7), dtype=torch.float64) for n, s in stds.items()}
    known = Knowledge(variance={n: s**2 for n, s in stds.items()})
    observation = Observation(
        loss_gradient=function,
        sent={n: g + noise[n] for n, g in gradient.items()},
        input_shape=(1, 8, 8),
        labels=y,
        knowledge=known,
    )
    plain = InvertingGradients(restarts=1, iterations=5)
    assert adaptive(plain, known) is None  # a cosine cannot weigh it
    dlg = DLG(restarts=1, evaluations=100, polish=0)
    assert psnr(adaptive(dlg, known), observation, x) > psnr(dlg, observation, x) + 3


@pytest.mark.parametrize("defense", [Sign(), Pruning(fraction=0.4), Quantisation(bits=4)], ids=str)
def test_one_of_a_batch_whose_others_are_known(convnet, cross_entropy, batch, defense):
    """The step was taken with the whole batch's gradient; the attacker knows the others' part."""
    function = LossGradient(convnet, cross_entropy)
    jacobian, true = InputJacobian(function, *batch), function(*batch)
    sent = defense(true, generator=gen())
    known = defense.knowledge(Release(true), sent)
    observation = observe(jacobian, true, sent, [2], threat=ThreatModel(), knowledge=known)
    plain = DLG(restarts=1, evaluations=100)
    x = batch[0][2:3]
    assert psnr(adaptive(plain, observation.knowledge), observation, x) > psnr(plain, observation, x) + 3


def test_observations_refuse_what_is_no_declaration(convnet, cross_entropy, batch):
    observation = seen(convnet, cross_entropy, batch[0][:1], batch[1][:1], Sign())
    with pytest.raises(InputError, match="knowledge"):
        replace(observation, knowledge={"scale": 1})


# ---------------------------------------------------------------------- which attacks are called for


def test_what_a_declaration_calls_for():
    plain = (RGAP(), DLG(), ILRG())
    mask = {"w": torch.tensor([True, False])}

    def names(known, attacks=plain):
        return [a.name for a in adaptive_attacks(known, attacks)]

    assert names(Knowledge()) == []
    assert names(Knowledge(mask=mask)) == ["DLG, adaptive"]
    assert names(Knowledge(mask={"w": mask["w"] | True})) == []
    assert names(Knowledge(variance=0.1)) == ["MAP"]
    assert names(Knowledge(variance=0.0)) == []
    assert names(Knowledge(variance={"a": 1.0, "b": 0.1})) == ["DLG, adaptive", "MAP"]
    assert names(Knowledge(displacement=lambda u: u)) == ["DLG, Wiener filter"]
    assert names(Knowledge(variance=0.1), (ILRG(),)) == []
    assert names(Knowledge(scale=None, variance=0.1)) == ["DLG, adaptive"]
    assert adaptive(DLG(adaptive=True), Knowledge(mask=mask)) is None


def test_verdicts_run_them(convnet, cross_entropy, batch):
    x, y = batch[0][:2], batch[1][:2]
    dlg = DLG(restarts=1, evaluations=60, polish=10)
    guard = Guard(defense=Sign(), attacks=[dlg], threat=ThreatModel(max_attacked=1))
    report = guard.audit(convnet, cross_entropy, x, y)
    assert set(report.attacks) == {"DLG", "DLG, adaptive"}
    assert set(report.attacks["DLG, adaptive"]) == {"with"}
    assert report.best_psnr("with") == report.attacks["DLG, adaptive"]["with"].best_psnr
    assert report.best_psnr("with") > report.attacks["DLG"]["with"].best_psnr + 5
    middle = (report.best_psnr("with") + report.attacks["DLG"]["with"].best_psnr) / 2
    asking = Guard(
        defense=Sign(),
        attacks=[dlg],
        threat=ThreatModel(max_attacked=1),
        policy=Policy(maximum_attacked_psnr=middle, minimum_predicted_error=None, maximum_attacked_ssim=None),
    )
    _, verdict = asking.protect(convnet, cross_entropy, x, y)
    assert verdict.decision == "block"  # the plain attack alone would have let it pass


def test_a_judge_without_a_declaration_runs_the_plain_ones(convnet, cross_entropy, batch):
    function = LossGradient(convnet, cross_entropy)
    jacobian, true = InputJacobian(function, *batch), function(*batch)
    noise = GaussianNoise(std=0.1)
    sent = noise(true, generator=gen())
    attack = DLG(restarts=1, evaluations=3, polish=0)
    judge = Judge(jacobian, true, attacks=[attack], policy=Policy(), threat=ThreatModel(max_attacked=1))
    assert set(judge(sent).scores.inputs) == {"DLG"}
    assert set(judge(sent, noise.knowledge(Release(true), sent)).scores.inputs) == {"DLG", "MAP"}


# ---------------------------------------------------------------------- declared noise


@pytest.mark.parametrize("attack", [MAP(starts=2), WienerFilter(attack=DLG(restarts=1))], ids=["MAP", "Wiener"])
def test_the_error_is_that_of_the_bayes_floor_in_the_linear_regime(convnet, cross_entropy, attack):
    """Inputs are drawn from the prior. The ratio's standard error over these draws is .07, so .85 is 1 less two."""
    prior, std, y = PowerLawPrior(), 1e-3, torch.tensor([3])
    function = LossGradient(convnet, cross_entropy)
    errors, floors = [], []
    for seed in range(12):
        x = 0.5 + prior.sqrt(torch.randn(1, 1, 8, 8, generator=gen(seed), dtype=torch.float64))
        sent = {
            n: g + std * torch.randn(g.shape, generator=gen(100 * seed + i), dtype=g.dtype)
            for i, (n, g) in enumerate(function(x, y).items())
        }
        known = Knowledge(variance=std**2)
        observation = Observation(loss_gradient=function, sent=sent, input_shape=(1, 8, 8), labels=y, knowledge=known)
        found = replace(attack, prior=prior)(observation, generator=gen(seed))
        errors.append((found.inputs - x).square().mean().item())
        floors.append(bayes_floor(InputJacobian(function, x, y), prior, std**2).mse.item())
    assert 0.85 < sum(errors) / sum(floors) < 1.3


def small_eigenvalue_noise(jacobian, share, ratio, gradient):
    """Noise in the eigenvectors of `J J^T` with the smallest eigenvalues: the message's change, and its declaration."""
    vectors = spectrum(jacobian, jacobian.size).vectors[0]
    vectors = vectors[-int(share * len(vectors)) :]
    direction = torch.randn(len(vectors), generator=gen(5), dtype=torch.float64) @ vectors
    delta = {n: v[0] for n, v in jacobian.rmatvec(direction.reshape(jacobian.inputs.shape)).items()}
    length, whole = (sum(v.square().sum() for v in g.values()).sqrt() for g in (delta, gradient))
    factor = (ratio * whole / length).item()
    known = Knowledge(displacement=lambda u: factor**2 * ((u.reshape(1, -1) @ vectors.T) @ vectors).reshape(u.shape))
    return {n: gradient[n] + factor * v for n, v in delta.items()}, known


def test_the_illusion_of_small_eigenvalue_noise(cross_entropy):
    """Plain DLG sees a picture that is gone; a Wiener filter gives it back, for natural pictures have little there."""
    pictures = photos(16)
    x, y = pictures.images[:1].double(), pictures.labels[:1]
    torch.manual_seed(1)
    model = uniform_init_(lenet(in_channels=x.shape[1], image_size=16)).double()
    function = LossGradient(model, cross_entropy)
    gradient = function(x, y)
    sent, known = small_eigenvalue_noise(InputJacobian(function, x, y), 0.25, 0.05, gradient)
    observation = Observation(
        loss_gradient=function, sent=sent, input_shape=tuple(x.shape[1:]), labels=y, knowledge=known
    )
    plain = DLG(restarts=1, polish=10)
    (filtered,) = adaptive_attacks(known, [plain])
    assert psnr(filtered, observation, x) > psnr(plain, observation, x) + 5


def test_what_is_not_sent_does_not_count_for_map(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    observation = seen(convnet, cross_entropy, x, y, RandomPruning(fraction=0.3))
    noisy = {
        n: g + 1e-4 * torch.randn(g.shape, generator=gen(), dtype=g.dtype) * observation.knowledge.mask[n]
        for n, g in observation.sent.items()
    }
    known = replace(observation.knowledge, variance=1e-8)
    assert psnr(MAP(starts=2), replace(observation, sent=noisy, knowledge=known), x) > 30


@dataclass(frozen=True)
class Independent:
    """A prior of one's own: independent elements around a mean."""

    mean: torch.Tensor
    std: float = 0.1

    def sqrt(self, x):
        return self.std * x


def test_a_prior_of_ones_own(convnet, cross_entropy, batch):
    """With noise that hides everything the answer is the prior's mean."""
    x, y = batch[0][:1], batch[1][:1]
    function = LossGradient(convnet, cross_entropy)
    mean = torch.full((1, 8, 8), 0.3)
    for known, attack in (
        (Knowledge(variance=1e12), MAP(prior=Independent(mean), starts=1)),
        (Knowledge(displacement=lambda u: 1e12 * u), WienerFilter(prior=Independent(mean), attack=DLG(evaluations=5))),
    ):
        observation = Observation(
            loss_gradient=function, sent=function(x, y), input_shape=(1, 8, 8), labels=y, knowledge=known
        )
        found = attack(observation, generator=gen()).inputs
        torch.testing.assert_close(found, mean[None].double(), atol=1e-3, rtol=0)


def test_they_refuse_what_declares_no_noise(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    observation = seen(convnet, cross_entropy, x, y, Sign())
    for attack in (MAP(), WienerFilter()):
        for known in (None, observation.knowledge):
            with pytest.raises(InputError, match="noise"):
                attack(replace(observation, knowledge=known))
    with pytest.raises(InputError):
        MAP(starts=0)
    with pytest.raises(InputError, match="sqrt"):
        MAP(prior=3)
    with pytest.raises(InputError, match="inputs"):
        WienerFilter(attack=ILRG())


def test_large_inputs_are_solved_without_forming_anything(monkeypatch, convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    function = LossGradient(convnet, cross_entropy)
    sent = {n: g + 1e-3 * torch.randn(g.shape, generator=gen(), dtype=g.dtype) for n, g in function(x, y).items()}
    known = Knowledge(variance=1e-6)
    observation = Observation(loss_gradient=function, sent=sent, input_shape=(1, 8, 8), labels=y, knowledge=known)
    attacks = (MAP(starts=1), WienerFilter(attack=DLG(restarts=1)))
    dense = [a(observation, generator=gen()).inputs for a in attacks]
    monkeypatch.setattr("gradguard.attacks.posterior.DENSE_SIZE", 0)
    iterative = [a(observation, generator=gen()).inputs for a in attacks]
    for one, other in zip(dense, iterative, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_mnist_pruned_by_40_percent_with_the_mask_known(real_pictures):
    """The first picture of I2F's row (Zhang et al. 2023): SSIM of at least .984; see benchmarks/reproduce_i2f.py."""
    pictures = real_pictures("mnist_2000")
    x, y = (pictures.images[1000:1001].double() - 0.1307) / 0.3081, pictures.labels[1000:1001]
    torch.manual_seed(1)
    model = uniform_init_(lenet()).double()
    observation = seen(model, nn.CrossEntropyLoss(), x, y, Pruning(fraction=0.4))
    attack = adaptive(DLG(restarts=1, evaluations=500, polish=0), observation.knowledge)
    found = attack(observation, generator=gen()).inputs
    assert fidelity(found * 0.3081 + 0.1307, x * 0.3081 + 0.1307).ssim.item() >= 0.984
