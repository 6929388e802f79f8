"""Models of tokens: what the module that looks the tokens up gives, and how to put something else in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.structures import named_leaves, output_tensors, rebuild

if TYPE_CHECKING:
    from gradguard.functional.loss_gradient import LossGradient


class TokenLookup:
    """The module of a model that turns tokens `(B, T)` into embeddings `(B, T, E)`, once per forward pass.

    Args:
        model: It is called with placeholder tokens while the module answers with embeddings.
        name: The module's path in it.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    @property
    def module(self) -> nn.Module:
        """The module as it is now."""
        return self.model.get_submodule(self.name)

    @contextmanager
    def replaced(self, embeddings: Tensor) -> Iterator[Tensor]:
        """Placeholder tokens to call the model with, while the module answers with `embeddings`."""
        calls = 0

        def given(*arguments: Any, **options: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return embeddings

        with forward_replaced(self.module, given):
            yield torch.zeros(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)
        self._check_calls(calls)

    @torch.no_grad()
    def embed(self, loss_gradient: LossGradient, tokens: Any) -> Any:
        """See `LossGradient.embed`."""
        leaves = named_leaves(tokens)
        wanted = [
            (name, leaf)
            for name, leaf in leaves
            if isinstance(leaf, Tensor) and not leaf.is_floating_point() and leaf.ndim == 2 and leaf.numel()
        ]
        named = str(loss_gradient.private) if loss_gradient.private is not None else None
        wanted = [w for w in wanted if w[0] == named] or wanted
        if not wanted:
            first = leaves[0][1] if leaves else tokens
            got = f"{first.dtype} of shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
            raise InputError(f"`tokens` must be integers (B, T), got {got}.")
        found: list[Any] = []
        asked: list[Tensor] = []
        module = self.module
        original = module.forward

        def recording(*arguments: Any, **options: Any) -> Any:
            asked.extend(a for a in (*arguments, *options.values()) if isinstance(a, Tensor))
            found.append(original(*arguments, **options))
            return found[-1]

        plain = loss_gradient.without_lookup()
        parameters = loss_gradient.parameters()
        with forward_replaced(module, recording):
            expected = plain.outputs_of(parameters, tokens)
        self._check_calls(len(found))
        # The tokens are what the module was asked for; a mask of whole numbers beside them is not.
        same = [w for w in wanted if any(a.shape == w[1].shape and bool((a == w[1]).all()) for a in asked)]
        if len(same) > 1:
            raise InputError(
                f"The inputs {[n for n, _ in same]} hold the same whole numbers: which of them are the tokens cannot "
                "be told: name them with `private=`."
            )
        name, ids = (same or wanted)[0]
        embeddings = found[0]
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 3 or embeddings.shape[:2] != ids.shape:
            got = str(tuple(embeddings.shape)) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise UnsupportedModelError(
                f"Module {self.name!r} turns tokens of shape {tuple(ids.shape)} into {got}; it must be "
                "(B, T, E), one embedding per token. Name the module that looks the tokens up."
            )
        structure = embeddings
        if isinstance(tokens, Mapping | tuple | list):
            names = iter([n for n, _ in leaves])
            structure = rebuild(tokens, lambda leaf: embeddings if next(names) == name else leaf)
        own = copy(loss_gradient)
        own.private = name if structure is not embeddings else None
        function, private, rest = own.bind(structure, torch.zeros(len(ids), device=ids.device))
        again = function.outputs(parameters, private, rest)
        for one, other in zip(output_tensors(again), output_tensors(expected), strict=False):
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max())):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} looks at its tokens beside {self.name!r} (a mask of padding, a "
                    "second table): from the embeddings and placeholder tokens it gives other outputs. Wrap it so that "
                    "whatever else it derives from the tokens is fixed."
                )
        detached = embeddings.detach().clone()
        if structure is embeddings:
            return detached
        return rebuild(structure, lambda leaf: detached if leaf is embeddings else leaf)

    def check_embeddings(self, inputs: Any) -> None:
        """Raises `InputError` for tokens, and for what no lookup could have given."""
        if not isinstance(inputs, Tensor):
            return  # refused with all other inputs
        where = f"the embeddings that {self.name!r} gives, floating point (B, T, E)"
        if not inputs.is_floating_point():
            raise InputError(f"`inputs` must be {where}, got {inputs.dtype}. For tokens pass `gradient.embed(tokens)`.")
        if inputs.ndim != 3:
            raise InputError(f"`inputs` must be {where}, got shape {tuple(inputs.shape)}.")
        module = self.module
        if isinstance(module, nn.Embedding) and inputs.shape[2] != module.embedding_dim:
            raise InputError(f"`inputs` must be {where} with E = {module.embedding_dim}, got E = {inputs.shape[2]}.")

    def _check_calls(self, calls: int) -> None:
        """Raises `UnsupportedModelError` unless the module was called once."""
        if calls != 1:
            times = "never" if calls == 0 else f"{calls} times"
            raise UnsupportedModelError(
                f"Module {self.name!r} is called {times} in a forward pass of {type(self.model).__name__}; "
                "`input_module` must be the one that embeds the tokens, called as a module and once."
            )


def check_module_name(model: nn.Module, name: str) -> None:
    """Raises `InputError`, with the names that come close, if `model` has no sub-module `name`."""
    names = [n for n, _ in model.named_modules() if n]
    if name not in names:
        near = get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
        near += [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n not in near]
        raise InputError(f"{type(model).__name__} has no module {name!r}; there are {near}, for instance.")


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `forward` for a while; hooks on it still run, and what stood in the way before comes back.

    On the instance, as `layer_by_layer` does it: within that replacement this one is the inner one, so a lookup that is
    bypassed is never recorded.

    Args:
        module: Any.
        forward: What it computes.

    Yields:
        Nothing.
    """
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before
