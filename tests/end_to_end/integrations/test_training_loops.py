"""The callback in loops of every kind: several optimisers, raw ones, incomplete windows, skipped batches, resuming."""

import copy
import csv
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, TensorDataset

from gradguard import Guard, InputError, LossGradient, SeededNoiseWarning
from gradguard.defenses import GaussianNoise, PriorNoise
from gradguard.demo import DigitsModule
from gradguard.functional.vectors import norm
from gradguard.integrations.lightning import GradGuard
from gradguard.integrations.training_step import MeanOfBatches, StepWatch
from gradguard.zoo.pictures import digits

KEY = bytes(range(32))
NOISY = Guard(defense=GaussianNoise(std=1.0), attacks=())


def batches(size=8, count=32):
    pictures = digits()
    return DataLoader(TensorDataset(pictures.images[:count], pictures.labels[:count]), size, shuffle=False)


def fit(module, *callbacks, data=None, folder=None, checkpoint=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger(folder, name="", version="") if folder else False,
        callbacks=list(callbacks),
        **({"max_steps": 2, "log_every_n_steps": 1} | options),
    )
    trainer.fit(module, data or batches(), ckpt_path=checkpoint)
    return trainer


def logged(folder, name):
    with (folder / "metrics.csv").open() as file:
        return [float(r[f"gradguard/{name}"]) for r in csv.DictReader(file) if r.get(f"gradguard/{name}")]


class Manual(LightningModule):
    """Two optimisers on the two layers of a model, stepped after one backward; what each step used is kept."""

    def __init__(self, raw=False, own_backward=False):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 10))
        self.loss_fn = nn.CrossEntropyLoss()
        self.raw, self.own_backward = raw, own_backward
        self.used = []

    def forward(self, inputs):
        return self.model(inputs)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.model[i].parameters(), lr=0.0) for i in (1, 3)]

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers(use_pl_optimizer=not self.raw)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = self.loss_fn(self(batch[0]), batch[1])
        if self.own_backward:
            loss.backward()
        else:
            self.manual_backward(loss)
        bare = [self.model[i].weight.grad.clone() for i in (1, 3)]
        for optimizer in optimizers:
            optimizer.step()
        self.used.append([self.model[i].weight.grad - b for i, b in zip((1, 3), bare, strict=True)])


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("own_backward", [False, True])
def test_each_gradient_is_perturbed_once_whatever_steps(raw, own_backward):
    module, callback = Manual(raw, own_backward), GradGuard(NOISY)
    fit(module, callback, max_steps=-1, max_epochs=1)
    assert len(module.used) == callback.steps == 4  # four batches
    assert callback.tensors == 16
    for first, second in module.used:
        assert first.std().item() == pytest.approx(1.0, abs=0.1)
        assert second.std().item() == pytest.approx(1.0, abs=0.15)  # 500 elements; twice the noise has 1.41
    assert "4 gradients in 16 tensors, GaussianNoise, secret noise" in callback.account


def test_a_second_backward_without_zeroing_is_new_noise():
    class Twice(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[0]
            optimizer.zero_grad()
            weight = self.model[1].weight
            for _ in range(2):
                self.manual_backward(self.loss_fn(self(batch[0]), batch[1]))
                bare = weight.grad.clone()
                optimizer.step()
                self.used.append(weight.grad - bare)
            optimizer.step()  # and no third noise without a third backward
            self.used.append(weight.grad - bare)

    module = Twice()
    fit(module, GradGuard(NOISY), max_steps=-1, max_epochs=1, limit_train_batches=1)
    first, second, third = module.used
    assert second.std().item() == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(first, second)
    assert torch.equal(second, third)


def test_a_raw_optimiser_with_a_closure_is_perturbed():
    class Closures(Manual):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=1e-6, max_iter=2)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)

            def closure():
                optimizer.zero_grad()
                loss = self.loss_fn(self(batch[0]), batch[1])
                self.manual_backward(loss)
                self.used.append(self.model[1].weight.grad.clone())
                return loss

            optimizer.step(closure)
            self.used.append(self.model[1].weight.grad - self.used[-1])

    module, callback = Closures(), GradGuard(NOISY)
    fit(module, callback, max_steps=-1, max_epochs=1, limit_train_batches=1)
    assert callback.steps == len(module.used) - 1
    assert module.used[-1].std().item() == pytest.approx(1.0, abs=0.1)


