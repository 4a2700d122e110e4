"""FlopCounterMode counts the operators as PyTorch counts its own attention: the products that the shapes say."""

import os
import subprocess
import sys

import pytest
import torch
from support.problems import make_ids
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import selfattn
from selfattn import SelfAttention, SelfAttentionConfig

OPS = torch.ops.selfattn
ATEN = torch.ops.aten
BATCH, QUERIES, KEYS, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 7, 9, 4, 2, 8, 6


def counts(function, *arguments, **options) -> dict[str, int]:
    """Operator -> its count, in one call."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments, **options)
    return {str(operator): count for operator, count in counter.get_flop_counts().get("Global", {}).items()}


def make(device: str = "cpu", dtype: torch.dtype = torch.float32, keys: int = KEYS, value_dim: int = VALUE_DIM):
    shapes = ((QUERIES, HEADS, DIM), (keys, KV_HEADS, DIM), (keys, KV_HEADS, value_dim))
    return [torch.randn(BATCH, *shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def count_of_sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """What PyTorch counts forward and backward for its own operator, of heads that are repeated, without data."""
    query, key, value = (
        torch.empty(x.shape[0], q.shape[2], x.shape[1], x.shape[3], device="meta") for x in (q, k, v)
    )  # fmt: skip
    grad_out = torch.empty(*query.shape[:3], value.shape[3], device="meta")
    lse = torch.empty(query.shape[:3], device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    forward = counts(ATEN._scaled_dot_product_efficient_attention, query, key, value, None, True)
    backward = counts(
        ATEN._scaled_dot_product_efficient_attention_backward,
        *(grad_out, query, key, value, None, grad_out, lse, seed, seed, 0.0, [True, True, True, False]),
    )
    return sum(forward.values()), sum(backward.values())


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window_left": 2}, {"softcap": 1.0}], ids=str)
@pytest.mark.parametrize("has_lse", [False, True])
def test_attention_counts_as_sdpa_of_the_same_shapes(options: dict, has_lse: bool) -> None:
    """Whatever may be masked: grouped heads, DQK other than DV, Sq other than Skv."""
    q, k, v = make()
    forward, backward = count_of_sdpa(q, k, v)
    assert forward == 2 * BATCH * HEADS * QUERIES * KEYS * (DIM + VALUE_DIM)
    function = selfattn.multihead_attention_lse if has_lse else selfattn.multihead_attention

    def step() -> None:
        out = function(q, k, v, **options)
        (out[0] if has_lse else out).sum().backward()

    assert counts(step) == {"selfattn.flash_attention": forward, "selfattn.flash_attention_backward": backward}


@pytest.mark.parametrize(("table", "capacity"), [(None, 12), (torch.zeros(3, 5, dtype=torch.int32), 60)])
def test_a_cache_counts_with_all_slots_of_a_row(table: Tensor | None, capacity: int) -> None:
    q, keys, values = (torch.zeros(3, length, heads, DIM) for length, heads in ((2, 4), (12, 2), (12, 2)))
    formula = flop_registry[OPS.flash_attention_kv_cache]
    count = formula(q, keys, values, torch.zeros(3, dtype=torch.int32), table, causal=False, out_val=None)
    assert count == 2 * 3 * 4 * 2 * capacity * (DIM + DIM)


def test_packed_rows_count_as_one_document() -> None:
    q, k, v = make(keys=QUERIES)
    ids = make_ids("packed", BATCH, QUERIES)
    assert counts(selfattn.multihead_attention, q, k, v, ids) == counts(selfattn.multihead_attention, q, k, v)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_outside", [False, True])
def test_calls_without_gradients_count_too(mode, is_outside: bool) -> None:
    q, k, v = make()

    def call() -> None:
        with mode():
            selfattn.multihead_attention(q, k, v)

    if is_outside:
        with mode():
            found = counts(selfattn.multihead_attention, q, k, v)
    else:
        found = counts(call)
    assert found == {"selfattn.flash_attention": count_of_sdpa(q, k, v)[0]}


def test_reference_counts_its_own_products() -> None:
    """More than the formula's where values cannot be read, as under a counter: those that keep NaN to its own pairs."""
    q, k, v = make()
    found = counts(selfattn.multihead_attention, q, k, v, backend="reference")
    assert list(found) == ["aten.bmm"]
    assert found["aten.bmm"] > count_of_sdpa(q, k, v)[0]


def test_backward_operators_count_under_their_own_names() -> None:
    """After a norm and a rotation too. A formula is one for every overload."""
    q, k, v = (tensor.detach() for tensor in make(keys=QUERIES, value_dim=DIM))
    forward, backward = count_of_sdpa(q, k, v)
    out, lse = OPS.flash_attention(q, k, v)
    attended = (torch.ones_like(out), None, q, k, v, out, lse)
    assert counts(OPS.flash_attention_backward, *attended) == {"selfattn.flash_attention_backward": backward}
    assert counts(OPS.qk_norm_rope_attention, q, k, v) == {"selfattn.qk_norm_rope_attention": forward}
    found = counts(OPS.qk_norm_rope_attention_backward, *attended)
    assert found == {"selfattn.qk_norm_rope_attention_backward": backward}
    assert OPS.flash_attention_backward.into.overloadpacket in flop_registry


