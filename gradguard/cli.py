"""The command line: `gradguard demo | audit | check | rank`. Parsing and printing only.

Exit codes: 0 fine, 1 the check says no, 2 bad usage or input.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gradguard.attacks import DLG, IDLG, ILRG, RGAP, Attack, InvertingGradients
from gradguard.defenses import Defense, GaussianNoise, PriorNoise, Pruning, SmallEigenspaceNoise
from gradguard.defenses.stream import SEEDED, fresh_noise
from gradguard.errors import ForeignMessageError, InputError, SeededNoiseWarning
from gradguard.evaluation.differences import compare
from gradguard.functional.as_gradient import as_gradient
from gradguard.functional.local_training import LocalTraining
from gradguard.guard import Guard
from gradguard.policy import Policy
from gradguard.storage.files import load_gradient, load_weights, save_gradient, write_text
from gradguard.survey import YARDSTICK, survey
from gradguard.threats.model import ThreatModel
from gradguard.zoo.models import NAMED
from gradguard.zoo.picture_folder import PictureFolder
from gradguard.zoo.pictures import Pictures, digits, load_npz, photos

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "binary-cross-entropy": nn.BCEWithLogitsLoss,
    "mse": nn.MSELoss,
}
#: Class indices `(N,)` as each loss takes them.
AS_TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross-entropy": lambda labels: labels,
    "binary-cross-entropy": lambda labels: labels[:, None].to(torch.float32),
    "mse": lambda labels: labels[:, None].to(torch.float32),
}
ATTACKS: dict[str, Callable[[], Attack]] = {
    "rgap": RGAP,
    "dlg": DLG,
    "idlg": IDLG,
    "ig": InvertingGradients,
    "ilrg": ILRG,
}
DEFENSES: dict[str, Callable[[float], Defense]] = {
    "gaussian": lambda strength: GaussianNoise(noise_ratio=strength),
    "prior": lambda strength: PriorNoise(noise_ratio=strength),
    "small-eigenspace": lambda strength: SmallEigenspaceNoise(noise_ratio=strength),
    "pruning": lambda strength: Pruning(fraction=strength),
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gradguard")
def main() -> None:
    """What shared gradients give away, less of it, and the proof."""


def reports_errors(command: Callable) -> Callable:
    """An `InputError` becomes one line on standard error (or in the JSON) and exit code 2."""

    @wraps(command)
    def wrapped(*args: Any, as_json: bool, **kwargs: Any) -> None:
        try:
            command(*args, as_json=as_json, **kwargs)
        except InputError as error:
            if as_json:
                click.echo(json.dumps({"error": str(error)}))
            click.echo(f"gradguard: {error}", err=True)
            sys.exit(2)

    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(wrapped)


def options(*decorators: Callable) -> Callable:
    """Several click options as one decorator."""

    def decorate(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


subject_options = options(
    click.option(
        "--model",
        required=True,
        help=f"A name ({', '.join(NAMED)}) or FILE.py:FACTORY or MODULE:FACTORY, a function that returns an nn.Module.",
    ),
    click.option(
        "--weights",
        type=click.Path(path_type=Path),
        help="Its parameters as safetensors (default: as the factory draws them).",
    ),
    click.option(
        "--data",
        default="digits",
        show_default=True,
        help='"digits", "photos", an .npz with images and labels, or a folder of pictures with a sub-folder per class.',
    ),
    click.option(
        "--input-shape",
        help="Channels,height,width that the pictures of a folder are scaled to (default: the named model's own).",
    ),
    click.option("--loss", type=click.Choice(list(LOSSES)), default="cross-entropy", show_default=True),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=8,
        show_default=True,
        help="The first examples of the data (check: all of them, unless this is given).",
    ),
    click.option("--defense", type=click.Choice(list(DEFENSES)), help="Perturb the gradient by this."),
    click.option(
        "--strength",
        type=float,
        default=0.5,
        show_default=True,
        help="Noise norm relative to the gradient's; for pruning, the fraction.",
    ),
    click.option(
        "--attack",
        "attack_names",
        type=click.Choice(list(ATTACKS)),
        multiple=True,
        help="Attack with this; may be repeated (default: rgap, dlg, ilrg).",
    ),
    click.option(
        "--attacked", type=click.IntRange(1), default=4, show_default=True, help="How many examples to attack."
    ),
    click.option(
        "--min-error",
        type=float,
        default=0.1,
        show_default=True,
        help="Policy: least predicted error, as a fraction of the value range.",
    ),
    click.option(
        "--max-psnr",
        type=float,
        default=20.0,
        show_default=True,
        help="Policy: highest PSNR (dB) that an attack may reach.",
    ),
    click.option(
        "--max-ssim",
        type=float,
        default=0.9,
        show_default=True,
        help="Policy: highest SSIM that an attack may reach on a picture; 1 allows all.",
    ),
    click.option(
        "--accept-unproven",
        is_flag=True,
        help="Policy: accept a gradient that meets it though no attack works without a defense either.",
    ),
    click.option(
        "--value-range",
        default="0,1",
        show_default=True,
        help='Lowest and highest valid input, "0,255" for instance; "none" for inputs without a range.',
    ),
    click.option("--max-labels", type=float, help="Policy: highest share of labels that may be recovered."),
    click.option("--device", default="cpu", show_default=True),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Of the model's weights and the attacks' starts."
    ),
    click.option(
        "--noise-seed",
        type=int,
        help="Reproducible noise, for tests: whoever knows the seed subtracts the noise (default: secret noise).",
    ),
)


class Subject:
    """The model, the data and the guard that a command line describes."""

    def __init__(
        self,
        *,
        model: str,
        weights: Path | None,
        data: str,
        input_shape: str | None,
        loss: str,
        batch_size: int,
        defense: str | None,
        strength: float,
        attack_names: tuple[str, ...],
        attacked: int,
        min_error: float,
        max_psnr: float,
        max_ssim: float,
        accept_unproven: bool,
        value_range: str,
        max_labels: float | None,
        device: str,
        seed: int,
        noise_seed: int | None,
        whole: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        place = checked_device(device)
        self.model, default_shape = load_model(model)
        if weights is not None:
            load_weights(weights, self.model)
        self.model.to(place).eval()
        self.data = load_data(data, parse_shape(input_shape) if input_shape else default_shape)
        self.count = len(self.data.images) if isinstance(self.data, Pictures) else len(self.data)
        batch_size = self.count if whole else batch_size
        pictures = self.data if isinstance(self.data, Pictures) else first_pictures(self.data, batch_size)
        self.inputs = pictures.images[:batch_size].to(place)
        self.as_targets = AS_TARGETS[loss]
        self.targets = self.as_targets(pictures.labels[:batch_size]).to(place)
        self.loss_fn = LOSSES[loss]()
        self.class_names = pictures.class_names
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        if noise_seed is not None:
            click.echo(f"gradguard: {SEEDED}", err=True)
        self.noise = fresh_noise(place) if noise_seed is None else torch.Generator().manual_seed(noise_seed)
        self.guard = Guard(
            defense=DEFENSES[defense](strength) if defense else None,
            attacks=[ATTACKS[n]() for n in attack_names] or None,
            policy=Policy(
                minimum_predicted_error=min_error,
                maximum_attacked_psnr=max_psnr,
                maximum_attacked_ssim=max_ssim,
                maximum_label_recovery=max_labels,
                accept_unproven=accept_unproven,
            ),
            threat=ThreatModel(max_attacked=attacked, value_range=parse_range(value_range)),
        )

    def examples(self) -> tuple[Tensor, Tensor] | Dataset:
        """All of the data, labels in the form that the loss takes; a folder's pictures as they are needed."""
        if isinstance(self.data, Pictures):
            return self.data.images, self.as_targets(self.data.labels)
        return Relabelled(self.data, self.as_targets)


