"""What a run ends with: the artefact, and what the test set says of it and of each stage."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch

from trainer import artifact
from trainer.config import Config
from trainer.messages import Measured, PhaseRecord
from trainer.phases import build_phases
from trainer.phases.stages import Stage, stages
from trainer.report.published import published
from trainer.worker.evaluate import DECODED

_LETTERS = {"zeros": "P", "sharing": "S", "quantization": "Q"}  # pruned, shared, quantized


class Result:
    """The models of one run: what its stages left, and the compressed file made of the last one.

    Attributes:
        artifact: content of the file; empty where none is asked for. Whoever writes it sets this
            to what he reads back: that is what counts.
    """

    def __init__(self, cfg: Config, ended: Callable[[int], bytes], last: PhaseRecord) -> None:
        """Args:
        ended: the weights that a phase left, by its index; -1: those of init_from.
        last: the record of the last phase.
        """
        self._cfg = cfg
        found = stages(build_phases(cfg.phases))
        self._has_baseline = found[0].phase >= 0 or cfg.init_from is not None
        self._stages = found if self._has_baseline else found[1:]
        self._weights = {_label(stage): ended(stage.phase) for stage in self._stages}
        self.artifact = b""
        if cfg.artifact.make:
            self.artifact = artifact.encode(
                dict(sorted(safetensors.torch.load(self.final).items())),
                cfg.artifact.numbers,
                cfg.artifact.coder,
                {
                    "name": cfg.name,
                    "seed": cfg.seed,
                    "model": cfg.model,
                    "validation_accuracy": round(last.accuracy, 6),
                },
            )

    @property
    def dense(self) -> bytes | None:
        """The weights of the dense stage; None where there is none."""
        return self._weights[_label(self._stages[0])] if self._has_baseline else None

    @property
    def final(self) -> bytes:
        """The weights of the last stage."""
        return self._weights[_label(self._stages[-1])]

    def models(self) -> dict[str, bytes]:
        """What to measure, by name: `trainer.worker.evaluate.measure`."""
        if self.artifact:
            return {**self._weights, DECODED: self.artifact}
        ends = {_label(self._stages[0]), _label(self._stages[-1])}
        return {name: content for name, content in self._weights.items() if name in ends}

    def facts(self, tested: Mapping[str, Measured]) -> dict[str, Any]:
        """The entries of summary.json that the test set decides."""
        final = tested[_label(self._stages[-1])]
        facts: dict[str, Any] = {
            "accuracy": final.accuracy,
            "loss": final.loss,
            **self._baseline(tested),
        }
        if self.artifact:
            facts["artifact"] = self._artifact_facts(tested)
        return facts

    def _baseline(self, tested: Mapping[str, Measured]) -> dict[str, float | None]:
        """What the dense stage reaches; None where there is none."""
        if not self._has_baseline:
            return {"baseline_accuracy": None, "baseline_loss": None}
        dense = tested[_label(self._stages[0])]
        return {"baseline_accuracy": dense.accuracy, "baseline_loss": dense.loss}

    def _artifact_facts(self, tested: Mapping[str, Measured]) -> dict[str, Any]:
        described = artifact.describe(self.artifact, max_bytes=sys.maxsize)  # our own file
        literature = published(self._cfg.model, self._cfg.data)
        rows = []
        dense = 0
        for stage in self._stages:
            label = _label(stage)
            weights, told = safetensors.torch.load(self._weights[label]), tested[label]
            dense = dense or 4 * sum(weights[name].numel() for name in told.parameters)
            if not stage.made:
                rows.append((label, dense, told))
                continue
            size = artifact.published_size(weights, told.parameters)
            rows.append((label, size.plain, told))
            if stage is self._stages[-1]:
                rows.append((f"{label}+H (Han's format)", size.coded, told))
        rows.append(("model.dcz", len(self.artifact), tested[DECODED]))
        return {
            "path": "model.dcz",
            "bytes": len(self.artifact),
            "dense_bytes": dense,
            "ratio": dense / len(self.artifact),
            "accuracy": tested[DECODED].accuracy,
            "loss": tested[DECODED].loss,
            **self._baseline(tested),
            "stages": [
                {
                    "name": name,
                    "bytes": size,
                    "ratio": dense / size,
                    "accuracy": measured.accuracy,
                    "loss": measured.loss,
                    "published": literature.get(name),
                }
                for name, size, measured in rows
            ],
            "layers": described.layers,
            "frame_bytes": described.frame,
        }


def _label(stage: Stage) -> str:
    letters = [_LETTERS.get(what, what) for what in sorted(stage.made, key=_order)]
    return "+".join(letters) or "dense"


def _order(what: str) -> tuple[int, str]:
    known = list(_LETTERS)
    return (known.index(what) if what in known else len(known), what)
