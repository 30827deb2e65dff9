"""The set-up scripts against a stub interpreter that logs its calls instead of installing.

Nothing here needs a network. That a real installation works is proved by every fresh clone that
runs these tests.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"

# Makes an environment by copying itself, logs pip, and fails where $BREAK is one of the words of
# the call. Everything else is answered by the real interpreter.
STUB = f"""#!/bin/sh
case "$*" in
    *-m*) echo "$*" >>"$LOG" ;;
esac
case " $* " in
    *" ${{BREAK:-none}} "*) exit 7 ;;
    *" -m venv "*)
        for last; do :; done
        rm -rf "$last"
        mkdir -p "$last/bin"
        cp "$0" "$last/bin/python" ;;
    *" config list "*) echo "${{PIP_SETTINGS:-}}" ;;
    *" pip "*) ;;
    *" -m "*) pwd; if (: >&9) 2>/dev/null; then echo the lock is held; fi ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of launch/ with a project file, the stub as python3, and nothing else on PATH."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a checkout"
        self.bin = root / "bin"
        self.log = root / "log"
        shutil.copytree(LAUNCH, self.root / "launch")
        (self.root / "pyproject.toml").write_text("[project]\n")
        (self.root / "constraints.txt").write_text("torch==1\n")
        (self.root / "tests").mkdir()
        script(self.bin / "python3", STUB)
        tools = "cat cp dirname echo grep head ls mkdir mv readlink rm sed sh sleep tail uname"
        for tool in tools.split():
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)

    @property
    def environment(self) -> Path:
        return self.root / ".venv"

    @property
    def stamp(self) -> Path:
        return self.environment / "installed"

    def start(self, name: str, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "launch" / name, *arguments],
            cwd=self.log.parent,
            env={"PATH": str(self.bin), "LOG": str(self.log), "PIP_SETTINGS": "find-links"}
            | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def call(self, name: str, *arguments: str, **environ: str) -> tuple[int, str, list[str]]:
        """Exit code, standard error, and what the interpreters were told to run."""
        self.log.write_text("")
        process = self.start(name, *arguments, **environ)
        self.out, err = process.communicate()
        return process.returncode, err, self.log.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def installs(calls: list[str]) -> list[str]:
    return [call.split()[-1] for call in calls if " pip " in call and " install " in call]


def creations(calls: list[str]) -> int:
    return sum(" venv " in call for call in calls)


def test_first_call_sets_up_and_second_only_runs(checkout: Checkout) -> None:
    code, err, calls = checkout.call("local", "a b", "seed=1")
    assert code == 0
    assert err.startswith("trainer: creating .venv")
    assert creations(calls) == 1
    assert len(installs(calls)) == 1
    assert calls[-1] == "-m trainer a b seed=1"
    assert checkout.out.strip() == str(checkout.log.parent), "the working directory was left"

    assert checkout.call("local") == (0, "", ["-m trainer"])


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_project_is_installed_again(checkout: Checkout, name: str) -> None:
    checkout.call("local")
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    code, _, calls = checkout.call("local")
    assert (code, creations(calls), len(installs(calls))) == (0, 0, 1)
    assert installs(checkout.call("local")[2]) == []


def test_test_extra_is_added_and_serves_local_too(checkout: Checkout) -> None:
    checkout.call("local")
    _, _, calls = checkout.call("test")
    assert creations(calls) == 0
    assert [call.endswith("[test]") for call in installs(calls)] == [True]
    assert installs(checkout.call("local")[2]) == []
    assert installs(checkout.call("test")[2]) == []


def test_incomplete_environment_is_rebuilt(checkout: Checkout) -> None:
    checkout.call("local")
    checkout.stamp.unlink()
    (checkout.environment / "half-written").touch()
    assert creations(checkout.call("local")[2]) == 1
    assert not (checkout.environment / "half-written").exists()


@pytest.mark.parametrize("word", ["--clear", "--editable"])
def test_failed_set_up_is_reported_and_repeated(checkout: Checkout, word: str) -> None:
    code, err, calls = checkout.call("local", BREAK=word)
    assert code == 1
    assert "trainer: p" in err
    assert "could not" in err
    assert not any("-m trainer" in call for call in calls)
    code, _, calls = checkout.call("local")
    assert (code, creations(calls)) == (0, 1)


def test_environment_is_rebuilt_after_a_failed_update(checkout: Checkout) -> None:
    checkout.call("local")
    (checkout.root / "constraints.txt").write_text("torch==2\n")
    assert checkout.call("local", BREAK="--editable")[0] == 1
    assert creations(checkout.call("local")[2]) == 1


def test_broken_interpreter_in_the_environment_is_noticed(checkout: Checkout) -> None:
    checkout.call("local")
    script(checkout.environment / "bin" / "python", "#!/bin/sh\nexit 1\n")
    code, _, calls = checkout.call("local")
    assert (code, creations(calls)) == (0, 1)


def test_environment_is_rebuilt_in_a_moved_checkout(checkout: Checkout) -> None:
    checkout.call("local")
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    code, _, calls = checkout.call("local")
    assert (code, creations(calls)) == (0, 1)
    assert creations(checkout.call("local")[2]) == 0


def test_works_through_a_symbolic_link(checkout: Checkout) -> None:
    link = checkout.log.parent / "train"
    link.symlink_to(checkout.root / "launch" / "local")
    assert checkout.call(str(link))[0] == 0
    assert checkout.stamp.exists()


OLD = "#!/bin/sh\ncase $1 in -c) echo 'is 3.9.2' ;; esac\n"
SHIM = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"


