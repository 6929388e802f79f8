"""What a message differs by from the gradient it is said to be: recognised, named, and never counted as noise."""

import copy
import re

import pytest
import torch
from torch import nn

import gradguard as gg
from gradguard.attacks import DLG
from gradguard.defenses import GaussianNoise, PriorNoise, Pruning
from gradguard.evaluation.batches import example_weights
from gradguard.evaluation.differences import compare, seen_by_attacker
from gradguard.evaluation.messages import read_message
from gradguard.functional.vectors import add, norm
from gradguard.zoo.models import digits_convnet


@pytest.fixture
def function(convnet, cross_entropy):
    return gg.LossGradient(convnet, cross_entropy)


@pytest.fixture
def gradient(function, batch):
    return function(*batch)


@pytest.fixture
def guard():
    return gg.Guard(defense=PriorNoise(), attacks=(), threat=gg.ThreatModel(max_attacked=1))


def scaled(gradient, factor):
    return {n: factor * g for n, g in gradient.items()}


def cast(gradient, dtype):
    return {n: g.to(dtype).to(g) for n, g in gradient.items()}


def clipped_per_tensor(gradient):
    return {n: g * min(1.0, 0.1 / g.norm().item()) for n, g in gradient.items()}


def without(gradient, name):
    return gradient | {name: torch.zeros_like(gradient[name])}


