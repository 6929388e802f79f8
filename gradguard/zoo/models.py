"""The small networks that the papers attack, for demos, benchmarks and tests. Any `nn.Module` works in their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from gradguard.errors import InputError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
}


def activation_module(name: str) -> nn.Module:
    """The activation of a name.

    Args:
        name: One of `ACTIVATIONS`.

    Returns:
        A new module.

    Raises:
        InputError: If there is no such name.
    """
    if name not in ACTIVATIONS:
        raise InputError(f"`activation` must be one of {sorted(ACTIVATIONS)}, got {name!r}.")
    return ACTIVATIONS[name]()


def uniform_init_(model: nn.Module, bound: float = 0.5) -> nn.Module:
    """DLG's initialisation: every weight and bias uniform on `(-bound, bound)`, in place.

    Args:
        model: The model to initialise.
        bound: The largest absolute value.

    Returns:
        The same model.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-bound, bound)
    return model


def lenet(
    *,
    in_channels: int = 1,
    image_size: int = 28,
    num_classes: int = 10,
    activation: str = "sigmoid",
    channels: int = 12,
) -> nn.Sequential:
    """The LeNet of DLG and I2F: four 5x5 convolutions of 12 channels, the first two with stride 2, and a linear head.

    Weights as PyTorch draws them; the papers' are `uniform_init_(lenet())`.

    Args:
        in_channels: Channels of a picture.
        image_size: Pixels per side.
        num_classes: Outputs `C`.
        activation: One of `ACTIVATIONS`.
        channels: Channels of every convolution.

    Returns:
        Maps `(B, in_channels, image_size, image_size)` to `(B, num_classes)`.
    """
    size = math.ceil(math.ceil(image_size / 2) / 2)
    layers: list[nn.Module] = []
    for index, stride in enumerate((2, 2, 1, 1)):
        layers += [
            nn.Conv2d(in_channels if index == 0 else channels, channels, 5, stride, 2),
            activation_module(activation),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, num_classes))


def fcn(sizes: Sequence[int], *, activation: str = "leaky_relu", bias: bool = False) -> nn.Sequential:
    """A fully connected network. R-GAP's FCN3 is `fcn((784, 1000, 100, 1))`.

    Args:
        sizes: Units of each layer, the input first.
        activation: One of `ACTIVATIONS`; none after the last layer.
        bias: Whether the layers have biases.

    Returns:
        Maps `(B, ...)` with `sizes[0]` elements per example to `(B, sizes[-1])`.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for index, (width_in, width_out) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(width_in, width_out, bias=bias))
        if index < len(sizes) - 2:
            layers.append(activation_module(activation))
    return nn.Sequential(*layers)


def cnn6(
    *, second_channels: int = 36, num_classes: int = 1, head_bias: bool = False, activation: str = "leaky_relu"
) -> nn.Sequential:
    """R-GAP's CNN6 for 32x32 RGB pictures (Zhu & Blaschko 2021); CNN6-d is `cnn6(second_channels=20)`.

    Args:
        second_channels: Channels of the second convolution.
        num_classes: Outputs `C`; 1 for the paper's two classes with a logistic loss.
        head_bias: Whether the last layer has a bias.
        activation: One of `ACTIVATIONS`.

    Returns:
        Maps `(B, 3, 32, 32)` to `(B, num_classes)`.
    """
    plan = [(12, 4, 2, 2), (second_channels, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1)]
    layers: list[nn.Module] = []
    channels = 3
    for out_channels, kernel, stride, padding in plan:
        layers += [
            nn.Conv2d(channels, out_channels, kernel, stride, padding, bias=False),
            activation_module(activation),
        ]
        channels = out_channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3200, num_classes, bias=head_bias))


def digits_convnet(*, num_classes: int = 10, activation: str = "tanh") -> nn.Sequential:
    """The small ConvNet of the demo, for 8x8 grey pictures: two convolutions and a linear head, smooth activations.

    Args:
        num_classes: Outputs `C`.
        activation: One of `ACTIVATIONS`.

    Returns:
        Maps `(B, 1, 8, 8)` to `(B, num_classes)`.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        activation_module(activation),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        activation_module(activation),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )


class Normalised(nn.Module):
    """`(x - mean) / std`, channel by channel, as a model's first layer: inputs then live in [0, 1], PSNR with them.

    Args:
        mean: One number per channel. A buffer, so no gradient of it is sent.
        std: One positive number per channel. A buffer too.

    Raises:
        InputError: If the two differ in length, or a `std` is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise InputError(f"`mean` and `std` must be as long as each other, `std` positive; got {mean} and {std}.")
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, height, width)` to the same."""
        return (x - self.mean) / self.std


