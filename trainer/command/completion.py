"""Completion of the command line in a shell.

The script of a shell calls `trainer --complete WORD...`, which prints candidates for the last word.
"""

from pathlib import Path

import yaml

from trainer.command.settings import choices
from trainer.config.comments import key_comments
from trainer.config.compose import conf_dir
from trainer.errors import ConfigError

SCRIPTS = {
    "bash": """\
_trainer() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n' words
    read -ra words -d '' <<< "$(printf '%s' "$line" | tr -s ' ' '\\n')"
    [[ $line == *" " ]] && words+=("")
    local last="${words[${#words[@]}-1]}"
    COMPREPLY=($(trainer --complete "${words[@]:1}" 2>/dev/null))
    # Bash treats = and : as ends of words and replaces only what follows the last one.
    local cut="${last%"${last##*[=:]}"}" i
    for i in "${!COMPREPLY[@]}"; do COMPREPLY[$i]="${COMPREPLY[$i]#"$cut"}"; done
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _trainer trainer
""",
    "zsh": """\
#compdef trainer
_trainer() {
    local -a found
    found=("${(@f)$(trainer --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    compadd -Q -S '' -- ${found:#}
    [[ -z ${found:#} ]] && _files
}
compdef _trainer trainer
""",
    "fish": """\
function __trainer_complete
    trainer --complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null
end
complete -c trainer -a '(__trainer_complete)'
""",
}

COMMANDS = ("artifact", "doctor", "hardware", "inference", "lecture")
OPTIONS = (
    "--cfg", "--completion", "--config-dir", "--help", "--list", "--version",
)  # fmt: skip


def script(shell: str) -> str:
    """The completion script of a shell.

    Raises:
        ConfigError: There is none for this shell.
    """
    if shell not in SCRIPTS:
        raise ConfigError(f"--completion={shell}: choose one of {', '.join(SCRIPTS)}")
    return SCRIPTS[shell]


def complete(words: list[str]) -> list[str]:
    """Candidates for the last word of a command line.

    Args:
        words: The words after `trainer`; the last one is incomplete, and may be empty.
    """
    *before, last = words or [""]
    config_dir = _option(before, "--config-dir")
    known = choices(config_dir)
    if last.startswith("-"):
        candidates = list(OPTIONS)
    elif before and before[-1] == "--completion":
        candidates = list(SCRIPTS)
    elif last.startswith("+experiment="):
        candidates = [f"+experiment={name}" for name in known["experiment"]]
    elif "=" in last:
        group = last.partition("=")[0]
        candidates = [f"{group}={name}" for name in known.get(group, ())]
    else:
        groups = [f"{group}=" for group in known if group not in ("experiment", "phase")]
        candidates = [*groups, *(f"{key}=" for key in _keys(before, known)), "+experiment="]
        if not before:
            candidates += [*COMMANDS, "resume="]
    return sorted({word for word in candidates if word.startswith(last)})


def _keys(words: list[str], known: dict[str, dict[str, Path]]) -> list[str]:
    """Dotted keys of the experiment on the command line, without composing it."""
    keys = list(key_comments(conf_dir() / "config.yaml"))
    chosen = {word.partition("=")[0]: word.partition("=")[2] for word in words if "=" in word}
    packages = {"cluster": "cluster", "sweep": "sweep", "optimizer": "optimizer", "data": "data"}
    files = {group: chosen.get(group, "") for group in (*packages, "model")}
    defaults = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    experiment = known["experiment"].get(chosen.get("+experiment", ""))
    if experiment is not None:
        content = yaml.safe_load(experiment.read_text(encoding="utf-8")) or {}
        defaults = [*defaults, *content.get("defaults", [])]
    for entry in defaults:
        for name, choice in entry.items() if isinstance(entry, dict) else ():
            group, _, package = name.removeprefix("override ").lstrip("/").partition("@")
            for one in choice if isinstance(choice, list) else [choice]:
                file = known.get(group, {}).get(files.get(group) or str(one))
                if file is not None:
                    keys += [f"{package or group}.{key}" for key in key_comments(file)]
    sections = {key.rpartition(".")[0] for key in keys}
    return [key for key in keys if key not in sections and not key.startswith("hydra.")]


def _option(words: list[str], name: str) -> str | None:
    """The value of an option on a command line; None without it, or if its folder is missing."""
    for number, word in enumerate(words):
        if word == name or word.startswith(f"{name}="):
            following = words[number + 1] if number + 1 < len(words) else ""
            value = following if word == name else word.removeprefix(f"{name}=")
            return value if Path(value).is_dir() else None
    return None
