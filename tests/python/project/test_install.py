"""Promise: `pip install .` gives a package that works from any folder, in C++ too, and says so where it meets another
torch; sources that are part of another project configure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
    environment = {**os.environ, "SELFATTN_CMAKE_ARGS": "-DSELFATTN_CUDA=OFF"}
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
    info = site / "selfattn" / "lib" / "libselfattn.json"
    before = info.read_text()
    info.write_text('{"torch": "2.3.1"}')
    try:
        command = [sys.executable, "-c", "import selfattn"]
        result = subprocess.run(
            command, env=environment_of(site), cwd=tmp_path, capture_output=True, text=True, check=False
        )
    finally:
        info.write_text(before)
    assert result.returncode != 0
    assert "built for torch 2.3.1" in result.stderr and f"installed torch is {torch.__version__}" in result.stderr


def test_package_requires_the_torch_that_it_was_built_for(site: Path) -> None:
    (metadata,) = site.glob("selfattn-*.dist-info/METADATA")
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"Requires-Dist: torch=={minor}.*\n" in metadata.read_text()
    assert "Tag: py3-none-" in (metadata.parent / "WHEEL").read_text()


def test_wheel_holds_no_compiled_python(site: Path) -> None:
    libraries = sorted(path.name for path in (site / "selfattn").rglob("*.so"))
    assert libraries == ["libselfattn.so"]
    needed = run("readelf", "-d", site / "selfattn" / "lib" / "libselfattn.so")
    assert "libtorch_python" not in needed
    assert "[$ORIGIN/../../torch/lib" in needed  # beside the package


# ---------------------------------------------------------------- C++

PROJECT = """
cmake_minimum_required(VERSION 3.24)
project(application LANGUAGES CXX)
{finds}
add_executable(application main.cpp)
target_link_libraries(application PRIVATE SelfAttn::selfattn)
"""
MAIN = """
#include <ATen/ops/randn.h>
#include <selfattn/ops.h>
int main() {
  const at::Tensor q = at::randn({1, 5, 2, 8});
  return selfattn::multihead_attention(q, q, q, {}).sizes() == q.sizes() ? 0 : 1;
}
"""


def configure(folder: Path, finds: str, torch_root: Path, *options: str) -> Path:
    """A project of one program in `folder`, configured in the folder that is returned."""
    (folder / "CMakeLists.txt").write_text(PROJECT.format(finds=finds))
    (folder / "main.cpp").write_text(MAIN)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run(tool("cmake"), "-S", folder, "-B", folder / "build", *generator, f"-DLibTorch_ROOT={torch_root}", *options)
    return folder / "build"


def test_cpp_program_is_built_with_the_package(site: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "selfattn.cmake_prefix"]
    asked = subprocess.run(command, env=environment_of(site), cwd=tmp_path, capture_output=True, text=True, check=True)
    torch_root = Path(torch.__file__).parent
    build = configure(
        tmp_path, "find_package(SelfAttn REQUIRED)", torch_root, f"-DCMAKE_PREFIX_PATH={asked.stdout.strip()}"
    )
    run(tool("cmake"), "--build", build)
    run(build / "application")


INCLUDES_SOURCES = {
    "add_subdirectory": f"add_subdirectory({ROOT} selfattn)",
    "FetchContent": f"""
        include(FetchContent)
        FetchContent_Declare(selfattn SOURCE_DIR {ROOT})
        FetchContent_MakeAvailable(selfattn)
    """,
}


@pytest.mark.parametrize("finds", INCLUDES_SOURCES.values(), ids=INCLUDES_SOURCES.keys())
def test_project_around_the_sources_configures(finds: str, tmp_path: Path) -> None:
    build = configure(tmp_path, finds, Path(torch.__file__).parent, "-DSELFATTN_CUDA=OFF")
    needed = run(tool("ninja"), "-C", build, "-t", "commands", "application")
    assert "csrc/library.cpp" in needed and "main.cpp" in needed


def test_nvcc_of_another_cuda_is_refused_with_both_versions(tmp_path: Path) -> None:
    tool("nvcc")
    torch_root = Path(torch.__file__).parent
    if torch.version.cuda is None:
        pytest.skip("needs a torch with CUDA")
    stale = tmp_path / "torch"
    stale.mkdir()
    for name in ("include", "lib"):
        (stale / name).symlink_to(torch_root / name)
    (stale / "version.py").write_text("cuda: Optional[str] = '9.2'\n")
    command = [tool("cmake"), "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DLibTorch_ROOT={stale}"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    said = " ".join(result.stderr.split())
    assert result.returncode != 0 and "was built with CUDA 9.2, but" in said and "-DSELFATTN_CUDA=OFF" in said, said


# ---------------------------------------------------------------- what stops a build


def setup_with(stub: str, tmp_path: Path, *arguments: str) -> str:
    """What `setup.py` says, of metadata unless `arguments` ask for more, in a process in which `stub` ran first."""
    (tmp_path / "sitecustomize.py").write_text(stub)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "setup.py", *(arguments or ("dist_info", f"--output-dir={tmp_path}"))]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0, result.stdout
    return result.stderr


@pytest.mark.parametrize(
    ("version", "complaint"),
    [
        ("None", "must be installed in"),
        ("'2.3.1'", "torch must be >=2.11,<2.16; got 2.3.1"),
    ],
)
def test_missing_or_strange_torch_stops_the_build(version: str, complaint: str, tmp_path: Path) -> None:
    stub = f"""
from importlib import metadata
def version(name, right=metadata.version):
    if name != "torch":
        return right(name)
    if {version} is None:
        raise metadata.PackageNotFoundError(name)
    return {version}
metadata.version = version
"""
    assert complaint in setup_with(stub, tmp_path)


def test_old_setuptools_stops_the_build(tmp_path: Path) -> None:
    said = setup_with("import setuptools; setuptools.__version__ = '61.0.0'", tmp_path)
    assert "setuptools must be 78 or newer to build; got 61.0.0" in said


@pytest.mark.parametrize("missing", ["cmake", "ninja"])
def test_missing_tool_stops_the_build(missing: str, tmp_path: Path) -> None:
    stub = f"""
import shutil
from importlib import metadata
def without(right):
    return lambda name, *rest, **options: None if name == {missing!r} else right(name, *rest, **options)
shutil.which = without(shutil.which)
metadata.files = without(metadata.files)
"""
    said = setup_with(stub, tmp_path, "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}")
    assert f"{missing} must be installed to build" in said
