"""Which family of CUDA kernels serves a device: the newest that suits it, or the one that SELFATTN_FLASH_FAMILY forces.

The variable is read once a process, so each test of it has processes of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT
from support.cpp_build import run, tool

FAMILIES = ("sm80", "sm90")
CAPABILITIES = (70, 75, 80, 86, 89, 90, 100, 120)
START = "import torch, selfattn\n"
FAKE_CALL = """
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    q = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16, device="cuda:7")
    print(selfattn.explain_backend(q, q, q).splitlines()[0])
"""
CPU_CALL = """
q = torch.ones(1, 8, 2, 64, dtype=torch.bfloat16)
print(selfattn.explain_backend(q, q, q).splitlines()[0])
"""


def run_program(program: str, family: str | None, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "SELFATTN_FLASH_FAMILY"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    if family is not None:
        environment["SELFATTN_FLASH_FAMILY"] = family
    environment.update(variables)
    command = [sys.executable, "-c", START + program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def output_of(program: str, family: str | None) -> str:
    done = run_program(program, family)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---------------------------------------------------------------- the environment variable


@pytest.mark.parametrize("value", ["sm75", "SM80", "80"])
def test_a_value_that_names_no_family_is_an_error_of_cuda_calls(value: str) -> None:
    done = run_program(FAKE_CALL, value)
    assert done.returncode != 0
    expected = "ValueError: selfattn: the environment variable SELFATTN_FLASH_FAMILY must be sm80, sm90 or unset"
    assert f"{expected}; got '{value}'" in done.stderr


def test_the_error_comes_at_every_call() -> None:
    program = f"""
def ask():
    {FAKE_CALL.strip().replace(chr(10), chr(10) + "    ")}
for _ in range(2):
    try:
        ask()
    except ValueError as error:
        print(str(error).splitlines()[0])
"""
    lines = output_of(program, "hopper").splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]


@pytest.mark.parametrize("value", [None, "", "sm80", "sm90", "sm75"])
def test_calls_on_the_cpu_do_not_read_it(value: str | None) -> None:
    assert output_of(CPU_CALL, value) == "flash: chosen"


@pytest.mark.parametrize("value", [None, "", *FAMILIES])
def test_a_device_that_is_not_there_has_no_family(value: str | None) -> None:
    said = output_of(FAKE_CALL, value)
    assert "there is no device cuda:7" in said or "has no kernels for cuda:7" in said


# ---------------------------------------------------------------- the choice

SHIM = r"""
#include <cstdlib>
#include <iostream>

#include "flash/kernels.h"

using namespace selfattn;

std::string forced;
bool is_there[5];  // sm80, sm90, segments, float32, unaligned

