"""From the configured mapping of phases to the phases, checked one by one and in their order."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from trainer.config import to_dataclass
from trainer.config.instantiate import locate
from trainer.errors import ConfigError
from trainer.phases.base import Phase


def build_phases(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Phase]:
    """The phases by name, in order.

    Args:
        settings: by name, a `_target_` (a subclass of Phase) and its arguments; `fit` is a plain
            mapping of FitConfig's fields.

    Raises:
        ConfigError: no phases, a wrong setting, or an order that check_order refuses.
    """
    if not settings:
        raise ConfigError("phases: there are none; an experiment needs at least one, such as train")
    phases = {name: _build(f"phases.{name}", chosen) for name, chosen in settings.items()}
    check_order(phases)
    return phases


def _build(key: str, settings: Mapping[str, Any]) -> Phase:
    fit = settings.get("fit")
    if not isinstance(fit, Mapping):
        raise ConfigError(f"{key}.fit={fit}: it must be a mapping, such as {{epochs: 0}}")
    kind = locate(key, settings, {})
    if not (isinstance(kind, type) and issubclass(kind, Phase) and is_dataclass(kind)):
        raise ConfigError(
            f"{key}._target_={settings['_target_']}: a phase is a dataclass that derives from Phase"
        )
    return to_dataclass(kind, {k: v for k, v in settings.items() if k != "_target_"}, key)


def check_order(phases: Mapping[str, Phase]) -> None:
    """Refuse an order in which a phase, or its training, destroys what an earlier one made.

    Raises:
        ConfigError: names both phases and what to do.
    """
    made: dict[str, str] = {}
    for name, phase in phases.items():
        for what, maker in made.items():
            told = f"phase {name!r} ({phase.kind}) would destroy the {what} made by {maker!r}"
            if what in phase.destroys:
                raise ConfigError(
                    f"{told}, trained or not: move it before {maker!r}, or keep the {what} where "
                    "it has a setting for that, such as keep=[zeros,sharing]"
                )
            if phase.fit.epochs > 0 and what not in phase.keeps:
                raise ConfigError(f"{told}: use retrain in its place, or move it before {maker!r}")
        made.update(dict.fromkeys(phase.makes, name))
