"""PyTorch's switch that leaves SMs to collectives: kernels that take all leave these free, with the same results."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.problems import documents, norm_error
from support.serving_table import skip_unless_flash_serves

import selfattn

pytestmark = pytest.mark.gpu

LEFT_FREE = 12


@pytest.fixture(autouse=True)
def no_carveout() -> Iterator[None]:
    yield
    torch._C._set_sm_carveout_experimental(None)


def grids(path: Path) -> dict[str, int]:
    """Of the attention kernels in a trace, thread blocks by name."""
    events = json.loads(path.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel" and "flash_attention" in event["name"]]
    return {event["name"]: event["args"]["grid"][0] for event in kernels}


@pytest.mark.parametrize("has_ids", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_kernels_leave_sms_free(dim: int, has_ids: bool, tmp_path: Path) -> None:
    skip_unless_flash_serves("cuda", torch.bfloat16, dim)
    length, heads = 4096, 16
    q, k, v = (torch.randn(1, length, heads, dim, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    ids = documents(1, length, 700).int().cuda() if has_ids else None

    def run(left_free: int | None) -> list[torch.Tensor]:
        torch._C._set_sm_carveout_experimental(left_free)
        out = selfattn.multihead_attention(q, k, v, ids, backend="flash")
        return [out, *torch.autograd.grad(out, (q, k, v), out.detach().roll(1, -1))]

    whole = run(None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        free = run(LEFT_FREE)
        torch.cuda.synchronize()
    assert torch.equal(free[0], whole[0])
    for name, one, other in zip(("dq", "dk", "dv"), free[1:], whole[1:], strict=True):
        assert norm_error(one, other) < 1e-3, name
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    found = grids(tmp_path / "trace.json")
    assert found
    properties = torch.cuda.get_device_properties(0)
    persistent = [name for name in found if "sm90" in name and "process" not in name]
    assert all(found[name] <= properties.multi_processor_count - LEFT_FREE for name in persistent), found
    for left_free in (1000, 0):  # at least one works; none is left
        assert torch.equal(run(left_free)[0], whole[0])
