"""The callback in real Trainers on bundled digits."""

import csv
import warnings
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradguard import Guard, InputError, ThreatModel, UnsupportedModelError
from gradguard.attacks import DLG, ILRG
from gradguard.defenses import Defense, GaussianNoise, PriorNoise
from gradguard.demo import Demo, DigitsModule, accuracy
from gradguard.functional.vectors import flatten
from gradguard.integrations.lightning import GradGuard
from gradguard.zoo.pictures import digits

QUICK = DLG(restarts=2, evaluations=60, polish=10)


def loader(batch_size=16, count=160):
    pictures = digits()
    data = TensorDataset(pictures.images[:count], pictures.labels[:count])
    return DataLoader(data, batch_size, shuffle=False, drop_last=True)


def fit(module, *callbacks, batches=None, folder=None, checkpoint=None, **options):
    """A quiet Trainer; `folder` gets a CSV log."""
    torch.manual_seed(0)
    logger = CSVLogger(folder, name="", version="") if folder else False
    options = {"max_steps": 6, "log_every_n_steps": 1, "logger": logger} | options
    trainer = Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, batches or loader(), ckpt_path=checkpoint)
    return trainer


class Recorder(GradGuard):
    """Keeps every gradient that a step leaves, as it goes to the optimiser."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sent = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.sent.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())


def module_with_seed(seed=0):
    torch.manual_seed(seed)
    return DigitsModule()


def test_logged_numbers_are_in_the_csv(tmp_path):
    guard = Guard(defense=PriorNoise(), attacks=(QUICK, ILRG()), threat=ThreatModel(max_attacked=2))
    callback = GradGuard(guard, every_n_steps=2, verify_every_n_steps=4, max_examples=2, exact=True)
    # Lightning repeats a logged value in each row until the next one: rows are read where they are first written.
    fit(module_with_seed(), callback, folder=tmp_path, log_every_n_steps=2)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    measured = {int(r["step"]): r for r in rows if r.get("gradguard/noise_ratio")}
    verified = {int(r["step"]): r for r in rows if r.get("gradguard/attacked_psnr")}
    assert sorted(measured) == [1, 3, 5]
    assert min(verified) == 3
    for row in measured.values():
        assert float(row["gradguard/noise_ratio"]) == pytest.approx(0.5, rel=1e-3)
        bound, predicted = float(row["gradguard/influence_lower_bound"]), float(row["gradguard/predicted_error"])
        assert 0 < bound <= predicted
        assert float(row["gradguard/lambda_max"]) > 0
    found = [float(value) for name, value in verified[3].items() if name.startswith("gradguard/psnr/") and value]
    assert max(found) == pytest.approx(float(verified[3]["gradguard/attacked_psnr"]))  # the best, adaptive ones too
    assert 0 <= float(verified[3]["gradguard/label_recovery"]) <= 1
    assert callback.last_report.best_psnr("with") == pytest.approx(
        float(verified[3]["gradguard/attacked_psnr"]), rel=1e-5
    )


def test_every_gradient_is_perturbed_by_just_the_defense(tmp_path):
    plain, noisy = Recorder(Guard(attacks=())), Recorder(Guard(defense=PriorNoise(noise_ratio=0.3), attacks=()))
    fit(module_with_seed(), plain, max_steps=1)
    fit(module_with_seed(), noisy, max_steps=1)
    module = module_with_seed()
    inputs, targets = next(iter(loader()))
    module.loss_fn(module(inputs), targets).backward()
    true = torch.cat([p.grad.flatten() for p in module.parameters()])
    torch.testing.assert_close(plain.sent[0], true)
    ratio = (noisy.sent[0] - true).norm() / true.norm()
    assert ratio.item() == pytest.approx(0.3, rel=1e-3)


def testaccuracy_is_within_a_point_at_the_default_strength():
    """Of the run without the callback, on held-out digits; averaged over seeds, since one run varies by more."""
    train, test = digits().split(500)
    guard = Guard(defense=PriorNoise(), attacks=())
    without, with_defense = [], []
    for seed in range(6):
        demo = Demo(seed=seed)
        without.append(accuracy(demo.train(train, None), test))
        with_defense.append(accuracy(demo.train(train, guard), test))
    mean = [sum(values) / len(values) for values in (without, with_defense)]
    assert mean[0] > 0.85
    assert mean[1] > mean[0] - 0.01


def test_resuming_continues_cadence_and_noise(tmp_path):
    # One batch an epoch, since a plain DataLoader does not resume within one.
    batches = loader(count=16)
    guard = Guard(defense=GaussianNoise(noise_ratio=0.5), attacks=())
    whole, first, second = (Recorder(guard, every_n_steps=2, seed=0) for _ in range(3))
    fit(module_with_seed(), whole, batches=batches, max_steps=6)
    fit(module_with_seed(), first, batches=batches, max_steps=3).save_checkpoint(tmp_path / "half.ckpt")
    logged = tmp_path / "log"
    trainer = fit(
        module_with_seed(),
        second,
        batches=batches,
        max_steps=6,
        checkpoint=tmp_path / "half.ckpt",
        folder=logged,
        log_every_n_steps=2,
    )
    assert trainer.global_step == 6
    assert second.steps == whole.steps == 6
    assert len(first.sent) + len(second.sent) == len(whole.sent)
    rows = list(csv.DictReader((logged / "metrics.csv").open()))
    assert [int(r["step"]) for r in rows if r.get("gradguard/noise_ratio")] == [3, 5]
    # The same noise as in the run that was not interrupted.
    for ours, theirs in zip(first.sent + second.sent, whole.sent, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_accumulated_gradients_are_those_of_all_their_batches():
    callback = Recorder(Guard(defense=PriorNoise(noise_ratio=0.3), attacks=()), every_n_steps=1)
    with warnings.catch_warnings():
        # The measured function is the accumulated one: no warning about another gradient.
        warnings.filterwarnings("error", message="The step's gradient differs")
        fit(module_with_seed(), callback, max_steps=2, accumulate_grad_batches=2)
    assert callback.steps == 2


def test_bf16_mixed_precision_is_perturbed_and_measured(tmp_path):
    callback = Recorder(Guard(defense=PriorNoise(), attacks=()), every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The step's gradient differs")
        fit(module_with_seed(), callback, max_steps=2, precision="bf16-mixed", folder=tmp_path)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    ratios = [float(r["gradguard/noise_ratio"]) for r in rows if r.get("gradguard/noise_ratio")]
    assert ratios == pytest.approx([0.5, 0.5], rel=1e-2)


def test_clipping_after_the_noise_is_said():
    with pytest.warns(UserWarning, match="clips gradients at 1.0 after gradguard has perturbed them"):
        fit(module_with_seed(), GradGuard(Guard(attacks=()), every_n_steps=1), max_steps=1, gradient_clip_val=1.0)


def test_a_cadence_that_the_loggers_miss_is_said():
    with pytest.warns(UserWarning, match=r"`every_n_steps=3` is no multiple of the trainer's `log_every_n_steps=2`"):
        fit(module_with_seed(), GradGuard(Guard(attacks=()), every_n_steps=3), max_steps=1, log_every_n_steps=2)


def test_another_gradient_than_the_measured_one_is_said():
    class TwiceTheLoss(DigitsModule):
        def training_step(self, batch, batch_idx):
            return 2 * super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="differs by 100% from that of `loss_fn"):
        fit(TwiceTheLoss(), GradGuard(Guard(attacks=()), every_n_steps=1), max_steps=1)


def test_train_mode_batchnorm_is_refused_at_the_first_batch():
    class WithBatchNorm(DigitsModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))

    with pytest.raises(UnsupportedModelError, match=r"'model\.1' \(BatchNorm2d\) is in training mode"):
        fit(WithBatchNorm(), GradGuard(Guard(attacks=())), max_steps=1)
    callback = Recorder(Guard(defense=PriorNoise(), attacks=(), train_mode="eval"))
    fit(WithBatchNorm(), callback, max_steps=2)
    assert len(callback.sent) == 2


def test_verification_does_not_take_the_train_modes_difference_for_noise():
    class WithDropout(DigitsModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 10))

    guard = Guard(
        defense=GaussianNoise(noise_ratio=0.01), attacks=(), train_mode="eval", threat=ThreatModel(max_attacked=1)
    )
    callback = GradGuard(guard, verify_every_n_steps=1, every_n_steps=50)
    fit(WithDropout(), callback, max_steps=1)
    assert callback.last_report.noise_ratio < 0.1


def test_several_processes_are_refused():
    callback = GradGuard(Guard(attacks=()))
    trainer = Trainer(accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    with pytest.raises(InputError, match="works in one process, this trainer has 2"):
        callback.setup(trainer, module_with_seed(), "fit")


def test_a_module_without_a_loss_is_told_how_to_name_one():
    module = module_with_seed()
    del module.loss_fn
    module.training_step = lambda batch: nn.functional.cross_entropy(module(batch[0]), batch[1])
    with pytest.raises(InputError, match=r"has no `loss_fn` or `criterion`.*GradGuard\(guard, loss_fn"):
        fit(module, GradGuard(Guard(attacks=())), max_steps=1)
    fit(module, GradGuard(Guard(attacks=()), loss_fn=nn.CrossEntropyLoss(), model="model"), max_steps=1)


def test_a_batch_of_another_kind_is_told_how_to_unpack():
    class Dictionaries(LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = module_with_seed()
            self.loss_fn = nn.CrossEntropyLoss()

        def forward(self, inputs):
            return self.inner(inputs)

        def training_step(self, batch, batch_idx):
            return self.loss_fn(self(batch["image"]), batch["label"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    pictures = digits()
    rows = [{"image": x, "label": y} for x, y in zip(pictures.images[:32], pictures.labels[:32], strict=True)]
    batches = DataLoader(rows, 8)
    with pytest.raises(InputError, match="The batch is a dict, not a pair"):
        fit(Dictionaries(), GradGuard(Guard(attacks=())), batches=batches, max_steps=1)
    callback = GradGuard(Guard(attacks=()), unpack=lambda b: (b["image"], b["label"]), every_n_steps=1)
    fit(Dictionaries(), callback, batches=batches, max_steps=2)
    assert callback.steps == 2


def test_lbfgs_gets_a_perturbed_gradient_at_every_closure():
    class WithLBFGS(DigitsModule):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    callback = Recorder(Guard(defense=PriorNoise(noise_ratio=0.3), attacks=()))
    fit(WithLBFGS(), callback, max_steps=1)
    assert len(callback.sent) == callback.steps > 1


class PictureLogger(CSVLogger):
    """A logger with what TensorBoard's writer offers for pictures, keeping what it is given."""

    def __init__(self, folder):
        super().__init__(folder)
        self.taken = []

    @property
    def experiment(self):
        return self

    def add_images(self, tag, images, step):
        self.taken.append((tag, images, step))

    def log_metrics(self, metrics, step=None):
        pass

    def save(self):
        pass


