"""DLG, iDLG and Inverting Gradients on real pictures. PSNR in dB, pictures in [0, 1]."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradguard import InputError, LossGradient
from gradguard.attacks import DLG, IDLG, InvertingGradients, Observation
from gradguard.functional.vectors import add, norm
from gradguard.leakage import fidelity
from gradguard.zoo.models import digits_convnet, lenet, uniform_init_
from references import psnr


def observe(model, loss_fn, x, y, *, labels=True, num_classes=10, sent=None, value_range=(0.0, 1.0)):
    function = LossGradient(model, loss_fn)
    return Observation(
        loss_gradient=function,
        sent=function(x, y) if sent is None else sent,
        input_shape=tuple(x.shape[1:]),
        batch_size=len(x),
        labels=y if labels else None,
        num_classes=num_classes,
        value_range=value_range,
    )


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def sigmoid_lenet(image_size):
    torch.manual_seed(0)
    return uniform_init_(lenet(image_size=image_size)).double()


@pytest.fixture(scope="module")
def upscaled(digit_pictures):
    """Digits as large as MNIST's, or smaller."""

    def at(size, index):
        x = F.interpolate(digit_pictures.images[[index]], size=(size, size), mode="bilinear").double()
        return x, digit_pictures.labels[[index]]

    return at


# A short polish: at 28 x 28 each of its steps is 100 LSMR iterations, and 30 dB need none to 3 of them. With all of
# the 50 these reach 280 dB and more, the end of float64.
SHORT = DLG(restarts=1, evaluations=250, polish=3)


def test_dlg_on_the_papers_lenet(cross_entropy, upscaled):
    x, y = upscaled(28, 0)
    found = SHORT(observe(sigmoid_lenet(28), cross_entropy, x, y), generator=gen())
    assert psnr(found.inputs, x) > 30
    assert found.matching_loss < 1e-6
    assert found.converged


def test_dlg_on_mnist(cross_entropy, real_pictures):
    pictures = real_pictures("mnist_2000")
    x, y = pictures.images[:1].double(), pictures.labels[:1]
    found = SHORT(observe(sigmoid_lenet(28), cross_entropy, x, y), generator=gen())
    assert psnr(found.inputs, x) > 30
    assert found.converged


def test_dlg_with_joint_labels_on_the_lenet(cross_entropy, upscaled):
    """At 16 x 16, where the step of the polish is cheap."""
    x, y = upscaled(16, 0)
    attack = DLG(restarts=2, evaluations=250)
    found = attack(observe(sigmoid_lenet(16), cross_entropy, x, y, labels=False), generator=gen())
    assert torch.equal(found.labels, y)
    assert psnr(found.inputs, x) > 30
    assert found.converged


@pytest.mark.parametrize("index", [1, 7])
def test_dlg_on_the_convnet(convnet, cross_entropy, digit_pictures, index):
    x, y = digit_pictures.images[[index]].double(), digit_pictures.labels[[index]]
    found = DLG()(observe(convnet, cross_entropy, x, y), generator=gen())
    assert psnr(found.inputs, x) > 60  # 320 dB measured, float64's end
    assert found.converged
    assert found.labels.tolist() == y.tolist()


def test_dlg_on_a_batch_of_two(convnet, cross_entropy, batch):
    """Labels say which picture is which, so the order comes back too: 320 dB measured for both."""
    x, y = batch[0][:2], batch[1][:2]
    found = DLG(restarts=2)(observe(convnet, cross_entropy, x, y), generator=gen())
    assert [psnr(g, t) > 60 for g, t in zip(found.inputs, x, strict=True)] == [True, True]
    # The same pictures in the other order do not fit.
    assert psnr(found.inputs.flip(0), x) < 20


def test_dlg_on_a_batch_of_one_class_finds_the_pictures_in_some_order(convnet, cross_entropy, digit_pictures):
    x = digit_pictures.images[digit_pictures.labels == 3][:2].double()
    found = DLG(restarts=2)(observe(convnet, cross_entropy, x, torch.tensor([3, 3])), generator=gen())
    assert (fidelity(found.inputs, x).psnr > 60).all()


def test_dlg_finds_labels_and_pictures_together(convnet, cross_entropy, digit_pictures):
    x, y = digit_pictures.images[[5]].double(), digit_pictures.labels[[5]]
    found = DLG()(observe(convnet, cross_entropy, x, y, labels=False), generator=gen())
    assert found.labels.dtype == torch.int64
    assert torch.equal(found.labels, y)
    assert psnr(found.inputs, x) > 60


@pytest.mark.parametrize("index", [5, 8])
def test_idlg_takes_the_label_from_the_last_layer(convnet, cross_entropy, digit_pictures, index):
    x, y = digit_pictures.images[[index]].double(), digit_pictures.labels[[index]]
    found = IDLG(restarts=2)(observe(convnet, cross_entropy, x, y, labels=False), generator=gen())
    assert torch.equal(found.labels, y)
    assert psnr(found.inputs, x) > 60
    assert found.attack == "IDLG"


def test_inferred_labels_of_a_batch(convnet, cross_entropy, batch):
    x, y = batch[0][:2], batch[1][:2]
    found = DLG(restarts=2, labels="inferred")(observe(convnet, cross_entropy, x, y, labels=False), generator=gen())
    assert sorted(found.labels.tolist()) == sorted(y.tolist())
    assert (fidelity(found.inputs, x).psnr > 60).all()


def test_a_float32_model_is_attacked_in_float64(cross_entropy, digit_pictures):
    """The gradient is rounded to float32, which costs dB but hides nothing."""
    torch.manual_seed(0)
    model, x, y = digits_convnet(), digit_pictures.images[[2]], digit_pictures.labels[[2]]
    found = DLG(restarts=2)(observe(model, cross_entropy, x, y), generator=gen())
    assert found.inputs.dtype == torch.float64
    assert psnr(found.inputs, x) > 60


