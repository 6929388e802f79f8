"""Secret noise: what an attacker with the source and every default can subtract from what is sent.

The noise of a message of each way out (`Guard.protect`, the Lightning callback, `gradguard check`), every option at its
default, against an attacker who draws the noise of thousands of guesses: PyTorch generators of every small seed and of
people's favourites, the global generator seeded with the same, noise streams of guessable keys, and gradguard itself
run again after `seed_everything(42)`. Residual ratio: what is left of the noise after the best guess, at its best
scale, is subtracted (1: nothing removed, 0: all). As a control the same attacker meets noise that was given a seed.
Then two clients that both call `seed_everything(42)`; what a checkpoint holds; resuming with and without the user's
key; and the price of secret numbers beside PyTorch's and beside a training step. Apart from the control the noise here
is secret, whatever `--seed` says.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from common import Bar, benchmark_parser, finish, paired_times, rows_table, seconds
from gradguard import Guard, LossGradient, Policy, load_gradient, save_gradient
from gradguard.cli import main as command_line
from gradguard.defenses import GaussianNoise, NoiseStream
from gradguard.demo import DigitsModule, quiet_lightning
from gradguard.functional.vectors import Gradient, add, flatten
from gradguard.integrations.lightning import GradGuard
from gradguard.zoo.models import digits_convnet, resnet
from gradguard.zoo.pictures import digits

#: What people give to `seed_everything`, beside small numbers.
FAVOURITES = (42, 1234, 1337, 2023, 2024, 2025, 3407, 12345, 31337, 123456, 20240101, 2**32 - 1)
GUARD = Guard(defense=GaussianNoise(noise_ratio=0.5), attacks=(), policy=Policy(minimum_predicted_error=1e-6))
WAYS = ("Guard.protect", "callback", "gradguard check")


def main() -> None:
    """Run all parts."""
    options = benchmark_parser(__doc__).parse_args()
    seeds = [*range(500 if options.quick else 20_000), *FAVOURITES]
    removed = removal_rows(seeds)
    clients = client_rows()
    checkpoint = checkpoint_row()
    price = price_rows(options)
    bars = [
        Bar(f"{r['way']}: residual ratio after the best guess", r["residual"], 0.99, "at least")
        for r in removed
        if r["noise"] == "default"
    ]
    bars += [
        Bar(f"{r['way']}: the same attacker on seeded noise", r["residual"], 1e-3, "at most")
        for r in removed
        if r["noise"] == "seeded"
    ]
    bars += [Bar(f"two clients, {r['way']}: |cosine| on 1e6 elements", r["cosine"], 0.01, "at most") for r in clients]
    bars += [
        Bar("keys found in checkpoints", checkpoint["keys"], 0, "at most"),
        Bar("resumed with the key: largest difference of the noise", checkpoint["with the key"], 0, "at most"),
        Bar("resumed without the key: |cosine| with the noise that was", checkpoint["without"], 0.05, "at most"),
        Bar("resumed without the key: warnings that a new stream begins", checkpoint["warnings"], 1, "at least"),
    ]
    tables = [
        rows_table("Removal", removed),
        rows_table("Two clients", clients),
        rows_table("Checkpoint", [checkpoint]),
        rows_table("Price", price),
    ]
    figures = {"removal": removed, "clients": clients, "checkpoint": [checkpoint], "price": price}
    finish(options, figures=figures, bars=bars, tables=tables)


# ---------------------------------------------------------------------- the ways out


def case() -> tuple[nn.Module, Tensor, Tensor, Gradient]:
    """The model, the batch and its gradient, which the attacker is given."""
    torch.manual_seed(3)
    model, pictures = digits_convnet(), digits()
    inputs, targets = pictures.images[:8], pictures.labels[:8]
    return model, inputs, targets, LossGradient(model, nn.CrossEntropyLoss())(inputs, targets)


def noise_of(way: str, seed: int | None = None) -> Tensor:
    """The noise `(P,)` of one message of the way out; `seed`: of the noise, where it is to have one."""
    model, inputs, targets, true = case()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if way == "Guard.protect":
        sent, _ = GUARD.protect(model, nn.CrossEntropyLoss(), inputs, targets, verify=False, noise=generator)
    elif way == "callback":
        return trained(Kept(GUARD, seed=seed), Digits(model), inputs, targets)[0]
    else:
        sent = from_command_line(true, seed)
    assert sent is not None
    return flatten(add(true, sent, -1.0))


def from_command_line(true: Gradient, seed: int | None) -> Gradient:
    """What `gradguard check --write` lets out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "client.py").write_text(
            "import torch\nfrom gradguard.zoo.models import digits_convnet\n"
            "def make():\n    torch.manual_seed(3)\n    return digits_convnet()\n",
            encoding="utf-8",
        )
        save_gradient(folder / "gradient.safetensors", true)
        words = ["check", str(folder / "gradient.safetensors"), "--model", f"{folder / 'client.py'}:make"]
        words += [
            "--batch-size",
            "8",
            "--defense",
            "gaussian",
            "--min-error",
            "1e-6",
            "--no-verify",
            "--write",
            str(folder / "sent"),
        ]
        words += [] if seed is None else ["--noise-seed", str(seed)]
        result = CliRunner().invoke(command_line, words)
        if result.exit_code != 0:
            raise RuntimeError(result.output)
        return load_gradient(folder / "sent")


