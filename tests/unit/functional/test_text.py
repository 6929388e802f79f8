import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from gradguard import InputError, InputJacobian, LossGradient, UnsupportedModelError
from gradguard.attacks import DLG, Observation
from gradguard.functional.checks import check_labels
from gradguard.functional.vectors import add, flatten
from gradguard.leakage import influence, influence_lower_bound
from gradguard.zoo.models import gpt
from gradguard.zoo.text import (
    Characters,
    centred,
    decode,
    last_token_loss,
    nearest_neighbour_distance,
    next_token_loss,
    sample_text,
    token_recovery,
    tokens_in_gradient,
    windows,
)
from references import dense_influence

TEXT = sample_text()
CHARACTERS = Characters.of(TEXT)
TOKENS = CHARACTERS.encode(TEXT)


def model_of(tied=False, width=8, layers=2):
    torch.manual_seed(0)
    return gpt(len(CHARACTERS), width=width, layers=layers, context=8, tied=tied).double()


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    return model_of(request.param)


@pytest.fixture
def text_batch():
    return windows(TOKENS, 5, 3, generator=torch.Generator().manual_seed(0))


def gradient_of(model, loss_fn=next_token_loss, **options):
    return LossGradient(model, loss_fn, input_module="transformer.wte", **options)


def from_embeddings(model, embeddings):
    """The model after its lookup, written out: no hook, no placeholder."""
    parts, positions = model.transformer, torch.arange(embeddings.shape[1])
    x = embeddings + parts["wpe"](positions)
    for block in parts["h"]:
        x = block(x)
    return model.lm_head(parts["ln_f"](x))


def dense_reference(model, loss_fn, embeddings, targets):
    """`d^2 l / d embeddings d parameters` by double backward."""
    embeddings = embeddings.clone().requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    (by_input,) = torch.autograd.grad(
        loss_fn(from_embeddings(model, embeddings), targets), embeddings, create_graph=True
    )
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(element, parameters, retain_graph=True, materialize_grads=True)]
        )
        for element in by_input.flatten()
    ]
    return torch.stack(rows)


# ---------------------------------------------------------------------- the input module


def test_the_gradient_is_that_of_the_model_after_its_lookup(model, text_batch):
    tokens, targets = text_batch
    gradient = gradient_of(model)
    embeddings = gradient.embed(tokens)
    assert torch.equal(embeddings, model.transformer["wte"].weight[tokens])
    loss = next_token_loss(from_embeddings(model, embeddings), targets)
    expected = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    torch.testing.assert_close(flatten(gradient(embeddings, targets)), torch.cat([g.flatten() for g in expected]))


def test_tied_weights_keep_the_heads_share_only(text_batch):
    tokens, targets = text_batch
    shares = {}
    for tied in (False, True):
        gradient = gradient_of(model_of(tied))
        shares[tied] = gradient(gradient.embed(tokens), targets)
    assert not shares[False]["transformer.wte.weight"].any()
    assert "lm_head.weight" not in shares[True]
    assert shares[True]["transformer.wte.weight"].any()


