"""Promise: the blocks of docs/integrations.md and docs/pretrained_layers.md run as they stand, with small models."""

import functools
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import ROOT
from models import build, tokens
from support.guides import programs_of, run
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import selfattn

DOCS = ROOT / "docs"
SDPA = "activate_flash_attention_impl"  # replaces kernels of the whole process: test_readme_integrations.py runs it
ONNX = "torch.onnx.export"


class Continued(hf.LlamaForCausalLM):
    """Three new tokens of each prompt."""

    def generate_batch(self, prompts: list[list[int]], **options):
        greedy = hf.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1)
        return super().generate_batch(prompts, generation_config=greedy, progress_bar=False, **options)


def test_integrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama = build("llama", layers=1)
    llama.save_pretrained(tmp_path)
    static_cache = hf.StaticCache(config=llama.config, max_cache_len=16)
    with torch.no_grad():
        llama(tokens(5)[None], cache=static_cache)
    layer = selfattn.SelfAttention.from_pretrained_layer(build("llama", "eager", layers=1).model.layers[0].self_attn)
    x = torch.randn(1, 3, 64)
    names = run(
        DOCS / "integrations.md",
        {
            "torch": torch,
            "selfattn": selfattn,
            "functools": functools,
            "create_selective_checkpoint_contexts": create_selective_checkpoint_contexts,
            "AutoModelForCausalLM": Continued,
            "name": tmp_path,
            "DataCollatorWithFlattening": hf.DataCollatorWithFlattening,
            "examples": [{"input_ids": tokens(length).tolist()} for length in (3, 4)],
            "static_cache": static_cache,
            "layers": [layer],
            "layer": layer,
            "x": x,
            "segment_ids": torch.zeros(1, 3, dtype=torch.int64),
            "ContinuousBatchingConfig": functools.partial(
                hf.ContinuousBatchingConfig, num_blocks=16, max_batch_tokens=16
            ),
            "prompts": [tokens(length).tolist() for length in (3, 9)],
        },
        only=lambda block: SDPA not in block and ONNX not in block,
    )
    assert names["loss"].isfinite() and names["y"].shape == x.shape and names["cache"].lengths.tolist() == [8]
    assert [len(output.generated_tokens) for output in names["outputs"].values()] == [3, 3]


def test_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layer = selfattn.SelfAttention(64, selfattn.SelfAttentionConfig(head_dim=16))
    given = {"torch": torch, "selfattn": selfattn, "model": layer, "args": (torch.randn(1, 3, 64),)}
    run(DOCS / "integrations.md", {**given, "dynamic_shapes": None}, only=lambda block: ONNX in block)
    assert (tmp_path / "model.onnx").exists()


def test_sdpa_is_the_readme_s() -> None:
    (own,), (readme,) = (
        [block for block in programs_of(guide.read_text()) if SDPA in block]
        for guide in (DOCS / "integrations.md", ROOT / "README.md")
    )
    assert own == readme


def test_pretrained_layers() -> None:
    class Small:
        @staticmethod
        def from_pretrained(name: str) -> hf.PreTrainedModel:
            assert name == "Qwen/Qwen3-4B"
            return build("qwen3", "eager")

    x, attention_mask = torch.randn(2, 5, 64), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    given = {"selfattn": selfattn, "AutoModelForCausalLM": Small, "x": x, "attention_mask": attention_mask}
    names = run(
        DOCS / "pretrained_layers.md",
        {**given, "position_ids": torch.arange(5)[None], "segment_ids": attention_mask - 1},
    )
    assert names["y"].shape == x.shape and not names["y"][1, 3:].any()