class Digits(DigitsModule):
    """A module around a given model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Kept(GradGuard):
    """The callback, with the noise of every step kept."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.noises: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The callback's, between two looks."""
        before = torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone()
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.noises.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]) - before)


def trained(
    callback: Kept, module: LightningModule, inputs: Tensor, targets: Tensor, *others: Any, steps: int = 1, **fit: Any
) -> list[Tensor]:
    """The noises of a training whose epochs are one batch."""
    with quiet_lightning():
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=bool(others),
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback, *others],
        )
        trainer.fit(module, DataLoader(TensorDataset(inputs, targets), len(inputs)), **fit)
    return callback.noises


# ---------------------------------------------------------------------- the attacker


def removal_rows(seeds: list[int]) -> list[dict[str, Any]]:
    """The residual ratio for each way out: with every default, and, as a control, with a seed from the list."""
    true = case()[-1]
    secret = {way: noise_of(way) for way in WAYS}
    seeded = {way: noise_of(way, 7) for way in WAYS}
    noises = torch.stack([*secret.values(), *seeded.values()])
    noises = noises / noises.norm(dim=1, keepdim=True)
    best, count = torch.zeros(len(noises), dtype=torch.float64), 0
    for guess in guesses(true, seeds):
        best = torch.maximum(best, (noises @ (guess / guess.norm())).abs().double())
        count += 1
    residual = (1 - best.square()).clamp_min(0).sqrt().tolist()
    kinds = [(way, kind) for kind in ("default", "seeded") for way in WAYS]
    return [
        {"way": way, "noise": kind, "guesses": count, "residual": r}
        for (way, kind), r in zip(kinds, residual, strict=True)
    ]


def guesses(true: Gradient, seeds: list[int]) -> Iterator[Tensor]:
    """The noises `(P,)` that the attacker tries, up to scale."""
    defense = GaussianNoise(noise_ratio=0.5)
    for seed in seeds:
        for names in (list(true), sorted(true)):  # as the model has them, as a file does
            generator = torch.Generator().manual_seed(seed)
            delta = defense.checked_perturbation({n: true[n] for n in names}, generator=generator)
            yield flatten({n: delta[n] for n in true})
        torch.manual_seed(seed)
        yield flatten({n: torch.randn(g.shape) for n, g in true.items()})
        yield torch.randn(sum(g.numel() for g in true.values()))
    for key in [
        bytes(32),
        bytes([255]) * 32,
        *(s.to_bytes(32, order) for s in seeds[:200] for order in ("little", "big")),
    ]:
        for secure in (False, True):
            stream = NoiseStream(key, secure=secure)
            yield flatten(defense.checked_perturbation(true, generator=stream.message()))
    for seed in (0, 1, 42):
        for way in WAYS:
            seed_everything(seed, verbose=False)
            yield noise_of(way)


