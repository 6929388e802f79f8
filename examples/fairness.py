"""Who is exposed? Every digit of a data set is measured by itself; a stopped run goes on where it stopped.

    python examples/fairness.py

Writes ./survey.safetensors, ./survey.png and ./survey.html. Explained in docs/fairness.md.
"""

import torch
from torch import nn

import gradguard as gg
from gradguard.zoo.models import digits_convnet
from gradguard.zoo.pictures import digits


def main() -> None:
    """Train for a moment, then survey the first 300 pictures under the same noise for all."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # networks this small are slower on several threads
    pictures = digits()
    model, loss_fn = digits_convnet(), nn.CrossEntropyLoss()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        rows = torch.randint(len(pictures), (64,))
        optimiser.zero_grad()
        loss_fn(model(pictures.images[rows]), pictures.labels[rows]).backward()
        optimiser.step()

    survey = gg.survey(
        model,
        loss_fn,
        pictures,
        defense=gg.defenses.GaussianNoise(std=0.01),
        examples=300,
        checkpoint="survey.safetensors",  # run this again: what is measured is not measured twice
    )
    survey.print()
    survey.save_html("survey.html")
    first, last = survey.per_class()[0], survey.per_class()[-1]
    print(f"\nThe worst example of class {first.name} is {last.worst / first.worst:.1f} times as exposed as that of")
    print(f"class {last.name}; over single examples the factor is {survey.spread:.3g}.")


if __name__ == "__main__":
    main()
