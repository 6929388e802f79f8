"""Influence on text: where I2F says that an attacker of a transformer's gradient lands, where DLG lands, and which
tokens that gives away.

A small GPT, trained for seconds on the text that comes with scikit-learn, one token per character. Inputs are the
embeddings of the tokens (`LossGradient(..., input_module="transformer.wte")`), batch 1, float64, embeddings centred
(LayerNorms hide their mean). Two threat models, targets known in both:

- "every next token": language modelling. Its targets are the text, moved by one, so who knows them needs no attack:
  a worst case that says what the input side of the gradient determines.
- "one label": a loss at the last position alone, whose target (the character that follows) says nothing about the
  text before it. Random starts often end in other minima here; up to ten rounds of DLG, each followed by a search
  over tokens (one exchanged at a time, for the lowest matching loss), are given to the attacker. Sequences on which
  they all fail are counted and left out of the comparison.

Perturbed gradients are attacked from the attacker's own solution of the undisturbed one ("continued"), which is the
text itself where that was found: at large noise this flatters the attack. The first sequence's Gaussian rows are also
attacked from random starts. "share" is the predicted error per token (root mean square) over the median distance
between neighbouring embeddings. A row counts as small where it is between 0.0001 (below, rounding decides) and 0.1.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from common import Bar, benchmark_parser, finish, generator, rows_table
from gradguard import InputJacobian, LossGradient
from gradguard.attacks import DLG, Observation
from gradguard.attacks._matching.engine import matching_losses
from gradguard.defenses import GaussianNoise, Pruning
from gradguard.functional.loss_gradient import LossFunction
from gradguard.functional.vectors import Gradient, add
from gradguard.leakage import influence
from gradguard.linalg import one_thread
from gradguard.zoo.models import GPT, gpt
from gradguard.zoo.text import (
    Characters,
    centred,
    decode,
    last_token_loss,
    nearest_neighbour_distance,
    next_token_loss,
    sample_text,
    token_recovery,
    windows,
)

SHARES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
#: Above the arithmetic, below the curvature.
SMALL = (1e-4, 0.1)


@dataclass(frozen=True, kw_only=True)
class ContinuedDLG(DLG):
    """DLG from embeddings `(B, T, E)` that the attacker already has."""

    first: Tensor = field(repr=False)

    def start(self, shape: tuple[int, ...], observation: Observation, generator: torch.Generator | None) -> Tensor:
        """Every trial starts at `first`."""
        return self.first.to(observation.loss_gradient.device, self.dtype).expand(shape).clone()


@dataclass(frozen=True)
class Case:
    """A loss, the tokens per sequence, how many sequences, and how many rounds the attacker gets."""

    name: str
    loss_fn: LossFunction = field(repr=False)
    length: int
    sequences: int
    rounds: int


def cases(quick: bool) -> list[Case]:
    """The full run has more sequences."""
    return [
        Case("every next token", next_token_loss, 8, 2 if quick else 4, 2),
        Case("every next token", next_token_loss, 12, 1 if quick else 3, 2),
        Case("one label", last_token_loss, 8, 2 if quick else 4, 10),
    ]


def main() -> None:
    """Train, attack, compare."""
    options = benchmark_parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    undisturbed: list[dict[str, Any]] = []
    with one_thread():
        model, tokens, loss = trained(options.seed, options.device)
        for case in cases(options.quick):
            own = LossGradient(model, case.loss_fn, dtype=torch.float64, input_module="transformer.wte")
            inputs, targets = windows(tokens, case.length, case.sequences, generator=generator(options, case.length))
            if case.loss_fn is last_token_loss:
                targets = targets[:, -1]
            for index in range(case.sequences):
                clean, found = sequence(
                    own,
                    inputs[index : index + 1].to(options.device),
                    targets[index : index + 1].to(options.device),
                    case=case,
                    seed=options.seed + 100 * index,
                    random_too=index == 0 and case.loss_fn is next_token_loss,
                )
                undisturbed.append({"targets": case.name, "tokens": case.length, "sequence": index} | clean)
                rows += [{k: undisturbed[-1][k] for k in ("targets", "tokens", "sequence")} | row for row in found]
    counted = [row for row in rows if row["start"] == "continued"]
    small = [row["ratio"] for row in counted if SMALL[0] <= row["share"] <= 1.001 * SMALL[1]]
    by_share = recovery_by_share(rows)
    means = [row["recovery"] for row in by_share]
    # Continued attacks start at the text, which at such noise nobody has: they do not forget it evenly.
    from_random = [row["recovery from random starts"] for row in by_share]
    from_random = [value for value in from_random if value is not None]
    found_all = [row["recovery"] for row in undisturbed if row["found"]]
    summary = {
        "rows": len(counted),
        "small rows": len(small),
        "least ratio of small": min(small),
        "largest ratio of small": max(small),
        "sequences": len(undisturbed),
        "sequences found": len(found_all),
        "mean gap of recovery, predicted and observed": statistics.mean(
            abs(row["recovery"] - row["predicted recovery"]) for row in counted
        ),
        "model's loss (nats per character)": loss,
    }
    bars = [
        Bar(
            "rank correlation of predicted and observed error",
            correlation(counted, "predicted", "observed"),
            0.9,
            "at least",
        ),
        Bar(
            f"median observed / predicted at shares of {SMALL[0]} to {SMALL[1]}",
            statistics.median(small),
            (0.9, 1.1),
            "within",
        ),
        Bar("least recovery on undisturbed gradients that were matched", min(found_all), 1.0, "at least"),
        Bar("undisturbed gradients matched, share of sequences", len(found_all) / len(undisturbed), 0.8, "at least"),
        Bar("least mean recovery at shares up to 0.1", min(means[:3]), 1.0, "at least"),
        Bar(
            "rank correlation of share and mean recovery (Gaussian noise)",
            correlation(by_share, "share", "recovery"),
            -0.8,
            "at most",
        ),
        Bar(
            "largest rise of recovery from one share to the next, random starts",
            max((b - a for a, b in pairwise(from_random)), default=float("nan")),
            0.02,
            "at most",
        ),
    ]
    figures = {"undisturbed": undisturbed, "perturbed": rows, "recovery by share": by_share, "summary": [summary]}
    finish(
        options,
        figures=figures,
        bars=bars,
        tables=[
            rows_table("Undisturbed gradients", [compact(row) for row in undisturbed]),
            rows_table("Perturbed gradients", [compact(row) for row in rows]),
            rows_table("Recovery by predicted error", by_share),
            rows_table("Summary", [summary]),
        ],
    )


def trained(seed: int, device: torch.device, *, steps: int = 300) -> tuple[GPT, Tensor, float]:
    """The model, the text's tokens, and the loss of the last steps."""
    text = sample_text()
    characters = Characters.of(text)
    tokens = characters.encode(text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = gpt(len(characters)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        inputs, targets = (part.to(device) for part in windows(tokens, model.context, 64, generator=draw))
        optimizer.zero_grad()
        loss = next_token_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return model, tokens, float(torch.stack(losses[-20:]).mean())


def sequence(
    gradient: LossGradient, tokens: Tensor, targets: Tensor, *, case: Case, seed: int, random_too: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The attack on one sequence's undisturbed gradient, and its rows; no rows where that attack found nothing."""
    table = centred(
        gradient.embed(torch.arange(len(gradient.model.lm_head.weight), device=gradient.device)[:, None])[:, 0]
    )  # type: ignore[arg-type]
    neighbour = nearest_neighbour_distance(table).median().item()
    x = gradient.embed(tokens)
    jacobian, true = InputJacobian(gradient, x, targets), gradient(x, targets)
    observation = Observation(
        loss_gradient=gradient, sent=true, input_shape=tuple(x.shape[1:]), labels=targets, value_range=None
    )

    def scored(inputs: Tensor) -> tuple[float, float]:
        error = torch.linalg.vector_norm(centred(inputs - x)).item()
        return error, token_recovery(decode(centred(inputs), table), tokens).item()

    own, matching, rounds = undisturbed_attack(observation, gradient, table, case.rounds, seed)
    error, recovery = scored(own)
    found = matching < 1e-12
    clean = {"found": found, "rounds": rounds, "matching loss": matching, "error": error, "recovery": recovery}
    if not found:
        return clean, []
    rows = []
    for name, delta in perturbations(jacobian, true, neighbour, torch.Generator().manual_seed(seed)):
        predicted = influence(jacobian, delta)
        share = predicted.value.item() / (case.length**0.5 * neighbour)
        seen = replace(observation, sent=add(true, delta))
        starts: dict[str, DLG] = {"continued": ContinuedDLG(first=own[None], restarts=1, evaluations=1, polish=12)}
        if random_too and name == "GaussianNoise":
            starts["random"] = DLG(restarts=4, evaluations=600, polish=0)
        for start, attack in starts.items():
            result = attack(seen, generator=torch.Generator().manual_seed(seed + 1))
            assert result.inputs is not None
            error, recovery = scored(result.inputs)
            rows.append(
                {
                    "perturbation": name,
                    "start": start,
                    "share": share,
                    "predicted": predicted.value.item(),
                    "observed": error,
                    "ratio": error / predicted.value.item(),
                    "predicted recovery": scored(x + predicted.displacement)[1],
                    "recovery": recovery,
                    "gradient change": relative(delta, true),
                }
            )
    return clean, rows


def undisturbed_attack(
    observation: Observation, gradient: LossGradient, table: Tensor, rounds: int, seed: int
) -> tuple[Tensor, float, int]:
    """What the attacker has after at most `rounds` rounds: embeddings, their matching loss, and the rounds it took.

    Each round: DLG from random starts, and a search over tokens from what it found. Levenberg-Marquardt refines the
    better of the two.
    """
    embeddings = gradient.embed(torch.arange(len(table), device=table.device)[:, None])[:, 0]
    best, own = float("inf"), torch.zeros(1, *observation.input_shape)
    for place in range(rounds):
        draw = torch.Generator().manual_seed(seed + place)
        found = DLG(restarts=8, evaluations=300, polish=0)(observation, generator=draw)
        assert found.inputs is not None
        searched, loss = searched_tokens(observation, decode(centred(found.inputs), table), embeddings)
        first = embeddings[searched] if loss < found.matching_loss else found.inputs
        result = ContinuedDLG(first=first[None], restarts=1, evaluations=1, polish=15)(observation)
        assert result.inputs is not None
        if result.matching_loss < best:
            best, own = result.matching_loss, result.inputs
        if best < 1e-12:
            break
    return own, best, place + 1


def searched_tokens(observation: Observation, tokens: Tensor, embeddings: Tensor) -> tuple[Tensor, float]:
    """Exchange one token at a time for the one with the lowest matching loss, until none is lower.

    `tokens`: `(1, T)`, the first guess. Returns the last one, and its matching loss.
    """
    length, vocabulary = tokens.shape[1], len(embeddings)
    count, best = length * vocabulary, float("inf")
    place = torch.arange(length, device=tokens.device).repeat_interleave(vocabulary)
    token = torch.arange(vocabulary, device=tokens.device).repeat(length)
    assert observation.labels is not None
    targets = observation.labels.expand(count, *observation.labels.shape)
    while True:
        candidates = tokens.expand(count, -1).clone()
        candidates[torch.arange(count, device=tokens.device), place] = token
        losses = matching_losses(observation, embeddings[candidates][:, None], targets)
        if losses.min().item() >= best:
            return tokens, best
        best, tokens = losses.min().item(), candidates[losses.argmin()][None]


def perturbations(
    jacobian: InputJacobian, true: Gradient, neighbour: float, draw: torch.Generator
) -> Iterator[tuple[str, Gradient]]:
    """Gaussian noise at every share, a random displacement of the embeddings at some, rounding and
    pruning as they come.
    """
    scale = jacobian.inputs.shape[1] ** 0.5 * neighbour
    noise = GaussianNoise(noise_ratio=1.0).checked_perturbation(true, jacobian, generator=draw)
    for share in SHARES:
        yield "GaussianNoise", moving(jacobian, noise, share * scale)
    # Along the mean of an embedding the gradient does not move at all; that is not a direction to hide in.
    direction = centred(torch.randn(jacobian.inputs.shape, generator=draw, dtype=torch.float64).to(jacobian.inputs))
    image = {n: v[0] for n, v in jacobian.rmatvec(direction).items()}
    for share in (0.03, 0.1, 0.3):
        yield "J^T times a random direction", moving(jacobian, image, share * scale)
    yield "rounding to bfloat16", {n: g.to(torch.bfloat16).to(g) - g for n, g in true.items()}
    yield "rounding to float16", {n: g.to(torch.float16).to(g) - g for n, g in true.items()}
    yield "Pruning 50%", Pruning(fraction=0.5).checked_perturbation(true)


def moving(jacobian: InputJacobian, delta: Gradient, distance: float) -> Gradient:
    """`delta` scaled so that I2F, which is linear in it, is `distance`."""
    unit = influence(jacobian, delta).value.item()
    return {n: d * (distance / unit) for n, d in delta.items()}


def relative(delta: Gradient, true: Gradient) -> float:
    """`|delta| / |true|`."""
    squares = [sum(float((v * v).sum()) for v in part.values()) for part in (delta, true)]
    return (squares[0] / squares[1]) ** 0.5


def recovery_by_share(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean recovery at each of `SHARES`, under Gaussian noise."""
    result = []
    for share in SHARES:
        some = [r for r in rows if r["perturbation"] == "GaussianNoise" and abs(r["share"] / share - 1) < 1e-3]
        names = ("recovery", "predicted recovery", "ratio", "gradient change")
        random = [r["recovery"] for r in some if r["start"] == "random"]
        some = [r for r in some if r["start"] == "continued"]
        result.append({"share": share} | {name: statistics.mean(r[name] for r in some) for name in names})
        result[-1]["recovery from random starts"] = statistics.mean(random) if random else None
    return result


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a terminal."""
    first = f"{row['targets']}, {row['tokens']} tokens, #{row['sequence']}"
    left = {"targets", "tokens", "sequence", "perturbation", "start", "gradient change", "predicted recovery"}
    if "perturbation" in row:
        first += f", {row['perturbation']}, {row['start']}"
    return {"case": first} | {name: value for name, value in row.items() if name not in left}


def correlation(rows: list[dict[str, Any]], first: str, second: str) -> float:
    """Spearman's."""
    return float(spearmanr([r[first] for r in rows], [r[second] for r in rows]).statistic)


if __name__ == "__main__":
    main()