def test_other_peoples_optimisers_are_left_alone():
    class WithAnother(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            other = torch.ones(3, requires_grad=True)
            other.sum().backward()
            torch.optim.SGD([other], lr=0.1).step()
            assert torch.equal(other.grad, torch.ones(3))

    fit(WithAnother(), GradGuard(NOISY), max_steps=-1, max_epochs=1)


def test_a_training_without_a_perturbed_step_ends_with_an_error():
    class ByHand(Manual):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss_fn(self(batch[0]), batch[1]))
            with torch.no_grad():
                for p in self.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None

    with (
        pytest.raises(InputError, match=r"0 of 32 steps were perturbed.*ByHand.*Guard\.perturb"),
        pytest.warns(UserWarning, match="no optimiser step in 10 batches"),
    ):
        fit(ByHand(), GradGuard(NOISY), data=batches(size=1), max_steps=-1, max_epochs=1)


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left(fails):
    class Breaks(DigitsModule):
        def training_step(self, batch, batch_idx):
            if fails and batch_idx == 1:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    before = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            fit(Breaks(), GradGuard(NOISY))
    else:
        fit(Breaks(), GradGuard(NOISY))
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == before


def test_clipping_between_noise_and_step_adds_no_second_noise():
    """Lightning's clipping writes to the gradients, also under a scaler, whose step comes without a closure."""
    seen = []

    class Watch(DigitsModule):
        def on_before_optimizer_step(self, optimizer):
            seen.append([p.grad.clone() for p in self.parameters()])

        def optimizer_step(self, *arguments, **options):
            super().optimizer_step(*arguments, **options)
            seen.append([p.grad.clone() for p in self.parameters()])

    with pytest.warns(UserWarning, match="clips gradients"):
        fit(Watch(), GradGuard(NOISY), max_steps=1, gradient_clip_val=0.5)
    before, after = (torch.cat([g.flatten() for g in s]) for s in seen)
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) > 1 - 1e-6


def test_what_a_scaler_does_between_noise_and_step_is_not_a_new_gradient():
    """AMP's scaler steps without a closure, after the framework's hook and after clipping has written to gradients."""
    layer, perturbed = nn.Linear(2, 1), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    watch = StepWatch(layer.parameters, perturbed.append)
    try:
        layer(torch.ones(1, 2)).sum().backward()
        watch.handled(optimizer)
        optimizer.step()
        assert perturbed == []
        optimizer.step()  # a raw one
        assert perturbed == [optimizer]
        watch.handled(optimizer)
        watch.forget()  # the scaler has left the step out, and a new batch begins
        optimizer.step()
        assert perturbed == [optimizer] * 2
    finally:
        watch.remove()


# ---------------------------------------------------------------------- windows


