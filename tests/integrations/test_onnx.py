"""ONNX files of exported programs, without an operator of selfattn in them, against eager in onnxruntime."""

import itertools
from collections.abc import Callable

import models
import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import selfattn
from selfattn import SelfAttention, SelfAttentionConfig

TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}
WIDTH = 64


def call(function: Callable) -> nn.Module:
    class Call(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            return function(*tensors)

    return Call()


def dynamic(*tensors: Tensor) -> tuple:
    """Every tensor's first two dimensions, batch and length, may change."""
    return tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in tensors)


def export(model: nn.Module, args: tuple[Tensor, ...], dynamic_shapes=None) -> Callable:
    """The model as a function that onnxruntime runs."""
    program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes)
    program = program.run_decompositions(selfattn.decompositions())
    assert not [node for node in program.graph.nodes if "selfattn" in str(node.target)]
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]

    def run(*tensors: Tensor) -> list[Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(np.array(result)) for result in session.run(None, feeds)]

    return run


def check(run: Callable, model: nn.Module, *args: Tensor) -> None:
    with torch.no_grad():
        expected = model(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for given, one in zip(run(*args), expected, strict=True):
        assert given.dtype == one.dtype
        torch.testing.assert_close(given, one, **TOLERANCE)


def packed_ids(batch_size: int, length: int) -> Tensor:
    """Documents of a few tokens with padding between and behind them."""
    ids = torch.arange(length) // 4 + torch.arange(batch_size)[:, None]
    return ids.masked_fill(torch.arange(length) % 7 == 6, -1)


class Layer(nn.Module):
    """What a model does around a layer: positions and ids as inputs."""

    def __init__(self, with_freqs: bool = False, **config) -> None:
        super().__init__()
        self.attention = SelfAttention(WIDTH, SelfAttentionConfig(head_dim=16, **config))
        for name, parameter in self.attention.named_parameters():
            nn.init.normal_(parameter, std=1.0 if name in ("sinks", "q_norm.weight", "k_norm.weight") else 0.3)
        self.with_freqs = with_freqs

    def forward(self, x: Tensor, segment_ids: Tensor, positions: Tensor) -> Tensor:
        freqs = selfattn.precompute_freqs(16, positions) if self.with_freqs else None
        return self.attention(x, freqs, segment_ids)


YARN = {"rope_type": "yarn", "factor": 4.0, **models.ORIGINAL}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0 + pair / 8 for pair in range(8)],
    "long_factor": [2.0 + pair for pair in range(8)],
    **models.ORIGINAL,
}
LAYERS = {
    "plain": {},
    "everything": {
        "qk_norm": True,
        "use_bias": True,
        "num_kv_heads": 2,
        "window_left": 3,
        "softcap": 2.0,
        "sinks": True,
        "rope_pairing": "half",
        "with_freqs": True,
    },
    "both directions, windows": {"causal": False, "window_left": 2, "window_right": 1, "num_kv_heads": 1},
    "backend aten": {"attention_backend": "aten", "qk_norm": True},
    "dropout that evaluation has not": {"dropout_rate": 0.5, "with_freqs": True},
    "rotation of a part": {"rotary_dim": 6},
    "llama3": {"rope_scaling": {**models.LLAMA3, **models.ORIGINAL}},
    "yarn": {"rope_scaling": YARN, "rotary_dim": 8, "rope_pairing": "half"},
    "longrope of a known length": {"rope_scaling": LONGROPE, "rope_length": 64},
}


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_with_dynamic_batch_and_length(name: str, ids_dtype: torch.dtype) -> None:
    model = Layer(**LAYERS[name]).eval()
    inputs = {}
    for batch_size, length in ((2, 11), (3, 29), (1, 1), (1, 64)):
        ids = packed_ids(batch_size, length).to(ids_dtype)
        positions = torch.arange(length).expand(batch_size, length) % 4
        inputs[batch_size, length] = torch.randn(batch_size, length, WIDTH), ids, positions.contiguous()
    args = inputs[2, 11]
    run = export(model, args, dict(zip(("x", "segment_ids", "positions"), dynamic(*args), strict=True)))
    for args in inputs.values():
        check(run, model, *args)


@pytest.mark.parametrize("what", ["k_proj", "q_norm"])
def test_layer_around_which_something_is_wrapped(what: str) -> None:
    """Its parts are operators of their own."""
    model = Layer(qk_norm=True, use_bias=True, num_kv_heads=2).eval()
    replaced = getattr(model.attention, what)
    setattr(model.attention, what, nn.Sequential(replaced, nn.Tanh()))
    args = torch.randn(2, 11, WIDTH), packed_ids(2, 11), torch.arange(11).repeat(2, 1)
    run = export(model, args, dynamic(*args))
    check(run, model, *args)
    check(run, model, torch.randn(1, 20, WIDTH), packed_ids(1, 20), torch.arange(20).repeat(1, 1))


