"""From directions to examples: what SPEAR solves once the zeros of `K` are known.

Let the first layer compute `z = W x + c` on `B` examples, the rows of `X` `(B, n)`, and let `dl/dz` of each be a column
of `K` `(m, B)`. Then `grad W = K X`, and with the bias's gradient `K 1` as one more column `grad = K [X 1]`. Its rank
is `b <= B`, so `grad = L R` with known factors, and `K = L Q`, `[X 1] = Q^-1 R` for an unknown `b x b` matrix `Q`. The
ReLU's zeros give `Q` up to the scale of its columns, the column of ones the scales. Source: Dimitrov et al. 2024
(arXiv 2403.03945); labels, copies and layers without a bias are ours.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.func import grad, vmap

from gradguard.attacks._closed_form.batch_proof import BatchProof
from gradguard.attacks._closed_form.sparse_columns import SparseColumns
from gradguard.chain import Activation, Affine, Chain, Reshape, Rewire, all_parameters, walk
from gradguard.errors import InputError, UnsupportedModelError
from gradguard.threats.observation import Observation

#: Without a bias, `log10` of an example's largest element is looked for within this of 0, and then ever nearer.
_LARGEST, _GRID, _ZOOMS = 3.0, 97, 22
#: Of the candidates for an example's label, so many are looked at more closely.
_LIKELY = 3
#: Relative distance of two signals that are the same.
_TWIN = 1e-6
_WAY_OUT = "Attack other models by gradient matching."


@dataclass(frozen=True)
class Disaggregated:
    """What a set of directions comes to. `inputs`: `(B, *input_shape)`; `labels`: as in `Observation`, or `None`.

    `loss`: the matching loss, `nan` without labels; `score`: the share of signs of `z` that agree with the zeros of `K`
    (Dimitrov et al. 2024); `copies`: how many examples are returned as another one's copy.
    """

    inputs: Tensor
    labels: Tensor | None
    loss: float
    score: float
    copies: int


class Disaggregation:
    """An observation in float64, its first layer, and the way from directions to examples. Raises as `SPEAR.check`.

    `gradient`: `(m, n)`, or `(m, n + 1)` with the bias's as its last column; `eps`: its relative rounding.
    """

    def __init__(self, observation: Observation) -> None:
        self.seen, self.observation = observation, observation.in_dtype(torch.float64)
        self.function = self.observation.loss_gradient
        self.chain = walk(self.function, observation.input_shape)
        self.parameters = all_parameters(self.function)
        self.index, self.layer = _first_layer(self.chain)
        sent, layer = self.observation.sent, self.layer
        if layer.weight not in sent:
            raise UnsupportedModelError(
                f"The weight of the first layer, {layer.name!r}, is frozen, so its gradient is not sent. {_WAY_OUT}"
            )
        self.gradient = sent[layer.weight]
        self.eps = torch.finfo(observation.sent[layer.weight].dtype).eps
        if not bool(self.gradient.any()):
            raise InputError(
                f"The sent gradient of {layer.weight!r} is zero: nothing about the inputs follows from it."
            )
        bias_gradient = None if layer.bias is None else sent.get(layer.bias)
        self.has_bias = bias_gradient is not None and bool(bias_gradient.any())
        if bias_gradient is not None and self.has_bias:
            self.gradient = torch.cat([self.gradient, bias_gradient[:, None]], dim=1)
        if observation.batch_size > min(self.gradient.shape):
            raise InputError(
                f"The gradient of the first layer, {layer.name!r}, is {tuple(self.gradient.shape)} and tells at most "
                f"{min(self.gradient.shape)} examples apart; this is a batch of {observation.batch_size}. Use a "
                "smaller batch, or attack by gradient matching."
            )

    # ------------------------------------------------------------------ from directions to examples

    def examples(self, columns: SparseColumns) -> Disaggregated:
        """The examples for the directions found so far; a guess where some are missing."""
        x, k, score = self._disaggregated(columns)
        residuals, scales, targets = self._explained(x, k, self.observation.batch_size - len(x) + 1)
        return self._assigned(x, residuals, scales, targets, score)

    def score(self, columns: SparseColumns) -> float:
        """The share of signs of `z` that agree with the zeros of `K` (Dimitrov et al. 2024), in [0, 1]."""
        return self._disaggregated(columns)[2]

    def unproved(self, found: Disaggregated) -> list[str]:
        """Why a batch that has the sent gradient may be another one, in sentences; empty if it cannot.

        Copies are one direction of the gradient for several examples, which different examples with proportional
        signals leave as well; and without a bias an example's scale may have more than one solution.
        """
        reasons = []
        inputs = found.inputs
        if found.copies:
            proof = BatchProof(self.seen, self.chain, self.index)
            if not proof.copies_proved(inputs, found.labels, found.loss):
                reasons.append(
                    f"The gradient tells {len(inputs) - found.copies} of {len(inputs)} examples apart; the others may "
                    "be copies, or different examples whose combinations are returned."
                )
        if (
            not self.has_bias
            and found.labels is not None
            and self._has_twin(self._rows(inputs), self.function.cast(found.labels))
        ):
            reasons.append("With another scale or label an example has the same gradient.")
        return reasons

    def _rows(self, inputs: Tensor) -> Tensor:
        """The first layer's inputs."""
        return torch.stack([self.chain(x, self.parameters, stop=self.index).flatten() for x in inputs])

    def _has_twin(self, x: Tensor, labels: Tensor) -> bool:
        """Whether, for an example of `x` `(B, n)`, another factor and some label give the gradient that 1 gives."""
        targets, _ = self._targets(x)
        if targets is None:
            return False
        grid = torch.linspace(-_LARGEST, _LARGEST, 4 * _GRID - 3, dtype=x.dtype, device=x.device)

        def signal(factors: Tensor, example: Tensor) -> Tensor:
            """`scale k(scale x)` for each target `(Y, g, m)`."""
            z = self._z(10 ** factors[:, None] * example).expand(len(targets), -1, -1)
            wide = targets[:, None].expand(*z.shape[:2], *targets.shape[1:])
            own = vmap(grad(self._loss))(z.flatten(0, 1), wide.flatten(0, 1)).unflatten(0, z.shape[:2])
            return own * 10 ** factors[:, None]

        for example, label in zip(x, labels, strict=True):
            which = int((targets == label).reshape(len(targets), -1).all(1).to(torch.int64).argmax())
            own = signal(grid.new_zeros(1), example)[which, 0]
            size = torch.linalg.vector_norm(own).clamp_min(torch.finfo(x.dtype).tiny)
            misses = torch.linalg.vector_norm(signal(grid, example) - own, dim=-1) / size
            lowest = (misses[:, 1:-1] <= misses[:, :-2]) & (misses[:, 1:-1] <= misses[:, 2:])
            away = grid[1:-1].abs() > 2 * float(grid[1] - grid[0])
            for target, place in torch.nonzero(lowest & away).tolist():
                centre, width = grid[place + 1], grid[1] - grid[0]
                for _ in range(_ZOOMS):
                    closer = centre + width * torch.linspace(-1, 1, 9, dtype=x.dtype, device=x.device)
                    near = torch.linalg.vector_norm(signal(closer, example)[target] - own, dim=-1) / size
                    centre, width = closer[near.argmin()], width / 4
                if float(near.min()) < _TWIN:
                    return True
        return False

    def _disaggregated(self, columns: SparseColumns) -> tuple[Tensor, Tensor, float]:
        """`x` `(b, n)` and `K^T` `(b, m)` up to the examples' scales where there is no bias, and the score."""
        directions = columns.padded()
        k, x = directions @ columns.factors.left.mT, torch.linalg.inv_ex(directions.mT)[0] @ columns.factors.right
        x = x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        active = ~columns.is_zero(directions)
        if self.has_bias:
            scale = torch.where(x[:, -1].abs() > torch.finfo(x.dtype).tiny, x[:, -1], 1.0)[:, None]
            x, k = x[:, :-1] / scale, k * scale
        else:
            x, k = self._upright(x, k, active, columns.alive)
        return x, k, float(((self._z(x)[:, columns.alive] > 0) == active).double().mean())

    def _upright(self, x: Tensor, k: Tensor, active: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Without a bias's gradient: the sign for which `K`'s zeros and those of `W x` agree, and largest element 1."""
        positive = ((x @ self.parameters[self.layer.weight].mT)[:, alive] > 0) == active
        size = x.abs().amax(1).clamp_min(torch.finfo(x.dtype).tiny)
        scale = (torch.where(positive.double().mean(1) < 0.5, -1.0, 1.0) / size)[:, None]
        return x * scale, k / scale

    def _z(self, x: Tensor) -> Tensor:
        """The first layer's output of examples `(..., n)`: `(..., m)`."""
        return x @ self.parameters[self.layer.weight].mT + self.layer.offset(self.parameters)

    # ------------------------------------------------------------------ labels, scales and copies, example by example

    def _explained(self, x: Tensor, k: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """How well each candidate (a target, so many copies) explains an example's column of `K`.

        `x`: `(b, n)`; `k`: `(b, m)`; `most`: copies that an example may stand for. Returns the relative distance of
        the model's `k` at `x` from the one found, and the factor of `x` at which it was taken, both `(b, Y most)` in
        the order target, copies, and the targets `(Y, ...)`; `None` for a loss that takes no classes.
        """
        targets, share = self._targets(x)
        if targets is None:
            return x.new_zeros(len(x), 1), x.new_ones(len(x), 1), None
        copies = torch.arange(1, most + 1, dtype=x.dtype, device=x.device).repeat(len(targets)) * share
        y = targets.repeat_interleave(most, dim=0)
        size = torch.linalg.vector_norm(k, dim=1).clamp_min(torch.finfo(k.dtype).tiny)[:, None, None]

        def residual(log_scale: Tensor, pairs: Tensor) -> Tensor:
            """`(b, p, g)` for `log10` of factors of that shape and the candidates `pairs` `(b, p)`."""
            scale = 10 ** log_scale[..., None]
            z = self._z(scale * x[:, None, None])
            wide = y[pairs][:, :, None].expand(*z.shape[:3], *y.shape[1:])
            own = vmap(grad(self._loss))(z.flatten(0, 2), wide.flatten(0, 2)).unflatten(0, z.shape[:3])
            found = copies[pairs][..., None, None] * own * (1.0 if self.has_bias else scale)
            return (torch.linalg.vector_norm(found - k[:, None, None], dim=-1) / size).nan_to_num(nan=math.inf)

        pairs = torch.arange(len(y), device=x.device).expand(len(x), -1)
        place = x.new_zeros(len(x), len(y), 1)
        if self.has_bias:
            return residual(place, pairs)[..., 0], 10 ** place[..., 0], targets
        grid = torch.linspace(-_LARGEST, _LARGEST, _GRID, dtype=x.dtype, device=x.device)
        least, best = residual(place + grid, pairs).min(-1)
        place, width = grid[best], 2 * _LARGEST / (_GRID - 1)
        few = least.topk(min(_LIKELY, len(y)), dim=1, largest=False).indices
        near = place.gather(1, few)[..., None]
        for _ in range(_ZOOMS):
            closer = near + torch.linspace(-width, width, 9, dtype=x.dtype, device=x.device)
            fine = residual(closer, few).min(-1, keepdim=True)
            near, width = closer.gather(-1, fine.indices), width / 4
            least = least.scatter(1, few, fine.values[..., 0])
        return least, 10 ** place.scatter(1, few, near[..., 0]), targets

    def _loss(self, z: Tensor, target: Tensor) -> Tensor:
        """The loss of one example as a function of the first layer's output."""
        outputs = self.chain(z.reshape(self.layer.output_shape), self.parameters, start=self.index + 1)
        return self.function.loss_fn(outputs[None], target[None])

    def _targets(self, x: Tensor) -> tuple[Tensor | None, float]:
        """What the loss may have been given, `(Y, ...)`, and the factor of one example's loss in the batch's."""
        outputs = self.chain(self._z(x[0]).reshape(self.layer.output_shape), self.parameters, start=self.index + 1)
        labels, trials = self.observation.labels, []
        if labels is not None:
            trials = [torch.unique(self.function.cast(labels), dim=0)]
        elif outputs.shape == (1,):
            trials = [x.new_tensor([[0.0], [1.0]])]
        elif outputs.ndim == 1:
            trials = [torch.arange(self.observation.num_classes or len(outputs), device=x.device)]
        for targets in trials:
            try:
                with warnings.catch_warnings():
                    # A loss that would broadcast class indices against outputs takes no classes.
                    warnings.filterwarnings("error", message="Using a target size")
                    one = self.function.loss_fn(outputs[None], targets[:1])
                    two = self.function.loss_fn(outputs.expand(2, -1), targets[[0, 0]])
            except Exception:  # a user's loss may raise anything on targets that are not its own
                return None, 1.0
            mean = bool((two - one).abs() <= (two - 2 * one).abs())
            return targets, 1 / self.observation.batch_size if mean else 1.0
        return None, 1.0

    def _assigned(
        self, x: Tensor, residuals: Tensor, scales: Tensor, targets: Tensor | None, score: float
    ) -> Disaggregated:
        """`B` examples from `b`, in the order of the given labels or of the recovered ones."""
        count, most = self.observation.batch_size, self.observation.batch_size - len(x) + 1
        best = residuals.argmin(1)
        # Each as often as its own candidate says; the first ones more often if that does not make up the batch.
        own = torch.arange(len(x), device=x.device).repeat_interleave(best % most + 1)
        own = torch.cat([own, torch.arange(count, device=x.device) % len(x)])[:count]
        labels = self.observation.labels
        if targets is None:
            choice = best[own]
            found = labels
        elif labels is not None:
            given = self.function.cast(labels)
            flat = (given[:, None] == targets[None]).reshape(count, len(targets), -1).all(-1).to(torch.int64).argmax(1)
            cost = residuals[own].unflatten(1, (len(targets), most)).amin(2)[:, flat]
            order = linear_sum_assignment(cost.clamp_max(1e6).mT.cpu().numpy())[1]
            own, found = own[torch.from_numpy(order).to(own.device)], labels
            copies = (
                residuals[own].unflatten(1, (len(targets), most))[torch.arange(count, device=x.device), flat].argmin(1)
            )
            choice = flat * most + copies
        else:
            order = (best[own] // most).argsort(stable=True)
            own = own[order]
            choice = best[own]
            found = targets[choice // most]
        inputs = self.chain.undone(x[own] * scales[own].gather(1, choice[:, None]))
        loss = math.nan if found is None else self.observation.matching_loss(inputs, found)
        return Disaggregated(inputs, found, loss, score, count - len(x))


def _first_layer(chain: Chain) -> tuple[int, Affine]:
    """The linear layer on the inputs, and where it is in the chain, once a ReLU follows it."""
    index = chain.affine_indices[0]
    layer = chain.layers[0]
    before = next((s for s in chain.steps[:index] if not isinstance(s, Reshape | Rewire)), None)
    if layer.kind != "Linear" or before is not None:
        first = layer if before is None else before
        raise UnsupportedModelError(
            f"SPEAR needs a linear layer on the inputs themselves, and this model begins with {first.name!r} "
            f"({first.kind}). {_WAY_OUT}"
        )
    after = next((s for s in chain.steps[index + 1 :] if not isinstance(s, Reshape)), None)
    if not isinstance(after, Activation) or after.kind != "ReLU":
        what = "nothing" if after is None else f"{after.name!r} ({after.kind})"
        raise UnsupportedModelError(
            f"SPEAR needs a ReLU right after the first layer, {layer.name!r}: it lives on the zeros of its derivative. "
            f"Here {what} follows. {_WAY_OUT}"
        )
    return index, layer