def test_nothing_is_left_on_the_model(model, text_batch):
    gradient, before = gradient_of(model), {n: p.clone() for n, p in model.state_dict().items()}
    InputJacobian(gradient, gradient.embed(text_batch[0]), text_batch[1]).gram(
        torch.ones(*text_batch[0].shape, 8, dtype=torch.float64)
    )
    with pytest.raises(InputError):
        gradient(torch.zeros(1, 99, 8, dtype=torch.float64), torch.zeros(1, 99, dtype=torch.int64))
    assert all("forward" not in vars(m) and not m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_a_forward_that_someone_replaced_comes_back(text_batch):
    model = model_of()
    table = model.transformer["wte"]

    def doubled(tokens):
        return 2 * F.embedding(tokens, table.weight)

    table.forward = doubled
    embeddings = gradient_of(model).embed(text_batch[0])
    torch.testing.assert_close(embeddings, 2 * table.weight[text_batch[0]])
    assert table.forward is doubled


def test_another_dtype_keeps_the_input_module(text_batch):
    gradient = gradient_of(model_of().float())
    double = gradient.with_dtype(torch.float64)
    assert double.input_module == "transformer.wte"
    assert double.embed(text_batch[0]).dtype == torch.float64
    assert "transformer.wte" in repr(gradient)
    jacobian = InputJacobian(gradient, gradient.embed(text_batch[0]), text_batch[1]).in_dtype(torch.float64)
    assert jacobian.dense().dtype == torch.float64


def test_third_derivatives_through_vmap(model, text_batch):
    """What gradient matching differentiates: `d |g(x) - s|^2 / dx`, against finite differences."""
    tokens, targets = text_batch
    gradient = gradient_of(model)
    parameters = gradient.parameters()
    embeddings = gradient.embed(tokens)[:, None]

    def objective(x, y):
        return flatten(grad(gradient.loss)(parameters, x, y)).square().sum()

    direction = torch.randn(embeddings.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slope = (vmap(grad(objective))(embeddings, targets[:, None]) * direction).flatten(1).sum(1)
    ends = [vmap(objective)(embeddings + h * direction, targets[:, None]) for h in (1e-5, -1e-5)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------------- the Jacobian


@pytest.mark.parametrize("loss_fn", [next_token_loss, last_token_loss])
def test_products_layer_by_layer_are_the_dense_ones(model, text_batch, loss_fn):
    tokens, targets = text_batch
    targets = targets if loss_fn is next_token_loss else targets[:, -1]
    gradient = gradient_of(model, loss_fn)
    embeddings = gradient.embed(tokens)
    jacobian = InputJacobian(gradient, embeddings, targets)
    assert jacobian.way == "layer by layer"
    reference = torch.stack(
        [dense_reference(model, loss_fn, x[None], y[None]) for x, y in zip(embeddings, targets, strict=True)]
    ) / len(embeddings)
    torch.testing.assert_close(jacobian.dense(), reference, rtol=1e-9, atol=1e-12)
    u = torch.randn(embeddings.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        flatten(jacobian.rmatvec(u), 1), torch.einsum("rnp,rn->rp", reference, u.flatten(1)), rtol=1e-9, atol=1e-12
    )
    gram = torch.einsum("rnp,rmp,rm->rn", reference, reference, u.flatten(1))
    torch.testing.assert_close(jacobian.gram(u).flatten(1), gram, rtol=1e-9, atol=1e-12)


def test_products_agree_with_torch_func(model, text_batch):
    gradient = gradient_of(model)
    embeddings = gradient.embed(text_batch[0])
    fast, slow = (InputJacobian(gradient, embeddings, text_batch[1]) for _ in range(2))
    slow.way = "forward over reverse"
    draw = torch.Generator().manual_seed(3)
    u = torch.randn(embeddings.shape, dtype=torch.float64, generator=draw)
    delta = {n: torch.randn(p.shape, dtype=torch.float64, generator=draw) for n, p in fast.parameters.items()}
    assert fast.way == "layer by layer"
    torch.testing.assert_close(flatten(fast.rmatvec(u), 1), flatten(slow.rmatvec(u), 1))
    torch.testing.assert_close(fast.matvec(delta), slow.matvec(delta))
    torch.testing.assert_close(fast.gram(u), slow.gram(u))


def test_the_lookup_is_not_in_the_jacobian(text_batch):
    gradient = gradient_of(model_of())
    jacobian = InputJacobian(gradient, gradient.embed(text_batch[0]), text_batch[1])
    assert "transformer.wte.weight" in jacobian.parameters
    image = jacobian.rmatvec(jacobian.inputs.cos())
    assert not image["transformer.wte.weight"].any()


def test_the_mean_of_an_embedding_is_not_seen(text_batch):
    gradient = gradient_of(model_of())
    jacobian = InputJacobian(gradient, gradient.embed(text_batch[0])[:1], text_batch[1][:1])
    values = torch.linalg.svdvals(jacobian.dense()[0])
    assert (values < 1e-10 * values[0]).sum() == 5  # one for each position
    shift = torch.randn(1, 5, 1, dtype=torch.float64).expand(1, 5, 8)
    assert flatten(jacobian.rmatvec(shift)).norm() < 1e-10 * values[0]


def test_influence_is_the_dense_formula(text_batch):
    gradient = gradient_of(model_of(width=4))
    inputs, targets = gradient.embed(text_batch[0])[:1], text_batch[1][:1]
    jacobian = InputJacobian(gradient, inputs, targets)
    draw = torch.Generator().manual_seed(4)
    delta = {n: torch.randn(p.shape, dtype=torch.float64, generator=draw) for n, p in jacobian.parameters.items()}
    found = influence(jacobian, delta, damping=1e-3)
    reference = dense_influence(dense_reference(gradient.model, next_token_loss, inputs, targets), flatten(delta), 1e-3)
    torch.testing.assert_close(found.displacement.flatten(), reference, rtol=1e-6, atol=1e-9)
    plain = influence(jacobian, delta)
    torch.testing.assert_close(plain.displacement, centred(plain.displacement), rtol=1e-6, atol=1e-9)
    assert influence_lower_bound(jacobian, delta).value <= plain.value


# ---------------------------------------------------------------------- refusals


def test_a_module_that_is_not_there_is_refused_with_close_names():
    with pytest.raises(InputError, match=r"no module 'transformer.wt'; there are \['transformer.wte'"):
        LossGradient(model_of(), next_token_loss, input_module="transformer.wt")


def test_tokens_are_refused_with_the_way_out(text_batch):
    with pytest.raises(InputError, match=r"pass `gradient.embed\(tokens\)`"):
        gradient_of(model_of())(*text_batch)
    plain = LossGradient(model_of(), next_token_loss)
    with pytest.raises(InputError, match="input_module"):
        plain(*text_batch)
    with pytest.raises(InputError, match="input_module"):
        plain.embed(text_batch[0])


@pytest.mark.parametrize(("shape", "message"), [((3, 5), "got shape"), ((3, 5, 1), "E = 8, got E = 1")])
def test_other_shapes_are_refused(text_batch, shape, message):
    with pytest.raises(InputError, match=message):
        gradient_of(model_of())(torch.zeros(shape, dtype=torch.float64), text_batch[1])


def test_no_tokens_are_refused():
    with pytest.raises(InputError, match=r"must be integers \(B, T\)"):
        gradient_of(model_of()).embed(torch.zeros(1, 5))


class Peculiar(nn.Module):
    """Looks tokens up once, twice, not at all, or elsewhere, too."""

    def __init__(self, how):
        super().__init__()
        self.how, self.table, self.unused, self.head = how, nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, tokens):
        x = self.table(tokens)
        if self.how == "twice":
            x = x + self.table(tokens)
        if self.how == "masked":
            x = x * (tokens != 0)[..., None]
        return self.head(torch.tanh(x))


@pytest.mark.parametrize(
    ("how", "name", "message"),
    [
        ("once", "unused", "'unused' is called never"),
        ("twice", "table", "'table' is called 2 times"),
        ("masked", "table", "looks at its tokens beside 'table'"),
    ],
)
def test_models_that_do_not_look_up_once_are_refused(how, name, message):
    gradient = LossGradient(Peculiar(how), next_token_loss, input_module=name)
    with pytest.raises(UnsupportedModelError, match=message):
        gradient.embed(torch.tensor([[3, 4]]))
    if how != "masked":
        with pytest.raises(UnsupportedModelError, match=message):
            gradient(torch.zeros(1, 2, 4), torch.tensor([[1, 2]]))


def test_outputs_of_another_shape_are_refused():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 9))
    tokens = torch.tensor([[3, 4]])
    with pytest.raises(UnsupportedModelError, match=r"into \(1, 8\); it must be \(B, T, E\)"):
        LossGradient(model, nn.CrossEntropyLoss(), input_module="1").embed(tokens)
    gradient = LossGradient(model, nn.CrossEntropyLoss(), input_module="0")
    assert gradient.embed(tokens).shape == (1, 2, 4)


