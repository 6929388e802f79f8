"""Thin adapters of the guard to what people train with. Each is imported by its own name."""
