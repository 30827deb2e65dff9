"""Gathers what report.html shows of a finished run. Its imports are slow: import it at the end."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import safetensors.torch

from trainer.config import Config
from trainer.errors import RunError
from trainer.phases import build_phases
from trainer.phases.stages import stages
from trainer.report.distributions import Distribution, distributions
from trainer.report.page import page
from trainer.store.checkpoints import Checkpoints
from trainer.store.directory import RunDirectory


def write_page(
    summary: Mapping[str, Any], cfg: Config, directory: RunDirectory, say: Callable[[str], None]
) -> None:
    """Leave report.html; where checkpoints are gone, say so and leave out what they show."""
    checkpoints = Checkpoints(directory.path, cfg.checkpoint.keep)
    try:
        shared = _shared(cfg, checkpoints)
    except RunError as error:
        # The error itself says how to make them anew, which a finished run does not.
        say(f"report.html does not show the weights: {error.__cause__}")
        shared = []
    finally:
        checkpoints.close()
    metrics, config = directory.read_metrics(), directory.read_config()
    directory.write_report(page(summary, metrics, config, shared))


def _shared(cfg: Config, checkpoints: Checkpoints) -> list[Distribution]:
    """The weights before and after sharing; none where nothing was shared that existed before."""
    names = list(cfg.phases)
    found = stages(build_phases(cfg.phases))
    for before, after in pairwise(found):
        if "sharing" in after.made - before.made and (before.phase >= 0 or cfg.init_from):
            ends = [checkpoints.ended(names, stage.phase) for stage in (before, after)]
            return distributions(*map(safetensors.torch.load, ends))
    return []
