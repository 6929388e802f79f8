"""The trace of a model: which calls are made in its `forward`, one after another, and what they are named."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from gradguard.chain import links
from gradguard.errors import UnsupportedModelError

WAY_OUT = (
    "R-GAP walks Linear, Conv2d, elementwise activations, batch normalisation in eval mode, average pooling, reshapes, "
    "padding and normalisation by constants, one after another; attack other models by gradient matching."
)

#: Where wrappers keep the module.
_WRAPPED = ("_orig_mod", "module", "_forward_module", "_original_module")


class Tracer(fx.Tracer):
    """Does not look into `opaque` modules."""

    def __init__(self, opaque: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        """Whether a call of `module` is one call of the trace."""
        return any(module is m for m in self.opaque) or super().is_leaf_module(module, path)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Through wrappers and compiled calls to the module that was written."""
        inner = unwrapped(m)
        compiled = getattr(inner, "_compiled_call_impl", None) is not None
        return super().call_module(inner, inner.forward if compiled or inner is not m else forward, args, kwargs)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of `torch.compile`, `nn.DataParallel` and their like: one child, under a name of theirs."""
    while True:
        children = dict(module.named_children())
        name = next((n for n in _WRAPPED if n in children), None)
        if name is None or not _wraps(module):
            return module
        module = children[name]


def _wraps(module: nn.Module) -> bool:
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return isinstance(module, kinds) or type(module).__name__ in ("OptimizedModule", "_FabricModule")


def traced(root: nn.Module, model: nn.Module) -> fx.Graph:
    """The trace; modules without parameters that cannot be followed are calls, judged by what they do."""
    opaque = tuple(m for m in model.modules() if m is not model and not any(True for _ in m.parameters()))
    try:
        return Tracer().trace(root)
    except Exception as error:  # a forward may raise anything on a symbolic input
        try:
            return Tracer(opaque).trace(root)
        except Exception:
            raise UnsupportedModelError(
                f"The `forward` of {name_of(model)} cannot be traced: it depends on the values of its input, or does "
                f"what torch.fx cannot follow ({type(error).__name__}: {error}). Write the model as nn.Sequential, or "
                "attack by gradient matching."
            ) from error


def nodes_of(root: nn.Module, model: nn.Module) -> list[fx.Node]:
    """The nodes of the trace that the output depends on, in order."""
    graph = traced(root, model)
    used: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output") or node in used:
            used |= {node, *node.all_input_nodes}
    return [n for n in graph.nodes if n in used]


def attribute_of(node: fx.Node) -> Any:
    """The attribute that a node reads off a value, if it does."""
    return node.args[1] if node.op == "call_function" and node.target is getattr else None


def is_shape_query(node: fx.Node) -> bool:
    """Whether a node asks for a shape, a dtype or a device, which no value goes through."""
    if node.op == "call_method":
        return node.target in links.SHAPE_METHODS
    return node.target is getattr and node.args[1] in links.SHAPE_ATTRIBUTES


def name_of(module: nn.Module) -> str:
    """The module's class, for messages."""
    return type(module).__name__


def call_name(node: fx.Node) -> str:
    """The called function or method, for messages."""
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
