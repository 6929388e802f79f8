"""`gradguard rank`."""

from __future__ import annotations

import json

import click
import torch

from gradguard.cli.common import reports_errors
from gradguard.cli.reading import load_model, parse_shape
from gradguard.errors import InputError
from gradguard.zoo.models import NAMED


@click.command()
@click.option("--model", required=True, help=f"A name ({', '.join(NAMED)}) or FILE.py:FACTORY or MODULE:FACTORY.")
@click.option("--input-shape", help="Channels,height,width (default: the named model's own).")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--advice", "advised", is_flag=True, help="Also find the smallest changes of a layer that leave its input short."
)
@reports_errors
def rank(model: str, input_shape: str | None, seed: int, advised: bool, as_json: bool) -> None:
    """From the architecture alone: which layers let R-GAP recover their input in closed form."""
    from gradguard.leakage import advice, rank_analysis

    torch.manual_seed(seed)
    module, default_shape = load_model(model)
    shape = parse_shape(input_shape) if input_shape else default_shape
    if shape is None:
        raise InputError(f"`--input-shape` is needed for the model {model!r}, for instance --input-shape 3,32,32.")
    analysis = rank_analysis(module, shape)
    changes = advice(module, shape) if advised else ()
    if as_json:
        found = analysis.to_dict()
        if advised:
            found["advice"] = [change.to_dict() for change in changes]
        click.echo(json.dumps(found, indent=2))
        return
    analysis.print()
    if advised:
        click.echo("Advice:" if changes else "Advice: no change of one convolution leaves its input short.")
        for change in changes:
            click.echo(f"  {change}")
