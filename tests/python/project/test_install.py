"""Promise: `pip install .` gives a package that works from any folder, and says so where it meets another torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.cpp_build import run, tool

pytestmark = pytest.mark.slow

USE = """
import torch, selfattn
out = selfattn.multihead_attention(*torch.randn(3, 1, 5, 2, 8))
print(out.shape, selfattn.__file__)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the package into, with the CPU part alone to keep the build short."""
    tool("cmake")
    folder = tmp_path_factory.mktemp("site")
    options = ["--no-build-isolation", "--no-deps", "--quiet", "--disable-pip-version-check"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "SELFATTN_CMAKE_ARGS": "-DSELFATTN_CUDA=OFF", "PATH": path}
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(ROOT)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def environment_of(site: Path) -> dict[str, str]:
    without = {key: value for key, value in os.environ.items() if not key.startswith("SELFATTN_")}
    return {**without, "PYTHONPATH": str(site)}


def test_installed_package_works_from_any_folder(site: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", USE]
    result = subprocess.run(
        command, env=environment_of(site), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 5, 2, 8])" in result.stdout
    assert str(site) in result.stdout


def test_another_torch_gives_a_readable_error(site: Path, tmp_path: Path) -> None:
    info = site / "selfattn" / "_build_info.py"
    before = info.read_text()
    info.write_text('TORCH_VERSION = "2.3.1"\n')
    try:
        command = [sys.executable, "-c", "import selfattn"]
        result = subprocess.run(
            command, env=environment_of(site), cwd=tmp_path, capture_output=True, text=True, check=False
        )
    finally:
        info.write_text(before)
    assert result.returncode != 0
    assert "built for torch 2.3.1" in result.stderr


def test_wheel_holds_no_compiled_python(site: Path) -> None:
    libraries = sorted(path.name for path in (site / "selfattn").rglob("*.so"))
    assert libraries == ["libselfattn.so"]
    needed = run("readelf", "-d", site / "selfattn" / "lib" / "libselfattn.so")
    assert "libtorch_python" not in needed
