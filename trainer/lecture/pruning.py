"""The exhibits about pruning: sensitivity of layers, and whether methods interfere."""

from trainer.lecture.compression import FEW_DIGITS
from trainer.lecture.exhibit import Exhibit, Job, Results
from trainer.report.table import Table
from trainer.sweeps.analysis import Answer, interference, sensitivity

SENSITIVITY_SWEEP = Job(
    "sensitivity",
    "sensitivity",
    short=(
        *FEW_DIGITS,
        "phases.train.fit.epochs=1",
        "sweep.params.phases.prune.sparsity=choice(0,0.9)",
    ),
)
INTERFERENCE_SWEEP = Job(
    "interference",
    "interference",
    short=(
        *FEW_DIGITS,
        *(f"phases.{phase}.fit.epochs=1" for phase in ("train", "prune", "share", "quantize")),
        "sweep.params.seed=choice(0)",
        "sweep.params.phases.quantize.enabled=choice(true)",
    ),
)

_KEPT = {"fc1": "8%", "fc2": "9%", "fc3": "26%"}  # Han et al., NIPS 2015, table 3


def _sensitivity(results: Results) -> Answer:
    answer = sensitivity(results.rows(SENSITIVITY_SWEEP))
    published = [(layer, kept) for layer, kept in _KEPT.items()]
    answer.tables.append(
        Table("Published: weights kept of LeNet-300-100", ("layer", "kept"), published)
    )
    return answer


SENSITIVITY = Exhibit(
    "sensitivity",
    "Sensitivity of each layer",
    "Each layer of LeNet-300-100 is pruned alone, with and without an epoch of retraining.",
    "Han et al., NIPS 2015, figure 6 and table 3: the last layer keeps the most",
    10,
    _sensitivity,
    (SENSITIVITY_SWEEP,),
)
INTERFERENCE = Exhibit(
    "interference",
    "Do methods interfere with one another?",
    "Pruning, sharing and quantization in every combination, from one baseline for each seed.",
    "a question of the lecture; Han et al. find that pruning does not hurt sharing",
    25,
    lambda results: interference(results.rows(INTERFERENCE_SWEEP)),
    (INTERFERENCE_SWEEP,),
)
