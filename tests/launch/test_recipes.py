"""Recipes for clusters and containers: valid, safe, and consistent with the project.

Nothing here starts Ray or needs a container engine: files are read, and the Slurm script runs
against stubs.
"""

import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
import yaml

from trainer.__main__ import main
from trainer.version import __version__

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
RECIPES = [
    *(ROOT / "launch" / name for name in ("slurm.sbatch", "cluster.yaml", "kuberay.yaml")),
    *(DOCKERFILE, ROOT / "docker" / "compose.yaml", ROOT / "docs" / "clusters.md"),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"trainer:{__version__}-cpu"
COMMAND = re.compile(r"\+experiment=[a-z0-9_]+(?:[\s\\#]+[+~]?\w[\w.]*=[\w./:-]+)*")


def pins(path: Path) -> dict[str, str]:
    """Package, normalised, to version; every line of a constraints file must be an exact pin."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    parts = [line.split("==") for line in lines]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in parts}


RAY = pins(ROOT / "constraints.txt")["ray"]


def load(name: str) -> list[Any]:
    return list(yaml.safe_load_all((ROOT / name).read_text()))


def commands() -> set[str]:
    """The arguments of every run that a recipe or its comments name, on one line."""
    (compose,) = load("docker/compose.yaml")
    found = {" ".join(compose["services"]["job"]["command"])}
    for path in RECIPES:
        matches = COMMAND.findall(path.read_text())
        assert matches or path == DOCKERFILE, f"{path} does not say what to run"
        found.update(" ".join(match.replace("#", " ").split()) for match in matches)
    return found


@pytest.mark.parametrize("command", sorted(commands()))
@pytest.mark.slow
def test_what_they_run_exists(command, capsys):
    assert main([*command.split(), "--cfg"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", [*RECIPES, ROOT / ".dockerignore"], ids=lambda path: path.name)
def test_no_secret_and_no_needless_power(path):
    text = path.read_text()
    assert not re.search(r"[0-9a-fA-F]{32}|BEGIN [A-Z ]*PRIVATE KEY", text)
    for word in ("privileged", "hostNetwork", "hostPID", "network_mode: host", "0.0.0.0", "sudo"):
        assert word not in text
    for value in re.findall(r"RAY_AUTH_TOKEN(?:=|: )(\S+)", text):
        assert value.startswith("$"), value


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_names_and_versions_agree(path):
    text = path.read_text()
    for image in re.findall(r"\btrainer:[\w.-]+", text):
        assert image.rpartition("-")[0] == IMAGE.rpartition("-")[0]
    for version in re.findall(r"(?:rayVersion: |ray(?:\[\w+\])?==)([\d.]+)", text):
        assert version == RAY
    for name in re.findall(r"\b(?:launch|docker)/[\w.]+", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\((\.\./[^)]+)\)", text):
        assert (path.parent / name).is_file(), name


class TestDockerfile:
    @pytest.fixture
    def stages(self) -> dict[str, list[tuple[str, str]]]:
        """Stage to its instructions; the first of each is its FROM."""
        text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
        found: dict[str, list[tuple[str, str]]] = {"": []}
        stage = ""
        for line in filter(None, text.replace("\\\n", " ").splitlines()):
            instruction, rest = line.split(maxsplit=1)
            if instruction == "FROM":
                rest, stage = rest.split(" AS ")
                found[stage] = []
            found[stage].append((instruction, " ".join(rest.split())))
        return found

    def test_its_only_base_is_pinned_and_supported(self, stages):
        assert stages.pop("") == [("ARG", "DEVICE=cpu")]
        sources = {instructions[0][1] for instructions in stages.values()}
        (base,) = sources - stages.keys() - {"${DEVICE}"}
        assert {"cpu", "cuda"} <= stages.keys()
        pinned = re.fullmatch(r"python:(\d)\.(\d+)\.\d+-slim-\w+", base)
        assert pinned
        assert (3, 11) <= tuple(map(int, pinned.groups())) <= (3, 14)
        assert PROJECT["requires-python"] == ">=3.11"

    def test_it_ends_as_an_ordinary_user_in_front_of_the_trainer(self, stages):
        *_, final = stages.values()
        users = [(i, rest) for i, (instruction, rest) in enumerate(final) if instruction == "USER"]
        assert users == [(len(final) - 2, "1000:1000")]
        assert final[-1] == ("ENTRYPOINT", '["python", "-m", "trainer"]')

    def test_what_it_copies_exists_and_reaches_the_builder(self, stages):
        rules = (ROOT / ".dockerignore").read_text().splitlines()
        allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
        assert "*" in rules
        copied = set()
        for instructions in stages.values():
            assert not any(instruction == "ADD" for instruction, _ in instructions)
            for instruction, rest in instructions:
                if instruction == "COPY" and not rest.startswith("--from="):
                    copied.update(rest.split()[:-1])
        assert all((ROOT / name).exists() for name in copied)
        assert copied == allowed

    def test_packages_are_pinned_and_come_before_the_code(self, stages):
        installs = [
            (stage, rest)
            for stage, instructions in stages.items()
            for instruction, rest in instructions
            if instruction == "RUN" and " install -" in rest and "pip" in rest
        ]
        assert len(installs) == 4
        for stage, rest in installs:
            wanted = "--no-index" if stage == "image" else "--constraint constraints.txt"
            assert wanted in rest
        for stage in ("requirements", "cpu", "cuda", "dependencies"):
            copies = [rest for instruction, rest in stages[stage] if instruction == "COPY"]
            assert not any(re.search(r"\b(trainer|conf)\b", rest) for rest in copies)

    def test_its_list_of_requirements_is_the_projects(self, stages):
        ((_, step),) = [item for item in stages["requirements"] if item[0] == "RUN"]
        command, _, target = step.rpartition(" >")
        assert target == "requirements.txt"
        python, *arguments = shlex.split(command)
        assert python == "python"
        listed = subprocess.check_output([sys.executable, *arguments], cwd=ROOT, text=True)
        extras = PROJECT["optional-dependencies"]
        wanted = [*PROJECT["dependencies"], *extras["cluster"], *extras["onnx"]]
        assert listed.splitlines() == wanted


class TestCompose:
    @pytest.fixture
    def services(self) -> dict[str, Any]:
        (compose,) = load("docker/compose.yaml")
        assert compose["volumes"] == {"runs": None}
        services: dict[str, Any] = compose["services"]
        return services

    def test_a_head_two_workers_and_a_job(self, services):
        assert services.keys() == {"head", "worker", "job"}
        assert services["worker"]["deploy"]["replicas"] == 2
        assert services["head"]["entrypoint"][:3] == ["ray", "start", "--head"]
        assert "--address=head:6379" in services["worker"]["entrypoint"]
        assert services["job"]["entrypoint"][-3:] == ["python", "-m", "trainer"]
        assert services["job"]["command"][0] == "+experiment=smoke"

    def test_the_token_must_be_set_and_nothing_is_published(self, services):
        for service in services.values():
            assert service["image"] == IMAGE
            assert service["environment"]["RAY_AUTH_MODE"] == "token"
            assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]
            assert not {"ports", "expose", "user"} & service.keys()
        assert "--dashboard-host=127.0.0.1" in services["head"]["entrypoint"]
        assert services["job"]["network_mode"] == "service:head"


class TestKubernetes:
    @pytest.fixture
    def job(self) -> dict[str, Any]:
        claim, job = load("launch/kuberay.yaml")
        assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
        assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
        spec: dict[str, Any] = job["spec"]
        volumes = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        assert volumes[0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        return spec

    @pytest.fixture
    def pods(self, job) -> list[Any]:
        cluster = job["rayClusterSpec"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        templates = [*(group["template"] for group in groups), job["submitterPodTemplate"]]
        return [template["spec"] for template in templates]

    def test_the_cluster_goes_with_the_run(self, job):
        assert job["entrypoint"].startswith("python -m trainer +experiment=smoke ")
        assert job["shutdownAfterJobFinishes"] is True
        workers = job["rayClusterSpec"]["workerGroupSpecs"][0]
        assert f"cluster.workers={workers['replicas']}" in job["entrypoint"]

    def test_the_token_comes_from_a_secret(self, job):
        auth = job["rayClusterSpec"]["authOptions"]
        assert auth == {"mode": "token", "secretName": "trainer-token"}
        assert job["rayClusterSpec"]["rayVersion"] == RAY
        created = "kubectl create secret generic trainer-token --from-literal=auth_token="
        assert created in (ROOT / "launch" / "kuberay.yaml").read_text()

    def test_pods_satisfy_the_restricted_standard(self, pods):
        for pod in pods:
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod["automountServiceAccountToken"] is False
            for container in pod["containers"]:
                assert container["image"] == IMAGE
                assert container["resources"].keys() == {"requests", "limits"}
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                }


class TestClusterLauncher:
    @pytest.fixture
    def config(self) -> dict[str, Any]:
        (config,) = load("launch/cluster.yaml")
        result: dict[str, Any] = config
        return result

    def test_ray_would_accept_it(self, config):
        ray = find_spec("ray")
        assert ray
        assert ray.origin
        schema = Path(ray.origin).parent / "autoscaler" / "ray-schema.json"
        jsonschema.validate(config, json.loads(schema.read_text()))

    def test_every_node_asks_for_the_same_token(self, config):
        assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
        starts = [config[f"{role}_start_ray_commands"][-1] for role in ("head", "worker")]
        for command in starts:
            assert re.search(r"RAY_AUTH_MODE=token .*ray start ", command)
        assert "--dashboard-host=127.0.0.1" in starts[0]

    def test_set_up_uses_the_constraints_that_it_copies(self, config):
        assert config["file_mounts"]["~/trainer"] == "."
        install = config["setup_commands"][-1]
        assert re.findall(r"--constraint trainer/(\S+)", install) == ["constraints.txt"]
        assert (ROOT / "constraints.txt").is_file()
        assert install.endswith("'./trainer[cluster,onnx]'")  # all that an experiment may ask for


class TestSlurm:
    """The script itself, with stubs for Slurm, Ray and Python."""

    SCRIPT = ROOT / "launch" / "slurm.sbatch"
    STUBS: ClassVar = {
        "srun": 'echo "srun $*"; while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
        "ray": 'while [ "$1" != -- ]; do shift; done; shift; [ -z "${NO_RAY:-}" ] || exit 0\n"$@"',
        "hostname": 'echo "192.0.2.1 198.51.100.1 "',
        "python": f"""case $1 in
            -c) exec {sys.executable} "$@" ;;
            *) printf '%s\\n' "$@" >arguments; env >environment
               if [ -n "${{SLEEP:-}}" ]; then trap 'exit 143' TERM; touch running
               while :; do sleep 0.05; done; fi
               exit "${{CODE:-0}}" ;;
        esac""",
    }

    @pytest.fixture
    def start(self, tmp_path):
        tools = tmp_path / "venv" / "bin"
        tools.mkdir(parents=True)
        (tools / "activate").write_text(f"PATH={tools}:$PATH\n")
        for name, body in self.STUBS.items():
            (tools / name).write_text(f"#!/bin/bash\n{body}\n")
            (tools / name).chmod(0o755)
        allocation = {"SLURM_JOB_ID": "4200042", "SLURM_JOB_NUM_NODES": "2"}
        environ = {
            "PATH": "/usr/bin:/bin",
            "VENV": "venv",
            "SLURM_CPUS_PER_TASK": "8",
            **allocation,
        }

        def start(*arguments: str, **more: str) -> subprocess.Popen[str]:
            return subprocess.Popen(
                ["bash", self.SCRIPT, *arguments],
                cwd=tmp_path,
                env=environ | more,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

        return start

    def test_its_syntax(self):
        subprocess.run(["bash", "-n", self.SCRIPT], check=True)

    def test_arguments_pass_through_and_the_token_stays_inside(self, start, tmp_path):
        process = start("+experiment=smoke", "name=a b", "cluster.workers=1")
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert (tmp_path / "arguments").read_text().splitlines() == [
            *("-m", "trainer", "cluster.workers=2", "cluster.cpus_per_worker=8"),
            *("+experiment=smoke", "name=a b", "cluster.workers=1"),
        ]
        lines = (tmp_path / "environment").read_text().splitlines()
        environment = dict(line.split("=", 1) for line in lines if "=" in line)
        assert environment["RAY_AUTH_MODE"] == "token"
        assert len(environment["RAY_AUTH_TOKEN"]) == 64
        assert environment["RAY_AUTH_TOKEN"] not in said
        assert f"--address {environment['RAY_ADDRESS']} --min-nodes 2" in said
        assert environment["RAY_ADDRESS"] == "192.0.2.1:20042"
        assert said.splitlines()[-1].endswith("rm -rf /tmp/ray-4200042")

    def test_a_worker_for_each_gpu(self, start, tmp_path):
        start("+experiment=smoke", SLURM_GPUS_ON_NODE="4").communicate()
        arguments = (tmp_path / "arguments").read_text().splitlines()
        assert arguments[2:4] == ["cluster.workers=8", "cluster.cpus_per_worker=2"]

    def test_a_later_argument_wins(self, capsys):
        assert main(["cluster.workers=2", "+experiment=smoke", "cluster.workers=1", "--cfg"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["cluster"]["workers"] == 1

    @pytest.mark.parametrize("code", [1, 2, 143])
    def test_the_exit_code_is_the_trainers(self, start, code):
        process = start("+experiment=smoke", CODE=str(code))
        process.communicate()
        assert process.returncode == code

    def test_a_ray_that_does_not_start_is_a_failure(self, start):
        process = start("+experiment=smoke", NO_RAY="1")
        said, _ = process.communicate()
        assert process.returncode == 1
        assert "Ray did not start" in said

    def test_without_an_experiment_nothing_starts(self, start, tmp_path):
        process = start()
        said, _ = process.communicate()
        assert process.returncode == 2
        assert said.startswith("usage: ")
        assert not (tmp_path / "arguments").exists()

    def test_sigterm_reaches_the_trainer_and_its_end_is_awaited(self, start, tmp_path):
        process = start("+experiment=smoke", SLEEP="1")
        while not (tmp_path / "running").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        process.communicate()
        assert process.returncode == 143