class Relabelled(Dataset):
    """A folder of pictures whose labels are in the form that a loss takes."""

    def __init__(self, folder: PictureFolder, as_targets: Callable[[Tensor], Tensor]) -> None:
        self.folder, self.as_targets = folder, as_targets

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture, label = self.folder[index]
        return picture, self.as_targets(torch.tensor([label]))[0]


@main.command()
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


@main.command()
@subject_options
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Measure every example of the data by itself, without attacks: who is exposed, class by class.",
)
@click.option("--examples", type=click.IntRange(1), help="The same for the first so many examples.")
@click.option(
    "--exact", is_flag=True, help="With --all or --examples: the predicted error itself, not only its lower bound."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Write the HTML page and its pictures to this folder (private: they show reconstructions). With --all or "
    "--examples: page, figure, numbers, and what is measured so far, from which the same command goes on.",
)
@reports_errors
def audit(
    everything: bool, examples: int | None, exact: bool, output: Path | None, as_json: bool, **subject: Any
) -> None:
    """What the gradient of a batch gives away: measures, attacks, verdict. With --all: of every example of the data."""
    case = Subject(**subject)
    if everything or examples is not None:
        if everything and examples is not None:
            raise InputError(f"Give `--all` or `--examples {examples}`, not both.")
        source = click.get_current_context().get_parameter_source("batch_size")
        chunk = None if source == click.core.ParameterSource.DEFAULT else subject["batch_size"]
        survey_of(case, output, as_json, examples=examples, exact=exact, batch_size=chunk)
        return
    if exact:
        raise InputError("`--exact` goes with --all or --examples; the audit of a batch is exact.")
    report = case.guard.audit(
        case.model,
        case.loss_fn,
        case.inputs,
        case.targets,
        class_names=case.class_names,
        generator=case.generator,
        noise=case.noise,
    )
    if output is not None:
        report.save_html(output / "index.html")
        write_text(output / "report.json", report.to_json())
    if as_json:
        click.echo(report.to_json())
    else:
        report.print()
        if output is not None:
            click.echo(f"\nThe report with pictures: {output / 'index.html'}")


