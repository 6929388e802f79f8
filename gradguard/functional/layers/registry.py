"""All module types whose products go layer by layer: one small function each.

A type of your own joins them with a decorator, and `gradguard.testing.check_layer` says whether it is right:

    @register_layer(MyScale, examples=lambda: [(MyScale(3), (3,))])
    def my_scale(module, weight_name, bias_name):
        return MyScaleLayer(module, weight_name, bias_name)

What is not registered goes another, slower way to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradguard.errors import InputError
from gradguard.functional.layers.base import BilinearLayer

#: A module, and the shape of one example that it takes; where it takes indices, they are below 5.
LayerExample = tuple[nn.Module, tuple[int, ...]]
#: `(module, weight_name, bias_name)` to the layer that the module is now, or `None` where it is none.
MakeLayer = Callable[[Any, str | None, str | None], BilinearLayer | None]


@dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """A module type in the registry.

    Args:
        module_type: Exactly this type: a subclass may compute something else.
        make: Its function.
        examples: Makes modules of all kinds that the function tells apart, which the tests try.
    """

    module_type: type[nn.Module]
    make: MakeLayer
    examples: Callable[[], Sequence[LayerExample]]


#: Every module type that goes layer by layer.
LAYERS: dict[type[nn.Module], LayerEntry] = {}


def register_layer(
    *module_types: type[nn.Module], examples: Callable[[], Sequence[LayerExample]]
) -> Callable[[MakeLayer], MakeLayer]:
    """A decorator that adds module types to `LAYERS`.

    Args:
        module_types: Exactly these, not their subclasses. A type that is there already is replaced.
        examples: Makes modules with the shape of one example, at least one; the contract is tested on them.

    Returns:
        The decorator, which returns the function as it is.

    Raises:
        InputError: For what is no module type.
    """
    for kind in module_types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise InputError(f"Only subclasses of `torch.nn.Module` can be registered, got {kind!r}.")

    def register(make: MakeLayer) -> MakeLayer:
        for kind in module_types:
            LAYERS[kind] = LayerEntry(module_type=kind, make=make, examples=examples)
        return make

    return register


def layer_of(module: nn.Module, weight_name: str | None, bias_name: str | None) -> BilinearLayer | None:
    """The layer that `module` is now.

    Args:
        module: Any.
        weight_name: The model's name of its weight; `None` if that is not trained.
        bias_name: The same of its bias.

    Returns:
        The layer, or `None` if its type is not registered or it is set in a way that the type's function refuses.
    """
    entry = LAYERS.get(type(module))
    return None if entry is None else entry.make(module, weight_name, bias_name)
