"""Promise: kernels are compiled for the GPUs that are asked for, and what is asked for in vain is named."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from support import ROOT
from support.cpp_build import tool

NAMES = ("SM90", "SM80", "FLASH", "RARE", "CUDA")
SCRIPT = f'include("{ROOT}/cmake/cuda_architectures.cmake")\n' + "".join(
    f'message(NOTICE "{name}=${{SELFATTN_{name}_ARCHITECTURES}}")\n' for name in NAMES
)
EVERY = ["80-real", "80-virtual", "100-real", "120-real"]
BOTH = ["80-real", "90-real"]
CASES = {
    "all": (["90a-real"], EVERY, [*EVERY, "90-real"], [*BOTH, "80-virtual"], ["75-real", *EVERY, "90-real"]),
    "8.6;9.0": (["90a-real"], ["80-real"], BOTH, BOTH, BOTH),
    "8.0;8.6;8.9": (["90a-virtual"], ["80-real"], ["80-real"], ["80-real"], ["80-real"]),
    "9.0a": (["90a-real"], ["80-virtual"], ["90-real"], ["90-real"], ["90-real"]),
    "10.3;12.1": (["90a-virtual"], *[["100-real", "120-real"]] * 4),
    "9.0+PTX": (["90a-real"], ["80-virtual"], *[["80-virtual", "90-real"]] * 3),
    "11.0": (["90a-virtual"], *[["80-virtual"]] * 4),
    "7.5": (["90a-virtual"], *[["80-virtual"]] * 3, ["75-real", "80-virtual"]),
}


def configure(folder: Path, capabilities: str = "", listed: str = "", nvcc: str = "13.0", gpus: str | None = None):
    """A process of CMake on a machine with these GPUs; `listed`: TORCH_CUDA_ARCH_LIST."""
    script = folder / "script.cmake"
    script.write_text(SCRIPT)
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + (f"printf '{gpus}'\n" if gpus else "exit 9\n"))
    program.chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "TORCH_CUDA_ARCH_LIST": listed}
    options = [f"-DSELFATTN_COMPUTE_CAPABILITIES={capabilities}", f"-DCMAKE_CUDA_COMPILER_VERSION={nvcc}"]
    command = [tool("cmake"), *options, "-P", str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def architectures(folder: Path, **options: str) -> tuple[list[str], ...]:
    done = configure(folder, **options)
    assert done.returncode == 0, done.stderr
    found = dict(line.split("=") for line in done.stderr.splitlines() if "=" in line)
    return tuple(found[name].split(";") for name in NAMES)


@pytest.mark.parametrize("capabilities", CASES)
def test_compute_capabilities(capabilities: str, tmp_path: Path) -> None:
    expected = tuple(sorted(group) for group in CASES[capabilities])
    assert tuple(sorted(group) for group in architectures(tmp_path, capabilities=capabilities)) == expected


def test_what_stands_first(tmp_path: Path) -> None:
    every, hopper = (architectures(tmp_path, capabilities=name) for name in ("all", "9.0"))
    assert architectures(tmp_path) == every
    assert architectures(tmp_path, gpus="9.0\\n9.0\\n") == hopper
    assert architectures(tmp_path, gpus="8.6\\n", listed="9.0") == hopper
    assert architectures(tmp_path, listed="8.6", capabilities="9.0") == hopper
    assert architectures(tmp_path, listed="8.6 9.0") == architectures(tmp_path, listed="8.6;9.0")
    assert architectures(tmp_path, gpus="9.0\\n", capabilities="native") == hopper
    assert architectures(tmp_path, gpus="9.0\\n", capabilities="all") == every


def test_an_older_nvcc_leaves_newer_cards_to_ptx(tmp_path: Path) -> None:
    assert sorted(architectures(tmp_path, capabilities="all", nvcc="12.6")[1]) == ["80-real", "80-virtual"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"listed": "8.0 Hopper"}, "must be all, native or compute capabilities .* got Hopper"),
        ({"capabilities": "90"}, "got 90"),
        ({"capabilities": "native"}, "needs a GPU"),
    ],
)
def test_what_cannot_be_compiled_for_is_an_error(options: dict[str, str], message: str, tmp_path: Path) -> None:
    done = configure(tmp_path, **options)
    assert done.returncode != 0
    assert re.search(message, " ".join(done.stderr.split())), done.stderr
