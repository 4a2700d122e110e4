"""torchtitan's own models with its converter "selfattn": its document mask's numbers, documents kept apart, its
selective checkpointing, its tensor parallelism."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config import JobConfig
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models import llama3, qwen3
from torchtitan.models.attention import get_causal_mask_mod, get_document_mask_mod
from torchtitan.models.llama3.infra import parallelize as llama3_parallelize
from torchtitan.protocols.model_converter import build_model_converters

import selfattn
from selfattn.integrations import torchtitan as adapter

EOS = 0
TOKENIZER = SimpleNamespace(eos_id=EOS)
SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96}
DOCUMENTS = {"attn_type": "varlen", "attn_mask_type": "block_causal"}
LENGTH = 64


def llama(convert: bool = True, **arguments) -> nn.Module:
    arguments = {**SIZES, **DOCUMENTS, "multiple_of": 32, "max_seq_len": LENGTH, **arguments}
    return built(llama3.Transformer(llama3.TransformerModelArgs(**arguments)), convert)


def qwen(convert: bool = True, **arguments) -> nn.Module:
    arguments = {
        **SIZES,
        **DOCUMENTS,
        "hidden_dim": 96,
        "head_dim": 24,
        "qk_norm": True,
        "max_seq_len": LENGTH,
        **arguments,
    }
    return built(qwen3.Qwen3Model(qwen3.Qwen3ModelArgs(**arguments)), convert)


def built(model: nn.Module, convert: bool) -> nn.Module:
    with torch.no_grad():
        model.init_weights()
    if convert:
        adapter.Converter(JobConfig(), None).convert(model)
    return model


def tokens_of_documents(rows: int = 2) -> Tensor:
    tokens = torch.randint(1, SIZES["vocab_size"], (rows, LENGTH))
    tokens[0, [4, 5, 30]] = EOS
    tokens[-1, [0, 47, LENGTH - 1]] = EOS
    return tokens


def logits_and_gradients(model: nn.Module, tokens: Tensor, **arguments) -> tuple[Tensor, list[Tensor]]:
    masks = model.get_attention_masks(tokens, TOKENIZER)
    out = model(tokens, attention_masks=masks, **arguments)
    loss = nn.functional.cross_entropy(out.flatten(0, 1), tokens.flatten(), reduction="sum") / tokens.numel()
    return out.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


class DenseAttention(nn.Module):
    """What a "flex" flavour computes, from torchtitan's own mask, by a formula that has a backward pass on a CPU."""

    def forward(self, q, k, v, *, block_mask, scale=None, enable_gqa=False):
        allowed = create_mask(block_mask.mask_mod, q.shape[0], None, q.shape[2], k.shape[2], device=q.device)
        return nn.functional.scaled_dot_product_attention(q, k, v, allowed, scale=scale, enable_gqa=enable_gqa)


def with_torchtitans_mask(model: nn.Module, like: nn.Module) -> nn.Module:
    model.load_state_dict(like.state_dict())
    for layer in model.layers.values():
        layer.attention.inner_attention = DenseAttention()

    def masks(tokens, tokenizer):  # as _get_flex_attention_masks, without compilation for a GPU
        mask = and_masks(get_causal_mask_mod(), get_document_mask_mod(tokens, tokenizer.eos_id))
        return create_block_mask(mask, tokens.shape[0], None, LENGTH, LENGTH, device=tokens.device)

    model.get_attention_masks = masks
    return model


@pytest.mark.parametrize("build", [llama, qwen])
def test_numbers_of_torchtitans_document_mask(build) -> None:
    model = build()
    theirs = with_torchtitans_mask(build(convert=False, attn_type="flex"), model)
    tokens = tokens_of_documents()
    out, gradients = logits_and_gradients(model, tokens)
    expected, expected_gradients = logits_and_gradients(theirs, tokens)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_a_row_is_its_documents() -> None:
    model, tokens = llama(), tokens_of_documents(rows=1)
    with torch.no_grad():
        packed = model(tokens, attention_masks=model.get_attention_masks(tokens, TOKENIZER))
        starts = [0, *(torch.nonzero(tokens[0] == EOS).flatten() + 1).tolist()]
        ends = [*starts[1:], LENGTH]
        assert len(starts) == 7 and starts[-1] == LENGTH  # the last document ends with the row
        for start, end in zip(starts[:-1], ends[:-1], strict=True):
            alone = tokens[:, start:end]
            out = model(alone, attention_masks=adapter.DocumentIds.of(torch.zeros_like(alone)))
            torch.testing.assert_close(packed[:, start:end], out, atol=2e-5, rtol=1e-5)
        joined = model(tokens, attention_masks=adapter.DocumentIds.of(torch.zeros_like(tokens)))
    assert (joined - packed).abs().max() > 1e-2


def test_documents_from_positions() -> None:
    """Positions win over the ends among the tokens."""
    model, tokens = llama(), tokens_of_documents(rows=1)
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)]).unsqueeze(0)
    masks = model.get_attention_masks(tokens, TOKENIZER, {"positions": positions})
    assert masks.segment_ids.tolist() == [[0] * 20 + [1] * (LENGTH - 20)]
    with torch.no_grad():
        packed = model(tokens, attention_masks=masks, positions=positions)
        alone = tokens[:, 20:]
        out = model(alone, attention_masks=adapter.DocumentIds.of(torch.zeros_like(alone)))
    torch.testing.assert_close(packed[:, 20:], out, atol=2e-5, rtol=1e-5)


