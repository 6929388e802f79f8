"""The command line: `gradguard demo | audit | check | rank`. Parsing and printing only, one file per command.

Exit codes: 0 fine, 1 the check says no, 2 bad usage or input.
"""

from __future__ import annotations

import click

from gradguard.cli.audit import audit
from gradguard.cli.check import check
from gradguard.cli.demo import demo
from gradguard.cli.rank import rank

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gradguard")
def main() -> None:
    """What shared gradients give away, less of it, and the proof."""


for command in (demo, audit, check, rank):
    main.add_command(command)
