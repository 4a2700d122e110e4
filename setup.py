"""Builds the package: CMake compiles libselfattn.so against the installed torch, the wheel carries it as it is.

CMakeLists.txt says what is compiled and how. Options for it go into the environment variable SELFATTN_CMAKE_ARGS,
e.g. SELFATTN_CMAKE_ARGS="-DSELFATTN_CUDA=OFF".
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Compiles libselfattn.so into the package and records the torch that it was compiled for."""

    def build_extension(self, ext: Extension) -> None:
        import torch

        package = Path(self.get_ext_fullpath("selfattn._")).parent.resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package / 'lib'}",
            f"-DLibTorch_ROOT={Path(torch.__file__).parent}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("SELFATTN_CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--target", "selfattn", "-j", jobs], check=True)
        docstring = '"""Written by the build: what libselfattn.so was compiled for."""'
        (package / "_build_info.py").write_text(f'{docstring}\n\nTORCH_VERSION = "{torch.__version__}"\n')

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split("."))  # a plain shared library: no Python ABI in its name


setup(
    version=(ROOT / "VERSION").read_text().strip(),
    ext_modules=[Extension("selfattn.libselfattn", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
