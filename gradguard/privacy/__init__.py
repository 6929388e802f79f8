"""Privacy in (epsilon, delta): accountants from libraries behind one protocol, and totals per example over rounds."""

from gradguard.privacy.accountants import (
    Accountant,
    OpacusAccountant,
    StreamAccountant,
    epsilon,
    noise_multiplier_for,
)
from gradguard.privacy.ledger import BudgetExhaustedError, PrivacyLedger

__all__ = [
    "Accountant",
    "BudgetExhaustedError",
    "OpacusAccountant",
    "PrivacyLedger",
    "StreamAccountant",
    "epsilon",
    "noise_multiplier_for",
]
