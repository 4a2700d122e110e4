"""Finds the package and the library under test; the libraries that it is plugged into must be installed."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT_LIBRARY = ROOT / "build" / "libselfattn.so"

# A library that was built in this folder is what is tested, unless the environment names another.
if BUILT_LIBRARY.is_file():
    os.environ.setdefault("SELFATTN_LIBRARY", str(BUILT_LIBRARY))
if "SELFATTN_LIBRARY" in os.environ:
    sys.path.insert(0, str(ROOT))

# Threads that wait for others sleep: on a machine with other work, spinning makes the tests several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is built on the spot

import pytest  # noqa: E402
import torch  # noqa: E402

import selfattn.integrations.transformers  # noqa: E402

selfattn.integrations.transformers.register()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "slow: compiles programs, a minute or so")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and there is none"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
