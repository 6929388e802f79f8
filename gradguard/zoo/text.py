"""Text: tokens, losses of language models, and what a reconstruction of embeddings says about the tokens.

`T` tokens per sequence, `V` in the vocabulary, `E` elements per embedding. Influence and attacks work on embeddings
`(B, T, E)`, which have derivatives (`LossGradient(..., input_module=...)`); this module goes there and back.
"""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gradguard.errors import InputError

# ---------------------------------------------------------------------- real text


def sample_text() -> str:
    """English prose: scikit-learn's descriptions of its data sets (bundled, BSD licence).

    Returns:
        Some 20,000 characters in lower case; everything but letters, digits and `.,'-` is a space.
    """
    folder = importlib.resources.files("sklearn.datasets") / "descr"
    pages = sorted((f for f in folder.iterdir() if f.name.endswith(".rst")), key=lambda f: f.name)
    paragraphs = [p for page in pages for p in re.split(r"\n\s*\n", page.read_text(encoding="utf-8"))]
    # No headings, tables, code or directives.
    prose = [p for p in paragraphs if len(p) >= 120 and not re.search(r">>>|\.\. |::|==|--|\|", p)]
    return " ".join(re.sub(r"[^a-z0-9.,'-]+", " ", " ".join(prose).lower()).split())


@dataclass(frozen=True)
class Characters:
    """A tokenizer with one token per character.

    Args:
        characters: `characters[i]` is token `i`.
    """

    characters: str

    @classmethod
    def of(cls, text: str) -> Characters:
        """The tokenizer of a text.

        Args:
            text: Any text.

        Returns:
            A tokenizer of all its characters, sorted.
        """
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """The tokens of a text.

        Args:
            text: `N` characters.

        Returns:
            Shape `(N,)`, int64.

        Raises:
            InputError: If a character is not among `characters`.
        """
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise InputError(f"The tokenizer has no token for {unknown[:5]}; it knows {self.characters!r}.")
        return torch.tensor([self.characters.index(c) for c in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens.

        Args:
            tokens: Shape `(N,)`, integer.

        Returns:
            `N` characters.
        """
        return "".join(self.characters[i] for i in tokens.tolist())


def windows(
    tokens: Tensor, length: int, count: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Stretches of a text at random places, and the tokens that follow theirs.

    Args:
        tokens: The whole text, shape `(N,)` with `N > length`.
        length: Tokens per stretch `T`.
        count: Number of stretches.
        generator: Draws the places.

    Returns:
        The stretches and the same moved on by one token, both `(count, length)`.

    Raises:
        InputError: If the text is too short.
    """
    if len(tokens) <= length:
        raise InputError(f"`tokens` must be more than `length` = {length}, got {len(tokens)}.")
    start = torch.randint(len(tokens) - length, (count, 1), generator=generator)
    rows = tokens[start + torch.arange(length + 1)]
    return rows[:, :-1], rows[:, 1:]


# ---------------------------------------------------------------------- losses


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy over all tokens. The targets of language modelling are the text itself, moved by one.

    Args:
        logits: Shape `(B, T, V)`.
        targets: Tokens `(B, T)`, int64, or probabilities `(B, T, V)`.

    Returns:
        A scalar, in nats.
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))


