"""Train on bundled digits with the GradGuard callback; print what it logged and its last report.

    python examples/lightning_digits.py

Logs go to ./logs. Explained in docs/tutorial-lightning.md.
"""

import csv
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradguard as gg
from gradguard.attacks import DLG, ILRG
from gradguard.defenses import PriorNoise
from gradguard.integrations.lightning import GradGuard
from gradguard.zoo.models import digits_convnet
from gradguard.zoo.pictures import digits


class Digits(LightningModule):
    """A small ConvNet on 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = digits_convnet()
        self.loss_fn = nn.CrossEntropyLoss()  # the callback finds a loss of this name

    def forward(self, inputs: Tensor) -> Tensor:
        """Class scores."""
        return self.model(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        inputs, targets = batch
        loss = self.loss_fn(self(inputs), targets)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, as a federated client would."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    """30 steps: measured every 5, attacked at the last."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # networks this small are slower on several threads
    pictures = digits()
    loader = DataLoader(TensorDataset(pictures.images, pictures.labels), batch_size=8, shuffle=True, drop_last=True)
    guard = gg.Guard(
        defense=PriorNoise(noise_ratio=0.5),
        attacks=(DLG(restarts=2), ILRG()),
        threat=gg.ThreatModel(max_attacked=1),
    )
    callback = GradGuard(guard, every_n_steps=5, verify_every_n_steps=30)
    trainer = Trainer(
        max_steps=30,
        accelerator="cpu",
        devices=1,
        logger=CSVLogger("logs", name="digits"),
        log_every_n_steps=5,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), loader)

    print("step   loss   lower bound on gradient matching's error, input units")
    with Path(trainer.logger.log_dir, "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            loss, bound = float(row["train_loss"]), float(row["gradguard/influence_lower_bound"])
            print(f"{int(row['step']) + 1:4d}  {loss:5.2f}  {bound:6.3f}")
    callback.last_report.print()


if __name__ == "__main__":
    main()
