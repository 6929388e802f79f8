"""Gradient matching: the engine of DLG and its descendants, and its parts."""
