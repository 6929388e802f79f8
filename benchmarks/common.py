"""What every benchmark script shares: its arguments, bars, environment and timings, and how a run ends.

A script is a docstring (its first paragraph stands in benchmarks/README.md), a `main`, and this frame:

    from common import Bar, benchmark_parser, finish, rows_table

    def main() -> None:
        options = benchmark_parser(__doc__).parse_args()
        rows = [{"batch": 4, "psnr": 21.3}]
        bars = [Bar("PSNR at batch 4 (dB)", 21.3, 20.0, "at least")]
        finish(options, figures={"rows": rows}, bars=bars, tables=[rows_table("PSNR", rows)])

    if __name__ == "__main__":
        main()
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gradguard import SeededNoiseWarning
from gradguard.zoo.pictures import Pictures, load_npz

# A benchmark's noise comes from `--seed`, so that its numbers can be had again, and `environment` says so.
warnings.simplefilter("ignore", SeededNoiseWarning)

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
#: Where the optional real images lie if neither `--data` nor GRADGUARD_DATA says otherwise.
DEFAULT_DATA = FOLDER.parents[1] / "shared" / "data"

T = TypeVar("T")
Sense = Literal["at least", "at most", "within"]


# ---------------------------------------------------------------------- bars


@dataclass(frozen=True)
class Bar:
    """A promise, or a paper's number, and what was measured.

    `name`: what is measured, with its unit. `value`: what came out; `None` or NaN if nothing did. An infinite value
        keeps no promise, since JSON cannot carry it: cap what can be perfect (a PSNR) before.
    `target`: a number or, for the sense "within", `(lowest, highest)`, both inclusive.
    `sense`: whether `value` must be "at least" or "at most" the target, or "within" its two ends.
    """

    name: str
    value: float | None
    target: float | tuple[float, float]
    sense: Sense

    def __post_init__(self) -> None:
        if self.sense not in ("at least", "at most", "within"):
            raise ValueError(f'`sense` must be "at least", "at most" or "within", got {self.sense!r}.')
        if (self.sense == "within") != isinstance(self.target, Sequence):
            raise ValueError(
                f'Bar {self.name!r}: the sense "within" takes `target=(lowest, highest)`, the others one number; '
                f"got {self.target!r} for {self.sense!r}."
            )

    @property
    def holds(self) -> bool:
        """Whether `value` keeps the promise; what was not measured, or is not finite, does not."""
        if self.value is None or not math.isfinite(self.value):
            return False
        if isinstance(self.target, Sequence):
            lowest, highest = self.target
            return bool(lowest <= self.value <= highest)
        return bool(self.value >= self.target if self.sense == "at least" else self.value <= self.target)

    def to_dict(self) -> dict[str, Any]:
        """`name`, `value`, `target`, `sense`, `holds`, as plain JSON types."""
        return plain({**{n: getattr(self, n) for n in ("name", "value", "target", "sense")}, "holds": self.holds})


# ---------------------------------------------------------------------- arguments


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of every script; a script adds its own to the parser it gets.

    `description`: the script's docstring. Parsed, `device` is a `torch.device` and `data` a folder that exists, or
    `None` where there are no real images: use what is bundled or skip the rows, and say so (`real_pictures` does).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")
    parser.add_argument("--quick", action="store_true", help="a smaller run: at most 10 minutes on 2 cores")
    parser.add_argument("--device", type=_device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--data",
        type=_folder,
        default=_default_data(),
        help="folder of real images as .npz (default: $GRADGUARD_DATA, or ../shared/data beside the checkout)",
    )
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    return parser


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name!r} is no device: cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no CUDA device here; leave --device out to run on the CPU")
    return device


def _folder(name: str) -> Path:
    if not Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {name!r}; leave --data out to run on bundled data")
    return Path(name)


def _default_data() -> Path | None:
    folder = Path(os.environ.get("GRADGUARD_DATA") or DEFAULT_DATA)
    return folder if folder.is_dir() else None


def real_pictures(options: argparse.Namespace, name: str) -> Pictures | None:
    """The real images `<data>/<name>.npz`; `None`, and a line on standard error, where they are not at hand."""
    path = options.data / f"{name}.npz" if options.data is not None else None
    if path is None or not path.is_file():
        print(f"No {name}.npz: the rows that need it are skipped (see --data).", file=sys.stderr)
        return None
    return load_npz(path)


def generator(options: argparse.Namespace, offset: int = 0) -> torch.Generator:
    """A CPU generator seeded with `--seed` plus `offset`: the numbers are the same on every device."""
    return torch.Generator().manual_seed(options.seed + offset)


# ---------------------------------------------------------------------- timing


@dataclass(frozen=True)
class PairedTimes:
    """Two ways to do one thing, timed turn by turn in one process.

    `ours`, `reference`: median seconds. `ratio`: median over pairs of `reference / ours`, how many times faster ours
    is; `ratios`: every pair's. Quote the ratio: seconds belong to the machine and to its neighbours.
    """

    ours: float
    reference: float
    ratio: float
    ratios: tuple[float, ...]


def seconds(function: Callable[[], T], *, device: torch.device | None = None) -> tuple[T, float]:
    """What `function` returns and the wall-clock seconds it took, the device's queued work included."""
    _synchronise(device)
    start = time.perf_counter()
    result = function()
    _synchronise(device)
    return result, time.perf_counter() - start


