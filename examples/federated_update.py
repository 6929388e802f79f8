"""What does a client of federated averaging give away? Its update of several local steps, attacked.

    python examples/federated_update.py

Explained in docs/attacks.md.
"""

import torch
from torch import nn

import gradguard as gg
from gradguard.attacks import DLG, Observation, attack_candidates
from gradguard.functional.local_training import LocalTraining
from gradguard.zoo.models import digits_convnet
from gradguard.zoo.pictures import digits

STEPS, RATE = 5, 0.05


def main() -> None:
    """Three attackers: one who knows the learning rate, one who guesses it, one who takes the update for a gradient."""
    torch.set_num_threads(1)  # networks this small are slower on several threads
    torch.manual_seed(0)
    gradient = gg.LossGradient(digits_convnet(), nn.CrossEntropyLoss(), dtype=torch.float64)
    pictures, labels = digits().images[:2], digits().labels[:2]

    # The client trains on its two pictures and sends the change of its parameters.
    mean = LocalTraining(steps=STEPS, learning_rate=RATE).mean_gradient(gradient, pictures, labels)
    update = {name: STEPS * RATE * g for name, g in mean.items()}

    def seen(rate: float, steps: int = STEPS) -> Observation:
        return Observation(
            loss_gradient=gradient,
            sent={name: u / (steps * rate) for name, u in update.items()},
            input_shape=(1, 8, 8),
            batch_size=2,
            labels=labels,
            local=LocalTraining(steps=steps, learning_rate=rate),
        )

    attack = DLG(restarts=1, evaluations=150, polish=0)
    generator = torch.Generator().manual_seed(0)
    rates = (0.02, 0.05, 0.1)
    knowing = attack(seen(RATE), generator=generator)
    guessing, best = attack_candidates(attack, [seen(rate) for rate in rates], generator=generator)
    unaware = attack(seen(STEPS * RATE, steps=1), generator=generator)

    print("attacker                          PSNR of the two pictures (dB)   matching loss")
    for name, result in (
        ("knows the learning rate", knowing),
        (f"guesses it ({rates[best]})", guessing),
        ("takes the update for a gradient", unaware),
    ):
        psnr = gg.leakage.fidelity(result.inputs, pictures.double()).psnr
        print(f"{name:32s}  {psnr[0]:13.1f} {psnr[1]:13.1f}   {result.matching_loss:16.1e}")


if __name__ == "__main__":
    main()