def test_scale_is_that_of_the_logits() -> None:
    q, k, v = (torch.randn(1, heads, 16, 24) for heads in (4, 2, 2))
    ids = torch.tensor([[0] * 5 + [1] * 11])
    allowed = (ids[0] == ids[0][:, None]).tril()
    found = adapter.DocumentAttention()(q, k, v, adapter.DocumentIds.of(ids), scale=0.3)
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, allowed, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, wanted.transpose(1, 2))


def test_a_pipeline_schedule_splits_ids_as_tokens() -> None:
    ids = torch.arange(4 * LENGTH).view(4, LENGTH)
    masks = {"attention_masks": adapter.DocumentIds.of(ids)}
    tokens, halves = split_args_kwargs_into_chunks((torch.zeros(4, LENGTH),), masks, 2)
    for (part,), half, wanted in zip(tokens, halves, ids.chunk(2), strict=True):
        assert isinstance(half["attention_masks"], adapter.DocumentIds) and len(part) == 2
        torch.testing.assert_close(half["attention_masks"].segment_ids, wanted)


class CountCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: dict = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator] = self.counts.get(operator, 0) + 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpointing_runs_attention_once(saved: bool) -> None:
    """In torchtitan's mode "op", with its own list; without selfattn's operators in the list, attention runs again."""
    model, tokens = llama(), tokens_of_documents()
    expected = logits_and_gradients(model, tokens)
    save_list = set(llama3_parallelize._op_sac_save_list)
    assert set(selfattn.attention_operators()) <= save_list
    if not saved:
        save_list -= set(selfattn.attention_operators())
    apply_ac(model, ActivationCheckpoint(mode="selective", selective_ac_option="op"), op_sac_save_list=save_list)
    with CountCalls() as calls:
        found = logits_and_gradients(model, tokens)
    operators = torch.ops.selfattn
    assert calls.counts[operators.flash_attention.default] == SIZES["n_layers"] * (1 if saved else 2)
    assert calls.counts[operators.flash_attention_backward.default] == SIZES["n_layers"]
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.slow
def test_compiles_without_a_break() -> None:
    model, tokens = llama(), tokens_of_documents()
    masks = model.get_attention_masks(tokens, TOKENIZER)
    h, layer = model.tok_embeddings(tokens), model.layers["0"]
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(
        compiled(h, model.freqs_cis, masks), layer(h, model.freqs_cis, masks), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("arguments", [{"attn_type": "sdpa"}, {"attn_type": "flex"}, {"attn_mask_type": "causal"}])
def test_refuses_other_flavours(arguments: dict) -> None:
    with pytest.raises(ValueError, match="the flavour must have attn_type"):
        llama(**arguments)


def test_refuses_context_parallelism() -> None:
    job = JobConfig()
    job.model.converters, job.parallelism.context_parallel_degree = ["selfattn"], 2
    with pytest.raises(NotImplementedError, match=r"must be 1; got 2\. torchtitan has no context parallelism"):
        build_model_converters(job, None)


def test_refuses_a_mask_of_lengths() -> None:
    tokens = tokens_of_documents()
    model = llama()
    lengths = llama(convert=False).get_attention_masks(tokens, TOKENIZER)
    with pytest.raises(TypeError, match="attention_masks must be DocumentIds"):
        model(tokens, attention_masks=lengths)


def test_refuses_a_tokenizer_without_an_end() -> None:
    with pytest.raises(ValueError, match="eos_id"):
        llama().get_attention_masks(tokens_of_documents(), SimpleNamespace(eos_id=None))


TENSOR_PARALLEL = """
import os, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.models.llama3.infra.parallelize import apply_tp
from test_torchtitan import llama, tokens_of_documents, logits_and_gradients, TOKENIZER
dist.init_process_group("gloo")
torch.manual_seed(0)
model, tokens = llama(), tokens_of_documents()
masks = model.get_attention_masks(tokens, TOKENIZER)
expected = model(tokens, attention_masks=masks)
expected.square().sum().backward()
gradients = [parameter.grad for parameter in model.parameters()]
model.zero_grad()
apply_tp(model, init_device_mesh("cpu", (2,)), loss_parallel=False, enable_float8_tensorwise_tp=False)
out = model(tokens, attention_masks=masks)
out.square().sum().backward()
torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
for parameter, wanted in zip(model.parameters(), gradients, strict=True):
    found = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    torch.testing.assert_close(found, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=1e-3)
dist.barrier()
print("parallel", flush=True)
os._exit(0)  # a process with gloo's threads aborts at its end now and then, without selfattn too
"""


def test_tensor_parallel() -> None:
    """Two processes, each with half of the heads, by torchtitan's own plan."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "integrations")])
    environment = {
        **os.environ, "PYTHONPATH": paths, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TENSOR_PARALLEL],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks) and all("parallel" in output for output in outputs), outputs
