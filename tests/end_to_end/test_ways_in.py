"""Tokens and structures through the survey, the comparisons and the command line, against plain autograd in float64."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn.functional import cross_entropy

from gradguard import Guard, InputError, LocalTraining, LossGradient, ThreatModel, save_gradient
from gradguard.benchmark import compare, compare_initialisations
from gradguard.cli import main
from gradguard.defenses import GaussianNoise
from gradguard.survey import survey

SOURCE = '''
import torch
from torch import nn
from torch.nn.functional import cross_entropy


class Tagger(nn.Module):
    """Tokens and a mask of whole numbers, the mask first; two heads."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(12, 4), nn.Linear(4, 4)
        self.kind, self.size = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, mask, ids):
        hidden = torch.tanh(self.mix(self.table(ids))) * mask[..., None]
        pooled = hidden.sum(1) / mask.sum(1, keepdim=True)
        return {"kind": self.kind(pooled), "size": self.size(pooled)[:, 0]}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, known, secret):
        return self.head(torch.tanh(self.left(known) + self.right(secret)))


def tagger():
    torch.manual_seed(0)
    return Tagger().double()


def two():
    torch.manual_seed(0)
    return Two().double()


def both(outputs, targets):
    return cross_entropy(outputs["kind"], targets["kind"]) + (outputs["size"] - targets["size"]).square().mean()


def texts():
    torch.manual_seed(1)
    mask = torch.ones(5, 4, dtype=torch.int64)
    mask[1, 3] = mask[2, 2:] = 0
    inputs = {"mask": mask, "ids": torch.randint(12, (5, 4))}
    return inputs, {"size": torch.rand(5).double(), "kind": torch.randint(3, (5,))}


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        inputs, targets = texts()
        return {n: v[index] for n, v in inputs.items()}, {n: v[index] for n, v in targets.items()}


def tuples():
    torch.manual_seed(2)
    return (torch.rand(5, 3).double(), torch.rand(5, 4).double()), torch.randint(3, (5,))


def labelled():
    inputs, labels = tuples()
    return {"secret": inputs[1], "labels": labels, "known": inputs[0]}
