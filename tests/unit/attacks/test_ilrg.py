"""iLRG as an attack: the paper's numbers on real pictures, the frame, its refusals."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from gradguard import InputError, LossGradient, UnsupportedModelError
from gradguard.attacks._labels.counts import restore_label_counts, update_label_counts
from gradguard.attacks._labels.inference import infer_labels
from gradguard.attacks.ilrg import ILRG, IDLGLabel
from gradguard.leakage.labels import LabelRecovery, count_labels, label_recovery
from gradguard.threats.observation import Observation
from gradguard.zoo.models import fcn
from gradguard.zoo.pictures import digits, load_npz

DATA = Path(os.environ.get("GRADGUARD_DATA") or Path(__file__).parents[3].parent / "shared" / "data")
#: Mean and standard deviation per channel, as the authors normalise.
MNIST = ([0.13066], [0.30811])
CIFAR100 = ([0.50716, 0.48669, 0.44120], [0.26733, 0.25644, 0.27615])


def pictures(name, mean, deviation):
    path = DATA / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no real pictures: {path}")
    data = load_npz(path)
    return (data.images - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None], data.labels


def fcn3():
    """The paper's FCN-3: PyTorch's initialisation, biases."""
    return fcn((784, 300, 300, 10), activation="relu", bias=True)


def lenet5(activation):
    """The paper's LeNet-5 for 32x32 RGB; convolutions Kaiming-normal over the fan out."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 5), activation(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), activation(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), activation(), nn.Linear(120, 84), activation(), nn.Linear(84, 100)),
    )
    for convolution in (model[0], model[3]):
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return model


def observe(model, inputs, targets, **known):
    function = LossGradient(model, nn.CrossEntropyLoss())
    return Observation(
        loss_gradient=function,
        sent=function(inputs, targets),
        input_shape=tuple(inputs.shape[1:]),
        batch_size=len(targets),
        **known,
    )


def mean_recovery(attack, make, data, classes, batch, *, networks=3, batches=10):
    """Means over `networks` initialisations with `batches` random batches each."""
    inputs, targets = data
    generator = torch.Generator().manual_seed(batch)
    scores = []
    for seed in range(networks):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make()
        for _ in range(batches):
            chosen = torch.randperm(len(inputs), generator=generator)[:batch]
            counts = attack(observe(model, inputs[chosen], targets[chosen])).label_counts
            score = label_recovery(counts, count_labels(targets[chosen], classes))
            scores.append((score.le_acc, score.ln_acc, score.i_rec))
    le_acc, ln_acc, i_rec = torch.tensor(scores, dtype=torch.float64).mean(0).tolist()
    return LabelRecovery(le_acc=le_acc, ln_acc=ln_acc, i_rec=i_rec)


def reaches(score, le_acc, ln_acc, i_rec):
    """Not below the paper's three digits."""
    return score.le_acc > le_acc - 5e-4 and score.ln_acc > ln_acc - 5e-4 and score.i_rec > i_rec - 5e-4


# ---------------------------------------------------------------------- the paper's numbers


@pytest.mark.parametrize(
    ("batch", "published"),
    [
        (4, (1, 1, 1)),
        (8, (1, 1, 1)),
        (16, (1, 1, 1)),
        (24, (1, 0.994, 1)),
        (32, (0.982, 0.804, 0.975)),
        (64, (0.998, 0.598, 0.957)),
        (128, (1, 0.386, 0.963)),
    ],
)
def test_fcn3_on_mnist_reaches_the_paper(batch, published):
    score = mean_recovery(ILRG(), fcn3, pictures("mnist_2000", *MNIST), 10, batch)
    assert reaches(score, *published), score


def test_fcn3_on_mnist_where_the_published_method_breaks():
    """Batch 64: LnAcc 0.598 in the paper; that is what its method gives here, and not what ours does."""
    data = pictures("mnist_2000", *MNIST)
    paper = mean_recovery(ILRG(refinements=0), fcn3, data, 10, 64, networks=4)
    ours = mean_recovery(ILRG(), fcn3, data, 10, 64, networks=4)
    assert paper.ln_acc == pytest.approx(0.598, abs=0.15)
    assert ours.ln_acc > 0.95


