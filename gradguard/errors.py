"""The errors that gradguard raises for what a user can mend."""


class InputError(ValueError):
    """Something handed to gradguard cannot be used; the message says what, the rule and the way out."""


class UnsupportedModelError(InputError):
    """A model has a part that a method cannot work with; the message names the module."""


class SeededNoiseWarning(UserWarning):
    """Noise that is to protect comes from a seed: who knows the seed, or tries them all, can subtract the noise."""


class ForeignMessageError(InputError):
    """A message is not of the batch, the weights or the training that it is checked against."""
