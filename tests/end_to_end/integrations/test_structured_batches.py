"""The callback on tokens, structures and the step's own randomness, against plain autograd in float64."""

import copy
import csv

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from gradguard import Guard, InputError, ThreatModel
from gradguard.defenses import GaussianNoise, PriorNoise
from gradguard.integrations.lightning import GradGuard
from gradguard.zoo.pictures import digits

ANY_VALUE = ThreatModel(value_range=None, max_attacked=1)


def fit(module, callback, data, folder=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger(folder, name="", version="") if folder else False,
        callbacks=[callback],
        **({"max_steps": 1, "log_every_n_steps": 1} | options),
    )
    trainer.fit(module, data)
    return trainer


class Module(LightningModule):
    """`model` and `loss_fn` on the batch as `unpack` reads it."""

    def __init__(self, model, loss_fn, unpack):
        super().__init__()
        self.model, self.loss_fn, self.unpack = model, loss_fn, unpack

    def training_step(self, batch):
        inputs, targets = self.unpack(batch)
        outputs = self.model(**inputs) if isinstance(inputs, dict) else self.model(*inputs)
        return self.loss_fn(outputs, targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Kept(GradGuard):
    """Keeps the bare gradient, what was added, and the model and the batch at the step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.batch = batch

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.bare = {n: p.grad.clone() for n, p in pl_module.model.named_parameters()}
        self.at = copy.deepcopy(pl_module.model)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.delta = {n: p.grad - self.bare[n] for n, p in pl_module.model.named_parameters()}


def logged(folder, name):
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return [float(r[f"gradguard/{name}"]) for r in rows if r.get(f"gradguard/{name}")]


def measures(gradient_of, private, delta, examples):
    """Of each example: `|J delta| / lambda_max` and `lambda_max`, by double backward of `gradient_of(private)`."""
    with sdpa_kernel(SDPBackend.MATH):
        leaf = private.clone().requires_grad_()
        gradient = gradient_of(leaf)
        flat = torch.cat([g.flatten() for g in gradient.values()])
        noise = torch.cat([delta[n].double().flatten() for n in gradient])
        product = torch.autograd.grad(flat, leaf, noise, retain_graph=True)[0]
        dummy = torch.zeros_like(flat, requires_grad=True)
        dot = torch.autograd.grad(flat, leaf, dummy, create_graph=True)[0]
        bounds, values = [], []
        for r in range(examples):
            probes = torch.eye(dot[r].numel(), dtype=torch.float64)
            rows = torch.stack([torch.autograd.grad(dot[r].flatten(), dummy, e, retain_graph=True)[0] for e in probes])
            values.append(torch.linalg.eigvalsh(rows @ rows.T)[-1].item())
            bounds.append(product[r].norm().item() / values[-1])
    return min(bounds), max(values)


def double_backward(model, loss):
    """Parameters and a function giving the gradient by them, differentiable."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), create_graph=True, allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None and g.requires_grad}


OPTIONS = {"every_n_steps": 1, "max_examples": 2, "tolerance": 1e-6, "confidence": None, "model": "model"}


# ---------------------------------------------------------------------- tokens


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return transformers.BertForSequenceClassification(config).double()


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config).double()


def classes(outputs, labels):
    return cross_entropy(outputs.logits, labels)


def next_token(outputs, labels):
    return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def text(kind):
    torch.manual_seed(1)
    ids, mask = torch.randint(20, (4, 5)), torch.ones(4, 5, dtype=torch.int64)
    mask[:, 4] = 0
    labels = torch.tensor([0, 2, 1, 0]) if kind == "bert" else ids
    # The mask comes first, and is of whole numbers too.
    rows = [{"attention_mask": m, "input_ids": i, "labels": y} for m, i, y in zip(mask, ids, labels, strict=True)]
    return DataLoader(rows, 4)


TOKENS = {
    "bert": (bert, classes, "bert.embeddings.word_embeddings"),
    "gpt2": (gpt2, next_token, "transformer.wte"),
}


@pytest.mark.parametrize("kind", list(TOKENS))
def test_tokens_in_a_dictionary_are_measured_at_their_embeddings(tmp_path, kind, recwarn):
    make, loss_fn, table = TOKENS[kind]
    guard = Guard(defense=GaussianNoise(noise_ratio=0.3), attacks=(), threat=ANY_VALUE, input_module=table)
    callback = Kept(guard, **OPTIONS)
    module = Module(make(), loss_fn, callback.unpack)
    fit(module, callback, text(kind), tmp_path)
    assert not [w for w in recwarn if "step's gradient differs" in str(w.message)]
    batch, model = callback.batch, callback.at
    embeddings = model.get_submodule(table)(batch["input_ids"]).detach()

    def gradient_of(leaf):
        outputs = model(inputs_embeds=leaf, attention_mask=batch["attention_mask"])
        return double_backward(model, loss_fn(outputs, batch["labels"]))

    bound, largest = measures(gradient_of, embeddings, callback.delta, 2)
    assert logged(tmp_path, "lambda_max") == pytest.approx([largest], rel=1e-4)
    assert logged(tmp_path, "influence_lower_bound") == pytest.approx([bound], rel=1e-3)


