"""A Griffe extension for the API pages: every "`name`: what it is" of a docstring begins a line of its own.

The docstrings are prose that names its arguments in backticks at the start of a line. Markdown would run those lines
into one paragraph.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

FIELD = re.compile(r"(`[\w.]+`(, `[\w.]+`)*:|Returns |Raises )")


class FieldLines(griffe.Extension):
    """Breaks the line before each field."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by Griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = with_breaks(obj.docstring.value)


def with_breaks(text: str) -> str:
    """`text` with Markdown line breaks before its fields; code blocks stay as they are."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if FIELD.match(line):
            if lines and lines[-1]:
                lines[-1] += "  "
            inside = True
        elif not line:
            inside = False
        # A field's indented continuation would read as code after a blank line, and as text here.
        lines.append(line.strip() if inside else line)
    return "\n".join(lines)
