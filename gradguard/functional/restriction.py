"""The Jacobian of what was sent: `J` restricted to the parameters whose gradient an attacker sees.

Where only some parameters' gradients leave the client, an attacker sees `J_S^T u`: the entries of `J^T u` for the sent
names `S`. `sent_only` gives the products of `J_S` through the interface of `InputJacobian`: `J_S delta` is `J` on
`delta` with zeros for all other names, and `J_S J_S^T` one after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, flatten, unflatten
from gradguard.linalg import LinearOperator


def sent_only(jacobian: InputJacobian, names: Collection[str]) -> InputJacobian:
    """`J_S`, what an attacker has to go by who sees the gradient of some parameters only.

    Args:
        jacobian: of all parameters, or restricted already.
        names: of the parameters whose gradient was sent.

    Returns:
        `jacobian` itself if `names` are all of its parameters, else a `SentJacobian`, which has the same interface.

    Raises:
        InputError: for no name at all, and for names of no parameter.
    """
    unknown = [n for n in names if n not in jacobian.parameters]
    if unknown:
        raise InputError(
            f"{sorted(unknown)[:5]} are no parameters that are trained here; there are "
            f"{list(jacobian.parameters)[:5]}, for instance. Key gradients as `model.named_parameters()`."
        )
    if not names:
        raise InputError("No parameter was sent, so nothing can be measured. Give the gradient of one at least.")
    if len(set(names)) == len(jacobian.parameters):
        return jacobian
    whole = jacobian.whole if isinstance(jacobian, SentJacobian) else jacobian
    return cast(InputJacobian, SentJacobian(whole, names))


class SentJacobian:
    """An `InputJacobian` restricted to some parameters; made by `sent_only`.

    `parameters`, and all gradients and deltas, name the sent ones alone, in the model's order. Whatever does not depend
    on parameters is that of `whole`.

    Args:
        whole: Of all parameters.
        names: Of the parameters that were sent.
    """

    def __init__(self, whole: InputJacobian, names: Collection[str]) -> None:
        self.whole = whole
        self.parameters: Gradient = {n: p for n, p in whole.parameters.items() if n in names}

    def __getattr__(self, name: str) -> Any:
        """Inputs, shapes and options of the whole Jacobian."""
        if name == "whole":  # while a copy of this is being made
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __repr__(self) -> str:
        return f"SentJacobian({self.whole!r}, {len(self.parameters)} of {len(self.whole.parameters)} parameters)"

    def of(self, whole: InputJacobian) -> InputJacobian:
        """The restriction of another Jacobian of the same model to the same parameters."""
        return cast(InputJacobian, SentJacobian(whole, self.parameters))

    def joint(self) -> InputJacobian:
        """The joint operator of the whole batch."""
        return self.of(self.whole.joint())

    def chunks(self) -> Iterator[tuple[slice, InputJacobian]]:
        """Which problems, and their operator, as `InputJacobian.chunks`."""
        for rows, part in self.whole.chunks():
            yield rows, cast(InputJacobian, self) if part is self.whole else self.of(part)

    def with_chunk_size(self, chunk_size: int | None) -> InputJacobian:
        """The same operator, computed `chunk_size` problems at a time."""
        return self.of(self.whole.with_chunk_size(chunk_size))

    def repeated(self, count: int) -> InputJacobian:
        """Each problem `count` times over, as `InputJacobian.repeated`."""
        return self.of(self.whole.repeated(count))

    def in_dtype(self, dtype: torch.dtype) -> InputJacobian:
        """The same operator computed in `dtype`."""
        return self.of(self.whole.in_dtype(dtype))

    # ------------------------------------------------------------------ products

    def rmatvec(self, u: Tensor) -> Gradient:
        """`J_S^T u`, as `InputJacobian.rmatvec`."""
        image = self.whole.rmatvec(u)
        return {n: image[n] for n in self.parameters}

    def matvec(self, delta: Mapping[str, Tensor]) -> Tensor:
        """`J_S delta`, as `InputJacobian.matvec`; `delta` names the sent parameters."""
        if set(delta) != set(self.parameters):
            missing, unexpected = set(self.parameters) - set(delta), set(delta) - set(self.parameters)
            raise InputError(
                "`delta` does not name the parameters that were sent: "
                f"missing {sorted(missing)[:5]}, unexpected {sorted(unexpected)[:5]}."
            )
        shared = all(delta[n].shape == p.shape for n, p in self.parameters.items())
        rows = () if shared else (self.whole.num_problems,)
        zeros = {
            n: torch.zeros((), dtype=p.dtype, device=p.device).expand(*rows, *p.shape)
            for n, p in self.whole.parameters.items()
            if n not in self.parameters
        }
        return self.whole.matvec({n: zeros[n] if n in zeros else delta[n] for n in self.whole.parameters})

    def gram(self, u: Tensor) -> Tensor:
        """`J_S J_S^T u`: shape of `inputs`. Holds `chunk_size` parameter-sized vectors at a time."""
        return torch.cat([part.matvec(part.rmatvec(u[rows])) for rows, part in self.chunks()])

    def dense(self, *, chunk_size: int | None = 64) -> Tensor:
        """`J_S` as a matrix: `(R, size, P_S)`. Forms the whole one on the way."""
        matrix = self.whole.dense(chunk_size=chunk_size)
        sizes = [p.numel() for p in self.whole.parameters.values()]
        pieces = zip(self.whole.parameters, matrix.split(sizes, dim=-1), strict=True)
        return torch.cat([piece for n, piece in pieces if n in self.parameters], dim=-1)

    # ------------------------------------------------------------------ for the solvers, on plain vectors

    def gram_operator(self) -> LinearOperator:
        """`J_S J_S^T` on vectors of shape `(R, size)`."""
        whole = self.whole

        def product(u: Tensor) -> Tensor:
            return self.gram(u.reshape(whole.inputs.shape)).reshape(u.shape)

        return LinearOperator(product, product, (whole.num_problems, whole.size, whole.size), whole.inputs)

    def transpose_operator(self) -> LinearOperator:
        """`J_S^T` from vectors `(R, size)` to `(R, P_S)`, and back by `J_S`."""
        whole = self.whole

        def forward(u: Tensor) -> Tensor:
            images = self.rmatvec(u.reshape(whole.inputs.shape))
            return flatten(images, batch_dims=1) if whole.per_example else flatten(images)[None]

        def backward(delta: Tensor) -> Tensor:
            vectors = unflatten(delta if whole.per_example else delta[0], self.parameters)
            return self.matvec(vectors).reshape(whole.num_problems, whole.size)

        sent = sum(p.numel() for p in self.parameters.values())
        return LinearOperator(forward, backward, (whole.num_problems, sent, whole.size), whole.inputs)