def test_labels_are_checked_on_either_axis():
    scores = torch.zeros(2, 3, 7)  # (B, T, V), or (B, C, positions)
    check_labels(scores, torch.full((2, 3), 6), next_token_loss)
    with pytest.raises(InputError, match="Label 7 is out of range: the model has 7 outputs"):
        check_labels(scores, torch.full((2, 3), 7), next_token_loss)
    with pytest.raises(InputError, match="Label 3 is out of range: the model has 3 outputs"):
        check_labels(scores, torch.full((2, 7), 3), F.cross_entropy)


# ---------------------------------------------------------------------- the attack


def test_dlg_finds_the_text_and_lands_where_influence_says(text_batch):
    gradient = gradient_of(model_of(layers=1), dtype=torch.float64)
    tokens, targets = text_batch[0][:1], text_batch[1][:1]
    x = gradient.embed(tokens)
    table = centred(gradient.model.transformer["wte"].weight)
    jacobian, true = InputJacobian(gradient, x, targets), gradient(x, targets)
    draw = torch.Generator().manual_seed(5)
    delta = {n: torch.randn(g.shape, dtype=torch.float64, generator=draw) for n, g in true.items()}
    scale = 0.02 * nearest_neighbour_distance(table).median() / influence(jacobian, delta).value
    delta = {n: scale * d for n, d in delta.items()}
    attack = DLG(restarts=4, polish=20)
    for sent, expected in ((true, 0.0), (add(true, delta), influence(jacobian, delta).value.item())):
        seen = Observation(loss_gradient=gradient, sent=sent, input_shape=x.shape[1:], labels=targets, value_range=None)
        found = attack(seen, generator=torch.Generator().manual_seed(0)).inputs
        assert centred(found - x).norm().item() == pytest.approx(expected, rel=0.1, abs=1e-6)
        assert token_recovery(decode(centred(found), table), tokens) == 1


# ---------------------------------------------------------------------- tokens and text