'''
WORLD: dict = {"__name__": "client"}
exec(SOURCE, WORLD)  # the same text is the command line's file


def own_measures(model, loss_of, leaf):
    """Of one example: `lambda_max` and `|g|`, by double backward."""
    named = dict(model.named_parameters())
    leaf = leaf.clone().requires_grad_()
    found = torch.autograd.grad(loss_of(leaf), list(named.values()), create_graph=True, allow_unused=True)
    flat = torch.cat([g.flatten() for g in found if g is not None])
    rows = torch.stack([torch.autograd.grad(g, leaf, retain_graph=True)[0].flatten() for g in flat if g.requires_grad])
    return torch.linalg.eigvalsh(rows.T @ rows)[-1].item(), flat.norm().item()


def of_text(model, r):
    inputs, targets = WORLD["texts"]()
    mask, y = inputs["mask"][r : r + 1], {n: v[r : r + 1] for n, v in targets.items()}

    def loss(leaf):
        hidden = torch.tanh(model.mix(leaf)) * mask[..., None]
        pooled = hidden.sum(1) / mask.sum(1, keepdim=True)
        return WORLD["both"]({"kind": model.kind(pooled), "size": model.size(pooled)[:, 0]}, y)

    return own_measures(model, loss, model.table(inputs["ids"][r : r + 1]).detach())


@pytest.mark.parametrize("kind", ["in memory", "items", "loader"])
def test_survey_of_tokens_beside_a_mask(kind):
    data = WORLD["texts"]()
    if kind != "in memory":
        data = WORLD["Items"]()
    if kind == "loader":
        data = torch.utils.data.DataLoader(data, 3)
    model = WORLD["tagger"]()
    found = survey(
        model,
        WORLD["both"],
        data,
        input_module="table",
        value_range=None,
        batch_size=2,
        lanczos_steps=60,
        progress=False,
    )
    assert found.input_shape == (4, 4)
    expected = torch.tensor([of_text(model, r) for r in range(5)], dtype=torch.float64)
    torch.testing.assert_close(found.lambda_max, expected[:, 0], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.gradient_norm, expected[:, 1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("data", ["tuples", "labelled"])
def test_survey_of_a_private_input_that_is_not_the_first(data):
    model, named = WORLD["two"](), data == "labelled"
    found = survey(
        model,
        nn.CrossEntropyLoss(),
        WORLD[data](),
        private="secret" if named else 1,
        lanczos_steps=60,
        progress=False,
    )
    (known, secret), labels = WORLD["tuples"]()

    def loss_of(r):
        return lambda leaf: cross_entropy(model(known[r : r + 1], leaf), labels[r : r + 1])

    expected = [own_measures(model, loss_of(r), secret[r : r + 1]) for r in range(5)]
    torch.testing.assert_close(
        torch.stack([found.lambda_max, found.gradient_norm], 1),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-6,
        atol=1e-12,
    )
    assert found.label.tolist() == labels.tolist()


def test_a_surveys_checkpoint_knows_its_private_input(tmp_path):
    model, file = WORLD["two"](), tmp_path / "survey.safetensors"
    first = survey(
        model, nn.CrossEntropyLoss(), WORLD["tuples"](), private=1, examples=2, checkpoint=file, progress=False
    )
    again = survey(model, nn.CrossEntropyLoss(), WORLD["tuples"](), private=1, checkpoint=file, progress=False)
    assert torch.equal(again.lambda_max[:2], first.lambda_max)
    with pytest.raises(InputError, match="private 1 there"):
        survey(model, nn.CrossEntropyLoss(), WORLD["tuples"](), private=0, checkpoint=file, progress=False)


def test_wrong_names_are_said_before_long_work():
    model, texts = WORLD["tagger"](), WORLD["texts"]()
    for options, match in [
        ({"input_module": "tabel"}, "has no module 'tabel'"),
        ({"input_module": "mix"}, "'mix' turns tokens|'mix'"),
        ({}, "no floating-point tensor"),
    ]:
        with pytest.raises(InputError, match=match):
            survey(model, WORLD["both"], texts, value_range=None, progress=False, **options)
        with pytest.raises(InputError, match=match):
            compare(model, WORLD["both"], *texts, [], attacks=(), threat=ThreatModel(value_range=None), **options)
    with pytest.raises(InputError, match="value_range"):
        survey(model, WORLD["both"], texts, input_module="table", progress=False)


@pytest.mark.parametrize("private", [None, "ids"])
def test_guard_and_compare_take_the_tokens_themselves(private):
    model, (inputs, targets) = WORLD["tagger"](), WORLD["texts"]()
    threat, options = ThreatModel(value_range=None, max_attacked=1), {"input_module": "table", "private": private}
    report = Guard(attacks=(), threat=threat, **options).audit(model, WORLD["both"], inputs, targets)
    assert report.input_shape == (4, 4)
    loss = WORLD["both"](model(**inputs), targets)
    seen = [p for n, p in model.named_parameters() if n != "table.weight"]
    length = torch.cat([g.flatten() for g in torch.autograd.grad(loss, seen)]).norm().item()
    assert report.gradient_norm == pytest.approx(length, rel=1e-9)
    found = compare(
        model, WORLD["both"], inputs, targets, [GaussianNoise(noise_ratio=0.3)], attacks=(), threat=threat, **options
    )
    assert found.rows[0].noise_ratio == 0
    assert found.rows[1].noise_ratio == pytest.approx(0.3, rel=0.2)  # of few parameters: the draw's length varies


def test_initialisations_look_tokens_up_in_their_own_tables():
    inputs, targets = WORLD["texts"]()
    found = compare_initialisations(
        {"tagger": WORLD["tagger"]},
        WORLD["both"],
        inputs,
        targets,
        initialisations=("as built",),
        seeds=(0,),
        input_module="table",
        value_range=None,
    )
    torch.manual_seed(0)
    expected = [of_text(WORLD["tagger"](), r) for r in range(5)]
    assert found.rows[0].gradient_norm == pytest.approx([length for _, length in expected], rel=1e-9)
    assert found.rows[0].lambda_max == pytest.approx([value for value, _ in expected], rel=1e-2)


# ---------------------------------------------------------------------- the command line


@pytest.fixture
def client(tmp_path):
    path = tmp_path / "client.py"
    path.write_text(SOURCE)
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def text_options(client, data="texts"):
    common = ("--model", f"{client}:tagger", "--data", f"{client}:{data}", "--loss", f"{client}:both")
    return (*common, "--input-module", "table", "--value-range", "none", "--attack", "dlg", "--attacked", 1)


@pytest.mark.parametrize("data", ["texts", "Items"])
def test_audit_of_tokens_on_the_command_line(client, data):
    result = run("audit", *text_options(client, data)[:-4], "--attack", "ilrg", "--batch-size", 3, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["input_shape"] == [4, 4]
    model, (inputs, targets) = WORLD["tagger"](), WORLD["texts"]()
    loss = WORLD["both"](model(**{n: v[:3] for n, v in inputs.items()}), {n: v[:3] for n, v in targets.items()})
    seen = [p for n, p in model.named_parameters() if n != "table.weight"]
    length = torch.cat([g.flatten() for g in torch.autograd.grad(loss, seen)]).norm().item()
    assert report["gradient_norm"] == pytest.approx(length, rel=1e-6)


def test_survey_of_tokens_on_the_command_line(client):
    result = run("audit", "--all", *text_options(client, "Items"), "--json")
    assert result.exit_code == 0, result.output


def test_a_private_input_on_the_command_line(client):
    subject = ("--model", f"{client}:two", "--data", f"{client}:labelled", "--attack", "ilrg", "--json")
    shapes = {}
    for private in ("secret", "known"):
        result = run("audit", *subject, "--private", private)
        assert result.exit_code == 0, result.output
        shapes[private] = json.loads(result.output)["input_shape"]
    assert shapes == {"secret": [4], "known": [3]}
    wrong = run("audit", *subject, "--private", "other")
    assert wrong.exit_code == 2
    assert "names no floating-point tensor" in wrong.output
    assert run("audit", *text_options(client)[:6], "--input-module", "tabel").exit_code == 2


def test_check_of_a_gradient_of_tokens(client, tmp_path):
    model, (inputs, targets) = WORLD["tagger"](), WORLD["texts"]()
    WORLD["both"](model(**inputs), targets).backward()
    save_gradient(tmp_path / "own.safetensors", {n: p.grad for n, p in model.named_parameters()})
    noise = ("--defense", "gaussian", "--strength", 2, "--no-verify", "--accept-unproven", "--json")
    result = run("check", tmp_path / "own.safetensors", *text_options(client), *noise)
    found = json.loads(result.output)
    assert "error" not in found, found
    assert found["examples"] == 5
    assert found["explanation"]


def test_check_of_an_update_with_a_proximal_term(client, tmp_path):
    """FedProx: the term is declared, so nothing is left unexplained; without it the update is another."""
    model, ((known, secret), labels) = WORLD["two"](), WORLD["tuples"]()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        prox = sum((p - start[n]).square().sum() for n, p in model.named_parameters())
        (cross_entropy(model(known, secret), labels) + 3.0 / 2 * prox).backward()
        optimizer.step()
    update = {n: p.detach() - start[n] for n, p in model.named_parameters()}
    save_gradient(tmp_path / "update.safetensors", update)
    subject = ("--model", f"{client}:two", "--data", f"{client}:tuples", "--private", 1, "--no-verify", "--json")
    local = ("--update", "--learning-rate", 0.5, "--steps", 4)
    result = run("check", tmp_path / "update.safetensors", *subject, *local, "--proximal", 3.0)
    found = json.loads(result.output.splitlines()[0])
    assert "error" not in found, found
    assert found["looks_like"] in ("update", "gradient"), found
    assert run("check", tmp_path / "update.safetensors", *subject, *local).exit_code == 2
    # A gradient that holds the term names the weights that it starts from.
    refused = run("check", tmp_path / "update.safetensors", *subject, "--proximal", 3.0)
    assert refused.exit_code == 2
    assert "--proximal-start" in refused.output


def test_local_training_on_a_structured_batch():
    model, (inputs, labels) = WORLD["two"](), WORLD["tuples"]()
    function = LossGradient(model, nn.CrossEntropyLoss(), private=1)
    mean = LocalTraining(steps=2, learning_rate=0.1, batch_size=3).mean_gradient(function, inputs, labels)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rows in (slice(0, 3), slice(3, 5)):
        optimizer.zero_grad()
        cross_entropy(model(*(x[rows] for x in inputs)), labels[rows]).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mean[name], (start[name] - parameter.detach()) / 0.2)


def test_tokens_that_cannot_be_told_from_a_mask_are_asked_for_by_name():
    model, (_, targets) = WORLD["tagger"](), WORLD["texts"]()
    same = {"mask": torch.ones(5, 4, dtype=torch.int64), "ids": torch.ones(5, 4, dtype=torch.int64)}
    options = {"attacks": (), "threat": ThreatModel(value_range=None), "input_module": "table"}
    with pytest.raises(InputError, match="`private=`"):
        Guard(**options).audit(model, WORLD["both"], same, targets)
    assert Guard(private="ids", **options).audit(model, WORLD["both"], same, targets).input_shape == (4, 4)
