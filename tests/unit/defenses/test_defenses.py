"""What each defense adds to a gradient, on real digits and against dense matrices in float64."""

import sys

import pytest
import torch
from torch import nn

from gradguard import InputError, InputJacobian, LossGradient
from gradguard.defenses import GaussianNoise, PriorNoise, Pruning, SmallEigenspaceNoise
from gradguard.defenses.base import randn
from gradguard.functional.vectors import flatten, norm
from gradguard.leakage import influence
from gradguard.linalg.covariances import PowerLawPrior

DIRECTIONAL = [
    PriorNoise(noise_ratio=0.3),
    SmallEigenspaceNoise(noise_ratio=0.3),
    SmallEigenspaceNoise(noise_ratio=0.3, fraction=0.05),
]
RANDOM = [*DIRECTIONAL, GaussianNoise(noise_ratio=0.3), GaussianNoise(std=1e-3)]
ALL = [*RANDOM, Pruning(fraction=0.7)]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def jacobian(convnet, cross_entropy, batch):
    return InputJacobian(LossGradient(convnet, cross_entropy), *batch)


@pytest.fixture
def gradient(convnet, cross_entropy, batch):
    return LossGradient(convnet, cross_entropy)(*batch)


@pytest.fixture
def krylov(monkeypatch):
    """No Jacobian is small enough to be formed."""
    # By its module: `gradguard.leakage.influence` is the function of that name.
    monkeypatch.setattr(sys.modules[influence.__module__], "DENSE_SIZE", 0)

    def refuse(self, **options):
        raise AssertionError("J was formed")

    monkeypatch.setattr(InputJacobian, "dense", refuse)


# ---------------------------------------------------------------------- every defense


@pytest.mark.parametrize("defense", ALL, ids=repr)
def test_the_sent_gradient_is_the_true_one_and_the_perturbation(gradient, jacobian, defense):
    sent = defense(gradient, jacobian, generator=gen())
    delta = defense.checked_perturbation(gradient, jacobian, generator=gen())
    assert list(sent) == list(gradient)
    for n, g in gradient.items():
        assert sent[n].shape == g.shape
        assert sent[n].dtype == g.dtype
        torch.testing.assert_close(sent[n], g + delta[n], rtol=0, atol=0)
    assert norm(delta) > 0


@pytest.mark.parametrize("defense", ALL, ids=repr)
def test_nothing_is_changed_in_place(convnet, gradient, jacobian, defense):
    kept = {n: g.clone() for n, g in gradient.items()}
    inputs, parameters = jacobian.inputs.clone(), [p.detach().clone() for p in convnet.parameters()]
    defense(gradient, jacobian, generator=gen())
    assert all(torch.equal(gradient[n], g) for n, g in kept.items())
    assert torch.equal(jacobian.inputs, inputs)
    assert all(torch.equal(p, q) for p, q in zip(convnet.parameters(), parameters, strict=True))
    assert all(p.grad is None for p in convnet.parameters())


@pytest.mark.parametrize("defense", RANDOM, ids=repr)
def test_the_generator_decides(gradient, jacobian, defense):
    state = torch.get_rng_state()
    first, again, other = (flatten(defense(gradient, jacobian, generator=gen(s))) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).norm() > 0.1 * (first - flatten(gradient)).norm()
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global one


