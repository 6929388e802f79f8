"""The errors that gradguard raises for what a user can mend."""


class InputError(ValueError):
    """Something handed to gradguard cannot be used; the message says what, the rule and the way out."""


class UnsupportedModelError(InputError):
    """A model has a part that a method cannot work with; the message names the module."""


class ForeignMessageError(InputError):
    """A message is not of the batch, the weights or the training that it is checked against."""
