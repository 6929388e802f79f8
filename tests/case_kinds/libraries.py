"""Models of real libraries and models that are wrapped: transformers, peft, Opacus, Fabric, compiled ones.

Everything is built from configurations; nothing is downloaded. The libraries are imported where they are used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from case_kinds.case import Case, case, labels, pictures

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 1, 7, 0, 0], [3, 8, 2, 9, 0]])


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def convnet():
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))


def small(wrap=lambda m: m, model=mlp):
    inputs = (lambda: torch.rand(3, 4)) if model is mlp else pictures
    return lambda: (wrap(model()), nn.CrossEntropyLoss(), inputs(), labels())


# ---------------------------------------------------------------------- transformers


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=11,
        n_positions=6,
        n_embd=4,
        n_layer=1,
        n_head=2,
        n_inner=6,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    return GPT2LMHeadModel(config)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=4,
            intermediate_size=6,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=8,
        )
    )


def bert(kind="BertForSequenceClassification", **options):
    import transformers

    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=6,
        num_labels=3,
        **options,
    )
    return getattr(transformers, kind)(config)


def vit(**options):
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=6,
            image_size=4,
            patch_size=2,
            num_channels=1,
            num_labels=3,
            **options,
        )
    )


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=2, hidden_sizes=[2, 4], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)


def next_token(outputs, targets):
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def each_token(outputs, targets):
    return F.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())


def scores(outputs, targets):
    return F.cross_entropy(outputs.logits, targets)


def own_loss(outputs, targets):
    return outputs.loss


def language(model, *, masked=False, labels_inside=False, lora=None):
    """A language model on the embeddings of its tokens, under the keys that its tokens have."""

    def make():
        base = model().eval()
        embedded = base.get_input_embeddings()(IDS).detach()
        targets = IDS.masked_fill(IDS == 0, -100)
        inputs = {"input_ids": embedded}
        if masked:
            inputs["attention_mask"] = (IDS > 0).long()
        if labels_inside:
            inputs["labels"] = targets
        built = base if lora is None else lora(base)
        return built.eval(), own_loss if labels_inside else next_token, inputs, targets

    return make


def embedded(model, loss_fn=scores, targets=labels, masked=True, key="inputs_embeds"):
    """A model on embeddings that it takes itself, or in the place of its tokens."""

    def make():
        built = model().eval()
        inputs = {key: built.get_input_embeddings()(IDS).detach()}
        if masked:
            inputs["attention_mask"] = (IDS > 0).long()
        return built, loss_fn, inputs, targets()

    return make


def seen(model, mode="eval", by_name=False):
    def make():
        images = pictures()
        built = model().train(mode == "train")
        return built, scores, {"pixel_values": images} if by_name else images, labels()

    return make


# ---------------------------------------------------------------------- peft


def lora(base, **options):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base, LoraConfig(r=2, **options))


def lora_gpt2(**options):
    return language(gpt2, lora=lambda base: lora(base, target_modules=["c_attn"], fan_in_fan_out=True, **options))


def lora_vit():
    return lora(vit(), target_modules=["q_proj", "v_proj", "query", "value"], init_lora_weights=False)


def lora_mlp():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    return lora(Small(), target_modules=["first", "second"], init_lora_weights=False)


# ---------------------------------------------------------------------- wrappers


def by_fabric(model):
    from lightning.fabric import Fabric

    return Fabric(accelerator="cpu", devices=1).setup(model)


def by_fabric_with_optimizer(model):
    from lightning.fabric import Fabric

    return Fabric(accelerator="cpu", devices=1).setup(model, torch.optim.SGD(model.parameters(), lr=0.1))[0]


def by_opacus(model):
    from opacus import GradSampleModule

    return GradSampleModule(model)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_within(model):
    model[0] = torch.compile(model[0], backend="eager")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


class LightningLike(nn.Module):
    """A model within a model, as a LightningModule holds it."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.criterion = model, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0, 3.0]))

    def forward(self, x):
        return self.model(x)

    def loss(self, outputs, targets):
        return self.criterion(outputs, targets)