KNOWN = {
    "bare": (lambda g: g, "gradient", None),
    "float32": (lambda g: cast(g, torch.float32), "gradient", None),
    "bfloat16": (lambda g: cast(g, torch.bfloat16), "rounding", "rounded to half precision"),
    "float16": (lambda g: cast(g, torch.float16), "rounding", "rounded to half precision"),
    "a sum in the place of a mean": (lambda g: scaled(g, 4.0), "factor", "4 times the true one, which hides nothing"),
    "accumulation": (lambda g: scaled(g, 0.25), "factor", "0.25 times the true one"),
    "a loss scale": (lambda g: scaled(g, 65536.0), "factor", r"6\.55e\+04 times the true one"),
    "clipping per tensor": (clipped_per_tensor, "factors", "a factor of its own"),
    "pruning": (lambda g: Pruning(fraction=0.9)(g), "gradient", "90% of the elements are set to zero"),
    "pruning and a factor": (lambda g: scaled(Pruning(fraction=0.5)(g), 0.1), "factor", "50% of the elements"),
    "a frozen layer": (lambda g: without(g, "0.weight"), "gradient", "'0.weight' is not sent or zero"),
    "a tensor left out": (lambda g: {n: v for n, v in g.items() if n != "0.bias"}, "gradient", "'0.bias' is not sent"),
    "small noise": (lambda g: GaussianNoise(noise_ratio=0.1)(g), "unexplained", "cannot explain; what nobody declared"),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_what_is_known_hides_nothing(function, batch, gradient, kind):
    change, look, sentence = KNOWN[kind]
    message = read_message(function, *batch, change(gradient), missing="unsent")
    assert message.difference.looks_like == look
    said = " ".join(message.sentences)
    assert (not said) if sentence is None else re.search(sentence, said)
    seen = message.seen(message.given)
    assert all(torch.equal(seen[n], g) for n, g in gradient.items())


@pytest.mark.parametrize("kind", KNOWN)
def test_what_a_defense_adds_is_seen_in_units_of_the_gradient(function, batch, gradient, kind):
    message = read_message(function, *batch, KNOWN[kind][0](gradient), missing="unsent")
    sent = {n: g + 0.01 * message.difference.factors.get(n, 1.0) for n, g in message.given.items()}
    seen = message.seen(sent)
    for name, true in gradient.items():
        expected = true + 0.01 if name in message.difference.factors else true
        torch.testing.assert_close(seen[name], expected)


def test_weight_decay_is_named_with_its_strength(function, batch, gradient):
    decayed = add(gradient, function.parameters(), 0.02)
    difference = compare(gradient, scaled(decayed, 3.0), parameters=function.parameters())
    assert difference.looks_like == "weight decay"
    assert difference.factor == pytest.approx(3.0)
    assert "weight_decay=0.02" in " ".join(difference.details)


def test_few_numbers_are_no_clipping_per_tensor():
    """A tensor of one number is a multiple of any other."""
    gradient = {"w": torch.tensor([[1.0]]), "b": torch.tensor([2.0])}
    assert compare(gradient, {"w": torch.tensor([[3.0]]), "b": torch.tensor([1.0])}).looks_like == "unexplained"


def test_what_a_factor_divides():
    gradient, given = {"w": torch.ones(4)}, {"w": 2 * torch.ones(4)}
    seen = seen_by_attacker(compare(gradient, given), gradient, given, {"w": given["w"] + 1}, amplification=5.0)
    torch.testing.assert_close(seen["w"], torch.full((4,), 1.1))


# ---------------------------------------------------------------------- what is refused, and what it looks like


def other(gradient_of):
    torch.manual_seed(9)
    return gg.LossGradient(digits_convnet().double(), nn.CrossEntropyLoss())(*gradient_of)


def test_a_negative_multiple_is_an_update(function, batch, gradient):
    with pytest.raises(gg.InputError, match=r"looks like an update.*-0\.1 times.*learning rate of 0\.1.*LocalTraining"):
        read_message(function, *batch, scaled(gradient, -0.1))
    mean = gg.LocalTraining(steps=5, learning_rate=0.05).mean_gradient(function, *batch)
    with pytest.raises(gg.InputError, match="looks like an update of several local steps"):
        read_message(function, *batch, scaled(mean, -0.25))


def test_another_batch_and_other_weights_are_refused(function, batch, gradient, digit_pictures, cross_entropy):
    x, y = digit_pictures.images[:32].double(), digit_pictures.labels[:32]
    for message in (function(x[4:8], y[4:8]), function(x, y), other(batch), GaussianNoise(noise_ratio=9.0)(gradient)):
        with pytest.raises(gg.InputError, match="another batch or of other weights"):
            read_message(function, *batch, message)
    with pytest.raises(gg.InputError, match=r"4 of the 32 examples alone \(number 0 to 3"):
        read_message(function, x, y, gradient)
    with pytest.raises(gg.InputError, match=r"3 of the 32 examples alone \(number 1, 5, 9"):
        read_message(function, x, y, function(x[[1, 5, 9]], y[[1, 5, 9]]))
    with pytest.raises(gg.InputError, match="holds nothing of the batch's gradient"):
        read_message(function, *batch, scaled(gradient, 0.0))


def test_clipping_per_example_is_known(function, batch):
    parts = [function(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(4)]
    weights = [0.25 * min(1.0, 0.5 * (i + 1)) for i in range(4)]
    message = {n: sum(w * p[n] for w, p in zip(weights, parts, strict=True)) for n in parts[0]}
    found = example_weights(function, *batch, message)
    assert found.weights == pytest.approx(weights)
    assert found.distance < 1e-9
    read = read_message(function, *batch, message)
    assert any("weigh from 0.125 to 0.25" in sentence for sentence in read.sentences)
    assert norm(add(read.seen(read.given), read.true, -1.0)) == 0


def test_as_many_examples_as_numbers_explain_nothing(cross_entropy):
    model = nn.Linear(2, 2)
    x, y = torch.rand(8, 2), torch.tensor([0, 1] * 4)
    assert example_weights(gg.LossGradient(model, cross_entropy), x, y, {"weight": torch.ones(2, 2)}) is None


def test_a_zero_gradient_is_told_from_a_message(cross_entropy):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    function = gg.LossGradient(model, cross_entropy)
    batch = torch.rand(2, 3).double(), torch.tensor([0, 1])
    zero = function(*batch)
    assert read_message(function, *batch, zero).difference.looks_like == "gradient"
    with pytest.raises(gg.InputError, match="not the batch's gradient"):
        read_message(function, *batch, {n: torch.ones_like(g) for n, g in zero.items()})


# ---------------------------------------------------------------------- updates and regularisers, through `protect`


@pytest.mark.parametrize("scale", [1.0, 0.25, -0.25, 3.0])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"batch_size": 2}])
def test_a_declared_update_is_known_at_any_scale(guard, convnet, cross_entropy, function, batch, scale, options):
    training = gg.LocalTraining(steps=5, learning_rate=0.05, **options)
    update = scaled(training.mean_gradient(function, *batch), scale)
    sent, verdict = guard.protect(
        convnet, cross_entropy, *batch, update, training=training, generator=torch.Generator().manual_seed(0)
    )
    assert verdict.decision == "perturb"
    assert any(r.startswith("as given, ") and "predicted" in r for r in verdict.reasons)
    # Noise of half the update's norm, on the update in the scale that it was given in.
    assert (norm(add(sent, update, -1.0)) / norm(update)).item() == pytest.approx(0.5, rel=1e-4)
    assert verdict.noise_ratio > 0
    said = " ".join(verdict.explanation)
    assert ("it is the declared update" in said) == (abs(scale) == 0.25)


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_five_undeclared_local_steps_hide_nothing(convnet, cross_entropy, function, batch, rate):
    message = gg.LocalTraining(steps=5, learning_rate=rate).mean_gradient(function, *batch)
    sent, verdict = gg.Guard(attacks=()).protect(convnet, cross_entropy, *batch, message)
    assert (sent, verdict.decision, verdict.noise_ratio) == (None, "block", 0)
    assert "cannot explain" in " ".join(verdict.reasons)


