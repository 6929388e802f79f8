"""What gradguard's answers are compared with: plain double backward in float64, without a line of gradguard.

The user's model is run as it is, its own parameters are the leaves, attention takes the MATH kernel. `x` is the
private leaf of the inputs, `L` the loss of the batch:

    J^T u = grad_theta <grad_x L, u>        J delta = grad_x <grad_theta L, delta>

for one example `r` alone with `u` zero in all other rows: the derivative of the batch's gradient by example `r`,
whatever the loss or the model do with the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from case_kinds.case import Case, first_private, leaf_of, to_double, with_leaf


class Reference:
    """A case in float64 and its derivatives.

    `inputs`: the private leaf. `names`: of the trained parameters, as the user's model names them.
    """

    def __init__(self, case: Case) -> None:
        self.case, made = case, case.build_plain()
        self.model = made.model.double()
        self.loss_fn = made.loss_fn.double() if isinstance(made.loss_fn, nn.Module) else made.loss_fn
        self.all_inputs, self.targets = to_double(made.inputs), to_double(made.targets)
        self.key = first_private(made.inputs, case.options.get("private"))
        self.inputs = leaf_of(self.all_inputs, self.key).detach().clone()
        if case.options.get("train_mode") == "eval":
            self.model.eval()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.names = [n for n, p in case.build().model.named_parameters() if p.requires_grad]
        if [p.shape for p in self.parameters] != [p.shape for p in case.build().model.parameters() if p.requires_grad]:
            raise ValueError(f"Case {case.name!r}: the plain model has other parameters than the user's.")

    # ------------------------------------------------------------------ the function

    def loss(self, leaf: Tensor) -> Tensor:
        """The batch's loss; buffers move as the model moves them, so each call starts from the same ones."""
        with _state_kept(self.model), torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
            with self._called_with(leaf) as inputs:
                outputs = _call(self.model, inputs)
            return self.loss_fn(outputs, self.targets)

    @contextmanager
    def _called_with(self, leaf: Tensor) -> Iterator[object]:
        module = self.case.options.get("input_module")
        if module is None:
            # A clone: a model may write into what it is given.
            yield with_leaf(self.all_inputs, self.key, leaf.clone())
            return
        tokens = torch.zeros(leaf.shape[:2], dtype=torch.int64)
        hook = self.model.get_submodule(module).register_forward_hook(lambda *_: leaf.clone())
        try:
            yield with_leaf(self.all_inputs, self.key, tokens)
        finally:
            hook.remove()

    # ------------------------------------------------------------------ first derivatives

    def gradient(self, leaf: Tensor | None = None) -> dict[str, Tensor]:
        """The gradient of the batch's loss, at other inputs too."""
        return self._named(self._grad(self.loss(self.inputs if leaf is None else leaf), self.parameters))

    def flat(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """One vector, parameters in their order."""
        return torch.cat([gradient[n].double().flatten() for n in self.names])

    # ------------------------------------------------------------------ second derivatives

    def rmatvec(self, u: Tensor, *, per_example: bool) -> dict[str, Tensor]:
        """`J^T u`: `(B, *parameter_shape)` per example, else `parameter_shape`."""
        _, by_inputs = self._by_inputs
        rows = [u * _only(r, u) for r in range(len(u))] if per_example else [u]
        images = [self._named(self._grad((by_inputs * row).sum(), self.parameters, keep=True)) for row in rows]
        return {n: torch.stack([i[n] for i in images]) for n in self.names} if per_example else images[0]

    def matvec(self, delta: Mapping[str, Tensor]) -> Tensor:
        """`J delta`: shape of the private leaf."""
        leaf = self.inputs.clone().requires_grad_(True)
        gradient = self._grad(self.loss(leaf), self.parameters, create=True)
        product = sum((g * delta[n].double()).sum() for n, g in zip(self.names, gradient, strict=True))
        return self._grad(product, [leaf])[0]

    @cached_property
    def _by_inputs(self) -> tuple[Tensor, Tensor]:
        leaf = self.inputs.clone().requires_grad_(True)
        return leaf, self._grad(self.loss(leaf), [leaf], create=True)[0]

    @cached_property
    def jacobian(self) -> Tensor:
        """`J` as a matrix, a row per input element: `(B D, P)`."""
        _, by_inputs = self._by_inputs
        rows = [self._grad(e, self.parameters, keep=True) for e in by_inputs.flatten()]
        return torch.stack([torch.cat([p.flatten() for p in row]) for row in rows])

    # ------------------------------------------------------------------ influence

    def problems(self, per_example: bool) -> Tensor:
        """`J` of each problem: `(B, D, P)`, or `(1, B D, P)` for the batch as a whole."""
        return self.jacobian.unflatten(0, (len(self.inputs), -1)) if per_example else self.jacobian[None]

    def influence(self, delta: Mapping[str, Tensor], *, per_example: bool, damping: float = 0.0) -> Tensor:
        """`|(J J^T + damping)^+ J delta|` of each problem, by the singular values of `J`."""
        _, singular, right = torch.linalg.svd(self.problems(per_example), full_matrices=False)
        image = torch.einsum("rkp,p->rk", right, self.flat(delta))
        cut = 1e-15 * max(self.jacobian.shape) * singular[:, :1]
        gain = torch.where(singular > cut, singular / (singular**2 + damping).clamp_min(1e-300), 0.0)
        return torch.linalg.vector_norm(gain * image, dim=1)

    @property
    def seen(self) -> Tensor:
        """Which examples the gradient shows at all, to first order: `(B,)`."""
        return self.problems(True).flatten(1).norm(dim=1) > 0

    def is_clear(self, per_example: bool) -> bool:
        """Whether the rank of `J` can be told: no singular value near the rounding of the largest, none tiny."""
        singular = torch.linalg.svdvals(self.problems(per_example))
        ratio = singular / singular[:, :1].clamp_min(1e-300)
        return not bool(((ratio > 1e-16 * max(self.jacobian.shape)) & (ratio < 1e-4)).any())

    # ------------------------------------------------------------------ matching

    def matching(self, leaf: Tensor, sent: Mapping[str, Tensor]) -> tuple[float, Tensor]:
        """`|g(leaf) - sent|^2 / |sent|^2`, and its gradient by `leaf`."""
        leaf = leaf.detach().double().clone().requires_grad_(True)
        gradient = self._grad(self.loss(leaf), self.parameters, create=True)
        wanted = self.flat(sent)
        value = (torch.cat([g.flatten() for g in gradient]) - wanted).square().sum() / wanted.square().sum()
        return value.item(), self._grad(value, [leaf])[0]

    # ------------------------------------------------------------------ inside

    def _named(self, gradients: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, gradients, strict=True))

    def _grad(self, value: Tensor, by: list[Tensor], *, create: bool = False, keep: bool = False) -> list[Tensor]:
        if not value.requires_grad:
            return [torch.zeros_like(b) for b in by]
        keep = keep or create
        found = torch.autograd.grad(value, by, create_graph=create, retain_graph=keep, materialize_grads=True)
        return [f if create else f.detach() for f in found]


def _only(row: int, like: Tensor) -> Tensor:
    mask = torch.zeros(len(like), *[1] * (like.ndim - 1), dtype=like.dtype)
    mask[row] = 1
    return mask


def _call(model: nn.Module, inputs: object) -> object:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Buffers and attributes that a forward pass moves are put back; not in place, since graphs may hold them."""
    attributes = [(m, {n: v for n, v in vars(m).items() if n[:1] != "_"}) for m in model.modules()]
    buffers = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for module, kept in attributes:
            vars(module).update(kept)
