"""Promise: what holds of ranks on the CPU holds of ranks with a GPU each, over NCCL, with the kernels of ``flash``:
context parallelism in bfloat16 against one GPU, in a graph and in O(S) memory, and training on every axis."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.memory import peak_of
from support.problems import dense_attention, documents, error, make_ids, norm_error
from support.ranks import Ranks
from support.small_model import data_rank, loss_in_context, loss_of, make_model, make_optimizer, train_mean, whole
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import selfattn
from selfattn import ParallelConfig, SelfAttention, SelfAttentionConfig
from selfattn.distributed import ContextLayout, TensorParallel, context_parallel_attention, parallelize

pytestmark = pytest.mark.gpu

RANKS, LENGTH = 2, 700


@pytest.fixture(scope="module")
def gpus() -> Iterator[Ranks]:
    if torch.cuda.device_count() < RANKS:
        pytest.skip(f"needs {RANKS} CUDA GPUs, and there are {torch.cuda.device_count()}")
    pool = Ranks("cuda")
    yield pool
    pool.close()


def device_type() -> str:
    return "cuda" if "nccl" in dist.get_backend() else "cpu"


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh(device_type(), (dist.get_world_size(),))


def random_heads(length: int, heads: tuple[int, int], dim: int, batch: int = 1) -> list[Tensor]:
    """q, k and v, the same on every rank."""
    numbers = (heads[0], heads[1], heads[1])
    return [torch.randn(batch, length, n, dim, device=device_type(), dtype=torch.bfloat16) for n in numbers]


# ---------------------------------------------------------------- context parallelism

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"window_left": 60, "dim": 64},
    {"causal": False, "heads": (4, 4)},
    {"softcap": 20.0, "qk_scale": 0.2},
    {"sinks": True, "heads": (8, 2), "dim": 256},
    {"causal": False, "window_left": 50, "window_right": 90},
)


def check_one(ids: Tensor, balance: str, method: str, options: dict[str, Any]) -> None:
    options = dict(options)
    tensors = random_heads(LENGTH, options.pop("heads", (4, 2)), options.pop("dim", 128), len(ids))
    grad = torch.randn_like(tensors[0])
    sinks = torch.randn(tensors[0].shape[2], device=grad.device) if options.pop("sinks", False) else None
    one = [x.requires_grad_() for x in tensors]
    out = selfattn.multihead_attention(*one, ids, **options, sinks=sinks)
    alone = dict(zip(("out", "dq", "dk", "dv"), [out, *torch.autograd.grad(out, one, grad)], strict=True))
    exact = dense_attention(*tensors, ids, **options, sinks=sinks, grad_out=grad)

    layout = ContextLayout.from_segment_ids(ids, mesh_of_all(), balance, bucket=64)
    own = [layout.shard(x.detach(), float("nan")).requires_grad_() for x in tensors]
    out = context_parallel_attention(*own, layout, method=method, **options, sinks=sinks)
    found = [out, *torch.autograd.grad(out, own, layout.shard(grad, float("nan")))]
    for (name, other), mine in zip(alone.items(), found, strict=True):
        wanted = layout.shard(exact[name])
        assert not mine[layout.indices < 0].any(), name
        # What two ranks have of a key's gradient is rounded before it is added up.
        most = 1.5 if method == "keys" and name in ("dk", "dv") else 1.1
        assert norm_error(mine, wanted) <= most * norm_error(layout.shard(other), wanted) + 1e-4, name


def check_grid(method: str, balance: str) -> None:
    options = itertools.cycle(OPTIONS)
    for kind in ("one_document", "documents", "shuffled", "padding_around", "blocks"):
        for call in (next(options), next(options)):
            try:
                check_one(make_ids(kind, 2, LENGTH).to(device_type()), balance, method, call)
            except Exception as failure:
                raise AssertionError(f"{kind}, {call}") from failure


@pytest.mark.parametrize("balance", ["documents", "head_tail", "contiguous"])
@pytest.mark.parametrize("method", ["keys", "heads"])
def test_context_parallel_attention_is_that_of_one_gpu(gpus: Ranks, method: str, balance: str) -> None:
    gpus.run(check_grid, RANKS, method, balance)


def check_bits() -> None:
    """Of heads that each one rank computes, in their rows."""
    torch.use_deterministic_algorithms(True)
    ids = torch.zeros(1, 2048, dtype=torch.int32, device=device_type())
    tensors = [x.requires_grad_() for x in random_heads(2048, (8, 2), 128)]
    out = selfattn.multihead_attention(*tensors, ids)
    expected = [out, *torch.autograd.grad(out, tensors, out.detach().roll(1, -1))]
    layout = ContextLayout.from_segment_ids(ids, mesh_of_all(), "head_tail")
    for _ in range(2):
        own = [layout.shard(x.detach()).requires_grad_() for x in tensors]
        out = context_parallel_attention(*own, layout, method="heads")
        found = [out, *torch.autograd.grad(out, own, out.detach().roll(1, -1))]
        for name, mine, other in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            assert torch.equal(mine, layout.shard(other)), name


def test_heads_have_the_bits_of_one_gpu(gpus: Ranks) -> None:
    gpus.run(check_bits, RANKS)


def check_repeats() -> None:
    torch.use_deterministic_algorithms(True)
    ids = documents(1, 4096, 1500).int().to(device_type())
    layout = ContextLayout.from_segment_ids(ids, mesh_of_all())
    own = [layout.shard(x).requires_grad_() for x in random_heads(4096, (8, 2), 64)]

    def results() -> list[Tensor]:
        out = context_parallel_attention(*own, layout, method="keys")
        return [out, *torch.autograd.grad(out, own, out.detach().roll(1, -1))]

    first = results()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(results(), first, strict=True))


def test_keys_repeat_in_deterministic_mode(gpus: Ranks) -> None:
    gpus.run(check_repeats, RANKS)


def check_graph(method: str) -> None:
    ids = documents(1, 2048, 900).int().to(device_type())
    layout = ContextLayout.from_segment_ids(ids, mesh_of_all())
    own = [layout.shard(x).requires_grad_() for x in random_heads(2048, (8, 2), 128)]

    def run() -> list[Tensor]:  # compared over ranks by the first call, which is not captured
        out = context_parallel_attention(*own, layout, method=method)
        return [out, *torch.autograd.grad(out, own, out.detach().roll(1, -1))]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    for _ in range(2):
        with torch.no_grad():
            for x in own:
                x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        for mine, other in zip(captured, run(), strict=True):
            assert norm_error(mine, other) < 1e-3


@pytest.mark.parametrize("method", ["keys", "heads"])
def test_a_graph_holds_the_collectives(gpus: Ranks, method: str) -> None:
    gpus.run(check_graph, RANKS, method)


def check_memory(method: str) -> None:
    length = 32_768
    ids = torch.zeros(1, length, dtype=torch.int32, device=device_type())
    layout = ContextLayout.from_segment_ids(ids, mesh_of_all(), "head_tail")
    own = [layout.shard(x).requires_grad_() for x in random_heads(length, (4, 2), 64)]

    def run() -> None:
        context_parallel_attention(*own, layout, method=method).square().sum().backward()

    assert peak_of(run) < length * length / 4  # a mask of the pairs that a rank computes is twice to four times that


@pytest.mark.parametrize("method", ["keys", "heads"])
def test_memory_grows_with_the_tokens(gpus: Ranks, method: str) -> None:
    gpus.run(check_memory, RANKS, method)


# ---------------------------------------------------------------- models

FSDP = {"fsdp_modules": ["Block"], "fsdp_min_weight_size": 0}
SMALL_WHOLE = {"fsdp_modules": ["Block"], "fsdp_min_weight_size": 100}


def check_training(fields: dict[str, Any]) -> None:
    """In float64: three steps give the weights of one process that computes the batches of all ranks."""
    config = ParallelConfig(**fields)
    mesh = config.device_mesh(device_type())
    model = parallelize(make_model(config).to(device_type()), mesh, config)
    alone = make_model().to(device_type())
    batches, rank = mesh["dp"].size() * mesh["fsdp"].size(), data_rank(mesh, config)
    optimizer, optimizer_alone = make_optimizer(model), make_optimizer(alone)
    for step in range(3):
        optimizer.zero_grad()
        number = step * batches + rank
        loss = loss_in_context(model, number, mesh, config) if mesh["cp"].size() > 1 else loss_of(model, number)
        loss.backward()
        optimizer.step()
        train_mean(alone, optimizer_alone, range(step * batches, (step + 1) * batches))
    expected = alone.state_dict()
    for name, parameter in get_model_state_dict(model).items():
        assert error(whole(parameter), expected[name]) < 1e-9, name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"fsdp_axis_size": 2, **FSDP},
        {"fsdp_axis_size": 2, "remat": ["Block"], **SMALL_WHOLE},
        {"model_axis_size": 2},
        {"model_axis_size": 2, "tp_async_dense": True, "remat": ["SelfAttention"]},
        {"context_axis_size": 2, **FSDP},
        {"context_axis_size": 2, "context_balance": "head_tail", "context_method": "heads", **SMALL_WHOLE},
    ],
    ids=str,
)
def test_training(gpus: Ranks, fields: dict[str, Any]) -> None:
    gpus.run(check_training, RANKS, fields)


def check_layer(plan: dict[str, bool]) -> None:
    """Of the model axis, in bfloat16 by the kernels, with tokens enough for halves of the output product."""
    torch.manual_seed(1)
    device, length, width = device_type(), 4096, 256
    options = {"head_dim": 64, "num_kv_heads": 2, "qk_norm": True, "sinks": True, "dtype": "bfloat16"}
    alone = SelfAttention(width, SelfAttentionConfig(**options)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    spread = parallelize_module(copy.deepcopy(alone), mesh, TensorParallel(**plan))
    x, grad = torch.randn(2, 1, length, width, device=device, dtype=torch.bfloat16)
    ids = documents(1, length, 300).int().to(device)
    cut = slice(mesh.get_local_rank() * length // 2, (mesh.get_local_rank() + 1) * length // 2)
    cut = cut if plan else slice(None)
    own, mine = x.clone().requires_grad_(), x[:, cut].clone().requires_grad_()
    expected, out = alone(own, segment_ids=ids), spread(mine, segment_ids=ids)
    expected.backward(grad)
    out.backward(grad[:, cut])
    assert norm_error(out, expected[:, cut]) < 1e-2
    assert norm_error(mine.grad, own.grad[:, cut]) < 1e-2
    for (name, parameter), reference in zip(spread.named_parameters(), alone.parameters(), strict=True):
        assert norm_error(whole(parameter.grad), reference.grad) < 2e-2, name


@pytest.mark.parametrize("plan", [{}, {"sequence_parallel": True}], ids=str)
def test_tensor_parallel_layer(gpus: Ranks, plan: dict[str, bool]) -> None:
    gpus.run(check_layer, RANKS, plan)