def test_tokens_are_perturbed_by_a_prior_and_verified():
    guard = Guard(defense=PriorNoise(noise_ratio=0.3), attacks=(), threat=ANY_VALUE, input_module=TOKENS["bert"][2])
    callback = Kept(guard, verify_every_n_steps=1, every_n_steps=50, model="model")
    fit(Module(bert(), classes, callback.unpack), callback, text("bert"))
    assert callback.last_report.input_shape == (5, 8)
    # The table's own gradient says which tokens there were: it does not leave bare.
    assert callback.delta["bert.embeddings.word_embeddings.weight"].count_nonzero() > 0
    assert callback.last_report.noise_ratio > 0.1


@pytest.mark.parametrize(
    ("name", "match"),
    [("bert.embeddings.wrong", "has no module"), ("bert.pooler.dense", "turns tokens|called"), (None, "input_module")],
)
def test_a_wrong_input_module_is_said_before_the_first_step(name, match):
    guard = Guard(attacks=(), threat=ANY_VALUE, input_module=name)
    callback = GradGuard(guard, every_n_steps=1, model="model")
    with pytest.raises(InputError, match=match):
        fit(Module(bert(), classes, callback.unpack), callback, text("bert"))
    assert callback.steps == 0


# ---------------------------------------------------------------------- structures


