"""A model as a chain of layers: `z = W patches(x) + b`, an elementwise activation, a reshape, and so on.

What R-GAP and the rank analysis walk along. The model is traced with `torch.fx`, so nested `nn.Sequential` and a plain
`forward` that calls its submodules one after another both work; a model that is not a chain is refused by the name of
the module that breaks it. Source: Zhu & Blaschko 2021 (arXiv 2010.07733), section 3.
"""

from gradguard.chain.activation import Activation, Shape
from gradguard.chain.rewiring import Rewire
from gradguard.chain.sequence import Chain, Graph, all_parameters
from gradguard.chain.steps import (
    Affine,
    ChannelScale,
    MaxPool,
    MeanPool,
    Reshape,
    Residual,
    Step,
    Sum,
    Tail,
)
from gradguard.chain.system import LayerSystem, few_threads
from gradguard.chain.walk import walk, walk_graph

__all__ = [
    "Activation",
    "Affine",
    "Chain",
    "ChannelScale",
    "Graph",
    "LayerSystem",
    "MaxPool",
    "MeanPool",
    "Reshape",
    "Residual",
    "Rewire",
    "Shape",
    "Step",
    "Sum",
    "Tail",
    "all_parameters",
    "few_threads",
    "walk",
    "walk_graph",
]