def test_sample_text_is_prose():
    assert 15_000 < len(TEXT) < 40_000
    assert set(TEXT) <= set(" abcdefghijklmnopqrstuvwxyz0123456789.,'-")
    assert " the " in TEXT
    assert CHARACTERS.decode(TOKENS) == TEXT


def test_unknown_characters_are_refused():
    with pytest.raises(InputError, match=r"no token for \['X'\]"):
        CHARACTERS.encode("aXa")


def test_windows_are_followed_by_their_targets():
    inputs, targets = windows(torch.arange(50), 6, 10, generator=torch.Generator().manual_seed(0))
    assert inputs.shape == (10, 6)
    assert torch.equal(inputs + 1, targets)
    with pytest.raises(InputError, match="more than `length`"):
        windows(torch.arange(6), 6, 1)


def test_losses_are_cross_entropies_written_out():
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    rows = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(next_token_loss(logits, targets), rows.mean())
    torch.testing.assert_close(next_token_loss(logits, F.one_hot(targets, 5).float()), rows.mean())
    torch.testing.assert_close(last_token_loss(logits, targets[:, -1]), rows[:, -1].mean())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_decoding_is_the_nearest_row(metric):
    draw = torch.Generator().manual_seed(0)
    table, points = torch.randn(20, 6, generator=draw), torch.randn(2, 4, 6, generator=draw)
    found = decode(points, table, metric=metric)
    for b in range(2):
        for t in range(4):
            if metric == "euclidean":
                scores = [-(points[b, t] - row).norm() for row in table]
            else:
                scores = [F.cosine_similarity(points[b, t], row, dim=0) for row in table]
            assert found[b, t] == max(range(20), key=lambda i: scores[i])
    assert torch.equal(decode(table[None], table, metric=metric)[0], torch.arange(20))


def test_decode_refuses_other_widths_and_metrics():
    with pytest.raises(InputError, match="the table's E = 6"):
        decode(torch.zeros(1, 2, 5), torch.zeros(20, 6))
    with pytest.raises(InputError, match="`metric`"):
        decode(torch.zeros(1, 2, 6), torch.zeros(20, 6), metric="manhattan")


def test_half_the_neighbours_distance_is_safe():
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(30, 6, generator=draw, dtype=torch.float64)
    distance = nearest_neighbour_distance(table)
    reference = [min((table[i] - table[j]).norm() for j in range(30) if j != i) for i in range(30)]
    torch.testing.assert_close(distance, torch.stack(reference))
    moved = table + 0.499 * distance[:, None] * F.normalize(torch.randn(table.shape, generator=draw).double(), dim=-1)
    assert token_recovery(decode(moved[None], table), torch.arange(30)[None]) == 1


def test_recovery_counts_places():
    assert token_recovery(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 4, 3]])).tolist() == [0.5]
    with pytest.raises(InputError, match=r"must be \(B, T\)"):
        token_recovery(torch.zeros(2), torch.zeros(2))


def test_the_tables_gradient_names_the_tokens(text_batch):
    tokens, targets = text_batch
    model = model_of()
    next_token_loss(model(tokens), targets).backward()
    rows = model.transformer["wte"].weight.grad
    assert torch.equal(tokens_in_gradient(rows), tokens.unique())
    assert torch.equal(tokens_in_gradient(rows + 1e-9 * rows.norm(), tolerance=1e-3), tokens.unique())
    tied = model_of(tied=True)
    next_token_loss(tied(tokens), targets).backward()
    assert len(tokens_in_gradient(tied.transformer["wte"].weight.grad)) == len(CHARACTERS)


def test_gpt_is_causal_and_takes_forward_derivatives(text_batch):
    model, tokens = model_of(), text_batch[0][:1].clone()
    before = model(tokens)
    tokens[0, -1] = (tokens[0, -1] + 1) % len(CHARACTERS)
    torch.testing.assert_close(model(tokens)[:, :-1], before[:, :-1])
    assert not torch.equal(model(tokens)[:, -1], before[:, -1])
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    change = {n: torch.ones_like(p) for n, p in parameters.items()}
    image = jvp(lambda p: functional_call(model, p, (tokens,)), (parameters,), (change,))[1]
    ends = [functional_call(model, {n: p + h for n, p in parameters.items()}, (tokens,)) for h in (1e-6, -1e-6)]
    torch.testing.assert_close(image, (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"width": 6, "heads": 4}, {"layers": 0}, {"context": 0}])
def test_gpts_that_cannot_be_are_refused(options):
    with pytest.raises(InputError):
        gpt(10, **options)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(InputError, match="at most 8 tokens"):
        model_of()(torch.zeros(1, 9, dtype=torch.int64))
