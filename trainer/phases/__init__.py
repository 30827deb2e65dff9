"""Phases of a run: train, prune, retrain, share, quantize, or a phase of your own."""

from trainer.phases.auto_prune import AutoPrune
from trainer.phases.base import Evaluate, Phase, RoundPhase, StructuralPhase
from trainer.phases.entropy import EntropyPenalty
from trainer.phases.entropy_round import EntropyRound
from trainer.phases.prune import Prune
from trainer.phases.quantize import Quantize
from trainer.phases.retrain import Retrain
from trainer.phases.share import Share
from trainer.phases.structured_prune import StructuredPrune
from trainer.phases.train import Train

__all__ = [
    "AutoPrune",
    "EntropyPenalty",
    "EntropyRound",
    "Evaluate",
    "Phase",
    "Prune",
    "Quantize",
    "Retrain",
    "RoundPhase",
    "Share",
    "StructuralPhase",
    "StructuredPrune",
    "Train",
]