const std::string& selfattn::forced_flash_family() { return forced; }
std::string selfattn::capability_to_string(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

namespace selfattn::cuda {
bool segments_are_built_for(int) { return is_there[2]; }
const FlashKernels& sm80_kernels() {
  static FlashKernels kernels{SM80, .is_built_for = [](int) { return is_there[0]; }};
  return kernels;
}
const FlashKernels& sm90_kernels() {
  static FlashKernels kernels{SM90, .is_built_for = [](int) { return is_there[1]; }};
  return kernels;
}
const FlashKernels& unaligned_kernels() {
  static FlashKernels kernels{UNALIGNED, .is_built_for = [](int) { return is_there[4]; }};
  return kernels;
}
const FlashKernels& float32_kernels() {
  static FlashKernels kernels{FLOAT32, .is_built_for = [](int) { return is_there[3]; }};
  return kernels;
}
}

// Of each question on a line (capability, family or -, five digits, 1 for float32, 1 for aligned rows): the family's
// name, or the reason.
int main() {
  int capability;
  std::string family, built;
  bool is_float32, is_aligned;
  while (std::cin >> capability >> family >> built >> is_float32 >> is_aligned) {
    forced = family == "-" ? "" : family;
    for (int i = 0; i < 5; i++) is_there[i] = built[i] == '1';
    const cuda::FlashKernels* kernels = cuda::select_kernels(
        0, capability, is_float32 ? cuda::ElementType::kFloat : cuda::ElementType::kHalf,
        is_aligned ? cuda::RowLayout::kAligned : cuda::RowLayout::kUnaligned);
    const FlashSupport support = find_flash_support(0, capability, is_float32, is_aligned);
    if ((kernels != nullptr) != (support.limits != nullptr)) return 1;
    std::cout << (kernels ? kernels->name : support.reason) << "\n";
  }
}
"""


SOURCES = {
    "sm80": "sm80/kernels",
    "sm90": "sm90/kernels",
    "unaligned": "sm80/unaligned_kernels",
    "float32": "float32/kernels",
}


def limits_in_source(family: str) -> str:
    """The designated initialisers of what the choice reads, as the family's own table has them."""
    source = (ROOT / f"csrc/cuda/flash/{SOURCES[family]}.cu").read_text()
    wanted = ("name", "min_capability", "max_capability", "is_of_float32", "is_of_unaligned")
    lines = [line.strip() for line in source.splitlines()]
    return " ".join(line for name in wanted for line in lines if line.startswith(f".{name} ="))


@pytest.fixture(scope="module")
def chooser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """select_kernels.cu itself, with families whose kernels are there or not as the question says."""
    cuda = Path(tool("nvcc")).resolve().parents[1] / "include"
    folder = tmp_path_factory.mktemp("chooser")
    shim = SHIM
    for family in SOURCES:
        shim = shim.replace(f"{family.upper()},", limits_in_source(family))
    (folder / "shim.cpp").write_text(shim)
    (folder / "select_kernels.cpp").write_text('#include "cuda/flash/select_kernels.cu"\n')
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}", f"-isystem{cuda}"]
    run(tool("c++"), "-std=c++20", *includes, *folder.glob("*.cpp"), "-o", folder / "chooser")
    return folder / "chooser"


def choices(
    chooser: Path, family: str = "-", built: str = "11111", is_float32: bool = False, is_aligned: bool = True
) -> dict[int, str]:
    rows = f"{int(is_float32)} {int(is_aligned)}"
    questions = "\n".join(f"{capability} {family} {built} {rows}" for capability in CAPABILITIES)
    done = subprocess.run([chooser], input=questions, capture_output=True, text=True, check=True)
    return dict(zip(CAPABILITIES, done.stdout.splitlines(), strict=True))


def test_every_device_since_ampere_has_a_family(chooser: Path) -> None:
    for capability, said in choices(chooser).items():
        if capability < 80:
            got = f"{capability // 10}.{capability % 10}"
            assert said == f"it needs compute capability 8.0 or newer; got {got}"
        else:
            assert said == ("sm90" if capability == 90 else "sm80")


def test_a_family_can_be_forced_where_it_runs(chooser: Path) -> None:
    for capability, said in choices(chooser, "sm80").items():
        assert said == "sm80" or capability < 80
    for capability, said in choices(chooser, "sm90").items():
        got = f"{capability // 10}.{capability % 10}"
        refusal = f"SELFATTN_FLASH_FAMILY=sm90 forces kernels that need compute capability 9.0; got {got}"
        assert said == ("sm90" if capability == 90 else refusal)


@pytest.mark.parametrize("built", ["00111", "01011", "10011", "11011"])
def test_a_device_for_which_a_part_was_not_built_is_refused(chooser: Path, built: str) -> None:
    """The families' own kernels, or the preparation of segments."""
    for capability, said in choices(chooser, built=built).items():
        if capability >= 80:
            assert said.startswith("this build of selfattn holds no flash kernels for compute capability"), said


def test_hopper_without_its_own_kernels_runs_those_of_every_card(chooser: Path) -> None:
    assert choices(chooser, built="10111")[90] == "sm80"
    assert choices(chooser, built="01111")[90] == "sm90"


