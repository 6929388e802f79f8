"""Residual blocks of a graph as single steps of a chain."""

from __future__ import annotations

from gradguard.chain.sequence import Chain, Graph
from gradguard.chain.steps import Affine, MaxPool, Residual, Step, Sum
from gradguard.errors import UnsupportedModelError


def folded(graph: Graph) -> Chain:
    """The chain that a graph is if each sum of two paths from one value is a step.

    Of a sum's paths the one that ends in a layer is its branch, the longer one if both do.

    Args:
        graph: The model's steps.

    Returns:
        The chain, with `Residual` steps.

    Raises:
        UnsupportedModelError: If a layer is on the way to two sums, whose gradient is then of both.
    """
    return Chain(tuple(_Folder(graph).path(len(graph.steps) - 1, -1)), graph.input_shape)


class _Folder:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.taken = graph, set[int]()

    def path(self, end: int, start: int) -> list[Step]:
        """The steps behind step `start` up to step `end`."""
        steps: list[Step] = []
        index = end
        while index != start:
            step, sources = self.graph.steps[index], self.graph.sources[index]
            if index in self.taken:
                raise UnsupportedModelError(
                    f"The value of {step.name!r} ({step.kind}) goes into more than one sum, so what comes from it "
                    "cannot be told apart. Attack by gradient matching."
                )
            self.taken.add(index)
            if isinstance(step, Sum):
                before = self._common(*sources)
                steps.append(self._block(step, self.path(sources[0], before), self.path(sources[1], before), before))
                index = before
            else:
                assert not isinstance(step, MaxPool), "the walk of a chain refuses it"
                steps.append(step)
                (index,) = sources
        return steps[::-1]

    def _common(self, first: int, second: int) -> int:
        """The last step that both values come from, -1 for the input."""
        dominators = self.graph.dominators
        both = [dominators[i] if i >= 0 else frozenset[int]() for i in (first, second)]
        return max(both[0] & both[1], default=-1)

    def _block(self, step: Sum, first: list[Step], second: list[Step], before: int) -> Residual:
        def order(path: list[Step]) -> tuple[bool, int]:
            block = Residual(name="", branch=tuple(path), skip=(), input_shape=(), output_shape=())
            return block.end >= 0, sum(isinstance(s, Affine) for s in path)

        skip, branch = sorted((first, second), key=order)
        return Residual(
            name=step.name,
            branch=tuple(branch),
            skip=tuple(skip),
            input_shape=self.graph.input_shape if before < 0 else self.graph.steps[before].output_shape,
            output_shape=step.output_shape,
        )
