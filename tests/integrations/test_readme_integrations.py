"""Promise: every line of the README's section on other libraries runs as it stands, and does what it says."""

import importlib
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import accelerate
import onnxruntime
import peft
import pytest
import torch
import torchao
import torchao.quantization
from conftest import ROOT
from torchtitan.config import ConfigManager
from torchtitan.models import llama3
from torchtitan.protocols.model_converter import build_model_converters
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import selfattn

TRANSFORMERS, WRAPPERS = "transformers", "PEFT, torchao, accelerate"
SDPA, TORCHTITAN = "`F.scaled_dot_product_attention`, `varlen_attn`", "torchtitan"
ONNX, PLAIN = "ONNX", "A plain loop, Lightning"


def blocks() -> dict[str, str]:
    """The lines under each heading of the section."""
    text = (ROOT / "README.md").read_text()
    (section,) = re.findall(r"^## Use it in other libraries\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    found = {}
    for part in re.split(r"^### ", section, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        (found[heading],) = re.findall(r"```(?:python|sh)\n(.*?)```", body, re.DOTALL)
    return found


def run(lines: str, **names) -> SimpleNamespace:
    namespace = dict(names)
    exec(compile(lines, "README.md", "exec"), namespace)
    return SimpleNamespace(**namespace)


def wrapper_line(name: str) -> str:
    (line,) = (line for line in blocks()[WRAPPERS].splitlines() if f"{name}." in line)
    return line


@pytest.fixture
def layer() -> selfattn.SelfAttention:
    layer = selfattn.SelfAttention(64, selfattn.SelfAttentionConfig(head_dim=16))
    torch.nn.init.normal_(layer.out_proj.weight, std=0.1)
    return layer


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 8, 64)


def test_every_heading_is_tested_here() -> None:
    assert set(blocks()) == {TRANSFORMERS, WRAPPERS, SDPA, TORCHTITAN, ONNX, PLAIN}
    assert len(blocks()[WRAPPERS].splitlines()) == 3


def test_transformers(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path)
    model = run(blocks()[TRANSFORMERS], AutoModelForCausalLM=AutoModelForCausalLM, name=tmp_path).model
    tokens = torch.randint(64, (1, 9))
    packed = model(tokens, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])).logits[:, 4:]
    torch.testing.assert_close(packed, model(tokens[:, 4:]).logits, atol=1e-5, rtol=1e-4)


def test_peft(layer, x) -> None:
    model = run(wrapper_line("peft"), peft=peft, layer=layer).model
    before = model(x)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    assert (model(x) - before).abs().max() > 1e-3


def test_torchao(layer, x) -> None:
    before = layer(x)
    run(wrapper_line("torchao"), torchao=torchao, layer=layer)
    error = ((layer(x) - before).norm() / before.norm()).item()
    assert 0 < error < 0.05


def test_accelerate(layer, x) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    ready = run(wrapper_line("accelerate"), accelerate=accelerate, layer=layer, optimizer=optimizer)
    before = [parameter.clone() for parameter in layer.parameters()]
    ready.layer(x.to(layer.out_proj.weight.device)).square().sum().backward()
    ready.optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="replaces the flash attention of torch's CUDA build")
def test_sdpa() -> None:
    try:
        run(blocks()[SDPA], torch=torch)
        assert torch.nn.attention.current_flash_attention_impl() == "selfattn"
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def test_torchtitan() -> None:
    """The options reach the converter; the training itself asks for GPUs."""
    words = shlex.split(blocks()[TORCHTITAN].replace("\\\n", ""))
    assert words[:4] == ["torchrun", "--nproc_per_node=8", "-m", "torchtitan.train"]
    job = ConfigManager().parse_args(words[4:])
    assert job.model.name == "llama3"
    importlib.import_module(job.experimental.custom_import)
    with torch.device("meta"):
        model = llama3.Transformer(llama3.llama3_args[job.model.flavor])
    build_model_converters(job, None).convert(model)
    attention = {type(block.attention.inner_attention).__name__ for block in model.layers.values()}
    assert attention == {"DocumentAttention"}


def test_onnx(layer, x, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(blocks()[ONNX], torch=torch, selfattn=selfattn, layer=layer, x=x)
    session = onnxruntime.InferenceSession("layer.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), layer(x).detach(), atol=1e-5, rtol=1e-4)


def test_plain_loop() -> None:
    done = run(blocks()[PLAIN])
    with torch.no_grad():
        after = (done.layer(done.x, segment_ids=done.segment_ids) - done.x).square()[done.segment_ids >= 0].mean()
    assert after < done.loss
