import pytest
import torch
from torch import nn

from gradguard import InputError, LossGradient, UnsupportedModelError
from gradguard.functional.vectors import flatten, norm, unflatten
from references import flat_gradient


def test_gradient_is_autograds(convnet, cross_entropy, batch):
    ours = flatten(LossGradient(convnet, cross_entropy)(*batch))
    torch.testing.assert_close(ours, flat_gradient(convnet, cross_entropy, *batch), rtol=1e-12, atol=1e-14)


def test_per_example_gradients_average_to_the_batch_gradient(convnet, cross_entropy, batch):
    function = LossGradient(convnet, cross_entropy)
    each = flatten(function.per_example(*batch, chunk_size=3), batch_dims=1)
    for row, x, y in zip(each, *batch, strict=True):
        torch.testing.assert_close(row, flat_gradient(convnet, cross_entropy, x[None], y[None]))
    torch.testing.assert_close(each.mean(0), flatten(function(*batch)))


def test_nothing_is_left_on_the_model(convnet, cross_entropy, batch):
    before = {n: p.clone() for n, p in convnet.state_dict().items()}
    LossGradient(convnet, cross_entropy)(*batch)
    assert all(p.grad is None for p in convnet.parameters())
    assert all(torch.equal(before[n], p) for n, p in convnet.state_dict().items())


def test_frozen_parameters_are_constants(convnet, cross_entropy, batch):
    convnet[0].weight.requires_grad_(False)
    gradient = LossGradient(convnet, cross_entropy)(*batch)
    assert "0.weight" not in gradient
    assert list(gradient) == [n for n, p in convnet.named_parameters() if p.requires_grad]
    torch.testing.assert_close(flatten(gradient), flat_gradient(convnet, cross_entropy, *batch))


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1))))))


def test_tied_parameters_appear_once_and_get_both_shares(cross_entropy, batch):
    torch.manual_seed(0)
    model = Tied().double()
    gradient = LossGradient(model, cross_entropy)(*batch)
    assert "first.weight" in gradient
    assert "second.weight" not in gradient
    cross_entropy(model(batch[0]), batch[1]).backward()
    torch.testing.assert_close(gradient["first.weight"], model.first.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computing_dtype_is_independent_of_the_models(cross_entropy, batch, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(dtype)
    gradient = LossGradient(model, cross_entropy, dtype=torch.float64)(*batch)
    assert all(g.dtype == torch.float64 for g in gradient.values())
    assert model[1].weight.dtype == dtype
    torch.testing.assert_close(flatten(gradient), flat_gradient(model.double(), cross_entropy, *batch))


def batchnorm_model():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)
    ).double()


@pytest.mark.parametrize(("module", "index"), [("BatchNorm2d", 1), ("Dropout", 2)])
def test_train_mode_layers_are_refused_by_name(cross_entropy, batch, module, index):
    model = batchnorm_model().eval()
    model[index].train()
    with pytest.raises(UnsupportedModelError, match=rf"Module '{index}' \({module}\) is in training mode.*eval"):
        LossGradient(model, cross_entropy)(*batch)


def test_train_mode_eval_measures_the_eval_model_and_puts_everything_back(cross_entropy, batch):
    torch.manual_seed(0)
    model = batchnorm_model().train()
    statistics = model[1].running_mean.clone()
    ours = LossGradient(model, cross_entropy, train_mode="eval")(*batch)
    assert all(m.training for m in model.modules())
    assert torch.equal(model[1].running_mean, statistics)
    assert model[1].num_batches_tracked == 0
    torch.testing.assert_close(flatten(ours), flat_gradient(model.eval(), cross_entropy, *batch))


def test_eval_mode_batchnorm_uses_its_buffers(cross_entropy, batch):
    torch.manual_seed(0)
    model = batchnorm_model()
    model(batch[0])  # moves the running statistics
    model.eval()
    ours = LossGradient(model, cross_entropy)(*batch)
    torch.testing.assert_close(flatten(ours), flat_gradient(model, cross_entropy, *batch))


def test_flatten_and_unflatten_are_inverse(convnet, cross_entropy, batch):
    gradient = LossGradient(convnet, cross_entropy)(*batch)
    again = unflatten(flatten(gradient), gradient)
    assert all(torch.equal(again[n], g) for n, g in gradient.items())
    torch.testing.assert_close(norm(gradient), flatten(gradient).norm())


def test_a_model_without_trainable_parameters_is_refused(cross_entropy):
    with pytest.raises(InputError, match="no trainable parameter"):
        LossGradient(nn.Linear(2, 2).requires_grad_(False), cross_entropy)
