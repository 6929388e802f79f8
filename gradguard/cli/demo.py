"""`gradguard demo`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from gradguard.cli.common import reports_errors
from gradguard.cli.reading import checked_device


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("gradguard-report"),
    show_default=True,
    help="The report's folder.",
)
@click.option("--steps", type=click.IntRange(1), default=100, show_default=True, help="Training steps.")
@click.option(
    "--noise-ratio",
    type=float,
    default=0.5,
    show_default=True,
    help="The defense's noise, relative to the gradient's norm.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@reports_errors
def demo(output: Path, steps: int, noise_ratio: float, device: str, seed: int, as_json: bool) -> None:
    """Train a small ConvNet on bundled digits with the callback, audit its gradient, write the report."""
    from gradguard.demo import Demo, summary

    checked_device(device)
    report = Demo(steps=steps, noise_ratio=noise_ratio, device=device, seed=seed).run(output)
    if as_json:
        click.echo(json.dumps(summary(report), allow_nan=False))
    else:
        report.print()
        click.echo(f"\nThe noise came from the seed {seed}, to show the same numbers each time; real noise is secret.")
        click.echo(f"The report with pictures: {output / 'index.html'}")
