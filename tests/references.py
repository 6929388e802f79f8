"""Dense, slow and plain: what the operators and estimators are compared with, in float64."""

import torch
from torch.func import functional_call


def loss_of(model, loss_fn, inputs, targets):
    """The loss and the trainable parameters, by ordinary autograd."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return loss_fn(functional_call(model, parameters, (inputs,)), targets), list(parameters.values())


def flat_gradient(model, loss_fn, inputs, targets):
    """The gradient of a batch as one vector."""
    loss, parameters = loss_of(model, loss_fn, inputs, targets)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def dense_jacobian(model, loss_fn, inputs, targets):
    """`d^2 l / d inputs d parameters` by double backward, one input element at a time: (inputs' elements, P)."""
    inputs = inputs.clone().requires_grad_(True)
    loss, parameters = loss_of(model, loss_fn, inputs, targets)
    (by_input,) = torch.autograd.grad(loss, inputs, create_graph=True)
    rows = []
    for element in by_input.flatten():
        pieces = torch.autograd.grad(element, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([p.flatten() for p in pieces]))
    return torch.stack(rows)


def dense_influence(jacobian, delta, damping=0.0):
    """`|(J J^T + damping)^{-1} J delta|`, by the formula as it stands in the paper."""
    gram = jacobian @ jacobian.T + damping * torch.eye(len(jacobian), dtype=jacobian.dtype)
    return torch.linalg.solve(gram, jacobian @ delta)


def psnr(guess, truth):
    """dB in [0, 1], clamped as a picture would be shown."""
    return float(-10 * torch.log10((guess.double().clamp(0, 1) - truth.double()).square().mean()))
