"""The package as a whole: its version, what importing it costs, what it ships."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradguard

ROOT = Path(__file__).parents[2]


def test_version_is_the_same_everywhere():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', project, flags=re.MULTILINE).group(1) == gradguard.__version__
    assert re.search(r"^version: (.+)$", citation, flags=re.MULTILINE).group(1) == gradguard.__version__


def test_every_public_name_is_there():
    assert [n for n in gradguard.__all__ if not hasattr(gradguard, n)] == []


HEAVY_OR_OPTIONAL = ["flwr", "lightning", "matplotlib", "opacus", "pytorch_lightning", "ray", "sklearn"]


@pytest.mark.parametrize("package", HEAVY_OR_OPTIONAL)
def test_importing_gradguard_does_not_import(package, loaded_by_gradguard):
    assert package not in loaded_by_gradguard


@pytest.fixture(scope="module")
def loaded_by_gradguard() -> set[str]:
    """The top-level packages that `import gradguard` loads in a fresh interpreter."""
    code = "import sys, gradguard; print('\\n'.join({m.partition('.')[0] for m in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


def test_type_information_is_shipped():
    assert (Path(gradguard.__file__).parent / "py.typed").is_file()


def test_no_test_asserts_time():
    """A test that asserts seconds fails on a busy machine and says nothing on an idle one."""
    clocks = {"perf_counter", "monotonic", "process_time", "time"}
    found = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in clocks and getattr(node.value, "id", "") == "time":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
