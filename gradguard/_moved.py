"""Old import paths, for one release: each still gives its names, with a warning that says where they are now."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

#: Old module -> where its names are now, the first that has one; for a module that is still there, those that left it.
MOVED: dict[str, tuple[str, ...]] = {
    "gradients": ("functional.loss_gradient", "functional.vectors", "functional.checks"),
    "jacobian": ("functional.jacobian",),
    "linearisation": ("functional.layer_by_layer",),
    "bilinear": (
        "functional.layers.base",
        "functional.layers.linear",
        "functional.layers.convolution",
        "functional.layers.normalisation",
        "functional.layers.lookup",
    ),
    "local_training": ("functional.local_training",),
    "precision": ("functional.precision",),
    "priors": ("linalg.covariances",),
    "models": ("zoo.models",),
    "data": ("zoo.pictures",),
    "folder": ("zoo.picture_folder",),
    "text": ("zoo.text",),
    "files": ("storage.files",),
    "verification": ("evaluation.scoring",),
    "policy": ("threats.model",),
    "attacks.matching": (),
    "attacks.closed_form": (),
    "attacks.labels": (),
}


class _OldPath(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `MOVED`, and what lay below the packages among them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for an old path, `None` for any other."""
        if self.new_paths(fullname) is None:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=fullname.removeprefix("gradguard.") in MOVED)

    def new_paths(self, fullname: str) -> tuple[str, ...] | None:
        """Where the names of an old module are, `None` for a module that has not moved."""
        package, _, name = fullname.partition(".")
        if package != "gradguard":
            return None
        if name in MOVED:
            return tuple(f"gradguard.{new}" for new in MOVED[name])
        parts = name.split(".")
        if len(parts) == 3 and ".".join(parts[:2]) in MOVED:
            return (f"gradguard.attacks._{parts[1]}.{parts[2]}",)
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Every name that the module lacks is looked up where it is now."""
        paths = self.new_paths(module.__name__) or ()
        old = module.__name__

        def find(name: str) -> object:
            if not name.startswith("__"):
                for path in paths:
                    new = importlib.import_module(path)
                    if hasattr(new, name):
                        message = (
                            f"`{old}.{name}` has moved to `{path}.{name}`; the old path goes with the next release."
                        )
                        warnings.warn(message, DeprecationWarning, stacklevel=2)
                        return getattr(new, name)
            raise AttributeError(f"module {old!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(finder, _OldPath) for finder in sys.meta_path):
        finder = _OldPath()
        sys.meta_path.append(finder)
        finder.exec_module(importlib.import_module("gradguard.policy"))
