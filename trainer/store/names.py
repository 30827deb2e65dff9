"""Names of a state_dict that was saved from inside a wrapper, adapted to those of a model."""

from collections.abc import Collection, Iterator, Mapping

from trainer.errors import ConfigError

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes in which DataParallel, torch.compile, FSDP and activation checkpointing keep the model
that they wrap."""

_USUAL = "model"
"""Attribute in which most training frameworks keep the model; preferred over others."""


def adapt_names(found: Collection[str], wanted: Collection[str]) -> tuple[dict[str, str], str]:
    """Find the change that turns the names of a file into those of a model.

    Each change removes a wrapper's name, or removes or adds the first part of the names (the
    attribute in which a module keeps the model). It is made only if more names fit afterwards.

    Args:
        found: Names in the file.
        wanted: Names in the model.

    Returns:
        The new name of every name in the file; and the changes in words, empty if there are none.

    Raises:
        ConfigError: Two different changes fit equally well.
    """
    known = set(wanted)
    names = {name: name for name in found}
    changes: list[str] = []
    while (fitting := len(known.intersection(names.values()))) < len(known):
        best, score, rivals, settled = names, fitting, [""], True
        for label, usual, new in _candidates(names, known):
            fits = len(known.intersection(new.values()))
            if fits > score:
                best, score, rivals, settled = new, fits, [label], usual
            elif fits == score and not settled and {*new.values()} != {*best.values()}:
                rivals.append(label)
        if best is names:
            break
        if len(rivals) > 1:
            raise ConfigError(
                f"it is not clear which of its weights to take: {' or '.join(rivals)} would fit; "
                "save a file that holds only the ones you want"
            )
        names = best
        changes.append(rivals[0])
    return names, ", ".join(changes)


def _candidates(
    names: Mapping[str, str], wanted: Collection[str]
) -> Iterator[tuple[str, bool, dict[str, str]]]:
    """Possible changes: in words, whether it wins over equally good ones, and the new names."""
    for before, base in _unwrapped(names):
        values = base.values()
        if before:
            yield ", ".join(before), True, base
        for part in sorted(dict.fromkeys(map(_first, values)), key=lambda part: part != _USUAL):
            removed = {old: name.removeprefix(f"{part}.") for old, name in base.items()}
            if part and len(set(removed.values())) == len(removed):  # each has a name of its own
                yield ", ".join([*before, f"{part + '.'!r} removed"]), part == _USUAL, removed
        for part in filter(None, dict.fromkeys(map(_first, wanted))):
            added = {old: f"{part}.{name}" for old, name in base.items()}
            yield ", ".join([*before, f"{part + '.'!r} added"]), False, added


def _unwrapped(names: Mapping[str, str]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The names, then without their first part if all of them share it, and so on."""
    base, changes = dict(names), list[str]()
    while True:
        yield changes, base
        part = next((w for w in _WRAPPERS if any(w in n.split(".") for n in base.values())), "")
        if part:
            base = {old: _without(name, part) for old, name in base.items()}
        else:
            shared = set(map(_first, base.values()))
            part = shared.pop() if len(shared) == 1 else ""
            if not part:
                return
            base = {old: name.removeprefix(f"{part}.") for old, name in base.items()}
        if len(set(base.values())) < len(base):
            return
        changes = [*changes, f"{part + '.'!r} removed"]


def _first(name: str) -> str:
    """The first part of a name that has several; empty for any other."""
    return name.partition(".")[0] if "." in name else ""


def _without(name: str, part: str) -> str:
    return ".".join(piece for piece in name.split(".") if piece != part)