def test_five_undeclared_long_local_steps_are_refused(convnet, cross_entropy, function, batch):
    message = gg.LocalTraining(steps=5, learning_rate=0.5).mean_gradient(function, *batch)
    assert norm(add(message, function(*batch), -1.0)) / norm(message) > 0.5
    with pytest.raises(gg.InputError, match=r"an update of several local steps.*LocalTraining"):
        gg.Guard(attacks=()).protect(convnet, cross_entropy, *batch, message)


def test_a_proximal_term_hides_nothing(convnet, cross_entropy, function, batch):
    """FedProx: away from the global weights it adds mu (w - w0)."""
    guard = gg.Guard(attacks=())
    start = {n: p + 0.05 * torch.randn(p.shape, dtype=p.dtype) for n, p in function.parameters().items()}

    def proximal(parameters):
        return 0.05 * sum((p - start[n]).square().sum() for n, p in parameters.items())

    training = gg.LocalTraining(steps=1, learning_rate=0.1, regulariser=proximal)
    message = training.mean_gradient(function, *batch)
    true = function(*batch)
    assert 0.05 < norm(add(message, true, -1.0)) / norm(true) < 0.4
    sent, verdict = guard.protect(convnet, cross_entropy, *batch, message)
    assert (sent, verdict.decision, verdict.noise_ratio) == (None, "block", 0)
    assert verdict.looks_like == "unexplained"
    assert "counts as known to the attacker" in " ".join(verdict.reasons)
    _, verdict = guard.protect(convnet, cross_entropy, *batch, message, training=training)
    assert verdict.noise_ratio == 0
    assert verdict.looks_like == "gradient"
    # Another one than the declared does not become known by being declared as something.
    weaker = gg.LocalTraining(steps=1, learning_rate=0.1, weight_decay=0.01)
    _, verdict = guard.protect(convnet, cross_entropy, *batch, message, training=weaker)
    assert (verdict.decision, verdict.noise_ratio) == ("block", 0)


