"""Numbers about what leaks: influence and its bound, the spectrum of `J J^T`, floors under an attacker's error, ranks,
labels, reconstruction quality."""

from gradguard.leakage.advice import Advice, advice, advised
from gradguard.leakage.fidelity import Fidelity, fidelity, mean_picture_psnr
from gradguard.leakage.floors import Floor, bayes_floor, cramer_rao_floor
from gradguard.leakage.influence import Influence, InfluenceBound, influence, influence_lower_bound
from gradguard.leakage.labels import LabelRecovery, count_labels, label_recovery
from gradguard.leakage.rank import LayerRank, RankAnalysis, RankCheck, rank_analysis, rank_check
from gradguard.leakage.spectrum import SpectralDensity, Spectrum, spectral_density, spectrum
from gradguard.leakage.streams import effective_std, stream_floor, stream_precision

__all__ = [
    "Advice",
    "Fidelity",
    "Floor",
    "Influence",
    "InfluenceBound",
    "LabelRecovery",
    "LayerRank",
    "RankAnalysis",
    "RankCheck",
    "SpectralDensity",
    "Spectrum",
    "advice",
    "advised",
    "bayes_floor",
    "count_labels",
    "cramer_rao_floor",
    "effective_std",
    "fidelity",
    "influence",
    "influence_lower_bound",
    "label_recovery",
    "mean_picture_psnr",
    "rank_analysis",
    "rank_check",
    "spectral_density",
    "spectrum",
    "stream_floor",
    "stream_precision",
]
