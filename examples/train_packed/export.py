"""From the trained model to a C++ program: TorchScript, a CMake build against an install tree, and its runs."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from model import LanguageModel
from packing import BOUNDARY
from torch import Tensor

SOURCES = Path(__file__).parent


@dataclass(frozen=True)
class GeneratorRun:
    """What the C++ program did with some prompts."""

    output: str
    seconds: float
    tokens: list[Tensor]
    """(N,) of each prompt: what was generated, with the boundary where it ended the text."""
    logits: list[Tensor]
    """(prompt bytes + N, VOCABULARY) of each prompt: after the boundary that opens it, after each of its bytes, and
    after each token that was generated and read again, all but the last."""

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


def export_torchscript(model: LanguageModel, path: Path) -> None:
    torch.jit.script(model).save(str(path))


def build_generator(install_tree: Path, build_folder: Path) -> Path:
    """Configures and builds the generator as a project of its own, which knows the library by find_package alone."""
    cmake = _tool("cmake")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-DCMAKE_BUILD_TYPE=Release"]
    found_at = [f"-DCMAKE_PREFIX_PATH={install_tree.resolve()}", f"-DLibTorch_ROOT={Path(torch.__file__).parent}"]
    _run([cmake, "-S", SOURCES, "-B", build_folder, *generator, *found_at])
    _run([cmake, "--build", build_folder])
    return build_folder / "generate"


def run_generator(program: Path, model_path: Path, prompts: list[bytes], *options: str) -> GeneratorRun:
    """Lets C++ continue the prompts; ``options`` are those of the program (generate.cpp)."""
    with TemporaryDirectory() as folder:
        record_path = Path(folder, "record.pt")
        prompt_paths = [Path(folder, f"prompt_{number}.txt") for number in range(len(prompts))]
        for path, prompt in zip(prompt_paths, prompts, strict=True):
            path.write_bytes(prompt)
        done = subprocess.run(
            [program, "--record", record_path, *options, model_path, *prompt_paths],
            capture_output=True,
            # Sums may be split by threads: as many as here give the same bits.
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        if done.returncode != 0:
            raise SystemExit(f"{program} failed with status {done.returncode}:\n{done.stderr.decode(errors='replace')}")
        seconds, *tensors = torch.load(record_path, weights_only=True)
    return GeneratorRun(done.stdout.decode(errors="replace"), seconds.item(), tensors[::2], tensors[1::2])


@torch.no_grad()
def prompt_logits(model: LanguageModel, prompt: bytes) -> Tensor:
    """(prompt bytes + 1, VOCABULARY), of a model on the CPU."""
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
