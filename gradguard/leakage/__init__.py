"""Numbers about what leaks: influence and its bound, the spectrum of `J J^T`, ranks, labels, reconstruction quality."""

from gradguard.leakage.fidelity import Fidelity, fidelity
from gradguard.leakage.influence import Influence, InfluenceBound, influence, influence_lower_bound
from gradguard.leakage.labels import LabelRecovery, count_labels, label_recovery
from gradguard.leakage.rank import LayerRank, RankAnalysis, rank_analysis
from gradguard.leakage.spectrum import Spectrum, spectrum

__all__ = [
    "Fidelity",
    "Influence",
    "InfluenceBound",
    "LabelRecovery",
    "LayerRank",
    "RankAnalysis",
    "Spectrum",
    "count_labels",
    "fidelity",
    "influence",
    "influence_lower_bound",
    "label_recovery",
    "rank_analysis",
    "spectrum",
]
