"""How good can any attack on a noisy gradient be? Floors for four pictures, as the noise and the rounds grow.

    python examples/floors.py

Explained in docs/floors.md.
"""

import torch
from torch import nn

import gradguard as gg
from gradguard.functional.vectors import norm
from gradguard.leakage import bayes_floor, cramer_rao_floor, spectral_density, spectrum
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.zoo.models import lenet, uniform_init_
from gradguard.zoo.pictures import digits


def main() -> None:
    """One table, and two pictures of the spectrum in the folder it is run from."""
    torch.set_num_threads(1)  # networks this small are slower on several threads
    torch.manual_seed(0)
    model = uniform_init_(lenet(image_size=8))
    pictures = digits()
    inputs, labels = pictures.images[:4], pictures.labels[:4]

    gradient = gg.LossGradient(model, nn.CrossEntropyLoss(), dtype=torch.float64)
    jacobian = gg.InputJacobian(gradient, inputs, labels)
    prior = PowerLawPrior(std=inputs.std(dim=0).mean().item())
    length = norm(gradient(inputs, labels)).item()

    print("PSNR (dB) that no attack gets above, for the most exposed of four pictures")
    print("noise/gradient  rounds  unbiased attacker  any attacker  prior alone")
    for ratio in (0.001, 0.01, 0.1):
        variance = (ratio * length) ** 2 / gradient.num_parameters
        for rounds in (1, 100):
            unbiased = cramer_rao_floor(jacobian, variance, rounds=rounds).psnr.max().item()
            any_attacker = bayes_floor(jacobian, prior, variance, rounds=rounds)
            best, alone = any_attacker.psnr.max().item(), any_attacker.prior_psnr.max().item()
            print(f"{ratio:14.1%}  {rounds:6d}  {unbiased:17.1f}  {best:12.1f}  {alone:11.1f}")

    values = spectrum(jacobian)
    values.plot().savefig("spectrum.png")
    density = spectral_density(jacobian, generator=torch.Generator().manual_seed(0))
    density.plot().savefig("density.png")
    small, error = density.count_below(0.1 * values.values[:, 0])
    print(f"{small[0]:.1f} +- {error[0]:.1f} of {jacobian.size} eigenvalues are below a tenth of the largest")


if __name__ == "__main__":
    main()
