"""A Python script, run as `python script.py` runs it but in this process: interpreters would mostly import torch.

Its namespace is fresh and its folder empty; what it may set for the whole process is put back after it.
"""

import contextlib
import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from gradguard.attacks.registry import ATTACKS
from gradguard.defenses.registry import DEFENSES
from gradguard.functional.layers import LAYERS


@contextlib.contextmanager
def process_kept():
    """Random states, torch's defaults, warnings, environment, paths, plots, registries are afterwards as they were."""
    torch_random, numpy_random = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    dtype, deterministic, threads = (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )
    environment, arguments, path = dict(os.environ), list(sys.argv), list(sys.path)
    registries = [(registry, dict(registry)) for registry in (ATTACKS, DEFENSES, LAYERS)]
    try:
        with warnings.catch_warnings(), mpl.rc_context():
            plt.switch_backend("Agg")
            yield
    finally:
        plt.close("all")
        torch.set_rng_state(torch_random)
        np.random.set_state(numpy_random)  # noqa: NPY002
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[:], sys.path[:] = arguments, path
        for registry, entries in registries:
            registry.clear()
            registry.update(entries)


@pytest.fixture
def run_script(tmp_path, monkeypatch, capsys):
    """A function that runs the script at a path, as `__main__`, and returns what it printed."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(path: Path) -> str:
        torch.seed()  # a script that needs a seed sets it
        try:
            with process_kept():
                sys.argv[:] = [str(path)]
                runpy.run_path(str(path), run_name="__main__")
        except (Exception, SystemExit):
            # The script's own lines are the end of the traceback; pytest would show those of runpy.
            pytest.fail(f"{capsys.readouterr().out[-2000:]}\n{traceback.format_exc()[-4000:]}", pytrace=False)
        return capsys.readouterr().out

    return run