@pytest.mark.parametrize("asked", [False, True])
def test_pictures_go_to_a_logger_only_if_asked(tmp_path, asked):
    guard = Guard(defense=PriorNoise(), attacks=(QUICK,), threat=ThreatModel(max_attacked=1))
    callback = GradGuard(guard, verify_every_n_steps=1, every_n_steps=1, log_pictures=asked)
    logger = PictureLogger(tmp_path)
    fit(module_with_seed(), callback, logger=logger, max_steps=1)
    assert bool(logger.taken) == asked
    if asked:
        tag, images, step = logger.taken[0]
        assert (tag, step) == ("gradguard/DLG", 1)
        assert images.shape == (1, 1, 8, 8)


def test_a_defense_of_ones_own_works_in_the_loop():
    class Halve(Defense):
        def perturbation(self, gradient, jacobian=None, *, generator=None):
            return {n: -0.5 * g for n, g in gradient.items()}

    plain, halved = Recorder(Guard(attacks=())), Recorder(Guard(defense=Halve(), attacks=()))
    fit(module_with_seed(), plain, max_steps=1)
    fit(module_with_seed(), halved, max_steps=1)
    torch.testing.assert_close(halved.sent[0], 0.5 * plain.sent[0])


def test_bad_cadences():
    for name in ("every_n_steps", "verify_every_n_steps", "max_examples"):
        with pytest.raises(InputError, match=rf"`{name}` must be at least 1, got 0"):
            GradGuard(Guard(attacks=()), **{name: 0})