@pytest.mark.parametrize("family", ["-", *FAMILIES])
@pytest.mark.parametrize(
    ("name", "rows", "without"),
    [
        ("float32", {"is_float32": True}, "11101"),
        ("float32", {"is_float32": True, "is_aligned": False}, "11101"),
        ("unaligned", {"is_aligned": False}, "11110"),
    ],
)
def test_float32_and_unaligned_rows_have_one_family_whatever_is_forced(
    chooser: Path, family: str, name: str, rows: dict[str, bool], without: str
) -> None:
    for capability, said in choices(chooser, family, **rows).items():
        got = f"{capability // 10}.{capability % 10}"
        assert said == (name if capability >= 80 else f"it needs compute capability 8.0 or newer; got {got}")
    for built in (without, "11011"):
        for capability, said in choices(chooser, family, built, **rows).items():
            if capability >= 80:
                assert said.startswith("this build of selfattn holds no flash kernels for compute capability"), said
    assert choices(chooser, built="00111", **rows)[90] == name


# ---------------------------------------------------------------- on a GPU

ATTEND = """
from torch.profiler import ProfilerActivity, profile

torch.manual_seed(0)
q, k, v, grad = (torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
ids = torch.arange(300, device="cuda").div(70, rounding_mode="floor").int().expand(2, -1)
print(selfattn.explain_backend(q, k, v, ids).splitlines()[0])


def step(backend, *tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = selfattn.multihead_attention(*leaves, ids, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, grad.detach().to(out.dtype))]


try:
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        results = step("flash", q, k, v)
        torch.cuda.synchronize()
    names = {event.name for event in profiler.events()}
    families = ("sm80", "sm90", "float32")
    print({family for family in families if any(f"::{family}::flash_attention" in name for name in names)})
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step("flash", q.float(), k.float(), v.float())
        torch.cuda.synchronize()
    assert any("::float32::flash_attention" in event.name for event in profiler.events())
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step("flash", q[..., 3:], k[..., 3:], v)  # rows of 61 elements: the same kernels on every card
        torch.cuda.synchronize()
    names = {event.name for event in profiler.events() if "::flash_attention" in event.name}
    assert len(names) > 2 and all("::sm80::" in name for name in names), names
    for mine, target in zip(results, step("reference", q.double(), k.double(), v.double())):
        assert (mine.double() - target).abs().max() < 2e-2 * target.abs().max()
except NotImplementedError as error:
    print(error)
    step("auto", q, k, v)  # something serves
"""


@pytest.mark.gpu
@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_forced_family_computes_or_is_refused_with_its_reason(family: str | None) -> None:
    major, minor = torch.cuda.get_device_capability()
    said, *rest = output_of(ATTEND, family).splitlines()
    if major < 8:
        assert said == f"flash: cannot serve this call: it needs compute capability 8.0 or newer; got {major}.{minor}"
    elif family == "sm90" and (major, minor) != (9, 0):
        reason = f"SELFATTN_FLASH_FAMILY=sm90 forces kernels that need compute capability 9.0; got {major}.{minor}"
        assert said == f"flash: cannot serve this call: {reason}"
        assert reason in rest[0]
    elif family == "sm80" and (major, minor) == (9, 0) and said != "flash: chosen":
        # Of a build for 9.0 and for cards before it, but without PTX.
        reason = "this build of selfattn holds no flash kernels for compute capability 9.0"
        assert said.startswith(f"flash: cannot serve this call: {reason}") and reason in rest[0]
    else:
        assert said == "flash: chosen"
        assert rest == [str({family or ("sm90" if (major, minor) == (9, 0) else "sm80")})]


@pytest.mark.gpu
def test_the_variable_is_read_once() -> None:
    program = """
import os
q = torch.ones(1, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
said = []
for value in ("sm80", "sm90", "nonsense"):
    os.environ["SELFATTN_FLASH_FAMILY"] = value
    said.append(selfattn.explain_backend(q, q, q))
print(len(set(said)))
"""
    assert output_of(program, None) == "1"


@pytest.mark.gpu
@pytest.mark.parametrize("value", ["99K", "0", "-99", "1e9"])
def test_shared_memory_that_is_no_number_is_an_error(value: str) -> None:
    program = """
q = torch.ones(1, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
selfattn.multihead_attention(q, q, q, torch.zeros(1, 8, dtype=torch.int32, device="cuda"), backend="flash")
"""
    done = run_program(program, None, SELFATTN_SHARED_MEMORY=value)
    assert done.returncode != 0
    expected = "the environment variable SELFATTN_SHARED_MEMORY must be a number of KiB or unset"
    assert f"{expected}; got '{value}'" in done.stderr
