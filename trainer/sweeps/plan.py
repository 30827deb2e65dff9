"""The settings of a sweep, validated before anything starts; makes the settings of each trial."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import Config
from trainer.config.instantiate import OBJECT
from trainer.errors import ConfigError, first_line
from trainer.sweeps.algorithms import own_pruner, own_sampler
from trainer.sweeps.analysis import check_analysis
from trainer.sweeps.loggers import check_loggers
from trainer.sweeps.measures import check_measures, for_task, task_directions
from trainer.sweeps.overrides import override
from trainer.sweeps.shared_phases import check_shared_phases
from trainer.sweeps.space import GRID_LIMIT, Drawn, flatten, parse_space

FIXED = ("name", "sweep", "cluster", "checkpoint")  # the same for all trials
# May change when the sweep continues.
FREE = ("trials", "seconds", "epochs", "slots", "max_retries", "recycle_after", "refit", "analysis")


class Plan:
    """The checked settings of a sweep.

    Args:
        cfg: the configuration; `sweep.params` is not empty.
        base: the same as composed. Its interpolations are resolved with the values of each trial.
        objects: what was passed from Python, by name.

    Raises:
        ConfigError: a key does not exist, or a text is not a range; `check` finds other mistakes.
    """

    def __init__(
        self, cfg: Config, base: DictConfig, objects: Mapping[str, Any] | None = None
    ) -> None:
        given = dict(objects or {})
        self.directions = task_directions(cfg, given)
        self.cfg = cfg = for_task(cfg, self.directions)
        self._base = base
        self.sampler = own_sampler(cfg.sweep, cfg.seed, given)
        self.pruner = own_pruner(cfg.sweep, given)
        # Used by the driver only, so they are not sent to the workers with each trial.
        mine = ("sweep.sampler", "sweep.pruner")
        self._objects = {name: value for name, value in given.items() if name not in mine}
        self._literal = "${" not in OmegaConf.to_yaml(base)  # not in texts of sweep.params either
        settings = _container(base, resolve=True)
        self._plain = {**settings, "sweep": {"name": cfg.sweep.name}}
        defaults = dict(_leaves(settings))
        self.space = parse_space(cfg.sweep, defaults)
        self._overrides = flatten(cfg.sweep.trial_overrides, "sweep.trial_overrides")
        for where, keys in (
            ("params", {p.key for p in self.space.parameters}),
            ("trial_overrides", set(self._overrides)),
        ):
            for key in sorted(keys):
                _check_key(f"sweep.{where}.{key}", key, settings)
        check_measures(cfg.sweep, self.directions)
        check_loggers(cfg.logger)
        check_shared_phases(cfg)
        check_analysis(cfg.sweep, self.space)
        if cfg.sweep.sampler == "grid":
            self.space.grid(GRID_LIMIT)

    def trial(self, drawn: Drawn) -> Any:
        """The `Experiment` of a trial. Raises ConfigError."""
        from trainer.experiment import Experiment  # imports torch, which slows down the start

        settings = self._settings({**self._overrides, **self.space.settings(drawn)})
        return Experiment.from_config(settings, self._objects)

    def winner(self, drawn: Drawn) -> dict[str, Any]:
        """The plain configuration of a trial without `sweep.trial_overrides`, for the refit."""
        return self._settings(self.space.settings(drawn))

    def overrides(self, drawn: Drawn) -> list[str] | None:
        """The arguments of the command line that turn the experiment into a trial.

        Returns:
            None where Hydra's grammar cannot express one of them (see `override`).
        """
        settings = {**self._overrides, **self.space.settings(drawn)}
        written = [override(key, value) for key, value in settings.items()]
        known = [argument for argument in written if argument is not None]
        return known if len(known) == len(written) else None

    def check(self) -> int:
        """Validate the ends of all ranges against model, phases and initial weights.

        With `sweep.refit` they are also validated without `sweep.trial_overrides`, which may hide
        mistakes.

        Returns:
            The maximum number of epochs of a trial.

        Raises:
            ConfigError: names the parameter and the value.
        """
        from trainer.experiment import Experiment, check_model, initial_weights
        from trainer.phases import RoundPhase

        epochs = 0
        compared = set()  # files may be large
        for name, drawn in self.space.ends():
            try:
                experiment = self.trial(drawn)
                model, cfg = check_model(experiment), experiment.config
                if cfg.init_from and (pair := (cfg.init_from, str(cfg.model))) not in compared:
                    initial_weights(experiment, model)
                    compared.add(pair)
            except ConfigError as error:
                raise ConfigError(f"sweep.params: with {name}={drawn[name]}, {error}") from error
            if self.cfg.sweep.refit and self._overrides:
                try:
                    check_model(Experiment.from_config(self.winner(drawn), self._objects))
                except ConfigError as error:
                    raise ConfigError(
                        "sweep.refit=true: without sweep.trial_overrides, and with "
                        f"{name}={drawn[name]}, {error}"
                    ) from error
            for phase, built in experiment.phases.items():
                if isinstance(built, RoundPhase) and built.max_rounds > 1:
                    raise ConfigError(
                        f"phases.{phase}: it takes as many rounds as it finds "
                        "(sparsity=auto), and a sweep must know how long a trial trains; give it "
                        "a number, or search one"
                    )
            epochs = max(epochs, sum(phase.fit.epochs for phase in experiment.phases.values()))
        return epochs

    def identity(self) -> dict[str, Any]:
        """All settings that must not change when the sweep continues, with the order of phases."""
        settings = self.unresolved()
        sweep = {k: v for k, v in settings["sweep"].items() if k not in (*FREE, "storage")}
        others = ("sweep", "cluster", "checkpoint", "limits", "cost")
        same = {k: v for k, v in settings.items() if k not in others}
        same["phases"] = [[name, phase] for name, phase in settings["phases"].items()]
        same["cluster.workers"] = settings["cluster"]["workers"]
        same |= {f"sweep.{k}": v for k, v in sweep.items()}
        same["sweep.objectives"] = [list(item) for item in self.cfg.sweep.objectives.items()]
        return same

    def free(self) -> dict[str, Any]:
        """The settings of `sweep` that may change when it continues."""
        sweep = self.unresolved()["sweep"]
        return {key: sweep[key] for key in FREE if key in sweep}

    def unresolved(self) -> dict[str, Any]:
        """The whole configuration as plain values, with unresolved interpolations."""
        return _container(self._base, resolve=False)

    def _settings(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        if self._literal:  # copying plain values is ten times faster
            return _changed(self._plain, changes)
        changed = copy.deepcopy(self._base)
        try:
            for key, value in changes.items():
                OmegaConf.update(changed, key, value, merge=False)
            changed.sweep = {"name": self.cfg.sweep.name}
            return _container(changed, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"sweep.params: {first_line(error)}") from error


def _container(conf: DictConfig, resolve: bool) -> dict[str, Any]:
    """Plain values."""
    plain = OmegaConf.to_container(conf, resolve=resolve, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain settings with other values at existing dotted keys."""
    changed = copy.deepcopy(dict(settings))
    for key, value in changes.items():
        *path, last = key.split(".")
        section = changed
        for part in path:
            section = section[part]
        section[last] = copy.deepcopy(value)
    return changed


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_key(where: str, key: str, settings: Mapping[str, Any]) -> None:
    """Refuse a key that the configuration does not have. Raises ConfigError."""
    if key.partition(".")[0] in FIXED:
        raise ConfigError(f"{where}: {key} is the same for all trials and cannot be searched")
    here: Any = settings
    for part in key.split("."):
        if not isinstance(here, Mapping) or part not in here:
            known = (
                f"; known here: {', '.join(map(str, here))}" if isinstance(here, Mapping) else ""
            )
            if isinstance(here, Mapping) and OBJECT in here:
                known = "; it was passed as an object: pass the class or function that makes it"
            raise ConfigError(f"{where}: the configuration has no {key}{known}")
        here = here[part]
    if isinstance(here, Mapping):
        raise ConfigError(f"{where}: it is a section; search its keys {', '.join(map(str, here))}")