def client_rows() -> list[dict[str, Any]]:
    """The noises of two clients that run the same script, on 1e6 elements and more."""
    rows = []
    for way, send in (("Guard.perturb", perturbed), ("callback", trained_wide), ("a copied callback", None)):
        if send is None:
            original = Kept(GUARD)
            first, second = (client(partial(trained_wide, pickled(original))) for _ in range(2))
        else:
            first, second = (client(send) for _ in range(2))
        cosine = torch.nn.functional.cosine_similarity(first, second, dim=0).abs().item()
        rows.append({"way": way, "elements": first.numel(), "cosine": cosine})
    return rows


def client(send: Callable[[], Tensor]) -> Tensor:
    """A client's noise after the one line that all of them share."""
    seed_everything(42, verbose=False)
    return send()


def pickled(callback: Kept) -> Kept:
    """The callback as it reaches a worker process."""
    file = io.BytesIO()
    torch.save(callback, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def perturbed() -> Tensor:
    """The noise on a gradient of a million elements."""
    gradient = {"weight": torch.randn(1000, 1000)}
    return flatten(add(GUARD.perturb(None, gradient), gradient, -1.0))


def trained_wide(callback: Kept | None = None) -> Tensor:
    """The noise of a training step of a million parameters."""
    module = Digits(nn.Sequential(nn.Flatten(), nn.Linear(1000, 1000)))
    inputs, targets = torch.rand(4, 1000), torch.arange(4)
    return trained(Kept(GUARD) if callback is None else callback, module, inputs, targets)[0]


# ---------------------------------------------------------------------- checkpoints


def checkpoint_row() -> dict[str, Any]:
    """Whether a checkpoint holds a key, and how the noise goes on with the user's key and without."""
    key = bytes(range(32))
    keys, differences, cosines, said = 0, [], [], 0
    for given in (key, None):
        with tempfile.TemporaryDirectory() as name:
            model, inputs, targets, _ = case()
            save = ModelCheckpoint(name, every_n_train_steps=2, save_top_k=-1)
            whole = Kept(GUARD, key=given)
            noises = trained(whole, Digits(model), inputs, targets, save, steps=4)
            path = next(Path(name).glob("*step=2.ckpt"))
            content = str(torch.load(path, weights_only=False)).encode() + path.read_bytes()
            for secret in (whole._stream._key, given):
                keys += secret is not None and (secret in content or secret.hex().encode() in content)
            resumed = Kept(GUARD, key=given)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                again = trained(resumed, Digits(case()[0]), inputs, targets, steps=4, ckpt_path=str(path))
            pairs = list(zip(again, noises[2:], strict=True))
            if given is not None:
                differences += [(a - b).abs().max().item() for a, b in pairs]
            else:
                cosines += [torch.nn.functional.cosine_similarity(a, b, dim=0).abs().item() for a, b in pairs]
                said += sum("a new stream of noise begins" in str(w.message) for w in caught)
    return {"keys": keys, "with the key": max(differences), "without": max(cosines), "warnings": said}


# ---------------------------------------------------------------------- the price


def price_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Nanoseconds per number, beside `torch.randn` in float32; and what it is of a ResNet-18's training step."""
    count = 2**20
    generator, rows = torch.Generator().manual_seed(0), []
    model = resnet(18) if not options.quick else resnet(10)
    inputs, targets = torch.rand(32, 3, 32, 32), torch.arange(32) % 10
    elements = sum(p.numel() for p in model.parameters())

    def step() -> None:
        nn.functional.cross_entropy(model(inputs), targets).backward()

    step()
    of_step = seconds(step)[1]
    for secure in (False, True):
        stream = NoiseStream(secure=secure)
        times = paired_times(
            lambda stream=stream: stream.message().normal("w", (count,)),
            lambda: torch.randn(count, generator=generator),
            repeats=3,
        )
        nanoseconds = times.ours / count * 1e9
        rows.append(
            {
                "noise": "half the sum of four" if secure else "default",
                "ns per number": nanoseconds,
                "times torch.randn": 1 / times.ratio,
                "model": "ResNet-10" if options.quick else "ResNet-18",
                "share of its step on 32 pictures": nanoseconds * 1e-9 * elements / of_step,
            }
        )
    return rows


if __name__ == "__main__":
    main()