def survey_of(case: Subject, output: Path | None, as_json: bool, **options: Any) -> None:
    """`gradguard audit --all`: measure, write, print."""
    checkpoint = output / "survey.safetensors" if output is not None else None
    try:
        found = survey(
            case.model,
            case.loss_fn,
            case.examples(),
            defense=case.guard.defense or YARDSTICK,
            checkpoint=checkpoint,
            seed=case.seed,
            class_names=case.class_names,
            value_range=case.guard.threat.value_range,
            **options,
        )
    except KeyboardInterrupt:
        kept = f"; the same command goes on from what {checkpoint} holds" if checkpoint and checkpoint.exists() else ""
        click.echo(f"gradguard: stopped{kept}.", err=True)
        sys.exit(130)
    if output is not None:
        found.save_html(output / "index.html")
        write_text(output / "survey.json", found.to_json())
    if as_json:
        click.echo(found.to_json())
    else:
        found.print()
        if output is not None:
            click.echo(f"\nThe page, the figure and the numbers: {output}")


@main.command()
@click.argument("gradient_file", type=click.Path(path_type=Path))
@subject_options
@click.option("--update", is_flag=True, help="The file holds an update (weights after - before, or before - after).")
@click.option("--learning-rate", type=float, help="With --update: of the local steps.")
@click.option("--steps", type=click.IntRange(1), help="With --update: how many local steps of SGD (default: 1).")
@click.option(
    "--local-batch-size", type=click.IntRange(1), help="With --update: examples per step, in order (default: all)."
)
@click.option("--momentum", type=float, default=0.0, show_default=True, help="With --update: of the local SGD.")
@click.option(
    "--weight-decay", type=float, default=0.0, show_default=True, help="Of the local SGD, or in the gradient."
)
@click.option("--declared", type=click.Choice(list(DEFENSES)), help="The file went through this defense already.")
@click.option("--declared-strength", type=float, default=0.5, show_default=True, help="Of that defense.")
@click.option("--partial", is_flag=True, help="Parameters that the file lacks are not sent (default: an error).")
@click.option(
    "--max-unexplained",
    type=float,
    default=0.05,
    show_default=True,
    help="Refuse a file that differs by more of its norm from the gradient of these data at these weights.",
)
@click.option("--no-verify", is_flag=True, help="Judge by the closed-form measures alone, without attacking.")
@click.option("--write", type=click.Path(path_type=Path), help="Write what may be sent to this safetensors file.")
@reports_errors
def check(
    gradient_file: Path,
    update: bool,
    learning_rate: float | None,
    steps: int | None,
    local_batch_size: int | None,
    momentum: float,
    weight_decay: float,
    declared: str | None,
    declared_strength: float,
    partial: bool,
    max_unexplained: float,
    no_verify: bool,
    write: Path | None,
    as_json: bool,
    **subject: Any,
) -> None:
    """May this gradient (safetensors) be sent? Exit code 0: yes, or the perturbed one was written; 1: no.

    2: it is not the gradient, or the declared update, of these data at these weights.
    """
    gradient = load_gradient(gradient_file)
    training = local_training(
        update,
        learning_rate=learning_rate,
        steps=steps,
        batch_size=local_batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    source = click.get_current_context().get_parameter_source("batch_size")
    case = Subject(**subject, whole=source == click.core.ParameterSource.DEFAULT)
    with warnings.catch_warnings(), told_where_to_look(case, gradient, subject):
        warnings.simplefilter("ignore", SeededNoiseWarning)  # said above, once, on standard error
        sent, verdict = case.guard.protect(
            case.model,
            case.loss_fn,
            case.inputs,
            case.targets,
            gradient,
            training=training,
            declared=DEFENSES[declared](declared_strength) if declared else None,
            missing="unsent" if partial else "error",
            foreign=max_unexplained,
            verify=not no_verify,
            generator=case.generator,
            noise=case.noise,
        )
    if write is not None and sent is not None:
        save_gradient(write, sent)
    fine = verdict.decision == "send" or (verdict.decision == "perturb" and write is not None)
    if as_json:
        decision = {
            "decision": verdict.decision,
            "reasons": verdict.reasons,
            "measures": verdict.measures,
            "noise_ratio": verdict.noise_ratio,
            "looks_like": verdict.looks_like,
            "explanation": verdict.explanation,
            "examples": len(case.inputs),
        }
        click.echo(json.dumps(decision | {"written": str(write) if write and sent is not None else None}))
    else:
        click.echo(f"{verdict.decision}: " + "; ".join(verdict.reasons))
        click.echo(f"Noise ratio {verdict.noise_ratio:.3g} (noise over gradient), {len(case.inputs)} examples.")
        if verdict.decision == "perturb" and write is None:
            click.echo("Do not send the gradient as it is; --write FILE saves the perturbed one.")
    sys.exit(0 if fine else 1)


def local_training(
    update: bool,
    *,
    learning_rate: float | None,
    steps: int | None,
    batch_size: int | None,
    momentum: float,
    weight_decay: float,
) -> LocalTraining | None:
    """What the options of `check` say of how the client trained; `None`: the file holds a plain gradient."""
    if not update:
        given = {"--learning-rate": learning_rate, "--steps": steps, "--local-batch-size": batch_size}
        wrong = [option for option, value in given.items() if value is not None] + ["--momentum"] * bool(momentum)
        if wrong:
            raise InputError(f"`{wrong[0]}` describes an update: it goes with `--update`.")
        return LocalTraining(steps=1, learning_rate=1.0, weight_decay=weight_decay) if weight_decay else None
    if learning_rate is None and (steps or 1) > 1:
        raise InputError(f"An update of {steps} steps depends on its learning rate: give `--learning-rate`.")
    return LocalTraining(
        steps=steps or 1,
        learning_rate=1.0 if learning_rate is None else learning_rate,
        batch_size=batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
    )


@contextmanager
def told_where_to_look(case: Subject, gradient: dict[str, Tensor], subject: dict[str, Any]) -> Iterator[None]:
    """A message that is not of these data at these weights is refused with what on the command line may be wrong."""
    try:
        yield
    except ForeignMessageError as error:
        raise InputError(f"{error} {where_to_look(case, gradient, subject)}") from error


def where_to_look(case: Subject, gradient: dict[str, Tensor], subject: dict[str, Any]) -> str:
    """What the command line makes likely where a message is not of its batch."""
    if len(case.inputs) < case.count and is_of_all(case, gradient):
        return f"It is the gradient of all {case.count} examples of {subject['data']}: leave `--batch-size` out."
    if subject["weights"] is None:
        weights = "No `--weights` were given: the model is as its factory draws it, which is hardly what it was."
    else:
        weights = f"The weights are those of {subject['weights']}: are they of the round that the message is of?"
    return f"{weights} The data are {len(case.inputs)} of the {case.count} examples of {subject['data']}."


def is_of_all(case: Subject, gradient: dict[str, Tensor]) -> bool:
    """Whether a message is a multiple of the gradient of all the data, where they are in memory."""
    examples = case.examples()
    if not isinstance(examples, tuple):
        return False
    function = case.guard.loss_gradient(case.model, case.loss_fn)
    given = as_gradient(case.model, gradient, missing="unsent")
    return compare(function(*(part.to(case.inputs.device) for part in examples)), given).distance <= 0.02


@main.command()
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


# ---------------------------------------------------------------------- reading arguments


def load_model(name: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    """The model called `name` and its input shape, or what the factory `FILE.py:FACTORY` / `MODULE:FACTORY` returns."""
    if name in NAMED:
        factory, shape = NAMED[name]
        return factory(), shape
    path, _, attribute = name.rpartition(":")
    if not path:
        raise InputError(
            f"`--model` must be one of {', '.join(NAMED)}, or FILE.py:FACTORY or MODULE:FACTORY; got {name!r}."
        )
    try:
        if path.endswith(".py"):
            spec = importlib.util.spec_from_file_location("gradguard_user_model", path)
            if spec is None or spec.loader is None or not Path(path).is_file():
                raise InputError(f"There is no Python file {path!r}.")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(path)
        model = getattr(module, attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"`--model {name}`: {error}.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"`{name}` must return an nn.Module, it returned a {type(model).__name__}.")
    return model, None


def load_data(name: str, shape: tuple[int, ...] | None) -> Pictures | PictureFolder:
    """The bundled set called `name`, a folder of pictures, or an `.npz`."""
    if name == "digits":
        return digits()
    if name == "photos":
        return photos(shape[-1] if shape else 32)
    return PictureFolder(name, shape=shape) if Path(name).is_dir() else load_npz(name)


def first_pictures(folder: PictureFolder, count: int) -> Pictures:
    """The first pictures of a folder. Raises `InputError` if their sizes differ."""
    items = [folder[index] for index in range(min(count, len(folder)))]
    shapes = {tuple(x.shape) for x, _ in items}
    if len(shapes) > 1:
        raise InputError(f"The pictures of {folder.path} differ in size: {sorted(shapes)}. Give `--input-shape`.")
    images, labels = torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
    return Pictures(images, labels, folder.class_names, folder.path.name)


def parse_shape(text: str) -> tuple[int, ...]:
    """`"3,32,32"` as a tuple of positive integers."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(f"`--input-shape` must be positive integers such as 3,32,32, got {text!r}.")
    return shape


def parse_range(text: str) -> tuple[float, float] | None:
    """`"0,255"` as two numbers, the smaller first; `None` for "none"."""
    if text.strip().lower() == "none":
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f'`--value-range` must be LOW,HIGH such as 0,255, or "none"; got {text!r}.') from error
    return low, high


def checked_device(name: str) -> torch.device:
    """The device called `name`, if there is one here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"`--device {name}` cannot be used here: {str(error).splitlines()[0]}") from error
    return device


if __name__ == "__main__":
    main()