def test_the_measured_gradient_is_the_modules(cross_entropy):
    """The callback's function of the module is the module's own gradient."""
    module, callback = module_with_seed(), GradGuard(Guard(attacks=()))
    inputs, targets = next(iter(loader()))
    ours = callback._function(module)(inputs, targets)
    module.loss_fn(module(inputs), targets).backward()
    torch.testing.assert_close(flatten(ours), torch.cat([p.grad.flatten() for p in module.parameters()]))


def test_a_bound_at_every_step_starts_from_the_one_before(tmp_path, monkeypatch):
    """And is `ritz + residual`'s, where no confidence is asked for."""
    from gradguard.evaluation import measurement as module

    seen = []
    original = module.influence_lower_bound

    def watched(*arguments, **options):
        bound = original(*arguments, **options)
        seen.append((options["start"], options["confidence"], bound))
        return bound

    monkeypatch.setattr(module, "influence_lower_bound", watched)
    guard = Guard(defense=GaussianNoise(noise_ratio=0.3), attacks=())
    fit(module_with_seed(), GradGuard(guard, every_n_steps=1, confidence=None, tolerance=0.3), folder=tmp_path)
    assert len(seen) == 6
    assert seen[0][0] is None
    for before, after in pairwise(seen):
        assert after[0] is before[2].vectors
        assert after[1] is None
        assert (after[2].value > 0).all()
    # From a good start it takes fewer products than from nothing.
    assert max(bound.iterations for _, _, bound in seen[1:]) < seen[0][2].iterations


def test_the_architecture_is_checked_at_the_first_batch_and_its_index_is_logged(tmp_path):
    callback = GradGuard(Guard(), every_n_steps=1, rank=True)
    with pytest.warns(UserWarning, match="every layer gives its input away in closed form"):
        fit(DigitsModule(), callback, folder=tmp_path, max_steps=2)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {float(row["gradguard/rank_index"]) for row in rows if row.get("gradguard/rank_index")} == {0.0}
