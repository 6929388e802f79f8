"""Contracts that every layer, attack and defense is given to."""
