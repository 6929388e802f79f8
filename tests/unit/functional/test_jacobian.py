import pytest
import torch
from torch import nn

from gradguard import InputError, InputJacobian, LossGradient
from gradguard.functional.vectors import flatten
from gradguard.zoo.models import cnn6, digits_convnet, fcn
from references import dense_jacobian


def models():
    torch.manual_seed(0)
    return {
        "convnet-tanh": digits_convnet(),
        "convnet-softplus": digits_convnet(activation="softplus"),
        "fcn-leaky": fcn((64, 30, 10), bias=True),
        "groupnorm": nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(144, 10)),
        "maxpool": nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)),
        "batchnorm-eval": nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)).eval(),
    }


@pytest.fixture(params=list(models()))
def model(request):
    return models()[request.param].double()


def random_like(gradient, *batch):
    return {n: torch.randn(*batch, *g.shape, dtype=g.dtype) for n, g in gradient.items()}


@pytest.mark.parametrize("per_example", [True, False])
def test_adjoint(model, cross_entropy, batch, per_example):
    jacobian = InputJacobian(LossGradient(model, cross_entropy), *batch, per_example=per_example)
    u, delta = torch.randn_like(batch[0]), random_like(jacobian.parameters)
    image = jacobian.rmatvec(u)
    if per_example:
        image = {n: v.sum(0) for n, v in image.items()}
    left, right = (flatten(image) * flatten(delta)).sum(), (u * jacobian.matvec(delta)).sum()
    assert abs(left - right) <= 1e-10 * max(abs(left), flatten(image).norm() * flatten(delta).norm())


def test_per_example_rows_are_the_dense_jacobian(model, cross_entropy, batch):
    jacobian = InputJacobian(LossGradient(model, cross_entropy), *batch)
    dense = jacobian.dense(chunk_size=7)
    for r, (x, y) in enumerate(zip(*batch, strict=True)):
        reference = dense_jacobian(model, cross_entropy, x[None], y[None]) / len(batch[0])
        torch.testing.assert_close(dense[r], reference, rtol=1e-9, atol=1e-12)


def test_joint_is_the_dense_jacobian_of_the_batch(model, cross_entropy, batch):
    batch = [part[:2] for part in batch]
    jacobian = InputJacobian(LossGradient(model, cross_entropy), *batch, per_example=False)
    torch.testing.assert_close(jacobian.dense()[0], dense_jacobian(model, cross_entropy, *batch), rtol=1e-9, atol=1e-12)


def test_products_are_the_dense_ones(convnet, cross_entropy, batch):
    jacobian = InputJacobian(LossGradient(convnet, cross_entropy), *batch, chunk_size=3)
    dense, u = jacobian.dense(), torch.randn_like(batch[0])
    torch.testing.assert_close(flatten(jacobian.rmatvec(u), 1), torch.einsum("rnp,rn->rp", dense, u.flatten(1)))
    gram = torch.einsum("rnp,rmp,rm->rn", dense, dense, u.flatten(1))
    torch.testing.assert_close(jacobian.gram(u).flatten(1), gram)
    for delta in (random_like(jacobian.parameters), random_like(jacobian.parameters, 4)):
        rows = flatten(delta, delta["0.bias"].ndim - 1).expand(4, -1)
        torch.testing.assert_close(jacobian.matvec(delta).flatten(1), torch.einsum("rnp,rp->rn", dense, rows))


def test_trials_are_joint_operators_side_by_side(convnet, cross_entropy, batch):
    function = LossGradient(convnet, cross_entropy)
    batch = [part[:2] for part in batch]
    inputs, targets = torch.stack([batch[0], batch[0].flip(0)]), torch.stack([batch[1], batch[1].flip(0)])
    trials = InputJacobian.of_trials(function, inputs, targets)
    for trial, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        torch.testing.assert_close(trials.dense()[trial], InputJacobian(function, x, y, per_example=False).dense()[0])


def test_examples_keep_the_batchs_weight(convnet, cross_entropy, batch):
    function = LossGradient(convnet, cross_entropy)
    some, everyone = InputJacobian(function, *batch, examples=[2, 0]), InputJacobian(function, *batch)
    u = torch.randn_like(batch[0])
    torch.testing.assert_close(some.gram(u[[2, 0]]), everyone.gram(u)[[2, 0]])
    assert some.joint().size == everyone.joint().size


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_examples_weight_follows_the_reduction(convnet, batch, reduction):
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    jacobian = InputJacobian(LossGradient(convnet, loss_fn), *batch)
    assert jacobian.contribution([1]).scale == pytest.approx(0.25 if reduction == "mean" else 1.0)
    loss_fn.reduction = "mean" if reduction == "sum" else "sum"  # changed later: read again
    jacobian = InputJacobian(LossGradient(convnet, loss_fn), *batch)
    assert jacobian.contribution([1]).scale == pytest.approx(0.25 if reduction == "sum" else 1.0)


def test_class_weights_are_read_from_the_batch_at_hand(convnet, batch):
    weighted = nn.CrossEntropyLoss(weight=torch.linspace(0.1, 3, 10).double())
    function = LossGradient(convnet, weighted)
    jacobian = InputJacobian(function, *batch)
    joint = dense_jacobian(convnet, weighted, *batch)
    torch.testing.assert_close(jacobian.dense().flatten(0, 1), joint, rtol=1e-9, atol=1e-12)


def test_in_dtype_is_the_same_operator(convnet, cross_entropy, batch):
    single = InputJacobian(LossGradient(convnet.float(), cross_entropy), batch[0].float(), batch[1])
    double = single.in_dtype(torch.float64)
    u = torch.randn_like(batch[0])
    assert double.gram(u).dtype == torch.float64
    torch.testing.assert_close(single.gram(u.float()).double(), double.gram(u), rtol=1e-3, atol=1e-6)


def test_wrong_shapes_are_named(convnet, cross_entropy, batch):
    jacobian = InputJacobian(LossGradient(convnet, cross_entropy), *batch)
    with pytest.raises(InputError, match=r"`u` must have the inputs' shape \(4, 1, 8, 8\), got \(1, 8, 8\)"):
        jacobian.rmatvec(batch[0][0])
    with pytest.raises(InputError, match="does not name the model's parameters"):
        jacobian.matvec({"0.weight": torch.zeros(16, 1, 3, 3)})
    with pytest.raises(InputError, match="one perturbation per example"):
        jacobian.matvec(random_like(jacobian.parameters, 3))


def test_binary_models(digit_pictures):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).double()
    x, y = digit_pictures.images[:3].double(), torch.tensor([[0.0], [1.0], [1.0]]).double()
    jacobian = InputJacobian(LossGradient(model, nn.BCEWithLogitsLoss()), x, y)
    reference = dense_jacobian(model, nn.BCEWithLogitsLoss(), x[:1], y[:1]) / 3
    torch.testing.assert_close(jacobian.dense()[0], reference)


def test_photographs_in_colour():
    from gradguard.zoo.pictures import photos

    torch.manual_seed(0)
    model = cnn6(num_classes=10, head_bias=True).double()
    jacobian = InputJacobian(LossGradient(model, nn.CrossEntropyLoss()), photos().images.double(), torch.tensor([3, 7]))
    u, v = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    left, right = (v * jacobian.gram(u)).sum(), (u * jacobian.gram(v)).sum()
    torch.testing.assert_close(left, right, rtol=1e-9, atol=0)