def convnet(
    width: int = 64,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    activation: str = "relu",
) -> nn.Sequential:
    """The ConvNet of Inverting Gradients (Geiping et al. 2020), 3x3 convolutions with batch normalisation.

    Eight convolutions of 1, 2, 2, 4, 4, 4, 4 and 4 times `width` channels, a maximum pooling over 3x3 pixels after the
    sixth and the last (32 pixels become 10, then 3), a linear head; ConvNet-64 is `convnet(64)`. The authors' code
    writes nine convolutions down, but two under one name, of which one is built. Call `.eval()` before measuring it: in
    training mode batch normalisation mixes examples.

    Args:
        width: Channels of the first convolution.
        in_channels: Channels of a picture.
        image_size: Pixels per side, at least 9.
        num_classes: Outputs `C`.
        activation: One of `ACTIVATIONS`.

    Returns:
        Maps `(B, in_channels, image_size, image_size)` to `(B, num_classes)`.

    Raises:
        InputError: If `image_size` is too small.
    """
    if image_size < 9:
        raise InputError(f"`image_size` must be at least 9 (two poolings divide it by 3), got {image_size}.")
    layers: list[nn.Module] = []
    channels = in_channels
    for place, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
        layers += [
            nn.Conv2d(channels, factor * width, 3, padding=1),
            nn.BatchNorm2d(factor * width),
            activation_module(activation),
        ]
        channels = factor * width
        layers += [nn.MaxPool2d(3)] if place in (5, 7) else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (image_size // 3 // 3) ** 2, num_classes))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions (or 1x1, 3x3, 1x1 with `expansion` 4) beside a shortcut (He et al. 2016).

    Args:
        width_in: Channels of the input.
        width: Channels inside; the output has `width * expansion`.
        stride: Stride of the block.
        expansion: 1, or 4 for the bottleneck block.
        activation: One of `ACTIVATIONS`.
    """

    def __init__(self, width_in: int, width: int, stride: int, *, expansion: int, activation: str) -> None:
        super().__init__()
        width_out = width * expansion
        plan = [(width_in, width, 3, stride), (width, width, 3, 1)]
        if expansion > 1:
            plan = [(width_in, width, 1, 1), (width, width, 3, stride), (width, width_out, 1, 1)]
        layers: list[nn.Module] = []
        for place, (before, after, kernel, step) in enumerate(plan):
            layers += [nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(after)]
            if place < len(plan) - 1:
                layers.append(activation_module(activation))
        self.residual = nn.Sequential(*layers)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )
        self.activation = activation_module(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`activation(residual(x) + shortcut(x))`."""
        return self.activation(self.residual(x) + self.shortcut(x))


#: Blocks per stage, and how much wider a block's output is than its inside.
_RESNETS: dict[int, tuple[tuple[int, ...], int]] = {
    10: ((1, 1, 1, 1), 1),
    18: ((2, 2, 2, 2), 1),
    34: ((3, 4, 6, 3), 1),
    50: ((3, 4, 6, 3), 4),
    101: ((3, 4, 23, 3), 4),
    152: ((3, 8, 36, 3), 4),
}


def resnet(
    depth: int = 18,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 64,
    activation: str = "relu",
    large_inputs: bool = False,
) -> nn.Sequential:
    """ResNet-`depth` with batch normalisation (He et al. 2016).

    Call `.eval()` before measuring it: in training mode batch normalisation mixes examples.

    Args:
        depth: 10, 18, 34, 50, 101 or 152 layers.
        in_channels: Channels of a picture.
        num_classes: Outputs `C`.
        width: Channels of the first stage (64 in the paper).
        activation: One of `ACTIVATIONS`.
        large_inputs: The ImageNet stem, a 7x7 convolution with stride 2 and a max-pool; by default the CIFAR stem, one
            3x3 convolution.

    Returns:
        Maps `(B, in_channels, height, width)` to `(B, num_classes)`.

    Raises:
        InputError: If there is no such depth.
    """
    if depth not in _RESNETS:
        raise InputError(f"`depth` must be one of {sorted(_RESNETS)}, got {depth}.")
    blocks, expansion = _RESNETS[depth]
    stem: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)]
    if large_inputs:
        stem = [nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)]
    stem += [nn.BatchNorm2d(width), activation_module(activation)]
    if large_inputs:
        stem.append(nn.MaxPool2d(3, 2, 1))
    stages: list[nn.Module] = []
    channels = width
    for stage, count in enumerate(blocks):
        inside = width * 2**stage
        parts: list[nn.Module] = []
        for place in range(count):
            stride = 2 if stage > 0 and place == 0 else 1
            parts.append(ResidualBlock(channels, inside, stride, expansion=expansion, activation=activation))
            channels = inside * expansion
        stages.append(nn.Sequential(*parts))
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


