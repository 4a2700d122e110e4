"""Builds the C++ programs of examples/ against an install tree of the library under test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import ROOT


def tool(name: str) -> str:
    """The program of that name beside this Python, or on the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"needs {name}, and there is none")
    return found


def run(*command: object) -> str:
    """Runs a command; gives what it printed, and fails the test with it where the command fails."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command[0]} exited with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def install_tree(prefix: Path) -> Path:
    """Installs the library under test into `prefix`: its build folder is the one that SELFATTN_LIBRARY lies in."""
    build = Path(os.environ["SELFATTN_LIBRARY"]).parent
    if not (build / "cmake_install.cmake").exists():
        pytest.skip(f"needs the CMake build folder of the library, and {build} is none")
    run(tool("cmake"), "--install", build, "--prefix", prefix)
    return prefix


def build_example(name: str, prefix: Path, folder: Path) -> Path:
    """Builds examples/<name> as a CMake project of its own against the install tree."""
    source = ROOT / "examples" / name
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    torch_root = f"-DLibTorch_ROOT={Path(torch.__file__).parent}"
    run(tool("cmake"), "-S", source, "-B", folder, *generator, f"-DCMAKE_PREFIX_PATH={prefix}", torch_root)
    run(tool("cmake"), "--build", folder, "-j", os.cpu_count() or 1)
    return folder
