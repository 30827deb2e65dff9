"""What sweep_vs_tune.py compares with: Ray Tune with OptunaSearch, running trainer's own trials.

    python benchmarks/tune_side.py CONFIG.yaml SPACE OUT.jsonl [--trials 20] [--seconds 600]

CONFIG.yaml is what `python -m trainer ... --cfg` prints; SPACE is `trivial` (the learning rate) or
`convnet` (that of convnet_sweep, with ASHA). A trial is a function trainable that goes through
`trainer.worker.run.run_phases` in its own process and reports the validation accuracy of each
epoch. For each trial that ended, OUT.jsonl gets a line: time of day, epochs, last accuracy.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import ray
import torch
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

AT_A_TIME = 2


def trivial(trial: Any) -> None:
    """As `TRIVIAL` in sweep_overhead.py."""
    trial.suggest_float("optimizer.lr", 1e-3, 1e-1, log=True)


def convnet(trial: Any) -> None:
    """As conf/experiment/convnet_sweep.yaml."""
    depth = trial.suggest_int("model.depth", 1, 4)
    for i in range(depth):
        trial.suggest_categorical(f"model.kernel_size.{i}", [3, 5, 7])
    for i in range(depth):
        trial.suggest_int(f"model.width.{i}", 8, 128, log=True)
    trial.suggest_float("optimizer.lr", 1e-4, 1e-1, log=True)


def run_trial(drawn: dict[str, Any], base: dict[str, Any]) -> None:
    """One trial: the configuration `base` with what was drawn, trained by trainer's own loop."""
    from trainer.engine.world import World
    from trainer.experiment import Experiment
    from trainer.messages import EpochEnded
    from trainer.worker.run import Start, run_phases

    settings = copy.deepcopy(base)
    lists: dict[str, list[Any]] = {}
    for name, value in drawn.items():
        key, _, index = name.rpartition(".")
        if index.isdigit():
            value = lists.setdefault(key, [])
            value.append(drawn[name])
            name = key
        section = settings
        *path, last = name.split(".")
        for part in path:
            section = section[part]
        section[last] = value
    torch.set_num_threads(1)
    for message in run_phases(
        World.single(torch.device("cpu")), Experiment.from_config(settings), Start(0)
    ):
        if isinstance(message, EpochEnded):
            tune.report({"accuracy": message.accuracy, "epoch": message.epoch})


class Journal(tune.Callback):
    """Writes down when each trial ended, and with what."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        last = trial.last_result
        entry = {"at": time.time(), "epochs": last.get("epoch"), "accuracy": last.get("accuracy")}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("space", choices=["trivial", "convnet"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=-1)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.touch()
    base = yaml.safe_load(args.config.read_text()) | {"sweep": {}}
    folder = args.out.resolve().parent
    space = {"trivial": trivial, "convnet": convnet}[args.space]
    epochs = sum(phase["fit"]["epochs"] for phase in base["phases"].values())
    ray.init(
        address="local", num_cpus=AT_A_TIME, include_dashboard=False, _temp_dir=f"{folder}/ray"
    )
    tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, base=base), {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(space, metric="accuracy", mode="max", seed=args.seed),
            scheduler=ASHAScheduler(
                time_attr="epoch", metric="accuracy", mode="max", max_t=epochs, grace_period=1
            )
            if args.space == "convnet"
            else None,
            num_samples=args.trials,
            time_budget_s=args.seconds,
            max_concurrent_trials=AT_A_TIME,
        ),
        run_config=tune.RunConfig(
            storage_path=f"{folder}/results", verbose=0, callbacks=[Journal(args.out)]
        ),
    ).fit()


if __name__ == "__main__":
    main()