def test_no_python_is_new_enough(checkout: Checkout) -> None:
    script(checkout.bin / "python3", OLD)
    script(checkout.bin / "python3.12", SHIM)
    code, err, _ = checkout.call("local")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "found: python3 is 3.9.2; python3.12 does not run. Install" in err
    assert not checkout.environment.exists()


def test_real_old_python_is_recognised(checkout: Checkout) -> None:
    # The probe of setup.sh, run by this interpreter under another version number.
    patched = 'shift; exec {} -c "import sys; sys.version_info = (3, 10, 4)\n$*"'
    script(checkout.bin / "python3", f"#!/bin/sh\n{patched.format(sys.executable)}\n")
    code, err, _ = checkout.call("local")
    assert code == 1
    assert "python3 is 3.10.4" in err


def test_versioned_name_is_taken_where_python3_does_not_do(checkout: Checkout) -> None:
    script(checkout.bin / "python3", OLD)
    script(checkout.bin / "python3.13", SHIM)
    script(checkout.bin / "python3.12", STUB)
    assert checkout.call("local")[0] == 0
    assert (checkout.environment / "bin" / "python").read_text() == STUB


def test_named_python_is_the_only_one_tried(checkout: Checkout) -> None:
    old = script(checkout.bin / "old", OLD)
    code, err, _ = checkout.call("local", PYTHON=str(old))
    assert code == 1
    assert f"{old} is 3.9.2" in err
    good = script(checkout.bin / "good", STUB)
    assert checkout.call("local", PYTHON=str(good))[0] == 0


def test_named_python_of_another_version_replaces_the_environment(checkout: Checkout) -> None:
    checkout.call("local")
    other_version = """case "$*" in *'("%d.%d" %'*) echo 3.99; exit ;; esac; exec /"""
    newer = script(checkout.bin / "newer", STUB.replace("exec /", other_version))
    assert checkout.call("local", PYTHON=str(newer), BREAK="--clear")[0] == 1
    assert not checkout.stamp.exists()
    assert creations(checkout.call("local", PYTHON=str(newer))[2]) == 1
    assert "3.99" in checkout.stamp.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has two builds of PyTorch")
def test_cpu_build_of_torch_where_there_is_no_gpu(checkout: Checkout) -> None:
    _, err, calls = checkout.call("local", PIP_SETTINGS="")
    assert "build for CPUs" in err
    assert installs(calls)[0] == "torch"
    assert len(installs(calls)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has two builds of PyTorch")
def test_users_own_index_or_gpu_decides_the_build_of_torch(checkout: Checkout) -> None:
    for settings in ("global.index-url='x'", ":env:.extra-index-url='x'", ":env:.find-links='x'"):
        shutil.rmtree(checkout.environment, ignore_errors=True)
        assert len(installs(checkout.call("local", PIP_SETTINGS=settings)[2])) == 1
    shutil.rmtree(checkout.environment)
    script(checkout.bin / "nvidia-smi", "#!/bin/sh\n")
    assert len(installs(checkout.call("local", PIP_SETTINGS="")[2])) == 1


def test_second_call_waits_for_the_first(checkout: Checkout) -> None:
    checkout.log.write_text("")
    with (checkout.root / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = [checkout.start("local") for _ in range(2)]
        for process in waiting:
            assert process.stderr is not None
            assert "waiting" in process.stderr.readline()
        assert checkout.log.read_text() == ""
    for process in waiting:
        process.communicate()
        assert process.returncode == 0
    assert checkout.log.read_text().count("--editable") == 1


def test_killed_set_up_leaves_no_lock_and_heals(checkout: Checkout) -> None:
    slow = script(checkout.bin / "slow", STUB.replace('*" pip "*) ;;', '*" pip "*) sleep 60 ;;'))
    process = checkout.start("local", PYTHON=str(slow))
    while "--editable" not in (checkout.log.read_text() if checkout.log.exists() else ""):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, _, calls = checkout.call("local")
    assert (code, creations(calls)) == (0, 1)


def test_test_runs_all_checks_in_order(checkout: Checkout) -> None:
    _, _, calls = checkout.call("test", "-k", "ring")
    checks = [call.split()[2:] for call in calls if call.startswith("-P -m ")]
    assert [check[0] for check in checks] == ["ruff", "ruff", "mypy", "pytest"]
    assert [check[1] for check in checks[:2]] == ["check", "format"]
    assert "-n3" in calls[-1]
    assert calls[-1].endswith(f"-k ring {checkout.root}/tests")


@pytest.mark.parametrize(("word", "ran"), [("check", 1), ("format", 2), ("mypy", 3), ("pytest", 4)])
def test_first_failing_check_decides_the_exit_code(checkout: Checkout, word: str, ran: int) -> None:
    checkout.call("test")
    code, _, calls = checkout.call("test", BREAK=word)
    assert (code, len(calls)) == (7, ran)


def test_test_runs_only_the_tests_that_are_named(checkout: Checkout) -> None:
    (checkout.log.parent / "test_one.py").touch()
    _, _, calls = checkout.call("test", "test_one.py::test_a", "-x")
    assert "-n3" not in calls[-1]
    assert calls[-1].endswith("test_one.py::test_a -x")


def test_files_of_the_user_in_the_checkout_are_not_checked(tmp_path: Path) -> None:
    shutil.copy(LAUNCH.parent / "pyproject.toml", tmp_path)
    for name in ("trainer/ours.py", "tests/unit/ours.py", "theirs.py", "experiments/theirs.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    command = [sys.executable, "-P", "-m", "ruff", "check", "--show-files", tmp_path]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = sorted(str(Path(line).relative_to(tmp_path)) for line in shown.splitlines())
    assert found == ["pyproject.toml", "tests/unit/ours.py", "trainer/ours.py"]
