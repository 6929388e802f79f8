"""Layers through which a gradient is taken layer by layer."""
