"""What every test may use: real pictures, small models, and the optional data folder."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from gradguard.zoo.models import digits_convnet
from gradguard.zoo.pictures import digits, load_npz

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GRADGUARD_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def digit_pictures():
    return digits()


@pytest.fixture
def convnet():
    torch.manual_seed(0)
    return digits_convnet().double()


@pytest.fixture
def cross_entropy():
    return nn.CrossEntropyLoss()


@pytest.fixture
def batch(digit_pictures):
    """Four digits in float64 and their labels."""
    return digit_pictures.images[:4].double(), digit_pictures.labels[:4]


@pytest.fixture(scope="session")
def real_pictures():
    """A loader of the optional real data sets, which skips the test where they are not there."""

    def load(name):
        path = DATA / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"{path.name} is not here; set GRADGUARD_DATA to the folder that holds it")
        return load_npz(path)

    return load


def generator(seed=0):
    return torch.Generator().manual_seed(seed)