@pytest.mark.parametrize("defense", ALL, ids=repr)
def test_a_gradient_that_is_not_a_number_is_refused(gradient, jacobian, defense):
    gradient["2.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"'2\.weight' holds NaN or infinite values"):
        defense(gradient, jacobian, generator=gen())


@pytest.mark.parametrize("defense", DIRECTIONAL, ids=repr)
def test_a_missing_jacobian_is_refused(gradient, defense):
    with pytest.raises(InputError, match=rf"{defense.name} depends on .*pass `jacobian=InputJacobian\(LossGradient"):
        defense(gradient)


@pytest.mark.parametrize("defense", [GaussianNoise(noise_ratio=0.3), Pruning(fraction=0.5)], ids=repr)
def test_the_others_need_none(gradient, jacobian, defense):
    first, second = defense(gradient, generator=gen()), defense(gradient, jacobian, generator=gen())
    assert torch.equal(flatten(first), flatten(second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_noise_is_standard_normal_in_every_precision(dtype):
    like = torch.zeros((), dtype=dtype)
    noise = randn((40_000,), like, gen())
    assert noise.dtype == dtype
    assert abs(noise.double().mean()) < 0.02
    assert abs(noise.double().std() - 1) < 0.02
    assert torch.equal(noise, randn((40_000,), like, gen()))


# ---------------------------------------------------------------------- strength


@pytest.mark.parametrize("ratio", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("kind", [PriorNoise, SmallEigenspaceNoise])
def test_directional_noise_has_just_the_length_asked_for(gradient, jacobian, kind, ratio):
    delta = kind(noise_ratio=ratio).checked_perturbation(gradient, jacobian, generator=gen())
    torch.testing.assert_close(norm(delta), ratio * norm(gradient), rtol=1e-12, atol=0)


def test_gaussian_noise_has_it_in_expectation(gradient):
    """9,930 elements: one draw is within 5 standard deviations, 5 / sqrt(2 P) = 3.6%; each tensor has the same std."""
    delta = GaussianNoise(noise_ratio=0.5).checked_perturbation(gradient, generator=gen())
    torch.testing.assert_close(norm(delta), 0.5 * norm(gradient), rtol=0.036, atol=0)
    std = 0.5 * norm(gradient) / flatten(gradient).numel() ** 0.5
    for name in ("2.weight", "5.weight"):
        assert delta[name].std().item() == pytest.approx(std.item(), rel=0.06)
        assert abs(delta[name].mean()) < 5 * std / delta[name].numel() ** 0.5


def test_gaussian_noise_in_gradient_units_is_not_scaled_by_the_gradient(gradient):
    noise = GaussianNoise(std=1e-3)
    delta = flatten(noise.checked_perturbation(gradient, generator=gen()))
    assert delta.std().item() == pytest.approx(1e-3, rel=0.036)
    larger = {n: 100 * g for n, g in gradient.items()}
    assert torch.equal(flatten(noise.checked_perturbation(larger, generator=gen())), delta)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(), "exactly one of `noise_ratio` and `std`, got None and None"),
        (lambda: GaussianNoise(noise_ratio=0.1, std=0.1), "exactly one of"),
        (lambda: GaussianNoise(std=0.0), "`std` must be positive and finite, got 0"),
        (lambda: PriorNoise(noise_ratio=float("inf")), "`noise_ratio` must be positive and finite, got inf"),
        (lambda: SmallEigenspaceNoise(fraction=0.0), r"`fraction` must be in \(0, 1\], got 0"),
        (lambda: SmallEigenspaceNoise(fraction=1.5), r"`fraction` must be in \(0, 1\], got 1.5"),
        (lambda: SmallEigenspaceNoise(leading=0), "`leading` must be at least 1, got 0"),
        (lambda: Pruning(fraction=1.0), r"`fraction` must be in \(0, 1\), got 1"),
        (lambda: Pruning(fraction=float("nan")), r"`fraction` must be in \(0, 1\), got nan"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ---------------------------------------------------------------------- directional noise


@pytest.mark.parametrize("defense", DIRECTIONAL, ids=repr)
def test_directional_noise_lies_in_the_range_of_the_jacobian(gradient, jacobian, defense):
    """A different picture would have given it, and no attacker can project it out."""
    delta = flatten(defense.checked_perturbation(gradient, jacobian, generator=gen()))
    basis, _ = torch.linalg.qr(jacobian.joint().dense()[0].T)  # (P, B D)
    assert (delta - basis @ (basis.T @ delta)).norm() < 1e-10 * delta.norm()
    # Isotropic noise of the same length does not.
    other = flatten(GaussianNoise(noise_ratio=0.3).checked_perturbation(gradient, generator=gen()))
    assert (other - basis @ (basis.T @ other)).norm() > 0.9 * other.norm()


def one_digit(model, loss_fn, batch, index=0):
    x, y = batch[0][[index]], batch[1][[index]]
    function = LossGradient(model, loss_fn)
    return function(x, y), InputJacobian(function, x, y)


@pytest.mark.parametrize("fraction", [0.02, 0.25, 1.0])
def test_small_eigenspace_noise_moves_along_the_smallest_eigenvectors(convnet, cross_entropy, batch, fraction):
    gradient, jacobian = one_digit(convnet, cross_entropy, batch)
    delta = SmallEigenspaceNoise(fraction=fraction).checked_perturbation(gradient, jacobian, generator=gen())
    moved = influence(jacobian, delta).displacement.flatten()
    dense = jacobian.dense()[0]
    _, vectors = torch.linalg.eigh(dense @ dense.T)  # smallest first
    keep = max(1, round(fraction * 64))
    inside = (vectors[:, :keep].T @ moved).norm()
    assert inside == pytest.approx(moved.norm().item(), rel=1e-8)
    # It is spread over all of them, not along one.
    shares = (vectors[:, :keep].T @ moved).square() / moved.norm() ** 2
    assert (shares > 1e-6 / keep).double().mean() > 0.9


def test_each_example_of_a_batch_gets_its_own(convnet, cross_entropy, batch, gradient, jacobian):
    """The joint displacement is, example by example, in each example's own small subspace."""
    defense = SmallEigenspaceNoise(fraction=0.25)
    delta = defense.checked_perturbation(gradient, jacobian, generator=gen())
    moved = influence(jacobian.joint(), delta).displacement.flatten(1)
    for example, dense in zip(moved, jacobian.dense(), strict=True):
        _, vectors = torch.linalg.eigh(dense @ dense.T)
        assert (vectors[:, :16].T @ example).norm() == pytest.approx(example.norm().item(), rel=1e-6)


def test_without_a_dense_jacobian_it_avoids_the_leading_eigenvectors(convnet, cross_entropy, batch, krylov):
    gradient, jacobian = one_digit(convnet, cross_entropy, batch)
    defense = SmallEigenspaceNoise(noise_ratio=0.3, leading=8)
    delta = defense.checked_perturbation(gradient, jacobian, generator=gen())
    torch.testing.assert_close(norm(delta), 0.3 * norm(gradient), rtol=1e-12, atol=0)
    moved = influence(jacobian, delta, method="lsmr").displacement.flatten()
    gram = torch.stack([jacobian.gram(e.reshape(1, 1, 8, 8)).flatten() for e in torch.eye(64, dtype=torch.float64)])
    values, vectors = torch.linalg.eigh(gram)
    leading, rest = vectors[:, -8:].T @ moved, vectors[:, :-8].T @ moved
    # Lanczos' tolerance of 1e-4 of the value, over the gaps between neighbouring values.
    assert leading.norm() < 0.02 * moved.norm()
    assert (rest.square() > 1e-6 * moved.norm() ** 2).double().mean() > 0.9
    assert values[-1] > 1.5 * values[-9] > 5 * values[0]  # what is avoided is worth avoiding


def test_what_the_gradient_does_not_show_is_left_alone(cross_entropy, batch):
    """Behind average pooling 48 of 64 directions are invisible: the smallest *visible* ones are moved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 10)).double()
    gradient, jacobian = one_digit(model, cross_entropy, batch)
    defense = SmallEigenspaceNoise(noise_ratio=0.1, fraction=0.25)
    moved = influence(jacobian, defense.checked_perturbation(gradient, jacobian, generator=gen()))
    dense = jacobian.dense()[0]
    values, vectors = torch.linalg.eigh(dense @ dense.T)
    assert (values[:48] < 1e-12 * values[-1]).all()
    displacement = moved.displacement.flatten()
    assert (vectors[:, 48:52].T @ displacement).norm() == pytest.approx(displacement.norm().item(), rel=1e-6)


def test_fewer_parameters_than_inputs(cross_entropy, batch):
    """50 parameters show at most 50 directions of 64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10))
    gradient, jacobian = one_digit(model.double(), cross_entropy, batch)
    delta = flatten(SmallEigenspaceNoise(fraction=0.25).checked_perturbation(gradient, jacobian, generator=gen()))
    left, singular, _ = torch.linalg.svd(jacobian.dense()[0].T, full_matrices=False)
    rank = int((singular > 1e-12 * singular[0]).sum())
    assert rank < 50
    # In parameter space `delta = J^T d` lies along the left singular vectors that belong to the smallest values.
    small = left[:, rank - round(0.25 * rank) : rank]
    assert (small.T @ delta).norm() == pytest.approx(delta.norm().item(), rel=1e-6)


def test_small_eigenspace_noise_works_per_example(gradient, jacobian):
    with pytest.raises(InputError, match="works per example: pass an `InputJacobian"):
        SmallEigenspaceNoise()(gradient, jacobian.joint())


def test_prior_noise_moves_by_a_draw_of_the_prior(convnet, cross_entropy, batch):
    """It is drawn from the prior: whitened by it, the displacement is the very noise that the generator gave."""
    gradient, jacobian = one_digit(convnet, cross_entropy, batch)
    prior = PowerLawPrior(std=0.5)
    delta = PriorNoise(noise_ratio=0.3, prior=prior).checked_perturbation(gradient, jacobian, generator=gen())
    moved = influence(jacobian, delta).displacement.flatten()
    drawn = prior.sqrt(torch.randn(1, 1, 8, 8, generator=gen(), dtype=torch.float64)).flatten()
    assert torch.nn.functional.cosine_similarity(moved, drawn, dim=0) > 1 - 1e-10


def test_at_equal_norm_the_small_eigenspace_moves_the_picture_furthest(convnet, cross_entropy, batch):
    """On every digit, I2F per unit of noise: small eigenspace > prior > isotropic (measured: .87, .65 and .06)."""
    for index in range(4):
        gradient, jacobian = one_digit(convnet, cross_entropy, batch, index)

        def error(defense, gradient=gradient, jacobian=jacobian):
            deltas = [defense.checked_perturbation(gradient, jacobian, generator=gen(s)) for s in range(3)]
            return min(influence(jacobian, d).value.item() / norm(d).item() for d in deltas)

        small = error(SmallEigenspaceNoise(noise_ratio=0.1))
        prior = error(PriorNoise(noise_ratio=0.1))
        isotropic = error(GaussianNoise(noise_ratio=0.1))
        assert small > 1.1 * prior
        assert prior > 3 * isotropic
        # Nothing can beat the one smallest eigenvector.
        least = torch.linalg.svdvals(jacobian.dense()[0])[-1]
        assert small <= 1 / least.item() * (1 + 1e-9)
        assert error(SmallEigenspaceNoise(fraction=1 / 64)) == pytest.approx(1 / least.item(), rel=1e-6)


# ---------------------------------------------------------------------- pruning


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_pruning_zeroes_the_smallest_and_keeps_the_rest(gradient, fraction):
    before, after = flatten(gradient), flatten(Pruning(fraction=fraction)(gradient))
    gone = after == 0
    assert gone.sum() == int(fraction * before.numel())
    assert before[gone].abs().max() <= before[~gone].abs().min()
    torch.testing.assert_close(after[~gone], before[~gone], rtol=0, atol=0)


def test_pruning_goes_over_all_parameters_together(gradient):
    """The threshold is one for all: a tensor of small elements may go as a whole."""
    gradient["0.weight"] *= 1e-9
    sent = Pruning(fraction=0.5)(gradient)
    assert (sent["0.weight"] == 0).all()


def test_pruning_keeps_to_its_fraction_among_equals(gradient):
    """Sign or quantised gradients: not everything of the threshold's magnitude goes."""
    signs = {n: g.sign() for n, g in gradient.items()}
    assert (flatten(signs) != 0).all()
    after = flatten(Pruning(fraction=0.25)(signs))
    assert (after == 0).sum() == int(0.25 * after.numel())


def test_pruning_less_than_one_element_changes_nothing():
    gradient = {"w": torch.tensor([1.0, -2.0, 3.0])}
    assert torch.equal(Pruning(fraction=0.2)(gradient)["w"], gradient["w"])