#: Channels of the convolutions; "M" is a maximum pooling.
_VGGS: dict[int, tuple[int | str, ...]] = {
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    13: (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    16: (64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3, "M"),
}


def vgg(
    depth: int = 11,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    activation: str = "relu",
    normalised: bool = False,
) -> nn.Sequential:
    """VGG-`depth` with one linear head (Simonyan & Zisserman 2015): 3x3 convolutions and maximum pooling.

    The head is the one usual for CIFAR, a linear layer on what the five poolings leave of `image_size`, without the
    paper's two layers of 4,096 units.

    Args:
        depth: 11, 13 or 16.
        in_channels: Channels of a picture.
        image_size: Pixels per side, at least 32.
        num_classes: Outputs `C`.
        activation: One of `ACTIVATIONS`.
        normalised: Batch normalisation after each convolution.

    Returns:
        Maps `(B, in_channels, image_size, image_size)` to `(B, num_classes)`.

    Raises:
        InputError: If there is no such depth, or `image_size` is too small.
    """
    if depth not in _VGGS:
        raise InputError(f"`depth` must be one of {sorted(_VGGS)}, got {depth}.")
    if image_size < 32:
        raise InputError(f"`image_size` must be at least 32 (five poolings halve it), got {image_size}.")
    layers: list[nn.Module] = []
    channels = in_channels
    for width in _VGGS[depth]:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        layers += [nn.BatchNorm2d(width)] if normalised else []
        layers.append(activation_module(activation))
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (image_size // 32) ** 2, num_classes))


class CausalSelfAttention(nn.Module):
    """Attention to the tokens so far, with an explicit softmax: it can be differentiated as often as one likes.

    Args:
        width: Elements per token `E`, a multiple of `heads`.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, E)` to the same."""
        length = x.shape[1]
        # (B, heads, T, E / heads), each
        query, key, value = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        attended = scores.masked_fill(later, -math.inf).softmax(-1) @ value
        return self.c_proj(attended.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`: GPT-2's pre-norm block (Radford et al. 2019).

    Args:
        width: Elements per token `E`, a multiple of `heads`.
        heads: Number of heads.
        activation: One of `ACTIVATIONS`.
    """

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), activation_module(activation), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, E)` to the same."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer with GPT-2's module names; see `gpt`.

    Args:
        vocabulary: Number of tokens `V`.
        width: Elements per token `E`, a multiple of `heads`.
        heads: Heads per block.
        layers: Number of blocks.
        context: Longest sequence.
        activation: One of `ACTIVATIONS`.
    """

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, context: int, activation: str) -> None:
        super().__init__()
        self.context = context
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(context, width),
                "h": nn.ModuleList(TransformerBlock(width, heads, activation) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score the token that follows each token.

        Args:
            tokens: Shape `(B, T)`, int64, `T` at most the context.

        Returns:
            Logits `(B, T, V)`.

        Raises:
            InputError: If the sequence is longer than the context.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise InputError(f"The model takes at most {self.context} tokens (`context`), got {length}.")
        positions = torch.arange(length, device=tokens.device)
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](positions)
        for block in self.transformer["h"]:  # type: ignore[attr-defined]
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def gpt(
    vocabulary: int,
    *,
    width: int = 16,
    heads: int = 2,
    layers: int = 2,
    context: int = 16,
    activation: str = "gelu",
    tied: bool = False,
) -> GPT:
    """A small GPT (Radford et al. 2019) without dropout.

    Modules are named as GPT-2's: `transformer.wte` looks tokens up, `transformer.wpe` positions;
    `transformer.h.0.attn.c_attn` and so on; `lm_head`. Weights as PyTorch draws them; embeddings of positions are a
    tenth of the tokens'.

    Args:
        vocabulary: Number of tokens `V`.
        width: Elements per token `E`, a multiple of `heads`.
        heads: Heads per block.
        layers: Number of blocks.
        context: Longest sequence.
        activation: One of `ACTIVATIONS`.
        tied: Whether the head's weight is the table of embeddings.

    Returns:
        Maps tokens `(B, T)` to logits `(B, T, vocabulary)`.

    Raises:
        InputError: If a size is below 1, or `width` is not a multiple of `heads`.
    """
    if vocabulary < 1 or width < 1 or heads < 1 or width % heads:
        raise InputError(
            f"`vocabulary` must be positive and `width` a multiple of `heads`, got {vocabulary}, {width} and {heads}."
        )
    if layers < 1 or context < 1:
        raise InputError(f"`layers` and `context` must be at least 1, got {layers} and {context}.")
    model = GPT(vocabulary, width, heads, layers, context, activation)
    with torch.no_grad():
        model.transformer["wpe"].weight.mul_(0.1)  # type: ignore[operator]
    if tied:
        model.lm_head.weight = model.transformer["wte"].weight  # type: ignore[assignment]
    return model


#: What `gradguard rank --model NAME` knows by name, each with its input shape.
NAMED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": (lenet, (1, 28, 28)),
    "cnn6": (cnn6, (3, 32, 32)),
    "cnn6-d": (lambda: cnn6(second_channels=20), (3, 32, 32)),
    "fcn3": (lambda: fcn((784, 1000, 100, 1)), (1, 28, 28)),
    "digits": (digits_convnet, (1, 8, 8)),
    "vgg11": (vgg, (3, 32, 32)),
    "vgg11-224": (lambda: vgg(image_size=224, num_classes=1000), (3, 224, 224)),
    "convnet64": (convnet, (3, 32, 32)),
    "resnet18": (resnet, (3, 32, 32)),
    "resnet18-224": (lambda: resnet(num_classes=1000, large_inputs=True), (3, 224, 224)),
}
