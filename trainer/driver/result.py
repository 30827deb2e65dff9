"""Results of a run: the compressed file, and test metrics of each stage and of the file."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from trainer import artifact
from trainer.experiment import Experiment, Stage, encode_artifact
from trainer.messages import Evaluated, PhaseRecord
from trainer.report.published import published
from trainer.store.serialization import from_bytes
from trainer.worker.evaluate import DECODED

_LETTERS = {"structure": "C", "zeros": "P", "sharing": "S", "quantization": "Q"}
"""Names of stages in tables: channels removed, pruned, shared, quantized."""


class FinalModels:
    """The models of one run: the weights after each stage, and the compressed file.

    Attributes:
        artifact: Content of the file; empty if none is made. The driver replaces it by the
            content that it reads back from the disk, so that this is evaluated.
    """

    def __init__(
        self, experiment: Experiment, saved: Callable[[int], bytes], last: PhaseRecord
    ) -> None:
        """
        Args:
            experiment: The experiment.
            saved: Returns the weights that a phase left, by its index; -1 for the initial ones.
            last: Record of the last phase.
        """
        self._experiment = experiment
        stages = experiment.stages
        self._stages = stages if experiment.has_dense_model else stages[1:]
        self._weights = {_label(stage): saved(stage.phase) for stage in self._stages}
        self.artifact = b""
        if experiment.config.artifact.make:
            about = {f"validation_{name}": round(of, 6) for name, of in last.metrics.items()}
            self.artifact = encode_artifact(experiment, self.final, about)

    @property
    def dense(self) -> bytes | None:
        """The weights of the dense model; None if there is none."""
        return self._weights[_label(self._stages[0])] if self._experiment.has_dense_model else None

    @property
    def final(self) -> bytes:
        """The weights of the last stage."""
        return self._weights[_label(self._stages[-1])]

    def models(self) -> dict[str, bytes]:
        """The models to evaluate, by name: see `trainer.worker.evaluate.evaluate_models`."""
        if self.artifact:
            return {**self._weights, DECODED: self.artifact}
        ends = {_label(self._stages[0]), _label(self._stages[-1])}
        return {name: content for name, content in self._weights.items() if name in ends}

    def facts(self, evaluated: Mapping[str, Evaluated]) -> dict[str, Any]:
        """The entries of summary.json that depend on the test set."""
        final = evaluated[_label(self._stages[-1])]
        facts: dict[str, Any] = {
            **final.metrics,
            "loss": final.loss,
            **self._baseline(evaluated),
        }
        if self.artifact:
            facts["artifact"] = self._artifact_facts(evaluated)
        return facts

    def _baseline(self, evaluated: Mapping[str, Evaluated]) -> dict[str, float | None]:
        """Metrics of the dense model; None if there is none."""
        if not self._experiment.has_dense_model:
            final = evaluated[_label(self._stages[-1])]
            return {f"baseline_{name}": None for name in (*final.metrics, "loss")}
        dense = evaluated[_label(self._stages[0])]
        return {
            f"baseline_{name}": value
            for name, value in {**dense.metrics, "loss": dense.loss}.items()
        }

    def _artifact_facts(self, evaluated: Mapping[str, Evaluated]) -> dict[str, Any]:
        # Written by this run, so its size needs no limit.
        described = artifact.describe(self.artifact, sys.maxsize, self._experiment.own_coder)
        config = self._experiment.config
        literature = published(config.model, config.data)
        rows = []
        dense = 0
        for stage in self._stages:
            label = _label(stage)
            weights, _ = from_bytes(self._weights[label])
            metrics = evaluated[label]
            dense = dense or 4 * sum(weights[name].numel() for name in metrics.parameters)
            if not stage.properties:
                rows.append((label, dense, metrics))
                continue
            size = artifact.published_size(weights, metrics.parameters)
            rows.append((label, size.plain, metrics))
            if stage is self._stages[-1]:
                rows.append((f"{label}+H (Han's format)", size.coded, metrics))
        rows.append(("model.dcz", len(self.artifact), evaluated[DECODED]))
        return {
            "path": "model.dcz",
            "bytes": len(self.artifact),
            "dense_bytes": dense,
            "ratio": dense / len(self.artifact),
            **evaluated[DECODED].metrics,
            "loss": evaluated[DECODED].loss,
            **self._baseline(evaluated),
            "stages": [
                {
                    "name": name,
                    "bytes": size,
                    "ratio": dense / size,
                    **metrics.metrics,
                    "loss": metrics.loss,
                    "published": literature.get(name),
                }
                for name, size, metrics in rows
            ],
            "layers": described.layers,
            "frame_bytes": described.frame,
        }


def _label(stage: Stage) -> str:
    letters = [_LETTERS.get(what, what) for what in sorted(stage.properties, key=_rank)]
    return "+".join(letters) or "dense"


def _rank(what: str) -> tuple[int, str]:
    known = list(_LETTERS)
    return (known.index(what) if what in known else len(known), what)
