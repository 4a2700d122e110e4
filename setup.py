"""Builds the package: CMake compiles libselfattn.so against the torch of this environment, and installs it, the C++
headers and the CMake package into the package's folder.

CMakeLists.txt says what is compiled and how. The environment says more:

- SELFATTN_CMAKE_ARGS: options for CMake, e.g. "-DSELFATTN_CUDA=OFF";
- MAX_JOBS: the compilations at a time (all cores);
- SELFATTN_LOCAL_VERSION: the version's local part, by which `make wheel` tells the wheels of several torches apart.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_SETUPTOOLS = 78
# What pyproject.toml asks for to build, e.g. ">=2.11,<2.16".
TORCH_RANGE = re.search(r'"torch(>=[^"]+)"', (ROOT / "pyproject.toml").read_text())[1]

if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"selfattn: setuptools must be {OLDEST_SETUPTOOLS} or newer to build; got {setuptools.__version__}; install a "
        f"newer one with `pip install 'setuptools>={OLDEST_SETUPTOOLS}'`, or build without --no-build-isolation"
    )

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402


def find_torch_minor() -> str:
    """Of the torch to build for, e.g. "2.15"."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        sys.exit(
            f"selfattn: torch{TORCH_RANGE} must be installed in {sys.prefix} to build for it, and there is none; "
            "install it, or build without --no-build-isolation"
        )
    minor = re.match(r"\d+\.\d+", version)[0]
    oldest, beyond = re.findall(r"\d+\.\d+", TORCH_RANGE)
    if not as_numbers(oldest) <= as_numbers(minor) < as_numbers(beyond):
        sys.exit(f"selfattn: torch must be {TORCH_RANGE}; got {version} in {sys.prefix}")
    return minor


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def find_tool(name: str) -> str:
    """The program of the Python package of that name, whose folder may be in no PATH, or what PATH has."""
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        files = []
    tools = [str(file.locate()) for file in files if file.name == name and file.parent.name == "bin"]
    tool = tools[0] if tools else shutil.which(name)
    if tool is None:
        sys.exit(
            f"selfattn: {name} must be installed to build, and there is none in {sys.prefix} or PATH; install it with "
            f"`pip install {name}`, or build without --no-build-isolation"
        )
    return tool


def needed_torch() -> str:
    """A compiled package serves one minor version; a source distribution can be compiled for any."""
    is_source = {"sdist", "egg_info"} & set(sys.argv[1:])
    return f"torch{TORCH_RANGE}" if is_source else f"torch=={find_torch_minor()}.*"


class WheelOfEveryPython(bdist_wheel):
    """The library holds no Python: one wheel serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class CMakeBuild(build_ext):
    """Has CMake compile and install into the package."""

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath("selfattn._")).parent.resolve()
        build = Path(self.build_temp).resolve()
        torch = metadata.distribution("torch").locate_file("torch")
        cmake = find_tool("cmake")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-ULibTorch_*",  # an earlier build in this folder may have found another torch
            "-DCMAKE_INSTALL_LIBDIR=lib",
            "-DSELFATTN_UNITY_BUILD=ON",
            "-DSELFATTN_SITE_PACKAGES=ON",
            f"-DLibTorch_ROOT={torch}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("SELFATTN_CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "--target", "selfattn", "-j", jobs], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(package)], check=True)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split("."))  # a plain shared library: no Python ABI in its name


local_version = os.environ.get("SELFATTN_LOCAL_VERSION")
setup(
    version=(ROOT / "VERSION").read_text().strip() + (f"+{local_version}" if local_version else ""),
    install_requires=[needed_torch()],
    ext_modules=[Extension("selfattn.libselfattn", sources=[])],
    cmdclass={"bdist_wheel": WheelOfEveryPython, "build_ext": CMakeBuild},
)