def test_layer_with_its_gradients_on() -> None:
    """A model that nobody froze: its training operators have entries too."""
    model = Layer(qk_norm=True).train()
    args = torch.randn(2, 11, WIDTH), packed_ids(2, 11), torch.arange(11).repeat(2, 1)
    check(export(model, args), model, *args)


def test_two_layers_in_a_model_with_an_embedding() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, WIDTH)
            config = SelfAttentionConfig(head_dim=16, qk_norm=True)
            self.layers = nn.ModuleList(SelfAttention(WIDTH, config) for _ in range(2))
            self.head = nn.Linear(WIDTH, 50)

        def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
            ids = selfattn.segment_ids_from_positions(positions)
            freqs = selfattn.precompute_freqs(16, positions)
            x = self.embedding(tokens)
            for layer in self.layers:
                x = x + layer(x, freqs, ids)
            return self.head(x)

    model = Model().eval()
    tokens, positions = torch.randint(50, (2, 12)), torch.tensor([[*range(5), *range(7)], [*range(12)]])
    shapes = {"tokens": dynamic(tokens)[0], "positions": dynamic(positions)[0]}
    run = export(model, (tokens, positions), shapes)
    check(run, model, tokens, positions)
    check(run, model, torch.randint(50, (1, 9)), torch.tensor([[0, 0, 1, 2, 0, 1, 2, 3, 4]]))


def test_model_of_transformers() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = models.build("llama", layers=2)

        def forward(self, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, segment_ids=segment_ids, use_cache=False).logits

    model, args = Logits().eval(), (models.tokens(2, 12), packed_ids(2, 12))
    run = export(model, args, dynamic(*args))
    for inputs in (args, (models.tokens(3, 20), packed_ids(3, 20))):
        with torch.no_grad():
            expected = model(*inputs)
        assert models.difference(run(*inputs)[0], expected) < 1e-5


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"qk_scale": -0.3, "softcap": 1.5},
        {"window_left": 2},
        {"window_left": 2**62, "window_right": 0, "causal": False},
    ],
    ids=str,
)
def test_attention_with_lse_of_fewer_queries_than_keys(options: dict, num_kv_heads: int) -> None:
    model = call(
        lambda q, k, v, ids, kv_ids, sinks: selfattn.multihead_attention_lse(
            q, k, v, ids, kv_segment_ids=kv_ids, sinks=sinks, **options
        )
    )
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 9, num_kv_heads, 16), torch.randn(2, 9, num_kv_heads, 8)
    kv_ids = packed_ids(2, 9)
    args = (q, k, v, kv_ids[:, -5:].contiguous(), kv_ids, torch.randn(4))
    run = export(model, args)
    check(run, model, *args)
    infinite = torch.tensor([torch.inf, -torch.inf, 0.0, 2.0])
    check(run, model, *args[:-1], infinite)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("options", [{}, {"window_left": 3}, {"window_left": 2**62, "causal": False}], ids=str)
def test_attention_of_positions(options: dict, dtype: torch.dtype) -> None:
    model = call(
        lambda q, k, v, positions, kv_positions: selfattn.multihead_attention_lse(
            q, k, v, positions=positions, kv_positions=kv_positions, **options
        )
    )
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 8)
    positions = torch.stack([torch.randperm(9) for _ in range(2)]).to(dtype)
    args = (q, k, v, positions[:, -5:].contiguous(), positions)
    run = export(model, args)
    check(run, model, *args)
    far = torch.tensor([-(2**31), 2**31 - 1, 0, 1, -1]).to(dtype).repeat(2, 1)
    check(run, model, *args[:3], far, positions)


def test_masked_rows_are_zero() -> None:
    model = call(lambda q, ids: selfattn.multihead_attention_lse(q, q, q, ids))
    args = torch.randn(2, 6, 2, 16), torch.full((2, 6), -1)
    out, lse = export(model, args)(*args)
    assert (out == 0).all() and (lse == -torch.inf).all()


