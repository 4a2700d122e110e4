"""Promise: C++ programs that know only the install tree train, load what Python saved, and exchange state with it."""

from pathlib import Path

import pytest
import torch
from support.cpp_build import build_example, install_tree, run
from torch import Tensor, nn

import selfattn
from selfattn import SelfAttention, SelfAttentionConfig

EVERY_OPTION = SelfAttentionConfig(head_dim=16, num_kv_heads=2, qk_norm=True, use_bias=True, sinks=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("libtorch_app")
    return build_example("libtorch_app", install_tree(folder / "install"), folder / "build")


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 19, 64), torch.randint(-1, 3, (2, 19), dtype=torch.int32)


def test_application_trains_and_its_script_loads_in_a_fresh_process(programs: Path, tmp_path: Path) -> None:
    module, tensors = tmp_path / "module.pt", tmp_path / "tensors.pt"
    assert "FAILED" not in run(programs / "train", module, tensors)
    assert run(programs / "load_torchscript", module, tensors).count("ok") == 2


def test_script_of_cpp_loads_in_python(programs: Path, tmp_path: Path) -> None:
    run(programs / "train", tmp_path / "module.pt", tmp_path / "tensors.pt")
    x, ids, out, *_ = torch.load(tmp_path / "tensors.pt")
    assert torch.equal(torch.jit.load(tmp_path / "module.pt")(x, None, ids), out)


def test_training_in_python_from_the_same_seed_gives_the_losses_of_cpp(programs: Path, tmp_path: Path) -> None:
    """The loop of train.cpp, line by line."""
    run(programs / "train", tmp_path / "module.pt", tmp_path / "tensors.pt")
    inputs_of_cpp, ids, *_, expected = torch.load(tmp_path / "tensors.pt")

    torch.manual_seed(0)
    attention = SelfAttention(64, SelfAttentionConfig(head_dim=16, num_kv_heads=2, qk_norm=True))
    x = torch.randn(8, 16, 64)
    assert torch.equal(x, inputs_of_cpp)
    allowed = selfattn.segment_mask(ids).squeeze(1).tril().float()
    target = torch.bmm(allowed, x) / allowed.sum(-1, keepdim=True).clamp_min(1)
    is_token = (ids >= 0).unsqueeze(-1)
    optimizer = torch.optim.Adam(attention.parameters(), lr=3e-3)
    losses = []
    for _ in range(len(expected)):
        optimizer.zero_grad()
        loss = ((attention(x, segment_ids=ids) - target) * is_token).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert len(losses) == 200 and losses[-1] < losses[0] / 2
    torch.testing.assert_close(torch.stack(losses), expected, rtol=1e-6, atol=0)


def test_script_of_python_loads_in_cpp(programs: Path, tmp_path: Path) -> None:
    module = SelfAttention(64, EVERY_OPTION)
    x, ids = inputs()
    out = module(x, segment_ids=ids)
    out.square().sum().backward()
    torch.jit.script(module).save(tmp_path / "module.pt")
    torch.save((x, ids, out.detach(), module.q_proj.weight.grad), tmp_path / "tensors.pt")
    assert run(programs / "load_torchscript", tmp_path / "module.pt", tmp_path / "tensors.pt").count("ok") == 2


def test_state_dict_moves_both_ways(programs: Path, tmp_path: Path) -> None:
    module = SelfAttention(64, EVERY_OPTION)
    x, ids = inputs()
    torch.save({"x": x, "segment_ids": ids, "state": dict(module.state_dict())}, tmp_path / "from_python.pt")
    run(programs / "exchange_state", tmp_path / "from_python.pt", tmp_path / "to_python.pt")
    answer = torch.load(tmp_path / "to_python.pt", weights_only=False)  # C++ types its dict
    with torch.no_grad():
        assert torch.equal(answer.pop("loaded_out"), module(x, segment_ids=ids))
        out = answer.pop("out")
        module.load_state_dict(answer)
        assert torch.equal(out, module(x, segment_ids=ids))


def test_exported_package_runs_in_cpp(programs: Path, tmp_path: Path) -> None:
    class OnPackedRows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = SelfAttention(64, EVERY_OPTION)

        def forward(self, x: Tensor, segment_ids: Tensor) -> Tensor:
            return self.attention(x, None, segment_ids)

    module = OnPackedRows()
    x, ids = inputs()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    with torch.no_grad():
        exported = torch.export.export(module, (x, ids), dynamic_shapes=({1: tokens}, {1: tokens}))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "module.pt2"))
        longer, longer_ids = torch.randn(2, 33, 64), torch.randint(-1, 3, (2, 33), dtype=torch.int32)
        torch.save((longer, longer_ids, module(longer, longer_ids)), tmp_path / "tensors.pt")
    assert "ok" in run(programs / "run_exported", tmp_path / "module.pt2", tmp_path / "tensors.pt")
