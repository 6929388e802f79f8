"""Four defenses on one gradient: what an attack gets, and what training with each costs.

    python examples/compare_defenses.py

Explained, with how to read it, in docs/tutorial-benchmark.md.
"""

import torch
from torch import nn

import gradguard as gg
from gradguard.attacks import DLG, ILRG
from gradguard.benchmark import compare
from gradguard.defenses import Defense, GaussianNoise, PriorNoise, Pruning, SmallEigenspaceNoise
from gradguard.zoo.models import digits_convnet
from gradguard.zoo.pictures import digits

TRAIN, TEST = digits().split(500)
LOSS = nn.CrossEntropyLoss()


def fresh_model() -> nn.Module:
    """The same start for every training."""
    torch.manual_seed(0)
    return digits_convnet()


def accuracy_after_training(defense: Defense | None) -> float:
    """Test accuracy in [0, 1] after 30 steps on batches of 4, every gradient perturbed by `defense`."""
    model, guard = fresh_model(), gg.Guard(defense=defense, attacks=())
    gradient_of = guard.loss_gradient(model, LOSS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = torch.Generator().manual_seed(1)
    for step in range(30):
        rows = slice(4 * step, 4 * step + 4)
        inputs, targets = TRAIN.images[rows], TRAIN.labels[rows]
        jacobian = None
        if defense is not None and defense.needs_jacobian:
            jacobian = gg.InputJacobian(gradient_of, inputs, targets)
        sent = guard.perturb(jacobian, gradient_of(inputs, targets), generator=noise)
        for name, parameter in model.named_parameters():
            parameter.grad = sent[name]
        optimizer.step()
    with torch.no_grad():
        return (model(TEST.images).argmax(dim=1) == TEST.labels).double().mean().item()


def main() -> None:
    """Equal norms for the three kinds of noise, which is not equal usefulness: read the score beside the PSNR."""
    torch.set_num_threads(1)  # networks this small are slower on several threads
    comparison = compare(
        fresh_model(),
        LOSS,
        TRAIN.images[:2],
        TRAIN.labels[:2],
        [
            GaussianNoise(noise_ratio=0.5),
            PriorNoise(noise_ratio=0.5),
            SmallEigenspaceNoise(noise_ratio=0.5),
            Pruning(fraction=0.9),
        ],
        attacks=(DLG(restarts=2), ILRG()),
        threat=gg.ThreatModel(max_attacked=1),
        training=accuracy_after_training,
    )
    comparison.print()
    for row in comparison.rows:
        name = row.defense.partition("(")[0]
        print(f"{name:21s} best attack {row.best_psnr:5.1f} dB, test accuracy {row.score:.3f}")


if __name__ == "__main__":
    main()