def test_binary_models_with_known_labels(digit_pictures):
    torch.manual_seed(0)
    model = digits_convnet(num_classes=1).double()
    x, y = digit_pictures.images[[4]].double(), torch.ones(1, 1, dtype=torch.float64)
    found = DLG(restarts=2)(observe(model, nn.BCEWithLogitsLoss(), x, y, num_classes=None), generator=gen())
    assert psnr(found.inputs, x) > 60


def test_noise_on_the_gradient_is_no_match(convnet, cross_entropy, digit_pictures):
    """A matching loss that noise keeps above zero is not called converged, and no picture comes out at 60 dB."""
    x, y = digit_pictures.images[[1]].double(), digit_pictures.labels[[1]]
    gradient = LossGradient(convnet, cross_entropy)(x, y)
    drawn = {n: torch.randn(g.shape, generator=gen(7), dtype=g.dtype) for n, g in gradient.items()}
    sent = add(gradient, drawn, 0.3 * norm(gradient) / norm(drawn))
    found = DLG(restarts=2, evaluations=100)(observe(convnet, cross_entropy, x, y, sent=sent), generator=gen())
    assert not found.converged
    # All of the noise but its 64 dimensions in the range of J^T (out of 9,930) stays as a residual.
    assert 0.09 / 1.09 * 0.8 < found.matching_loss < 0.09 / 1.09 * 1.2
    assert 20 < psnr(found.inputs, x) < 60


def test_inverting_gradients(convnet, cross_entropy, digit_pictures):
    """75 dB measured, float32's end."""
    x, y = digit_pictures.images[[5]].double(), digit_pictures.labels[[5]]
    found = InvertingGradients(iterations=250)(observe(convnet, cross_entropy, x, y), generator=gen())
    assert psnr(found.inputs, x) > 25
    assert found.inputs.dtype == torch.float32
    # Its last layer gives the label away where none is given.
    found = InvertingGradients(iterations=250)(observe(convnet, cross_entropy, x, y, labels=False), generator=gen())
    assert torch.equal(found.labels, y)
    assert psnr(found.inputs, x) > 25


def test_inverting_gradients_matches_the_direction_alone(convnet, cross_entropy, digit_pictures):
    """A gradient of ten times the length says the same; the matching loss, which is DLG's, then cannot vanish."""
    x, y = digit_pictures.images[[5]].double(), digit_pictures.labels[[5]]
    sent = {n: 10 * g for n, g in LossGradient(convnet, cross_entropy)(x, y).items()}
    found = InvertingGradients(iterations=250)(observe(convnet, cross_entropy, x, y, sent=sent), generator=gen())
    assert psnr(found.inputs, x) > 25
    assert found.matching_loss == pytest.approx(0.81, abs=0.01)


@pytest.mark.parametrize("iterations", [1, 2, 30])
@pytest.mark.parametrize("value_range", [(0.0, 1.0), (0.25, 0.5)])
def test_inverting_gradients_stays_in_the_box(convnet, cross_entropy, batch, iterations, value_range):
    observation = observe(convnet, cross_entropy, batch[0][:1], batch[1][:1], value_range=value_range)
    found = InvertingGradients(iterations=iterations, restarts=3)(observation, generator=gen())
    assert value_range[0] <= found.inputs.min()
    assert found.inputs.max() <= value_range[1]


def test_inverting_gradients_without_a_range_is_not_boxed(convnet, cross_entropy, batch):
    observation = observe(convnet, cross_entropy, 3 * batch[0][:1], batch[1][:1], value_range=None)
    found = InvertingGradients(iterations=150)(observation, generator=gen())
    assert found.inputs.max() > 1.5


def test_total_variation_smooths(convnet, cross_entropy, batch):
    observation = observe(convnet, cross_entropy, batch[0][:1], batch[1][:1])

    def roughness(weight):
        found = InvertingGradients(iterations=80, total_variation=weight)(observation, generator=gen())
        return (found.inputs[..., 1:] - found.inputs[..., :-1]).abs().mean()

    assert roughness(1.0) < 0.5 * roughness(0.0)


def test_joint_labels_need_a_number_of_classes(convnet, cross_entropy, batch):
    blind = observe(convnet, cross_entropy, batch[0][:1], batch[1][:1], labels=False, num_classes=None)
    with pytest.raises(InputError, match="needs `num_classes` in the observation"):
        DLG()(blind)
    # With the last layer's label there is nothing to optimise beside the picture.
    assert DLG(labels="inferred", restarts=1)(blind, generator=gen()).converged


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DLG(restarts=0), "`restarts` must be at least 1, got 0"),
        (lambda: DLG(polish=-1), "`polish` must not be negative, got -1"),
        (lambda: DLG(evaluations=0), "`evaluations` must be at least 1, got 0"),
        (lambda: DLG(labels="guess"), '`labels` must be "inferred", "joint" or "shared", got \'guess\''),
        (lambda: IDLG(labels="none"), "`labels` must be"),
        (lambda: InvertingGradients(restarts=0), "`restarts` must be at least 1"),
        (lambda: InvertingGradients(iterations=0), "`iterations` must be at least 1"),
        (lambda: InvertingGradients(learning_rate=0.0), "`learning_rate` positive"),
        (lambda: InvertingGradients(learning_rate=float("nan")), "`learning_rate` positive"),
        (lambda: InvertingGradients(total_variation=-1.0), "`weight` must be finite and not negative"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(InputError, match=message):
        make()