@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.SiLU, lambda: nn.LeakyReLU(0.01)], ids=["relu", "silu", "leaky_relu"]
)
@pytest.mark.parametrize("refinements", [0, 2])
def test_lenet5_on_cifar100_reaches_the_paper(activation, refinements):
    data = pictures("cifar100_400", *CIFAR100)
    score = mean_recovery(
        ILRG(refinements=refinements), lambda: lenet5(activation), data, 100, 24, networks=2, batches=8
    )
    assert reaches(score, 1, 1, 1), score


@pytest.mark.parametrize("batch", [8, 24, 64])
def test_fcn3_on_bundled_digits(batch):
    data = digits()
    score = mean_recovery(
        ILRG(), lambda: fcn((64, 300, 300, 10), activation="relu", bias=True), (data.images, data.labels), 10, batch
    )
    assert reaches(score, 1, 0.994, 1), score


# ---------------------------------------------------------------------- the frame


@pytest.fixture
def batch():
    data = digits()
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:12]
    return data.images[chosen], data.labels[chosen]


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fcn((64, 32, 10), activation="tanh", bias=True)


def test_what_comes_back(model, batch):
    inputs, targets = batch
    result = ILRG()(observe(model, inputs, targets))
    assert not ILRG.recovers_inputs
    assert result.attack == "ILRG"
    assert result.inputs is None
    assert result.label_counts.dtype == torch.int64
    assert torch.equal(result.label_counts, count_labels(targets, 10))
    assert torch.equal(result.labels, targets.sort().values)
    assert result.converged
    assert 0 <= result.details["residual"] < 0.5
    assert 0 <= result.details["rounding"] < 0.5
    assert 0.1 <= result.details["certainty"] < 0.3
    assert result.details["refinement"] in range(3)


def test_labels_in_the_observation_are_not_looked_at(model, batch):
    inputs, targets = batch
    free = ILRG()(observe(model, inputs, targets))
    misled = ILRG()(observe(model, inputs, targets, labels=torch.zeros(12, dtype=torch.int64), num_classes=10))
    assert torch.equal(free.label_counts, misled.label_counts)


def test_counts_sum_to_the_batch_size_whatever_was_sent(model, batch):
    observation = observe(model, *batch)
    generator = torch.Generator().manual_seed(0)
    noise = {n: 10 * torch.randn(g.shape, generator=generator) for n, g in observation.sent.items()}
    result = ILRG()(
        Observation(loss_gradient=observation.loss_gradient, sent=noise, input_shape=(1, 8, 8), batch_size=12)
    )
    assert result.label_counts.sum() == 12
    assert result.label_counts.min() >= 0
    assert not result.converged


def test_a_model_in_double_precision_gives_the_same(model, batch):
    observation = observe(model, *batch)
    double = observation.in_dtype(torch.float64)
    assert torch.equal(ILRG()(observation).labels, ILRG()(double).labels)


def test_the_attack_is_the_function(model, batch):
    observation = observe(model, *batch)
    found = restore_label_counts(
        observation.sent["3.weight"], observation.sent["3.bias"], model[3].weight, model[3].bias, 12, refinements=0
    )
    result = ILRG(refinements=0)(observation)
    assert torch.equal(result.label_counts, found.counts)
    assert result.details["residual"] == found.mismatch
    assert result.details["refinement"] == 0


def test_infer_labels_takes_idlg_for_one_and_ilrg_for_more(model, batch):
    inputs, targets = batch
    assert torch.equal(infer_labels(observe(model, inputs, targets)), targets.sort().values)
    for i in range(4):
        assert infer_labels(observe(model, inputs[i : i + 1], targets[i : i + 1])).tolist() == [targets[i].item()]