def test_declared_noise_must_fit(guard, convnet, cross_entropy, function, batch, gradient):
    noise = GaussianNoise(noise_ratio=2.0)
    noisy = noise(gradient, generator=torch.Generator().manual_seed(0))
    for declared in (GaussianNoise(noise_ratio=0.2), GaussianNoise(std=5.0)):
        with pytest.raises(gg.InputError, match="not only that noise"):
            guard.protect(convnet, cross_entropy, *batch, noisy, declared=declared)
    with pytest.raises(gg.InputError, match="not only that noise"):
        guard.protect(convnet, cross_entropy, *batch, scaled(gradient, 3.0), declared=noise)
    with pytest.raises(gg.InputError, match="draws nothing at random"):
        guard.protect(convnet, cross_entropy, *batch, noisy, declared=Pruning(fraction=0.9))
    _, verdict = guard.protect(convnet, cross_entropy, *batch, noisy, declared=noise)
    assert verdict.noise_ratio != 0


def test_the_strongest_attack_sees_through_every_known_difference(convnet, cross_entropy, batch, gradient):
    guard = gg.Guard(attacks=(DLG(restarts=2),), threat=gg.ThreatModel(max_attacked=1))
    message = scaled(GaussianNoise(noise_ratio=0.3)(gradient, generator=torch.Generator().manual_seed(0)), 5.0)
    _, verdict = guard.protect(convnet, cross_entropy, *batch, message, generator=torch.Generator().manual_seed(0))
    assert verdict.decision == "block"
    assert verdict.measures["attacked_psnr"] > 100


def test_every_form_of_a_message_is_taken(guard, convnet, cross_entropy, batch, gradient):
    for form in (list(gradient.values()), {"module." + n: g.numpy() for n, g in gradient.items()}):
        sent, verdict = guard.protect(convnet, cross_entropy, *batch, form, verify=False)
        assert verdict.decision == "perturb"
        assert list(sent) == list(gradient)
    report = gg.Guard(attacks=()).audit(convnet, cross_entropy, *batch, sent=list(gradient.values()))
    assert report.noise_ratio == 0


def test_nothing_of_the_users_changes(guard, convnet, cross_entropy, batch, gradient):
    model, given = copy.deepcopy(convnet.state_dict()), {n: g.clone() for n, g in gradient.items()}
    state = torch.get_rng_state()
    guard.protect(convnet, cross_entropy, *batch, gradient, verify=False, generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(model[n], p) for n, p in convnet.state_dict().items())
    assert all(torch.equal(given[n], g) for n, g in gradient.items())
    assert all(p.grad is None and p.requires_grad for p in convnet.parameters())


@pytest.mark.parametrize("kind", ["pruning", "pruning and a factor", "a frozen layer"])
def test_noise_leaves_a_mask_as_it_is(guard, convnet, cross_entropy, batch, gradient, kind):
    """On an element that is known to be zero the noise would be seen bare, and all of `J^T d` follows from a part."""
    message = KNOWN[kind][0](gradient)
    sent, verdict = guard.protect(convnet, cross_entropy, *batch, message, generator=torch.Generator().manual_seed(0))
    assert verdict.decision == "perturb"
    for name, value in message.items():
        assert torch.equal(sent[name] == 0, value == 0)


@pytest.mark.parametrize("kind", ["clipping per tensor", "a sum in the place of a mean"])
def test_noise_moves_all_tensors_by_one_displacement(guard, convnet, cross_entropy, function, batch, gradient, kind):
    """`J^T d` of one `d` beneath every factor: two tensors of different `d` would give the input away."""
    message = KNOWN[kind][0](gradient)
    sent, _ = guard.protect(convnet, cross_entropy, *batch, message, generator=torch.Generator().manual_seed(0))
    delta = {n: (sent[n] - message[n]) * (gradient[n].norm() / message[n].norm()) for n in message}
    flat = torch.cat([d.flatten() for d in delta.values()])
    jacobian = gg.InputJacobian(function, *batch, per_example=False).dense()[0]
    left = flat - jacobian.T @ torch.linalg.lstsq(jacobian.T, flat[:, None], driver="gelsd").solution[:, 0]
    assert left.norm() / flat.norm() < 1e-8
