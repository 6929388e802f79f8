"""Layers whose products go layer by layer: a registry of module types, one small function each."""

from gradguard.functional.layers import convolution, linear, lookup, normalisation
from gradguard.functional.layers.base import BilinearLayer
from gradguard.functional.layers.registry import LAYERS, LayerEntry, layer_of, register_layer

__all__ = [
    "LAYERS",
    "BilinearLayer",
    "LayerEntry",
    "convolution",
    "layer_of",
    "linear",
    "lookup",
    "normalisation",
    "register_layer",
]
