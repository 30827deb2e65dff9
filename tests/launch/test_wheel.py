"""The wheel contains the configuration and MNIST."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def files(folder: Path) -> set[str]:
    """Paths below `folder`, relative to it, without what Python leaves there."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.mark.integration
def test_wheel_holds_package_configuration_and_mnist(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        archive.extractall(tmp_path / "installed")
    code = {f"trainer/{name}" for name in files(ROOT / "trainer")}
    configuration = {f"trainer/conf/{name}" for name in files(ROOT / "conf")}
    assert packed == code | configuration
    assert len(licences) == 1
    assert "trainer/conf/config.yaml" in packed
    assert sum(name.endswith("-ubyte.gz") for name in packed) == 4

    # From the wheel alone, and from another directory: the list of experiments, exit code 2.
    done = subprocess.run(
        [sys.executable, "-m", "trainer"],
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "smoke" in done.stdout + done.stderr