class Unclipped(GradGuard):
    """Keeps each step's bare gradient, what is sent, and its batches."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.kept = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        bare = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if not bare:
            return
        delta = {n: p.grad - bare[n] for n, p in pl_module.named_parameters()}
        state = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        self.kept.append((bare, delta, state, [(b.inputs, b.targets) for b in self._window.batches]))


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [([8, 8, 8], 2), ([8, 8, 8, 8, 8], 4), ([8, 4], 2), ([4, 8, 2], 2), ([8], 4)],
    ids=str,
)
def test_windows_are_measured_as_the_step_that_is_taken(tmp_path, sizes, accumulate):
    """`J delta / lambda_max` and `lambda_max` of the very step, against autograd on the very sum of the losses."""
    pictures = digits()
    parts = torch.arange(sum(sizes)).split(sizes)
    data = DataLoader([(pictures.images[i], pictures.labels[i]) for i in parts], batch_size=None)
    torch.manual_seed(0)
    module = DigitsModule().double()
    callback = Unclipped(
        Guard(defense=GaussianNoise(noise_ratio=0.3), attacks=()),
        every_n_steps=1,
        max_examples=3,
        tolerance=1e-6,
        confidence=None,
        unpack=lambda batch: (batch[0].double(), batch[1]),
    )
    module.training_step = lambda batch: module.loss_fn(module(batch[0].double()), batch[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The step's gradient differs")
        fit(
            module, callback, data=data, folder=tmp_path, max_steps=-1, max_epochs=1, accumulate_grad_batches=accumulate
        )
    assert len(callback.kept) == -(-len(sizes) // accumulate)
    measured = zip(logged(tmp_path, "influence_lower_bound"), logged(tmp_path, "lambda_max"), strict=True)
    for (bound, lambda_max), (bare, delta, state, window) in zip(measured, callback.kept, strict=True):
        reference = DigitsModule().double()
        reference.load_state_dict(state)
        names, parameters = zip(*reference.named_parameters(), strict=True)
        inputs = [x.clone().requires_grad_() for x, _ in window]
        losses = [reference.loss_fn(reference(x), y) for x, (_, y) in zip(inputs, window, strict=True)]
        gradient = torch.autograd.grad(sum(losses) / accumulate, parameters, create_graph=True)
        torch.testing.assert_close(gradient, tuple(bare[n] for n in names))
        flat = torch.cat([g.flatten() for g in gradient])
        first = inputs[0][: min(3, len(inputs[0]))]
        product = torch.autograd.grad(
            flat, inputs[0], torch.cat([delta[n].flatten() for n in names]), retain_graph=True
        )
        bounds, values = [], []
        for r in range(len(first)):
            probes = torch.eye(64, dtype=torch.float64)
            # J J^T of one example: J^T u by a forward difference of nothing, as a double backward of the dot product.
            dummy = torch.zeros_like(flat, requires_grad=True)
            dot = torch.autograd.grad(flat, inputs[0], dummy, create_graph=True, retain_graph=True)[0][r].flatten()
            rows = torch.stack([torch.autograd.grad(dot, dummy, e, retain_graph=True)[0] for e in probes])
            top = torch.linalg.eigvalsh(rows @ rows.T)[-1]
            values.append(top)
            bounds.append(product[0][r].norm() / top)
        assert lambda_max == pytest.approx(max(values).item(), rel=1e-4)
        assert bound == pytest.approx(min(bounds).item(), rel=1e-3)


def test_batches_of_different_sizes_weigh_as_they_do_in_the_step():
    torch.manual_seed(0)
    model, pictures = DigitsModule().double(), digits()
    inputs, targets = pictures.images[:6].double(), pictures.labels[:6]
    parts = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    (sum(model.loss_fn(model(x), y) for x, y in parts) / 2).backward()
    whole = LossGradient(model, MeanOfBatches(model.loss_fn, (4, 2)))(inputs, targets)
    torch.testing.assert_close(whole, {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize("defense", [PriorNoise(noise_ratio=0.3), GaussianNoise(noise_ratio=0.3)], ids=repr)
@pytest.mark.parametrize(("sizes", "accumulate"), [([4, 8], 2), ([8], 4)], ids=str)
def test_windows_are_perturbed_and_verified_as_the_step_that_is_taken(defense, sizes, accumulate):
    pictures = digits()
    parts = torch.arange(sum(sizes)).split(sizes)
    data = DataLoader([(pictures.images[i], pictures.labels[i]) for i in parts], batch_size=None)
    callback = Unclipped(Guard(defense=defense, attacks=()), verify_every_n_steps=1)
    fit(DigitsModule(), callback, data=data, max_steps=-1, max_epochs=1, accumulate_grad_batches=accumulate)
    ((bare, delta, *_),) = callback.kept
    ratio = norm(delta) / norm(bare)
    assert ratio.item() == pytest.approx(0.3, rel=0.05)
    assert callback.last_report.noise_ratio == pytest.approx(ratio.item(), rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_batch_is_neither_counted_nor_measured(tmp_path, accumulate):
    class Skips(DigitsModule):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)

    callback = Unclipped(NOISY, every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The step's gradient differs")
        fit(Skips(), callback, folder=tmp_path, max_steps=-1, max_epochs=1, accumulate_grad_batches=accumulate)
    # Batches 1 and 2 are left: two steps of one each.
    assert callback.steps == 2
    assert all(value > 0 for value in logged(tmp_path, "noise_ratio"))
    assert all(value > 0 for value in logged(tmp_path, "lambda_max"))


def test_a_training_of_skipped_batches_alone_is_no_error():
    class SkipsAll(DigitsModule):
        def training_step(self, batch, batch_idx):
            return None

    callback = GradGuard(NOISY, every_n_steps=1)
    fit(SkipsAll(), callback, max_steps=-1, max_epochs=1)
    assert callback.steps == 0


def test_what_lies_outside_the_measured_model_does_not_leave_bare():
    class WithHead(DigitsModule):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 100)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.head(batch[0].flatten(1)).square().mean()

    callback = Unclipped(Guard(defense=PriorNoise(noise_ratio=0.3), attacks=()))
    callback.model = "model"
    module = WithHead()
    fit(module, callback, max_steps=1)
    bare, delta, _, _ = callback.kept[0]
    for name in ("head.weight", "head.bias"):
        assert (delta[name].norm() / bare[name].norm()).item() == pytest.approx(0.3, rel=0.3)


# ---------------------------------------------------------------------- keys


def test_clients_with_the_same_global_seed_send_different_noise():
    deltas = []
    for _ in range(2):
        torch.manual_seed(42)
        callback = Unclipped(NOISY)
        fit(DigitsModule(), callback, max_steps=1)
        deltas.append(torch.cat([d.flatten() for d in callback.kept[0][1].values()]))
    assert torch.nn.functional.cosine_similarity(*deltas, dim=0).abs() < 0.05
    copies = [copy.deepcopy(GradGuard(NOISY)) for _ in range(2)]
    assert copies[0]._stream.fingerprint != copies[1]._stream.fingerprint


def holds(value, secret):
    """Whether `secret` bytes are anywhere in a checkpoint."""
    if isinstance(value, dict):
        return any(holds(v, secret) for pair in value.items() for v in pair)
    if isinstance(value, list | tuple):
        return any(holds(v, secret) for v in value)
    if isinstance(value, torch.Tensor):
        return (
            secret in value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.ndim else False
        )
    return isinstance(value, bytes | str) and (secret in value if isinstance(value, bytes) else secret.hex() in value)


@pytest.mark.parametrize("as_file", [False, True])
def test_with_the_key_a_resumed_training_goes_on_with_the_same_noise(tmp_path, as_file):
    key = tmp_path / "noise.key" if as_file else KEY
    save = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    whole = Unclipped(NOISY, key=key)
    fit(DigitsModule(), whole, save, max_steps=4, data=batches(32))  # an epoch is a batch
    checkpoint = next(tmp_path.glob("*step=2.ckpt"))
    content = torch.load(checkpoint, weights_only=False)
    for secret in (whole._key, whole._stream._key):
        assert not holds(content, secret)
    second = Unclipped(NOISY, key=key)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The checkpoint")
        fit(DigitsModule(), second, max_steps=4, data=batches(32), checkpoint=checkpoint)
    assert len(second.kept) == 2
    for ours, theirs in zip(second.kept, whole.kept[2:], strict=True):
        assert all(torch.equal(ours[1][n], theirs[1][n]) for n in ours[1])


def test_without_the_key_a_new_stream_begins_and_says_so(tmp_path):
    whole = Unclipped(NOISY)
    trainer = fit(DigitsModule(), whole, max_steps=2, data=batches(32))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert not holds(torch.load(tmp_path / "half.ckpt", weights_only=False), whole._stream._key)
    for other, message in ((Unclipped(NOISY), "holds no key"), (Unclipped(NOISY, key=KEY), "is of another key")):
        with pytest.warns(UserWarning, match=rf"The checkpoint {message}.*a new stream of noise begins"):
            fit(DigitsModule(), other, max_steps=4, data=batches(32), checkpoint=tmp_path / "half.ckpt")
        assert other.steps == 4
        assert len(other.kept) == 2


def test_two_trainings_with_one_key_have_different_noise():
    first, second = (Unclipped(NOISY, key=KEY) for _ in range(2))
    for callback in (first, second):
        fit(DigitsModule(), callback, max_steps=1)
    noises = [torch.cat([d.flatten() for d in c.kept[0][1].values()]) for c in (first, second)]
    assert torch.nn.functional.cosine_similarity(*noises, dim=0).abs() < 0.05


def test_a_seed_warns_and_goes_with_no_key():
    with pytest.warns(SeededNoiseWarning, match="The noise comes from a seed"):
        GradGuard(NOISY, seed=0)
    with pytest.raises(InputError, match="Give `key`, for noise that is secret, or `seed`"):
        GradGuard(NOISY, seed=0, key=KEY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradGuard(NOISY)
        GradGuard(NOISY, key=KEY)


def test_measuring_draws_nothing_from_the_global_state():
    states = []

    class Watch(DigitsModule):
        def on_before_optimizer_step(self, optimizer):
            states.append(torch.get_rng_state())

    for callbacks in ((), (GradGuard(Guard(defense=PriorNoise(), attacks=()), every_n_steps=1),)):
        torch.manual_seed(1)
        fit(Watch(), *callbacks, max_steps=2)
    assert torch.equal(states[0], states[2])
    assert torch.equal(states[1], states[3])