def paired_times(
    ours: Callable[[], Any],
    reference: Callable[[], Any],
    *,
    repeats: int = 5,
    warm_up: int = 1,
    device: torch.device | None = None,
) -> PairedTimes:
    """Time `ours` and `reference` in `repeats` pairs after `warm_up` untimed ones.

    The two take turns at going first, so that neither always meets the warmer machine.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
    functions = (ours, reference)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(-warm_up, repeats):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            elapsed = seconds(functions[which], device=device)[1]
            if turn >= 0:
                times[which].append(elapsed)
    ratios = tuple(r / max(o, 1e-9) for o, r in zip(*times, strict=True))
    return PairedTimes(statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios), ratios)


def peak_memory(function: Callable[[], Any], *, device: torch.device | None = None) -> float:
    """MiB at the peak of `function` above what was in use before: the device's, or this process's on a CPU (Linux).

    What an earlier call has left in the allocator's pools hides part of the peak: measure in a process of its own.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    resident = _resident("VmRSS")
    function()
    return _resident("VmHWM") - resident


def _resident(which: str) -> float:
    """MiB in use now (`VmRSS`) or at the peak (`VmHWM`; `ru_maxrss` would begin with the parent process's)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return float(status.split(f"{which}:")[1].split()[0]) / 1024


def _synchronise(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------- the environment


def environment(options: argparse.Namespace, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """What the numbers depend on beside the code: versions, machine, command.

    `arguments`: the command line, script first (default: this process's).
    """
    device = options.device
    return {
        "command": command(sys.argv if arguments is None else arguments),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "gradguard": _gradguard_version(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device_kind": device.type,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seed": options.seed,
        "noise": "from the seed, unless the script says otherwise",
        "quick": options.quick,
        "real_images": options.data is not None,
    }


def command(arguments: Sequence[str]) -> str:
    """The command that gives the numbers again, without what only says where input and output lie."""
    words, rest = [f"python benchmarks/{Path(arguments[0]).name}"], iter(arguments[1:])
    for word in rest:
        if word == "--data":
            next(rest, None)
        elif word not in ("--json", "--save") and not word.startswith("--data="):
            words.append(word)
    return " ".join(words)


def _gradguard_version() -> str:
    try:
        return importlib.metadata.version("gradguard")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """The checkout's commit, with "+" where tracked files have changed since; `None` outside a checkout."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=FOLDER,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---------------------------------------------------------------------- how a run ends


def finish(
    options: argparse.Namespace,
    *,
    figures: Mapping[str, Any],
    bars: Iterable[Bar] = (),
    tables: Iterable[Table] = (),
    script: str | None = None,
) -> dict[str, Any]:
    """Print the tables and the bars; keep the result under `--save`; under `--json` end with it as one line.

    `figures`: what was measured, by name. Numbers, and lists of rows (dictionaries of numbers and strings), are shown
    in benchmarks/README.md; anything else stays in the JSON. Tensors and arrays become lists, non-finite numbers null.
    `script`: the name that the result is kept under (default: the running script's).
    Returns the object `{"figures", "bars", "environment"}`.
    """
    script = script or Path(sys.argv[0]).stem
    bars = list(bars)
    result = {
        "figures": plain(figures),
        "bars": [bar.to_dict() for bar in bars],
        "environment": plain(environment(options)),
    }
    console = Console()
    for table in tables:
        console.print(table)
    if bars:
        console.print(bars_table(bars))
    if options.save:
        path = RESULTS / result_name(script, quick=options.quick, device=options.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        console.print(f"Kept in {path.relative_to(FOLDER.parent) if path.is_relative_to(FOLDER.parent) else path}")
    if options.json:
        print(json.dumps(result, allow_nan=False), flush=True)
    return result


def result_name(script: str, *, quick: bool, device: torch.device) -> str:
    """`<script>[-quick]-<device kind>.json`."""
    return f"{script}{'-quick' if quick else ''}-{device.type}.json"


def rows_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of figures as a table, columns in the order in which the rows first name them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = any(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(number(row.get(column)) for column in columns))
    return table


def bars_table(bars: Sequence[Bar]) -> Table:
    """The bars as a table."""
    table = Table(title="Bars", title_justify="left")
    for heading, justify in (("bar", "left"), ("value", "right"), ("target", "left"), ("holds", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for bar in (b.to_dict() for b in bars):
        style = "green" if bar["holds"] else "red"
        table.add_row(bar["name"], number(bar["value"]), target_text(bar), number(bar["holds"]), style=style)
    return table


def target_text(bar: Mapping[str, Any]) -> str:
    """The target of a bar (as `Bar.to_dict` gives it) in words."""
    if isinstance(bar["target"], list):
        return "within " + " to ".join(number(end) for end in bar["target"])
    return f"{bar['sense']} {number(bar['target'])}"


def number(value: Any) -> str:
    """A figure for people: four significant digits, a dash for what was not measured."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(value: Any) -> Any:
    """`value` as JSON types: tensors and arrays as lists, non-finite numbers as `None`."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return plain(value.tolist())
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)
