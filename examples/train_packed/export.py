"""From the trained model to a C++ program: TorchScript, a CMake build against an install tree, equal logits."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from model import LanguageModel
from packing import BOUNDARY
from torch import Tensor

SOURCES = Path(__file__).parent


@dataclass(frozen=True)
class CppRun:
    continuation: str
    logits_equal: bool
    """Bit by bit."""
    largest_difference: float


def export_torchscript(model: LanguageModel, path: Path) -> None:
    torch.jit.script(model).save(str(path))


def build_generator(install_tree: Path, build_folder: Path) -> Path:
    """Configures and builds generate.cpp as a project of its own, which knows the library by find_package alone."""
    cmake = _tool("cmake")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-DCMAKE_BUILD_TYPE=Release"]
    found_at = [f"-DCMAKE_PREFIX_PATH={install_tree.resolve()}", f"-DLibTorch_ROOT={Path(torch.__file__).parent}"]
    _run([cmake, "-S", SOURCES, "-B", build_folder, *generator, *found_at])
    _run([cmake, "--build", build_folder])
    return build_folder / "generate"


def run_generator(program: Path, model_path: Path, prompt: bytes, num_bytes: int, python_logits: Tensor) -> CppRun:
    """Lets C++ continue the prompt, and compares the logits that it wrote with Python's."""
    logits_path = model_path.with_name("cpp_logits.pt")
    prompt_path = model_path.with_name("prompt.txt")
    prompt_path.write_bytes(prompt)
    done = subprocess.run(
        [program, model_path, prompt_path, str(num_bytes), logits_path],
        capture_output=True,
        # Sums may be split by threads: as many as here give the same bits.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    if done.returncode != 0:
        raise SystemExit(f"{program} failed with status {done.returncode}:\n{done.stderr.decode(errors='replace')}")
    cpp_logits = torch.load(logits_path, weights_only=True)
    return CppRun(
        continuation=done.stdout.decode(errors="replace"),
        logits_equal=torch.equal(cpp_logits, python_logits),
        largest_difference=(cpp_logits - python_logits).abs().max().item(),
    )


@torch.no_grad()
def prompt_logits(model: LanguageModel, prompt: bytes) -> Tensor:
    """(prompt bytes + 1, VOCABULARY), on the CPU, where the C++ program runs too."""
    return model(torch.tensor([[BOUNDARY, *prompt]]))[0]


def _tool(name: str) -> str:
    """The program of that name beside this Python, where pip puts it, or on the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is needed to build the C++ program, and was not found: `pip install {name}`")
    return found


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
