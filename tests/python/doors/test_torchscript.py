"""A scripted module, saved and loaded in a process without this package, gives the same outputs and gradients."""

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support.problems import make_ids, zigzag

import selfattn
from selfattn import SelfAttention, SelfAttentionConfig

CONFIGS = {
    "plain": SelfAttentionConfig(head_dim=16),
    "everything": SelfAttentionConfig(
        head_dim=16,
        qk_norm=True,
        use_bias=True,
        num_kv_heads=2,
        sinks=True,
        softcap=3.0,
        window_left=5,
        rope_pairing="half",
        norm_unit_offset=True,
        num_heads=6,
        qk_scale=0.3,
        out_bias=False,
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_loaded_script_equals_the_module(config: SelfAttentionConfig) -> None:
    module = SelfAttention(64, config)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in module.named_parameters()]
    x, ids = torch.randn(2, 9, 64), make_ids("shuffled", 2, 9)
    freqs = selfattn.precompute_freqs(16, torch.randint(0, 50, (2, 9)))
    for inputs in ((x,), (x, None, ids), (x, freqs), (x, freqs, ids)):
        for _ in range(3):  # the first runs of a script are profiled, later ones are optimised
            outs = [each(*inputs) for each in (module, loaded)]
            torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=0)
            gradients = [
                torch.autograd.grad(out.square().sum(), list(each.parameters()))
                for out, each in zip(outs, (module, loaded), strict=True)
            ]
            for actual, expected in zip(gradients[1], gradients[0], strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_script_keeps_training_and_evaluation_apart() -> None:
    script = torch.jit.script(SelfAttention(64, SelfAttentionConfig(head_dim=16, dropout_rate=0.5)))
    x = torch.randn(2, 9, 64)
    assert (script(x) == 0).any()
    script.eval()
    assert (script(x) != 0).all()


def test_script_of_a_function_around_the_operators() -> None:
    @torch.jit.script
    def function(q: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out, lse = torch.ops.selfattn.multihead_attention_lse(q, q, q, ids, window_left=3)
        return out * lse.transpose(1, 2).unsqueeze(-1)

    q, ids = torch.randn(2, 9, 2, 16), make_ids("one_document", 2, 9)
    out, lse = selfattn.multihead_attention_lse(q, q, q, ids, window_left=3)
    assert torch.equal(function(q, ids), out * lse.transpose(1, 2).unsqueeze(-1))


def test_script_of_a_function_with_positions() -> None:
    @torch.jit.script
    def function(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, kv_positions: torch.Tensor) -> torch.Tensor:
        return torch.ops.selfattn.multihead_attention(q, k, k, positions=positions, kv_positions=kv_positions)

    q, k = torch.randn(2, 5, 2, 16), torch.randn(2, 9, 2, 16)
    kv_positions = zigzag(9).expand(2, 9)
    positions = kv_positions[:, :5]
    file = io.BytesIO()
    torch.jit.save(function, file)
    file.seek(0)
    out = torch.jit.load(file)(q, k, positions, kv_positions)
    expected = selfattn.multihead_attention(q, k, k, positions=positions, kv_positions=kv_positions)
    assert torch.equal(out, expected) and not torch.equal(out, selfattn.multihead_attention(q, k, k))


def test_saved_script_needs_the_library_alone(tmp_path: Path) -> None:
    """In a fresh process that loads libselfattn.so and never sees this package."""
    module = SelfAttention(64, CONFIGS["everything"])
    x, ids = torch.randn(2, 9, 64), make_ids("packed", 2, 9)
    torch.jit.script(module).save(str(tmp_path / "module.pt"))
    torch.save({"x": x, "ids": ids, "out": module(x, None, ids).detach()}, tmp_path / "tensors.pt")
    library = os.environ.get("SELFATTN_LIBRARY") or Path(selfattn.__file__).parent / "lib" / "libselfattn.so"
    program = textwrap.dedent(f"""
        import sys, torch
        torch.ops.load_library({str(library)!r})
        tensors = torch.load("tensors.pt")
        out = torch.jit.load("module.pt")(tensors["x"], None, tensors["ids"])
        assert "selfattn" not in sys.modules
        torch.testing.assert_close(out, tensors["out"], rtol=1e-6, atol=1e-6)
    """)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