@pytest.mark.parametrize("heads_size", [1, 2])
def test_context_parallel_attention(heads_size: int) -> None:
    """Of ranks with 6 tokens each: 4 from local_start on, and 3 that travel, whose queries meet the keys of all."""
    q, k, v = (torch.randn(BATCH, 6, heads, DIM, device="meta", requires_grad=True) for heads in (HEADS, 2, 2))
    own = torch.zeros(BATCH, 6, dtype=torch.int32, device="meta")
    gathered = own.repeat(1, heads_size)
    group = {"shared": 3, "local_start": 2, "group_size": 2, "group_name": "", "method": "keys"}
    group |= {"heads_group_size": heads_size}
    with FlopCounterMode(display=False) as counter:
        OPS.context_parallel_attention(
            q, k, v, own, gathered, positions=own, kv_positions=gathered, **group
        ).sum().backward()
    pairs = BATCH * HEADS * (4 * 4 + 3 * heads_size * 2 * 3)
    assert counter.get_flop_counts()["Global"] == {
        OPS.context_parallel_attention_forward: 2 * pairs * 2 * DIM,
        OPS.context_parallel_attention_backward: 2 * pairs * 5 * DIM,
    }


COUNTED = {name + way for name in ("flash_attention", "qk_norm_rope_attention") for way in ("", "_backward")}
COUNTED |= {"flash_attention_kv_cache", "context_parallel_attention_forward", "context_parallel_attention_backward"}
MADE_OF_OTHERS = {
    "attention_with_kv_cache",
    "attention_with_kv_cache_lse",
    "context_parallel_attention",
    "multihead_attention",
    "multihead_attention_lse",
    "project_query_key_value",
    "projected_attention",
    "projected_attention_kv_cache",
    "self_attention",
    "self_attention_kv_cache",
}
WITHOUT_PRODUCTS = {
    "append_kv_cache",
    "apply_rotary_emb",
    "context_layout",
    "cu_seqlens_from_segment_ids",
    "explain_backend",
    "explain_kv_cache_backend",
    "kv_cache_pages",
    "kv_cache_positions",
    "lengths_after_append",
    "merge_attention",
    "positions_of_append",
    "precompute_freqs",
    "qk_norm_rope",
    "qk_norm_rope_append",
    "qk_norm_rope_backward",
    "rope_tables",
    "segment_ids_from_cu_seqlens",
    "segment_ids_from_positions",
    "segment_mask",
}


def test_every_operator_is_counted_or_has_no_product() -> None:
    schemas = torch._C._jit_get_all_schemas()
    names = {schema.name.removeprefix("selfattn::") for schema in schemas if schema.name.startswith("selfattn::")}
    assert names <= COUNTED | MADE_OF_OTHERS | WITHOUT_PRODUCTS
    assert {name for name in names if getattr(OPS, name) in flop_registry} == COUNTED


def test_operators_without_a_product_count_nothing() -> None:
    q, k, _ = make()
    assert counts(OPS.qk_norm_rope, q, k) == {}
    assert counts(OPS.apply_rotary_emb, q, q) == {}


def step_of(module: torch.nn.Module, x: Tensor, ids: Tensor) -> None:
    module(x, segment_ids=ids).sum().backward()


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("how", ["eager", "meta", "aot_eager", "dynamic"])
def test_training_step_of_the_module(how: str, qk_norm: bool) -> None:
    """Each projection is a product forward and two backward. The counter hooks every module, so a layer calls its norms
    instead of fusing them with attention."""
    embedding, length = 64, 12
    config = SelfAttentionConfig(head_dim=16, num_kv_heads=2, qk_norm=qk_norm)
    module = SelfAttention(embedding, config, device="meta" if how == "meta" else "cpu")
    x = torch.randn(2, length, embedding, device=module.q_proj.weight.device, requires_grad=True)
    ids = make_ids("packed", 2, length).to(x.device)
    torch.compiler.reset()
    run = module
    if how in ("aot_eager", "dynamic"):
        # Not as a whole graph: since torch 2.15 that is an error, of any module, where a mode (the counter) is active.
        run = torch.compile(module, backend="aot_eager", dynamic=how == "dynamic")
        step_of(run, x, ids)  # compiled before it is counted
    projections = 3 * 2 * x.shape[0] * length * embedding * (2 * embedding + 2 * 32)
    heads = (torch.empty(2, length, n, 16) for n in (4, 2, 2))
    forward, backward = count_of_sdpa(*heads)
    attention = {"selfattn.flash_attention": forward, "selfattn.flash_attention_backward": backward}
    assert counts(step_of, run, x, ids) == {"aten.mm": projections, **attention}


PROGRAMS = {
    "package_first": """
import sys, torch, selfattn
assert "torch.utils.flop_counter" not in sys.modules, "importing selfattn must not import Triton by way of it"
import torch.utils.flop_counter
""",
    "counter_first": """
import torch.utils.flop_counter
import selfattn
""",
    "again": """
import importlib, selfattn, torch.utils.flop_counter
importlib.reload(selfattn)
""",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_importing_the_package_registers_the_formulas(program: str) -> None:
    check = "assert torch.ops.selfattn.flash_attention in torch.utils.flop_counter.flop_registry"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", f"{PROGRAMS[program]}\n{check}"], check=True, env=environment)
