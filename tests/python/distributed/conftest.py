"""One pool of ranks for the whole folder."""

from collections.abc import Iterator

import pytest
import torch.distributed

if not torch.distributed.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def ranks() -> Iterator["Ranks"]:  # noqa: F821 -- imported where torch.distributed is
    from support.ranks import Ranks

    pool = Ranks()
    yield pool
    pool.close()