class TwoInputs(nn.Module):
    """Two floating-point inputs, two heads, a dictionary out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(3, 6).double(), nn.Linear(4, 6).double()
        self.kind, self.size = nn.Linear(6, 3).double(), nn.Linear(6, 1).double()

    def forward(self, known, picture):
        hidden = torch.tanh(self.left(known) * self.right(picture))
        return {"kind": self.kind(hidden), "size": self.size(hidden)[:, 0]}


def both(outputs, targets):
    return cross_entropy(outputs["kind"], targets["kind"]) + (outputs["size"] - targets["size"]).square().mean()


def pairs(counts, as_dict):
    torch.manual_seed(2)
    found = []
    for count in counts:
        known, picture = torch.rand(count, 3).double(), torch.rand(count, 4).double()
        inputs = {"known": known, "picture": picture} if as_dict else (known, picture)
        targets = {"size": torch.rand(count).double(), "kind": torch.randint(3, (count,))}
        found.append((inputs, targets))
    return DataLoader(found, batch_size=None)


@pytest.mark.parametrize(("as_dict", "private"), [(True, "picture"), (False, 1)])
@pytest.mark.parametrize("counts", [(4,), (4, 4), (4, 2)], ids=str)
def test_a_private_input_that_is_not_the_first_and_targets_in_a_dictionary(tmp_path, as_dict, private, counts):
    guard = Guard(defense=PriorNoise(noise_ratio=0.3), attacks=(), private=private)
    callback = Kept(guard, verify_every_n_steps=1, **OPTIONS)
    data = pairs(counts, as_dict)
    fit(Module(TwoInputs(), both, callback.unpack), callback, data, tmp_path, accumulate_grad_batches=len(counts))
    assert callback.last_report.input_shape == (4,)
    model, (inputs, targets) = callback.at, next(iter(data))
    known, picture = inputs.values() if as_dict else inputs
    # The first batch's examples only, in the gradient times the number of batches, as the callback measures them.
    found = measures(lambda leaf: double_backward(model, both(model(known, leaf), targets)), picture, callback.delta, 2)
    count = len(counts)
    assert logged(tmp_path, "lambda_max") == pytest.approx([found[1] / count**2], rel=1e-4)
    assert logged(tmp_path, "influence_lower_bound") == pytest.approx([found[0] * count], rel=1e-3)


def test_a_private_input_that_is_not_there_is_said_before_the_first_step():
    callback = GradGuard(Guard(attacks=(), private="image"), model="model")
    with pytest.raises(InputError, match="names no floating-point tensor"):
        fit(Module(TwoInputs(), both, callback.unpack), callback, pairs((4,), True))
    assert callback.steps == 0


# ---------------------------------------------------------------------- as sent


def convnet(drop=0.5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Dropout(drop),
        nn.Flatten(),
        nn.Linear(27, 10),
    ).double()


class Pictures(Module):
    """Draws random numbers before its forward pass, as augmentation does."""

    def training_step(self, batch):
        torch.rand(7)
        inputs, targets = self.unpack(batch)
        return self.loss_fn(self.model(inputs), targets)


def digit_batches(count=1):
    found = digits()
    rows = [(found.images[4 * i : 4 * i + 4].double(), found.labels[4 * i : 4 * i + 4]) for i in range(count)]
    return DataLoader(rows, batch_size=None)


def test_the_steps_own_masks_and_statistics_are_measured(tmp_path):
    state = {}

    class Watched(Pictures):
        def training_step(self, batch):
            state["before"] = torch.get_rng_state()
            return super().training_step(batch)

    guard = Guard(defense=GaussianNoise(noise_ratio=0.3), attacks=(), train_mode="as sent")
    callback = Kept(guard, **OPTIONS)
    data = digit_batches()
    fit(Watched(convnet(), nn.CrossEntropyLoss(), callback.unpack), callback, data, tmp_path)
    inputs, targets = next(iter(data))
    model = callback.at

    def gradient_of(leaf):
        torch.set_rng_state(state["before"])
        torch.rand(7)
        return double_backward(model, cross_entropy(model(leaf), targets))

    assert model.training
    for name, own in gradient_of(inputs.clone().requires_grad_()).items():
        torch.testing.assert_close(own.detach(), callback.bare[name])
    bound, largest = measures(gradient_of, inputs, callback.delta, 2)
    assert logged(tmp_path, "lambda_max") == pytest.approx([largest], rel=1e-4)
    assert logged(tmp_path, "influence_lower_bound") == pytest.approx([bound], rel=1e-3)


def test_a_prior_and_a_verification_of_the_steps_own_gradient():
    guard = Guard(defense=PriorNoise(noise_ratio=0.3), attacks=(), train_mode="as sent")
    callback = Kept(guard, verify_every_n_steps=1, every_n_steps=1, model="model")
    module = Pictures(convnet(), nn.CrossEntropyLoss(), callback.unpack)
    fit(module, callback, digit_batches(3), max_steps=3)
    assert callback.steps == 3
    # The audit's true gradient is the step's: its length is that of what the step computed.
    length = torch.cat([g.flatten() for g in callback.bare.values()]).norm().item()
    assert callback.last_report.gradient_norm == pytest.approx(length, rel=1e-6)
    assert callback.last_report.noise_ratio == pytest.approx(0.3, rel=1e-2)
    assert not module.model._forward_pre_hooks


@pytest.mark.parametrize("defense", [GaussianNoise(noise_ratio=0.3), PriorNoise(noise_ratio=0.3)])
def test_a_step_that_is_not_the_measured_one_is_an_error_by_name(defense):
    class Twice(Pictures):
        def training_step(self, batch):
            with torch.enable_grad():
                self.model(batch[0])  # its masks are the ones that are taken
            return super().training_step(batch)

    callback = GradGuard(Guard(defense=defense, attacks=(), train_mode="as sent"), every_n_steps=1, model="model")
    with pytest.raises(InputError, match=r"step's gradient differs by .*as sent"):
        fit(Twice(convnet(), nn.CrossEntropyLoss(), callback.unpack), callback, digit_batches())


def test_a_step_of_several_batches_as_sent_is_refused():
    callback = GradGuard(Guard(attacks=(), train_mode="as sent"), model="model")
    module = Pictures(convnet(), nn.CrossEntropyLoss(), callback.unpack)
    with pytest.raises(InputError, match="this step accumulates several"):
        fit(module, callback, digit_batches(2), accumulate_grad_batches=2)


# ---------------------------------------------------------------------- optimisers at different cadences


@pytest.mark.parametrize("zero", ["no", "none", "in place"])
def test_optimisers_that_step_at_different_cadences(zero):
    """Refused where one's gradient holds older batches; fine where it was set to zero in between."""

    class Two(Pictures):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.model[i].parameters(), lr=0.1) for i in (0, 5)]

        def training_step(self, batch, index):
            often, seldom = self.optimizers()
            if zero != "no":
                seldom.zero_grad(set_to_none=zero == "none")
            self.manual_backward(super().training_step(batch))
            often.step()
            often.zero_grad()
            if index % 2:
                seldom.step()
                seldom.zero_grad()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), *[nn.Tanh()] * 3, nn.Flatten(), nn.Linear(27, 10)).double()
    callback = GradGuard(Guard(defense=GaussianNoise(std=1e-3), attacks=()), model="model")
    module = Two(model, nn.CrossEntropyLoss(), callback.unpack)
    if zero == "no":
        with pytest.raises(InputError, match="different cadences"):
            fit(module, callback, digit_batches(4), max_steps=-1, max_epochs=1)
    else:
        fit(module, callback, digit_batches(4), max_steps=-1, max_epochs=1)
        assert callback.steps >= 4
