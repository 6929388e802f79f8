"""The labels that matching attacks are held to."""

import torch
import torch.nn.functional as F
from torch import nn

from gradguard import LossGradient
from gradguard.attacks import ILRG, Observation
from gradguard.attacks._labels.inference import infer_labels
from gradguard.functional.local_training import LocalTraining
from gradguard.zoo.models import fcn
from gradguard.zoo.pictures import digits


def observe(model, inputs, labels, local=None):
    function = LossGradient(model, nn.CrossEntropyLoss())
    sent = function(inputs, labels) if local is None else local.mean_gradient(function, inputs, labels)
    return Observation(
        loss_gradient=function, sent=sent, input_shape=(1, 8, 8), batch_size=len(inputs), num_classes=10, local=local
    )


def test_on_a_trained_network_they_are_right_where_ilrg_is_not():
    data = digits()
    images = data.images.double()
    torch.manual_seed(0)
    model = fcn((64, 100, 100, 10), activation="relu", bias=True).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(model(images[:1000]), data.labels[:1000]).backward()
        optimiser.step()
    right = {"ours": 0, "iLRG": 0}
    for start in range(1000, 1050, 5):
        seen = observe(model, images[start : start + 5], data.labels[start : start + 5])
        true = data.labels[start : start + 5].sort().values
        right["ours"] += torch.equal(infer_labels(seen), true)
        right["iLRG"] += torch.equal(ILRG(refinements=0)(seen).labels, true)
    assert right["ours"] > right["iLRG"]
    assert right["ours"] >= 5


def test_of_a_head_without_a_bias():
    data = digits()
    torch.manual_seed(0)
    model = fcn((64, 100, 10), activation="relu", bias=False).double()
    seen = observe(model, data.images[:4].double(), data.labels[:4])
    assert torch.equal(infer_labels(seen), data.labels[:4].sort().values)


def test_of_a_clients_update():
    """Steps so long that the head the client started from no longer explains what it sent."""
    data = digits()
    torch.manual_seed(0)
    model = fcn((64, 100, 10), activation="relu", bias=True).double()
    inputs, labels = data.images[:8].double(), data.labels[:8]
    seen = observe(model, inputs, labels, LocalTraining(steps=5, learning_rate=0.05, batch_size=8))
    assert torch.equal(infer_labels(seen), labels.sort().values)