@pytest.mark.parametrize("bias", [True, False])
def test_idlg_label(batch, bias):
    inputs, targets = batch
    for seed in range(4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = fcn((64, 32, 10), activation="tanh", bias=bias)
        result = IDLGLabel()(observe(model, inputs[seed : seed + 1], targets[seed : seed + 1]))
        assert result.labels.tolist() == [targets[seed].item()]
        assert result.label_counts.tolist() == count_labels(targets[seed : seed + 1], 10).tolist()
        assert result.converged


def test_repr_names_the_run():
    assert repr(ILRG(refinements=0)) == "ILRG(refinements=0)"


@pytest.mark.gpu
def test_on_the_device(model, batch):
    inputs, targets = (t.cuda() for t in batch)
    result = ILRG()(observe(model.cuda(), inputs, targets))
    assert result.labels.is_cuda
    assert torch.equal(result.labels, targets.sort().values)


# ---------------------------------------------------------------------- refusals


def test_a_head_without_a_bias_is_refused_early(batch):
    observation = observe(fcn((64, 32, 10), bias=False), *batch)
    with pytest.raises(UnsupportedModelError, match=r"head '3' has no trainable bias.*IDLGLabel"):
        ILRG().check(observation)


def test_another_number_of_classes_is_refused(model, batch):
    with pytest.raises(InputError, match=r"says `num_classes=7`, the head '3' has 10 outputs"):
        ILRG().check(observe(model, *batch, num_classes=7))


def test_a_binary_head_is_refused(batch):
    function = LossGradient(fcn((64, 1), bias=True), nn.BCEWithLogitsLoss())
    inputs, targets = batch[0], (batch[1] % 2).float()[:, None]
    observation = Observation(
        loss_gradient=function, sent=function(inputs, targets), input_shape=(1, 8, 8), batch_size=len(inputs)
    )
    with pytest.raises(InputError, match="has one output; labels are restored from two classes on"):
        ILRG().check(observation)


def test_another_loss_is_refused(model, batch):
    function = LossGradient(model, nn.CrossEntropyLoss(label_smoothing=0.1))
    observation = Observation(loss_gradient=function, sent=function(*batch), input_shape=(1, 8, 8), batch_size=12)
    with pytest.raises(InputError, match="without class weights or label smoothing"):
        ILRG().check(observation)


def test_a_zero_gradient_is_refused(model, batch):
    observation = observe(model, *batch)
    silent = {n: torch.zeros_like(g) for n, g in observation.sent.items()}
    with pytest.raises(InputError, match=r"'3\.bias' is zero everywhere"):
        ILRG().check(
            Observation(loss_gradient=observation.loss_gradient, sent=silent, input_shape=(1, 8, 8), batch_size=12)
        )


def test_negative_refinements_are_refused():
    with pytest.raises(InputError, match="must not be negative, got -1"):
        ILRG(refinements=-1)


def test_idlg_label_refuses_a_batch_and_two_classes_without_a_bias(model, batch):
    with pytest.raises(InputError, match=r"one example, not of 12\. Use ILRG"):
        IDLGLabel().check(observe(model, *batch))
    inputs, targets = batch[0][:1], batch[1][:1] % 2
    with pytest.raises(InputError, match="two classes and no bias"):
        IDLGLabel().check(observe(fcn((64, 2), bias=False), inputs, targets))


# ---------------------------------------------------------------------- several local steps


def test_counts_of_a_five_step_update(model, batch):
    """FedAvg: five SGD steps on eight digits each; the server sees the head before and after."""
    data = digits()
    before = [p.detach().clone() for p in (model[3].weight, model[3].bias)]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(5):
        chosen = slice(8 * step, 8 * step + 8)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(data.images[chosen]), data.labels[chosen]).backward()
        optimiser.step()
    found = update_label_counts(tuple(before), (model[3].weight, model[3].bias), 0.05, 5, 8)
    true = count_labels(data.labels[:40], 10)
    assert found.counts.sum() == 40
    assert label_recovery(found.counts, true).i_rec > 0.95


def test_an_update_without_steps_is_refused(model):
    head = (model[3].weight, model[3].bias)
    with pytest.raises(InputError, match=r"`learning_rate` and `steps` must be positive, got 0\.05 and 0"):
        update_label_counts(head, head, 0.05, 0, 8)
