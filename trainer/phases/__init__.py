"""What training may do to a model: train, prune, retrain, share, quantize, or your own."""

from trainer.phases.base import Phase
from trainer.phases.build import build_phases, check_order
from trainer.phases.prune import Prune
from trainer.phases.quantize import Quantize
from trainer.phases.retrain import Retrain
from trainer.phases.share import Share
from trainer.phases.train import Train

__all__ = ["Phase", "Prune", "Quantize", "Retrain", "Share", "Train", "build_phases", "check_order"]
