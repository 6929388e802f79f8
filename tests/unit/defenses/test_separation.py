import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gradguard import InputError
from gradguard.defenses import SeparatedSampler, check_separation

DATA = TensorDataset(torch.arange(10))


def test_an_example_comes_again_after_the_separation():
    sampler = SeparatedSampler(10, 3, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(DATA, batch_sampler=sampler)
    epochs = [[batch.tolist() for (batch,) in loader] for _ in range(2)]
    assert epochs[0] == epochs[1]
    assert len({i for batch in epochs[0] for i in batch}) == 9
    assert check_separation(loader, 3) == 3
    with pytest.raises(InputError, match="after 3 rounds"):
        check_separation(loader, 4)


def test_a_shuffling_loader_is_refused_by_name():
    assert check_separation(DataLoader(DATA, batch_size=3)) == 4
    with pytest.raises(InputError, match=r"RandomSampler does not keep the order.*SeparatedSampler"):
        check_separation(DataLoader(DATA, batch_size=3, shuffle=True))
