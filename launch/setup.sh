# shellcheck shell=sh disable=SC2154
# The environment .venv of this checkout; sourced by launch/local and launch/test, which set $root.
#
# The stamp .venv/installed says what the environment was made for and from. It is put there last
# and taken away before anything changes: an environment that has one is whole, and one that was
# left half-made has none and is made anew.

python=$root/.venv/bin/python
stamp=$root/.venv/installed

# Says why an interpreter cannot make the environment; says nothing if it can. The newest version
# is the newest that the packages pinned in constraints.txt exist for.
probe='
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    print("is %d.%d.%d" % sys.version_info[:3])
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("has no venv module (Debian, Ubuntu: apt install python3-venv)")
'

# Locks file descriptor 9. The lock is the shell's: it lasts until the shell and all its children
# have closed the descriptor or died, so it is never stale. (macOS has no flock command.)
lock='
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("trainer: waiting for another call that is setting up .venv", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
'

say() { echo "trainer: $*" >&2; }

die() {
    say "$*"
    exit 1
}

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo unknown; }

# What an environment cannot outlive: its place (scripts in it hold the path) and its Python.
base() { echo "$root, Python $(version "$python")"; }

sources() { cat "$root/pyproject.toml" "$root/constraints.txt"; }

# Is there a whole environment, made here, for the Python that it has and PYTHON asks for?
whole() {
    [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$(base)" ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version "$PYTHON")" = "$(version "$python")" ]
}

# current EXTRA: is it up to date as well, and does it have that extra (or the tests' one)?
current() {
    whole && [ "$(tail -n +3 "$stamp")" = "$(sources)" ] || return 1
    case $(sed -n 2p "$stamp") in "$1" | test) ;; *) return 1 ;; esac
}

# Prints the interpreter to make the environment with.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.13 python3.12 python3.11 python3.14
    fi
    found=
    for candidate in "$@"; do
        command -v "$candidate" >/dev/null || continue
        fault=$("$candidate" -c "$probe" 2>/dev/null) || fault="does not run"
        if [ -z "$fault" ]; then
            echo "$candidate"
            return
        fi
        found="$found${found:+; }$candidate $fault"
    done
    die "Python 3.11 to 3.14 is needed; found: ${found:-none of $*}." \
        "Install one, or name it: PYTHON=/path/to/python3"
}

# pip's output goes where the messages go, to leave standard output to the program.
pip() { "$python" -I -m pip --disable-pip-version-check "$@" >&2; }

# On Linux PyPI's build of PyTorch brings gigabytes of CUDA. Without an NVIDIA GPU take the CPU
# build, unless the user told pip where to look. In a step of its own, because pip would ask this
# index for every package, and wait long where it cannot be reached.
install_cpu_torch() {
    [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null || return 0
    if pip config list 2>&1 | grep -Eq 'index-url|find-links|no-index'; then return 0; fi
    say "no NVIDIA GPU here: taking PyTorch's build for CPUs (set PIP_EXTRA_INDEX_URL to choose)"
    pip install --constraint "$root/constraints.txt" --no-deps --retries 1 \
        --extra-index-url https://download.pytorch.org/whl/cpu torch
}

# make_environment HOST EXTRA
make_environment() {
    if whole; then
        say "updating .venv"
        rm "$stamp"
    else
        say "creating .venv in $root with Python $(version "$1"); the first time takes minutes"
        rm -f "$stamp"
        "$1" -m venv --clear "$root/.venv" || die "$1 could not create .venv"
    fi
    { base && echo "$2" && sources; } >"$stamp.part"
    install_cpu_torch || die "pip could not install PyTorch (its message is above)"
    pip install --constraint "$root/constraints.txt" --editable "$root${2:+[$2]}" ||
        die "pip could not install the packages (its message is above); the next call tries again"
    mv "$stamp.part" "$stamp"
}

# set_up [EXTRA]: afterwards .venv is complete.
set_up() {
    if current "${1:-}"; then return; fi
    host=$(find_python)
    exec 9>"$root/.venv.lock"
    "$host" -c "$lock"
    # Another call may have done it meanwhile.
    if ! current "${1:-}"; then make_environment "$host" "${1:-}"; fi
    exec 9>&-
}
