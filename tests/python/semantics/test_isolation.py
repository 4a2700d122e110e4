"""What a query may not attend to leaves its output, its lse and every gradient from it as they are, whatever its bits.

NaN and infinities stand in another document, in padding, in the causal future, outside the window: in q, k, v and in
the gradients that come in. What they may not reach equals the results of the same call without them.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from support.cases import BACKENDS_ON_CPU
from support.problems import POSITIONS, Case, error, make_ids
from support.serving_table import Call as ServedCall
from support.serving_table import describe, skip_refused
from torch import Tensor

import selfattn

POISONS = [math.nan, math.inf, -math.inf]
INPUTS = ["q", "k", "v", "grad_out", "grad_lse"]
RESULTS = ["out", "lse", "dq", "dk", "dv", "dsinks"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""On CUDA, against float64; on the CPU the bits are the same."""
PLACES = [
    *(pytest.param("cpu", backend, id=f"cpu-{backend}") for backend in ("reference", "flash")),
    *(pytest.param("cuda", backend, id=f"cuda-{backend}", marks=pytest.mark.gpu) for backend in ("reference", "flash")),
]


@dataclass(frozen=True)
class Call(Case):
    """A call, and the tokens that are poisoned: of queries where a query's tensor is, else of keys."""

    num_queries: int = 24
    ids: str | None = "shuffled"
    has_grad_lse: bool = True
    poisoned: str = "document"

    def poisoned_tokens(self, ids: Tensor | None, length: int) -> Tensor:
        """(B, length)."""
        if self.poisoned == "document":
            return ids == ids.max()
        if self.poisoned == "padding":
            return ids < 0
        if self.poisoned == "last":  # the causal future of every token but itself
            return (torch.arange(length) == length - 1).expand(self.batch, length)
        if self.poisoned == "middle":
            return (torch.arange(length) == length // 2).expand(self.batch, length)
        return (torch.arange(length) < length // 8).expand(self.batch, length)  # "first": left of the last windows


SMALL = [
    Call("another_document", ids="packed"),
    Call("another_document_in_any_order", causal=False),
    Call("one_of_reused_ids", ids="reused"),
    Call("padding_at_the_end", poisoned="padding", ids="packed", causal=False),
    Call("padding_anywhere", poisoned="padding", ids="mixed_padding"),
    Call("padding_anywhere_with_sinks", poisoned="padding", ids="mixed_padding", has_sinks=True, causal=False),
    Call("nothing_but_padding", poisoned="padding", ids="all_padding", has_sinks=True),
    Call("causal_future", poisoned="last", ids=None),
    Call("causal_future_of_half", poisoned="middle", ids=None, num_kv_heads=4),
    Call("causal_future_of_a_document", poisoned="middle", ids="one_document", has_sinks=True),
    Call("outside_the_window", poisoned="first", ids=None, window_left=4),
    Call("outside_both_windows", poisoned="middle", ids=None, window_left=2, window_right=3, causal=False),
    Call("window_and_documents", window_left=5),
    Call("fewer_queries", poisoned="last", num_queries=7, num_keys=24, ids=None, window_left=3),
    Call("more_queries", poisoned="first", num_keys=9, ids=None),
    Call("own_ids_for_keys", num_queries=11, num_keys=24, has_kv_ids=True),
    Call("own_ids_for_keys_with_padding", poisoned="padding", num_keys=11, ids="mixed_padding", has_kv_ids=True),
    Call("positions", poisoned="middle", ids=None, positions="zigzag"),
    Call("positions_in_order", poisoned="last", num_queries=7, num_keys=24, ids=None, positions="cache"),
    Call("positions_and_window", poisoned="middle", positions="permuted", causal=False, window_left=3, window_right=2),
    Call("positions_and_documents", ids="packed", positions="restarting", has_sinks=True),
    Call("positions_and_padding", poisoned="padding", ids="mixed_padding", positions="any"),
    Call("positions_of_nothing", poisoned="first", ids=None, positions="future", has_sinks=True),
    Call("softcap", ids="packed", softcap=1.5),
    Call("softcap_and_padding", poisoned="padding", ids="mixed_padding", has_sinks=True, softcap=1.5),
    Call("scale", poisoned="padding", ids="packed", qk_scale=-0.3),
    Call("value_dim_differs", ids="packed", value_dim=8),
    Call("odd_dims", dim=5, value_dim=3, num_heads=3, num_kv_heads=1),
]
TILES = {"batch": 1, "num_queries": 300, "num_heads": 2}
LARGE = [
    Call("tiles_of_documents", ids="packed", num_kv_heads=1, dim=64, **TILES),
    Call("tiles_in_any_order", num_kv_heads=2, dim=128, causal=False, **TILES),
    Call("tiles_of_padding", poisoned="padding", ids="packed", num_kv_heads=1, dim=128, has_sinks=True, **TILES),
    Call("tiles_of_wide_heads", ids="mixed_padding", num_kv_heads=1, dim=256, **TILES),
    Call("tiles_of_wide_heads_dense", poisoned="middle", ids=None, num_kv_heads=2, dim=256, **TILES),
    Call("tiles_of_the_future", poisoned="middle", ids=None, num_kv_heads=1, dim=64, **TILES),
    Call("tiles_outside_the_window", poisoned="first", ids=None, num_kv_heads=2, dim=64, window_left=40, **TILES),
    Call("tiles_of_positions", poisoned="middle", ids=None, positions="zigzag", num_kv_heads=1, dim=64, **TILES),
    Call("tiles_of_permuted_positions", ids="packed", positions="permuted", num_kv_heads=1, dim=64, **TILES),
    Call("tiles_of_own_ids", batch=1, num_queries=140, num_keys=300, has_kv_ids=True, dim=64),
]


class Problem:
    """The tensors of a call, clean and with each poison in each."""

    def __init__(self, call: Call, dtype: torch.dtype, device: str) -> None:
        self.call, self.device = call, device
        self.tensors = call.tensors(dtype) | call.grads(dtype)
        self.allowed = call.allowed(self.tensors)[:, 0]
        self.query_ids = self.tensors.pop("segment_ids", None)
        self.key_ids = self.tensors.pop("kv_segment_ids", self.query_ids)
        self.positions = {name: self.tensors.pop(name) for name in POSITIONS if name in self.tensors}
        self.sinks = self.tensors.pop("sinks").float() if call.has_sinks else None
        self.query_tokens = call.poisoned_tokens(self.query_ids, call.num_queries)
        self.key_tokens = call.poisoned_tokens(self.key_ids, call.num_keys)

    def poisoned(self, name: str, poison: float) -> dict[str, Tensor]:
        tensor = self.tensors[name]
        if name == "grad_lse":  # (B, NH, Sq)
            where = self.query_tokens[:, None, :]
        else:
            where = (self.key_tokens if name in ("k", "v") else self.query_tokens)[:, :, None, None]
        return {**self.tensors, name: tensor.masked_fill(where, poison)}

    def influence(self, name: str) -> dict[str, Tensor]:
        """Where a result may hang on the poisoned tokens: rows of queries for out, lse and dq, of keys for dk and dv,
        one truth for the sinks."""
        has_keys = self.allowed.any(2)  # (B, Sq)
        if name in ("k", "v"):
            rows = (self.allowed & self.key_tokens[:, None, :]).any(2)
        else:
            rows = self.query_tokens & has_keys
        keys = (self.allowed & rows[:, :, None]).any(1)
        is_input = name in ("q", "k", "v")
        reaches_sinks = (self.query_tokens if name == "grad_lse" else rows).any()
        none = torch.zeros_like(rows)
        return {
            "out": rows if is_input else none,
            "lse": rows if name in ("q", "k") else none,
            "dq": rows,
            "dk": keys,
            "dv": keys,
            "dsinks": reaches_sinks,
        }

    def facts(self) -> ServedCall:
        heads = (self.tensors[name].to(self.device) for name in ("q", "k", "v"))
        others = {"sinks": self.sinks, "wants_lse": True, **self.positions}
        return describe(*heads, self.query_ids, **others, **self.call.options)

    def run(self, tensors: dict[str, Tensor], backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        def on_device(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device, dtype if tensor.is_floating_point() else None)

        leaves = [on_device(tensors[name]).requires_grad_() for name in ("q", "k", "v")]
        if self.sinks is not None:
            leaves.append(on_device(self.sinks).requires_grad_())
        out, lse = selfattn.multihead_attention_lse(
            *leaves[:3],
            on_device(self.query_ids),
            kv_segment_ids=on_device(self.key_ids),
            sinks=leaves[3] if self.sinks is not None else None,
            **{name: on_device(tensor) for name, tensor in self.positions.items()},
            backend=backend,
            **self.call.options,
        )
        grads = on_device(tensors["grad_out"]).to(out.dtype), on_device(tensors["grad_lse"]).to(lse.dtype)
        gradients = torch.autograd.grad((out, lse), leaves, grads)
        return dict(zip(RESULTS, [out.detach(), lse.detach().transpose(1, 2), *gradients], strict=False))


def compare(problem: Problem, backend: str, dtype: torch.dtype) -> None:
    try:
        clean = problem.run(problem.tensors, backend)
    except NotImplementedError as refusal:
        skip_refused(refusal, backend, problem.facts())
    assert all(result.isfinite().all() for name, result in clean.items() if name != "lse")
    oracle = problem.run(problem.tensors, "reference", torch.float64) if problem.device == "cuda" else clean
    for name in INPUTS:
        influenced = problem.influence(name)
        for poison in POISONS:
            results = problem.run(problem.poisoned(name, poison), backend)
            for result, actual in results.items():
                free = ~influenced[result].to(problem.device)
                what = f"{poison} in {name} reaches {result}"
                if problem.device == "cpu":
                    assert torch.equal(actual[free], clean[result][free]), what
                else:  # the rows that are computed once more may be added in another order
                    # The gradient of the sinks is computed from lse, which is float32.
                    tolerance = max(TOLERANCE[dtype], 1e-6) if result in ("lse", "dsinks") else TOLERANCE[dtype]
                    assert error(actual[free], oracle[result][free]) < tolerance, what


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("call", SMALL, ids=str)
def test_poison_stays_where_it_is(
    call: Call, device: str, backend: str, dtype: torch.dtype, deterministic: None
) -> None:
    compare(Problem(call, dtype, device), backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("call", LARGE, ids=str)
def test_poison_stays_in_its_tiles(
    call: Call, device: str, backend: str, dtype: torch.dtype, deterministic: None
) -> None:
    compare(Problem(call, dtype, device), backend, dtype)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_second_derivatives_of_the_reference_are_isolated(name: str, poison: float) -> None:
    problem = Problem(Call("second", ids="mixed_padding", has_sinks=True), torch.float64, "cpu")

    def run(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = [tensors[name].clone().requires_grad_() for name in ("q", "k", "v")]
        out = selfattn.multihead_attention(*leaves, problem.query_ids, backend="reference", sinks=problem.sinks)
        first = torch.autograd.grad(out, leaves, problem.tensors["grad_out"], create_graph=True)
        directions = [torch.ones_like(gradient) for gradient in first]
        return [gradient.detach() for gradient in (*first, *torch.autograd.grad(first, leaves, directions))]

    free = ~(problem.query_ids == problem.query_ids.max())
    for actual, expected in zip(run(problem.poisoned(name, poison)), run(problem.tensors), strict=True):
        assert torch.equal(actual[free], expected[free])


def test_compiled_graph_of_the_reference_isolates() -> None:
    # A graph is made without a look at the values.
    torch.compiler.reset()
    problem = Problem(Call("compiled", ids="mixed_padding"), torch.float32, "cpu")

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return selfattn.multihead_attention(q, k, v, problem.query_ids, backend="reference")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def run(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = [tensors[name].clone().requires_grad_() for name in ("q", "k", "v")]
        out = compiled(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, problem.tensors["grad_out"])]

    free = ~(problem.query_ids == problem.query_ids.max())
    for name in ("q", "k", "v"):
        for actual, expected in zip(run(problem.poisoned(name, math.nan)), run(problem.tensors), strict=True):
            assert torch.equal(actual[free], expected[free])


def test_legal_infinities_come_to_what_the_formula_gives() -> None:
    # Through at::matmul where every pair is allowed, through the selection where one is not.
    q, k, v = (torch.randn(1, 6, 1, 8, dtype=torch.float64) for _ in range(3))
    v[0, 1, 0, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    v[0, 4, 0, :3] = torch.tensor([math.inf, math.inf, 1.0])
    full = selfattn.multihead_attention(q, k, v, causal=False, backend="reference")
    assert full[0, :, 0, 0].eq(math.inf).all() and full[0, :, 0, 1:3].isnan().all() and full[..., 3:].isfinite().all()
    padded = [torch.cat([tensor, torch.full_like(tensor[:, :1], math.nan)], dim=1) for tensor in (q, k, v)]
    ids = torch.tensor([[0, 0, 0, 0, 0, 0, -1]])
    out = selfattn.multihead_attention(*padded, ids, causal=False, backend="reference")[:, :6]
    torch.testing.assert_close(out, full, equal_nan=True)
    causal = selfattn.multihead_attention(q, k, v, backend="reference")[0, :, 0]
    assert causal[0].isfinite().all()
    assert causal[1:4, 1].eq(-math.inf).all() and causal[4:, 1].isnan().all() and causal[1:, 2].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
@pytest.mark.parametrize("kind", ["packed", "shuffled", "reused", "mixed_padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_a_document_moves_itself_alone(backend: str, kind: str, dtype: torch.dtype) -> None:
    length = 90
    q, k, v = (torch.randn(2, length, heads, 16).to(dtype) for heads in (4, 2, 2))
    ids = make_ids(kind, 2, length)
    grad_out = torch.randn(2, length, 4, 16).to(dtype)

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = selfattn.multihead_attention(*leaves, ids, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    before = run(q, k, v)
    for number in ids[ids >= 0].unique().tolist():
        document = ids == number
        changed = [torch.where(document[..., None, None], 5 * torch.randn_like(t), t) for t in (q, k, v)]
        for new, old in zip(run(*changed), before, strict=True):
            assert torch.equal(new[~document], old[~document])
            assert not torch.equal(new[document], old[document])
