"""gradguard: what shared gradients give away, less of it, and the proof.

Three ways in: a Lightning callback (`gradguard.integrations.lightning.GradGuard`), a pre-send check (`Guard.protect`,
`gradguard check`) and a benchmark of defenses (`gradguard.benchmark`).
"""

__version__ = "0.1.0"

from gradguard import _moved, attacks, defenses, leakage, linalg
from gradguard.errors import InputError, SeededNoiseWarning, UnsupportedModelError
from gradguard.functional.as_gradient import as_gradient
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.local_training import LocalTraining
from gradguard.functional.loss_gradient import LossGradient, random_state
from gradguard.guard import Guard
from gradguard.policy import Policy
from gradguard.report import LeakageReport, Verdict
from gradguard.storage.files import load_gradient, save_gradient
from gradguard.survey import Survey, survey
from gradguard.threats.model import ThreatModel

__all__ = [
    "Guard",
    "InputError",
    "InputJacobian",
    "LeakageReport",
    "LocalTraining",
    "LossGradient",
    "Policy",
    "SeededNoiseWarning",
    "Survey",
    "ThreatModel",
    "UnsupportedModelError",
    "Verdict",
    "as_gradient",
    "attacks",
    "defenses",
    "leakage",
    "linalg",
    "load_gradient",
    "random_state",
    "save_gradient",
    "survey",
]

_moved.install()
