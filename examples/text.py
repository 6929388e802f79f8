"""What does the gradient of a language model say about its text? Predicted and proven, as noise grows.

    python examples/text.py

Explained in docs/text.md.
"""

import torch

import gradguard as gg
from gradguard.attacks import DLG, Observation
from gradguard.defenses import GaussianNoise
from gradguard.functional.vectors import add
from gradguard.zoo.models import gpt
from gradguard.zoo.text import (
    Characters,
    centred,
    decode,
    nearest_neighbour_distance,
    next_token_loss,
    sample_text,
    token_recovery,
    tokens_in_gradient,
    windows,
)


def main() -> None:
    """One line per noise."""
    torch.set_num_threads(1)  # networks this small are slower on several threads
    torch.manual_seed(0)
    text = sample_text()
    characters = Characters.of(text)
    ids = characters.encode(text)
    model = gpt(len(characters), width=16, heads=2, layers=2, context=16)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(150):
        tokens, targets = windows(ids, 16, 32, generator=draw)
        optimizer.zero_grad()
        loss = next_token_loss(model(tokens), targets)
        loss.backward()
        optimizer.step()
    print(f"A GPT with {sum(p.numel() for p in model.parameters())} parameters, loss {loss.item():.2f} per character")

    tokens, targets = windows(ids, 8, 1, generator=torch.Generator().manual_seed(2))
    optimizer.zero_grad()
    next_token_loss(model(tokens), targets).backward()
    rows = tokens_in_gradient(model.transformer["wte"].weight.grad)
    print(f"The private text: {characters.decode(tokens[0])!r}")
    print(f"The embedding table's gradient alone names its characters: {characters.decode(rows)!r}")

    gradient = gg.LossGradient(model, next_token_loss, dtype=torch.float64, input_module="transformer.wte")
    x = gradient.embed(tokens)
    table = centred(model.transformer["wte"].weight)
    neighbour = nearest_neighbour_distance(table).median().item()
    jacobian, true = gg.InputJacobian(gradient, x, targets), gradient(x, targets)

    print("noise/gradient  predicted error  observed error  per token/neighbour  recovered  what the attacker reads")
    for ratio in (0.0, 0.01, 0.1, 1.0, 10.0):
        delta = {n: torch.zeros_like(g) for n, g in true.items()}
        if ratio:
            noise = GaussianNoise(noise_ratio=ratio)
            delta = noise.perturbation(true, generator=torch.Generator().manual_seed(0))
        seen = Observation(
            loss_gradient=gradient,
            sent=add(true, delta),
            input_shape=tuple(x.shape[1:]),
            labels=targets,
            value_range=None,
        )
        attack = DLG(restarts=2, evaluations=150, polish=0)
        found = attack(seen, generator=torch.Generator().manual_seed(0)).inputs
        predicted = gg.leakage.influence(jacobian, delta).value.item()
        observed = centred(found - x).norm().item()
        read = decode(centred(found), table)
        print(
            f"{ratio:14.1%}  {predicted:15.3f}  {observed:14.3f}  {predicted / 8**0.5 / neighbour:19.2f}  "
            f"{token_recovery(read, tokens).item():9.0%}  {characters.decode(read[0])!r}"
        )


if __name__ == "__main__":
    main()
