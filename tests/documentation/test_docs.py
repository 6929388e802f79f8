"""Every example in the documentation runs; the API page, the navigation and the drawn house name all that is there.

A page's ```python fences run in order, as one script, in an empty folder. A fence right below a comment
`<!-- not run: reason -->` is left out.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in WRITTEN if page.is_file()]
NOT_RUN = re.compile(r"<!-- not run: \S.*-->")


def script_of(page: str) -> str:
    """The page's Python fences as one script in which every line keeps its number, so that tracebacks point home."""
    lines, script, fence, last_text = page.splitlines(), [], None, ""
    for line in lines:
        kept = ""
        if fence is None and line.lstrip().startswith("```"):
            runs = re.match(r"```python\b", line) and not NOT_RUN.fullmatch(last_text.strip())
            fence = "run" if runs else "skip"
        elif fence is not None and line.strip() == "```":
            fence = None
        elif fence == "run":
            kept = line
        script.append(kept)
        last_text = line if line.strip() else last_text
    assert fence is None, "a fence is never closed"
    return "\n".join(script).rstrip() + "\n"


def test_script_of_keeps_line_numbers_and_leaves_out_what_is_marked():
    page = (
        "# A\n```python\na = 1\n```\n\n<!-- not run: needs a GPU -->\n\n```python\nb = 2\n```\n"
        "```\nc\n```\n```python\nd = a\n```\n"
    )
    assert script_of(page).splitlines() == ["", "", "a = 1", *[""] * 11, "d = a"]


def test_a_reason_is_owed_for_what_is_not_run():
    assert "a = 1" in script_of("<!-- not run: -->\n```python\na = 1\n```\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_run(page, tmp_path, run_script):
    script = script_of(page.read_text(encoding="utf-8"))
    if not script.strip():
        return
    path = tmp_path / f"{page.stem}.py"  # its line numbers are the page's
    path.write_text(script, encoding="utf-8")
    run_script(path)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {p.name for p in (ROOT / "docs").glob("*.md")}
    assert not {p for p in pages if f": {p}\n" not in navigation}


def public_modules() -> list[str]:
    """Modules and packages whose path has no underscore, the root and what only runs left out."""
    paths = [p.relative_to(ROOT).with_suffix("") for p in (ROOT / "gradguard").rglob("*.py")]
    parts = [p.parts[:-1] if p.name == "__init__" else p.parts for p in paths]
    names = {".".join(p) for p in parts if len(p) > 1 and not any(name.startswith("_") for name in p)}
    return sorted(names - {"gradguard.cli", "gradguard.demo"} - {n for n in names if n.startswith("gradguard.cli.")})


def test_every_public_module_is_on_the_api_page():
    """By its own name, or by its package's, which then gathers its names in `__all__`."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: (\S+)", page, flags=re.MULTILINE))

    def covered(module: str) -> bool:
        package = module.rpartition(".")[0]
        return module in named or package in named or any(n.startswith(f"{module}.") for n in named)

    assert not [m for m in public_modules() if not covered(m)]


def contract_layers() -> list[list[str]]:
    """The floors of the house, from the roof down, as `[tool.importlinter]` in pyproject.toml has them."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (layers,) = re.findall(r"^layers = \[\n(.*?)^\]", project, flags=re.MULTILINE | re.DOTALL)
    return [floor.split(" | ") for floor in re.findall(r'"(.+?)"', layers)]


def test_the_house_in_contributing_is_the_linters():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    house = page[page.index("## The house") :]
    block = house[house.index("```text\n") + len("```text\n") :].partition("```")[0]
    floors = [re.split(r" {2,}", line, maxsplit=1) for line in block.splitlines()]
    assert all(len(floor) == 2 for floor in floors), "each floor has a word on what it holds"
    assert [names.split(" | ") for names, _ in floors] == contract_layers()


def test_the_floors_in_the_design_notes_are_the_linters():
    page = (ROOT / "docs" / "design-notes.md").read_text(encoding="utf-8")
    floors = re.findall(r"^\| \d+ \| (.+?) \|", page, flags=re.MULTILINE)
    assert [re.findall(r"`(\w+)`", floor) for floor in floors][::-1] == contract_layers()
