"""Finds the package and the library under test, and names what a machine without a GPU leaves out."""

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT_LIBRARY = ROOT / "build" / "libselfattn.so"

# A library that was built in this folder is what is tested, unless the environment names another.
if BUILT_LIBRARY.is_file():
    os.environ.setdefault("SELFATTN_LIBRARY", str(BUILT_LIBRARY))
if "SELFATTN_LIBRARY" in os.environ:
    sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "examples" / "train_packed"))  # its parts are tested one by one

# Threads that wait for others sleep: on a machine with other work, spinning makes the tests several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Without it PyTorch refuses matrix products on a GPU where deterministic algorithms are asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "selfattn", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("selfattn")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "slow: builds or compiles programs, a minute or so")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and there is none"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A backend's refusal skips no test: what must serve, and what may be left out, stands in serving_table.py."""
    report = yield
    if report.skipped and "cannot serve this call" in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped because a backend refused, which the serving table alone may say: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same numbers for every test, which may change what PyTorch's settings say for itself."""
    torch.manual_seed(0)
    threads, is_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(is_deterministic)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def deterministic() -> None:
    torch.use_deterministic_algorithms(True)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
