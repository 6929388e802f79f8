"""Answers that are remembered about a model."""

import gc
import weakref

from torch import nn

from gradguard import LossGradient
from gradguard.functional.remembered import remembered


class WithLoss(nn.Module):
    """Its loss is a method of its own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x)

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)


def counted(answer):
    def find():
        find.calls += 1
        return answer

    find.calls = 0
    return find


def test_an_answer_is_found_once():
    model, find = WithLoss(), counted(True)
    for _ in range(3):
        assert remembered(LossGradient(model, model.loss), "question", find) is True
    assert find.calls == 1


def test_another_loss_or_another_mode_is_another_question():
    model, find = WithLoss(), counted(True)
    for loss in (model.loss, nn.CrossEntropyLoss()):
        remembered(LossGradient(model, loss), "question", find)
    assert find.calls == 2
    remembered(LossGradient(model.eval(), loss), "question", find)
    assert find.calls == 3


def test_a_model_whose_loss_is_its_own_method_can_be_freed():
    model = WithLoss()
    remembered(LossGradient(model, model.loss), "question", counted(True))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
