"""A client's loop in plain PyTorch: every gradient is checked, and perturbed or held back, before it is sent.

    python examples/check_before_sending.py

The last gradient is written to ./sent.safetensors. Explained in docs/tutorial-check.md.
"""

import torch
from torch import nn

import gradguard as gg
from gradguard.attacks import DLG, RGAP
from gradguard.defenses import NoiseStream, PriorNoise
from gradguard.zoo.models import digits_convnet
from gradguard.zoo.pictures import digits


def main() -> None:
    """Six rounds: judged by the predicted error in each, attacked as well in every third."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # networks this small are slower on several threads
    pictures = digits()
    model, loss_fn = digits_convnet(), nn.CrossEntropyLoss()
    server = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gg.Guard(
        defense=PriorNoise(noise_ratio=0.5),
        attacks=(RGAP(), DLG(restarts=2)),
        policy=gg.Policy(minimum_predicted_error=0.1, maximum_attacked_psnr=20.0),
        threat=gg.ThreatModel(max_attacked=1),
    )
    stream = NoiseStream()  # secret noise: one key for the whole run, a round of it for each message
    for number in range(6):
        rows = slice(8 * number, 8 * number + 8)
        batch = pictures.images[rows], pictures.labels[rows]
        sent, verdict = guard.protect(model, loss_fn, *batch, verify=number % 3 == 2, noise=stream.message())
        measures = ", ".join(f"{name} {value:.3g}" for name, value in verdict.measures.items())
        print(f"round {number}: {verdict.decision} (noise {verdict.noise_ratio:.2f} of |g|; {measures})")
        for reason in verdict.reasons:
            print(f"    {reason}")
        if sent is None:
            continue  # blocked: this round sends nothing
        gg.save_gradient("sent.safetensors", sent)
        for name, parameter in model.named_parameters():
            parameter.grad = sent[name]
        server.step()


if __name__ == "__main__":
    main()
