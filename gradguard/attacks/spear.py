"""SPEAR: a small batch, exactly, from the gradient of a first linear layer with a ReLU above it.

Source: Dimitrov et al. 2024 (arXiv 2403.03945). The maths is in `spear_problem` (from directions to
examples) and `sparse_columns` (where directions come from). Differs from the paper in: the bias's gradient is one more
column of `grad W`, so examples need to be independent only up to shifts; layers without a bias; labels; directions are
completed in pairs and drawn with the help of those found; the gradient of what was found decides when to end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradguard.attacks._closed_form.given_labels import check_differentiable, with_usable_labels
from gradguard.attacks._closed_form.rgap_problem import PERFECT
from gradguard.attacks._closed_form.sparse_columns import SparseColumns, factors
from gradguard.attacks._closed_form.spear_problem import Disaggregated, Disaggregation
from gradguard.attacks.base import Attack
from gradguard.errors import InputError
from gradguard.threats.observation import Observation, Reconstruction

#: Draws at a time: the first, and the most.
_FIRST, _MOST = 1024, 8192
#: Below this score some directions are sure to be wrong, and the examples are not worth their gradient.
_WORTH = 0.95


@dataclass(frozen=True, kw_only=True)
class SPEAR(Attack):
    """Every example of a small batch, exact up to rounding, by linear algebra and sampling: no prior, no optimisation.

    Source: Dimitrov et al. 2024. For chains (see `gradguard.chain`) that begin with a linear layer on the inputs and a
    ReLU. The more units the first layer has, the more examples come back: eight from 200 units and some batches of 16
    from 400, in a second, while the network is untrained; two to four once it is trained. The draws that are needed
    grow exponentially with the batch. Labels are recovered if they are not given, and the examples then ordered by
    them; if they are given, examples come in their order. Without a gradient of the layer's bias an example's scale is
    the one at which the model's matches.

    `details`: `rank`, found in the gradient (below `B` where examples are copies, or their `k` is lost in rounding);
    `noise`, the first singular value that was taken for rounding, relative to the largest; `samples`; `directions`,
    independent ones found; `sparsity`, the share of zeros of each; `score`, the share of agreement of `K`'s zeros with
    the signs of `z`; `copies`, examples returned as another one's copy; `unproved`, in sentences why what has the sent
    gradient may still be something else, empty if it cannot: then the attack has not converged.

    Args:
        max_samples: Draws of `b - 1` rows, at least 1, of which a core does some hundred thousand in a second. It ends
            earlier once the gradient matches.
        tolerance: Of the matching loss, at which the attack has converged if the signs of all `z` agree with the zeros
            found, too; without that the loss must be below 1e-10. Gradients rounded to float32 leave 1e-14 or so, and a
            confident model's more, since the client has rounded `p - 1` before. Positive.

    Raises:
        InputError: If a value is outside its range.
    """

    max_samples: int = 200_000
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.max_samples < 1:
            raise InputError(f"`max_samples` must be at least 1, got {self.max_samples}.")
        if not self.tolerance > 0:
            raise InputError(f"`tolerance` must be positive, got {self.tolerance}.")

    def check(self, observation: Observation) -> None:
        """Whether the attack can work on the observation, before any work.

        Args:
            observation: What the attacker sees.

        Raises:
            UnsupportedModelError: Without a first linear layer and a ReLU above it.
            InputError: For a batch that is too large, or labels that the loss does not take.
        """
        Disaggregation(observation)
        check_differentiable(with_usable_labels(observation))

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """Draw, keep the sparsest directions, and end once their examples have the gradient that was sent.

        Args:
            observation: What the attacker sees.
            generator: Draws the samples.

        Returns:
            The examples `(B, *input_shape)`, their labels where the loss tells, and in `details` what is proved.
        """
        observation = with_usable_labels(observation)
        problem = Disaggregation(observation)
        found = factors(problem.gradient, observation.batch_size, problem.eps)
        columns = SparseColumns(found)
        best: Disaggregated | None = None
        samples, turn, seen = 0, 0, -1
        if columns.rank == 1:
            columns.add(torch.ones_like(found.values)[None])
        while True:
            total = int(columns.zeros.sum())
            if columns.complete and total > seen:
                seen = total
                if problem.score(columns) > _WORTH:
                    best = min(filter(None, (best, problem.examples(columns))), key=_mismatch)
                    if self._exact(best) or (best.labels is None and best.score == 1.0):
                        break
            if samples >= self.max_samples or not columns.open:
                break
            count = min(_FIRST << turn, _MOST, self.max_samples - samples)
            # Draws that are guided by what was found come in between those that are not.
            guided = turn % 2 == 1 and len(columns.basis) > 0 and columns.rank > 2
            directions = columns.drawn(count, generator, guided=guided)
            columns.add(columns.completed(columns.sparsest(directions)) if guided else directions)
            columns.settle()
            samples, turn = samples + count, turn + 1
        if best is None:
            best = problem.examples(columns)
        unproved = problem.unproved(best) if self._exact(best) else []
        return Reconstruction(
            attack=self.name,
            inputs=best.inputs,
            labels=best.labels,
            matching_loss=best.loss,
            converged=self._exact(best) and not unproved,
            details={
                "rank": columns.rank,
                "noise": found.noise,
                "samples": samples,
                "directions": len(columns.basis),
                "sparsity": (columns.zeros / max(len(columns.unit), 1)).tolist(),
                "score": best.score,
                "copies": best.copies,
                "unproved": unproved,
            },
        )

    def _exact(self, found: Disaggregated) -> bool:
        """Whether this is what was sent; `nan`, for a loss without labels, is not."""
        return found.loss <= (self.tolerance if found.score == 1.0 else min(PERFECT, self.tolerance))


def _mismatch(found: Disaggregated) -> tuple[float, float]:
    """What candidates are compared by: the matching loss and, without labels, the score."""
    return (found.loss if found.loss == found.loss else float("inf")), -found.score
