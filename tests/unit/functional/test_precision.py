import torch
from torch import nn

from gradguard import InputJacobian, LossGradient
from gradguard.functional.precision import full_precision
from gradguard.leakage import influence_lower_bound
from gradguard.zoo.models import digits_convnet


def test_autocast_around_changes_no_answer(digit_pictures, cross_entropy):
    torch.manual_seed(0)
    inputs, targets = digit_pictures.images[:3], digit_pictures.labels[:3]
    u = torch.randn_like(inputs)

    def measured(fast):
        gradient = LossGradient(digits_convnet(), cross_entropy)
        with torch.no_grad():
            for p in gradient.model.parameters():
                p.copy_(torch.linspace(-0.2, 0.2, p.numel()).reshape(p.shape))
        jacobian = InputJacobian(gradient, inputs, targets)
        jacobian.way = "layer by layer" if fast else "forward over reverse"
        delta = {n: torch.ones_like(p) for n, p in jacobian.parameters.items()}
        own = torch.cat([g.flatten() for g in gradient(inputs, targets).values()])
        random = torch.ones(3, 64)
        bound = influence_lower_bound(jacobian, delta, random=random)
        return own, jacobian.gram(u), jacobian.matvec(delta), bound.value

    for fast in (True, False):
        expected = measured(fast)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = measured(fast)
            assert torch.is_autocast_enabled("cpu")
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b)


def test_it_puts_back_what_it_found():
    before = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu"), full_precision():
        assert not torch.is_autocast_enabled("cpu")
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32
    assert torch.backends.cudnn.allow_tf32 == before
