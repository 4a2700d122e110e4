"""cmake/check_ptxas.py finds what is wrong in ptxas' output; what it is told of shared memory covers all of sm80."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.cpp_build import run, tool

spec = importlib.util.spec_from_file_location("check_ptxas", ROOT / "cmake" / "check_ptxas.py")
check_ptxas = importlib.util.module_from_spec(spec)
sys.modules["check_ptxas"] = check_ptxas  # for its dataclass
spec.loader.exec_module(check_ptxas)

SM80 = ROOT / "csrc" / "cuda" / "flash" / "sm80"
INCLUDES = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}")
EVERY_CARD = 99 * 1024
"""Bytes that a thread block may have on every card since compute capability 8.0."""
CONFIG = "INS1_13ForwardConfigI13__nv_bfloat16Li128ELi128ELNS1_8MaskKindE0EEEEEv"
FORWARD = f"_ZN8selfattn4cuda4sm8030flash_attention_forward_kernel{CONFIG}NS1_19ForwardKernelParamsE"
REPAIR = f"_ZN8selfattn4cuda4sm806repair{CONFIG}"
DYNAMIC = {("flash_attention_forward_kernel", 128, 128): 65536}


def log(arch: str = "sm_80", spill: int = 0, repair_spill: int = 0, registers: int = 255, static: int = 0) -> str:
    smem = f", {static} bytes smem" if static else ""
    return f"""
ptxas info    : Compiling entry function '{FORWARD}' for '{arch}'
ptxas info    : Function properties for {FORWARD}
    88 bytes stack frame, 8 bytes spill stores, {spill} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers{smem}, 552 bytes cmem[0]
ptxas info    : Compile time = 72.611 ms
ptxas info    : Function properties for {REPAIR}
    0 bytes stack frame, {repair_spill} bytes spill stores, 4 bytes spill loads
"""


def found(text: str, allowances: dict[str, int] | None = None, shared: dict | None = DYNAMIC) -> list[str]:
    functions, serialised = check_ptxas.read_log(text)
    return serialised + check_ptxas.complaints(functions, 64, allowances or {}, shared)


def test_nothing_wrong_is_no_complaint() -> None:
    assert found(log() + log("sm_120", spill=64, repair_spill=64)) == []


def test_spills_are_told_by_function_and_architecture() -> None:
    text = log("sm_80", spill=80) + log("sm_120", spill=100, repair_spill=200)
    assert found(text) == [
        f"80 bytes spilled in {FORWARD} for sm_80",
        f"100 bytes spilled in {FORWARD} for sm_120",
        f"200 bytes spilled in {REPAIR} for sm_120",
    ]
    assert found(text, {"sm80+forward_kernel": 80}) == [
        f"100 bytes spilled in {FORWARD} for sm_120",
        f"200 bytes spilled in {REPAIR} for sm_120",
    ]
    assert found(text, {"sm80+forward_kernel": 80, "sm80+forward_kernel+sm_120": 100, "sm80+repair": 200}) == []
    assert len(found(text, {"sm90+forward_kernel": 200})) == 3


def test_registers_and_serialised_products_are_told() -> None:
    assert found(log(registers=256)) == [f"256 registers in {FORWARD} for sm_80"]
    warning = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert len(found(log() + warning)) == 1


@pytest.mark.parametrize(
    ("arch", "most"), [("sm_80", 99), ("sm_89", 99), ("sm_120", 99), ("sm_87", 163), ("sm_100", 227)]
)
def test_shared_memory_beyond_the_card_is_told(arch: str, most: int) -> None:
    room = most * 1024 - 65536
    assert found(log(arch, static=room)) == []
    assert len(found(log(arch, static=room + 16))) == 1


def test_a_kernel_of_unknown_shared_memory_is_told() -> None:
    assert found(log(), shared={}) == [f"nobody says how much dynamic shared memory there is in {FORWARD} for sm_80"]
    assert found(log(), shared=None) == []


def test_a_kernel_that_misses_an_architecture_is_told() -> None:
    other = FORWARD.replace("Li128ELi128E", "Li64ELi64E")
    shared = DYNAMIC | {("flash_attention_forward_kernel", 64, 64): 32768}
    text = log("sm_80") + log("sm_120") + log("sm_80").replace(FORWARD, other)
    assert found(text, shared=shared) == [f"{other} was not compiled for sm_120, as others were"]


def test_kernels_of_unaligned_rows_have_architectures_of_their_own() -> None:
    unaligned = FORWARD.replace("MaskKindE0E", "MaskKindE2ELb0ELNS0_9RowLayoutE1E")
    text = (
        log("sm_80")
        + log("sm_120")
        + "".join(log(arch) for arch in ("sm_80", "sm_90", "sm_120")).replace(FORWARD, unaligned)
    )
    assert found(text) == []
    other = unaligned.replace("Lb0E", "Lb1E")
    assert found(text + log("sm_80").replace(FORWARD, other)) == [
        f"{other} was not compiled for sm_120, sm_90, as others were"
    ]


# ---------------------------------------------------------------- the family itself, compiled


@pytest.fixture(scope="module")
def shared_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared_memory")
    run(tool("nvcc"), "-std=c++20", *INCLUDES, ROOT / "tests/cuda/shared_memory.cu", "-o", folder / "program")
    (folder / "shared_memory.txt").write_text(run(folder / "program"))
    return folder / "shared_memory.txt"


def test_shared_memory_of_every_instantiation_fits_every_card(shared_memory: Path) -> None:
    sizes = check_ptxas.read_shared_memory(shared_memory.read_text())
    kernels = {
        "forward": ["forward"],
        "backward": ["backward", "backward_postprocess", "backward_dq", "backward_dkdv"],
    }
    expected = set()
    for folder, names in kernels.items():
        for path in (SM80 / folder / "instantiations").glob("*.cu"):
            dim, value_dim = re.fullmatch(r"(?:softcap_|unaligned_)?d(\d+)(?:x(\d+))?_\w+", path.stem).groups()
            expected |= {(f"flash_attention_{name}_kernel", int(dim), int(value_dim or dim)) for name in names}
    assert set(sizes) == expected
    asking = {size for size in sizes.items() if size[0][0] in check_ptxas.ASKS_THE_DEVICE}
    assert all(size <= EVERY_CARD for _, size in sizes.items() - asking), sizes
    assert all(size <= max(check_ptxas.MOST_SHARED_MEMORY.values()) for _, size in asking), sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d96_bf16.cu", "unaligned_d64_bf16.cu"])
def test_an_instantiation_passes_the_check_on_every_architecture(
    shared_memory: Path, tmp_path: Path, name: str
) -> None:
    """As `make build` has it checked, which looks at all of them."""
    architectures = ("80", "86", "89", "100", "120")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    source = SM80 / "backward" / "instantiations" / name
    options = ["-std=c++20", "-Xptxas=-v", *INCLUDES, *codes, "-c", source, "-o", tmp_path / "object.o"]
    done = subprocess.run([tool("nvcc"), *map(str, options)], capture_output=True, text=True, check=True)
    (tmp_path / "log").write_text(done.stdout + done.stderr)
    spills = re.search(r"^SPILLS = ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    allowances = [f"--allow={spill}" for spill in spills.replace("\\\n", " ").split()]
    check = [ROOT / "cmake/check_ptxas.py", tmp_path / "log", "--shared-memory", shared_memory, *allowances]
    said = run(sys.executable, *check)
    assert all(f"sm_{arch}: " in said for arch in architectures), said