def lightning_module():
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = mlp()

        def forward(self, x):
            return self.model(x)

    return Module(), nn.CrossEntropyLoss(), torch.rand(3, 4), labels()


def loss_of_the_model():
    model = LightningLike(mlp())
    return model, model.loss, torch.rand(3, 4), labels()


def wrapped(name, wrap, model=mlp, *tags):
    return case(name, small(wrap, model), "wrapped", *tags, plain=small(model=model))


TOKENS = {"input_module": "transformer.wte"}
#: Norms, tables of angles and their own losses are computed in float32 whatever the model's dtype: two orders of
#: differentiation differ by float32's rounding.
IN_FLOAT32 = 2e-5

CASES: list[Case] = [
    case("GPT-2", language(gpt2), "transformers", options=TOKENS),
    case("GPT-2, attention mask", language(gpt2, masked=True), "transformers", options=TOKENS),
    case(
        "GPT-2, its own loss",
        language(gpt2, masked=True, labels_inside=True),
        "transformers",
        options=TOKENS,
        tolerance=IN_FLOAT32,
    ),
    case(
        "GPT-2, eager attention",
        language(lambda: gpt2(attn_implementation="eager")),
        "transformers",
        "slow",
        options=TOKENS,
    ),
    case("GPT-2 by inputs_embeds", embedded(gpt2, each_token, lambda: IDS), "transformers"),
    case(
        "Llama",
        language(llama, masked=True),
        "transformers",
        options={"input_module": "model.embed_tokens"},
        tolerance=IN_FLOAT32,
    ),
    case("BERT by inputs_embeds", embedded(bert), "transformers"),
    case(
        "BERT by input_module",
        embedded(bert, key="input_ids"),
        "transformers",
        options={"input_module": "bert.embeddings.word_embeddings"},
    ),
    case(
        "BERT for tokens",
        embedded(lambda: bert("BertForTokenClassification"), each_token, lambda: IDS % 3),
        "transformers",
    ),
    case(
        "BERT in train",
        lambda: ((m := embedded(bert)())[0].train(), *m[1:]),
        "transformers",
        refused="(?i)dropout",
    ),
    case("ViT", seen(vit), "transformers"),
    case("ViT by name", seen(vit, by_name=True), "transformers", "slow"),
    case(
        "ViT in train without dropout",
        seen(lambda: vit(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), mode="train"),
        "transformers",
    ),
    case("ResNet", seen(resnet), "transformers"),
    case("ResNet in train", seen(resnet, mode="train"), "transformers", refused="(?i)batchnorm"),
    case(
        "LoRA on GPT-2",
        lora_gpt2(init_lora_weights=False),
        "peft",
        options={"input_module": "base_model.model.transformer.wte"},
    ),
    case(
        "LoRA on GPT-2, fresh",
        lora_gpt2(),
        "peft",
        options={"input_module": "base_model.model.transformer.wte"},
    ),
    case("LoRA on ViT", seen(lora_vit), "peft"),
    case("LoRA on an MLP", lambda: (lora_mlp(), nn.CrossEntropyLoss(), torch.rand(3, 4), labels()), "peft"),
    wrapped("Fabric", by_fabric),
    wrapped("Fabric with an optimiser", by_fabric_with_optimizer),
    wrapped("DataParallel", nn.DataParallel),
    wrapped("Opacus GradSampleModule", by_opacus),
    wrapped("Opacus GradSampleModule, convolution", by_opacus, convnet),
    wrapped("torch.compile", compiled),
    wrapped("torch.compile, convolution", compiled, convnet),
    wrapped("model.compile()", compiled_in_place),
    wrapped("a compiled submodule", compiled_within),
    wrapped("a compiled forward", compiled_forward),
    case("torch.jit.script", small(torch.jit.script, mlp), "wrapped", refused=r"torch\.jit"),
    case("LightningModule", lightning_module, "wrapped"),
    case("a loss that is the model's method", loss_of_the_model, "wrapped"),
]