FUNCTIONS = {
    "apply_rotary_emb": (
        lambda q, k, sin, cos: selfattn.apply_rotary_emb(q, k, sin, cos, pairing="half"),
        lambda: (torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16), *selfattn.precompute_freqs(16, max_length=7)),
    ),
    "apply_rotary_emb of a part": (
        selfattn.apply_rotary_emb,
        lambda: (torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16), *selfattn.precompute_freqs(6, max_length=7)),
    ),
    "qk_norm_rope of a part": (
        lambda q, k, weight, sin, cos: selfattn.qk_norm_rope(q, k, weight, weight, sin, cos, pairing="half"),
        lambda: (
            torch.randn(2, 7, 4, 16),
            torch.randn(2, 7, 2, 16),
            torch.randn(16),
            *selfattn.precompute_freqs(6, max_length=7),
        ),
    ),
    "rope_tables": (
        lambda positions: selfattn.RopeParameters(rotary_dim=16, rope_type="linear", factor=4.0).tables(positions),
        lambda: (torch.randint(100_000, (2, 7)),),
    ),
    "qk_norm_rope of positions": (
        lambda q, k, positions: selfattn.qk_norm_rope(q, k, positions=positions, theta=1e6),
        lambda: (torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16), torch.randint(100_000, (2, 7))),
    ),
    "qk_norm_rope, the norm alone": (
        lambda q, k, weight: selfattn.qk_norm_rope(q, k, weight, None, rope=False),
        lambda: (torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(16)),
    ),
    "qk_norm_rope of nothing": (
        lambda q, k: selfattn.qk_norm_rope(q, k, norm=False, rope=False),
        lambda: (torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16)),
    ),
    "precompute_freqs": (
        lambda positions: selfattn.precompute_freqs(16, positions),
        lambda: (torch.randint(100_000, (2, 7)),),
    ),
    "merge_attention": (
        selfattn.merge_attention,
        lambda: (torch.randn(2, 7, 4, 16), torch.randn(2, 4, 7), torch.randn(2, 7, 4, 16), torch.randn(2, 4, 7)),
    ),
    "segment_mask": (selfattn.segment_mask, lambda: (packed_ids(2, 9),)),
    "segment_ids_from_positions": (selfattn.segment_ids_from_positions, lambda: (torch.arange(9).repeat(2, 1) % 4,)),
    "segment_ids_from_cu_seqlens": (
        lambda cu_seqlens: selfattn.segment_ids_from_cu_seqlens(cu_seqlens, 9),
        lambda: (torch.tensor([0, 4, 4, 7], dtype=torch.int32),),
    ),
    "cu_seqlens_from_segment_ids": (
        lambda ids: selfattn.cu_seqlens_from_segment_ids(ids, 8),
        lambda: (packed_ids(2, 9),),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function, make = FUNCTIONS[name]
    model, args = call(function), make()
    check(export(model, args), model, *args)


def test_every_operator_of_a_forward_pass_has_an_entry() -> None:
    """An operator that is new must be decided on here."""
    overloads = {
        schema.name.removeprefix("selfattn::") + "." + (schema.overload_name or "default")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("selfattn::")
    }
    without = {name for name in overloads if "_backward." in name} | {"explain_backend.default"}
    without |= {name for name in overloads if "kv_cache" in name or "append" in name}  # ONNX writes into no input
    without |= {name for name in overloads if name.startswith("context_")}  # ONNX has no collectives
    assert {str(overload).removeprefix("selfattn.") for overload in selfattn.decompositions()} == overloads - without
    # explain_backend returns text, and none is in a graph.
    returns = torch.ops.selfattn.explain_backend.default._schema.returns
    assert [str(one.type) for one in returns] == ["str"]


def test_table_is_the_callers_own() -> None:
    selfattn.decompositions().clear()
    assert selfattn.decompositions()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decompositions_compute_what_the_operators_compute(dtype: torch.dtype) -> None:
    """Without an exporter, in the dtypes that onnxruntime's kernels on the CPU lack."""
    q, k, v = (torch.randn(2, 9, heads, 16, dtype=dtype) for heads in (4, 2, 2))
    ids, weight = packed_ids(2, 9), torch.randn(16, dtype=dtype)
    table, operators = selfattn.decompositions(), torch.ops.selfattn
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 2e-2}
    for operator, args, options in (
        (operators.qk_norm_rope.default, (q, k, weight, weight), {"eps": 1e-5}),
        (operators.multihead_attention.default, (q, k, v, ids), {"window_left": 3, "softcap": 2.0}),
        (operators.multihead_attention.default, (q, k, v, ids), {"positions": torch.randint(0, 5, (2, 9))}),
    ):
        given, expected = table[operator](*args, **options), operator(*args, **options)
        for one, other in itertools.zip_longest(*(x if isinstance(x, tuple) else (x,) for x in (given, expected))):
            torch.testing.assert_close(one, other, **tolerance)