def last_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy at the last position alone, for a sequence with one label: a class, or the token that follows.

    Args:
        logits: Shape `(B, T, V)`.
        targets: Labels `(B,)`, int64, or probabilities `(B, V)`.

    Returns:
        A scalar, in nats.
    """
    return F.cross_entropy(logits[:, -1], targets)


# ---------------------------------------------------------------------- from embeddings back to tokens


def centred(embeddings: Tensor) -> Tensor:
    """Embeddings less the mean of their elements.

    A network that reads its embeddings through LayerNorms alone, as pre-norm transformers do, does not see that mean:
    `J J^T` has a zero eigenvalue for each position, and no attacker finds it.

    Args:
        embeddings: Shape `(..., E)`.

    Returns:
        The same shape.
    """
    return embeddings - embeddings.mean(-1, keepdim=True)


def decode(embeddings: Tensor, table: Tensor, *, metric: Literal["euclidean", "cosine"] = "euclidean") -> Tensor:
    """The tokens whose embeddings are nearest. Ties go to the lower token.

    Args:
        embeddings: Shape `(B, T, E)`.
        table: Shape `(V, E)`, the embedding of every token (`model.transformer.wte.weight`). Decode
            `centred(embeddings)` with `centred(table)` where the network does not see the mean.
        metric: What is nearest.

    Returns:
        Tokens `(B, T)`, int64.

    Raises:
        InputError: If the shapes do not fit, or there is no such metric.
    """
    _check_table(table)
    if embeddings.shape[-1:] != table.shape[-1:]:
        raise InputError(
            f"`embeddings` must be (B, T, E) with the table's E = {table.shape[-1]}, got {tuple(embeddings.shape)}."
        )
    if metric not in ("euclidean", "cosine"):
        raise InputError(f'`metric` must be "euclidean" or "cosine", got {metric!r}.')
    table = table.detach().to(embeddings)
    if metric == "cosine":
        return (F.normalize(embeddings, dim=-1) @ F.normalize(table, dim=-1).mT).argmax(-1)
    # |e - t|^2 less |e|^2, which is the same for all tokens
    return ((table * table).sum(-1) - 2 * embeddings @ table.mT).argmin(-1)


def token_recovery(found: Tensor, true: Tensor) -> Tensor:
    """The share of tokens that were found, in their places.

    Args:
        found: Tokens `(B, T)`.
        true: Tokens `(B, T)`.

    Returns:
        Shape `(B,)`, in [0, 1].

    Raises:
        InputError: If the shapes differ or are not `(B, T)`.
    """
    if found.shape != true.shape or true.ndim != 2:
        raise InputError(f"Tokens must be (B, T) both, got {tuple(found.shape)} and {tuple(true.shape)}.")
    return (found == true).double().mean(1)


def nearest_neighbour_distance(table: Tensor) -> Tensor:
    """How far each token's embedding is from the nearest other one.

    A reconstruction closer than half of it decodes to the right token.

    Args:
        table: Shape `(V, E)`.

    Returns:
        Shape `(V,)`, Euclidean, in the units of the table.
    """
    _check_table(table)
    distances = torch.cdist(table.detach(), table.detach(), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.fill_diagonal_(torch.inf).min(-1).values


def tokens_in_gradient(embedding_gradient: Tensor, *, tolerance: float = 0.0) -> Tensor:
    """Which tokens a batch holds, from the gradient of the embedding table alone.

    A lookup's gradient is zero in the row of every token that is not in the batch, so the rows that are not zero name
    those that are (Melis et al. 2019, arXiv 1805.04049; the first step of FILM, Gupta et al. 2022, arXiv 2205.08514).
    With a tied head every row has a share from the softmax, and with noise on it every row is non-zero: then this names
    all tokens, or the largest rows.

    Args:
        embedding_gradient: Shape `(V, E)`.
        tolerance: Rows whose norm is at most this share of the largest count as zero; in [0, 1).

    Returns:
        Tokens, int64, ascending.

    Raises:
        InputError: If the shape is another, or `tolerance` is outside its range.
    """
    if embedding_gradient.ndim != 2:
        raise InputError(f"`embedding_gradient` must be (V, E), got shape {tuple(embedding_gradient.shape)}.")
    if not 0 <= tolerance < 1:
        raise InputError(f"`tolerance` must be in [0, 1), got {tolerance}.")
    size = torch.linalg.vector_norm(embedding_gradient, dim=-1)
    return (size > tolerance * size.max()).nonzero()[:, 0]


def _check_table(table: Tensor) -> None:
    if table.ndim != 2 or len(table) < 2:
        raise InputError(f"`table` must be (V, E) with two tokens or more, got shape {tuple(table.shape)}.")
