"""Promise: attention whose rows are spread over ranks is attention of one process, forward and backward, for every
method, layout, kind of ids and option; only split documents travel, and a traced graph sees one operator."""

import contextlib
import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.problems import error
from support.ranks import Ranks, in_fake_job
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.fx.experimental.proxy_tensor import make_fx

import selfattn
from selfattn.distributed import ContextLayout, context_parallel_attention

BATCH, LENGTH, DIM = 2, 22, 8
"""Rows that neither 4 nor 8 divides."""


def make_ids(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    many = torch.randint(-1, 4, (BATCH, LENGTH), generator=generator, dtype=torch.int32)
    if kind == "any order":
        return many
    if kind == "sorted":
        return many.sort(1).values
    if kind == "padding on a rank":  # of a contiguous layout, the last one
        return torch.where(torch.arange(LENGTH) < LENGTH // 2 - 1, many.clamp(min=0).sort(1).values, -1)
    if kind == "one document":
        return torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    assert kind == "a document in a row"  # fewer than ranks, beside a row of many
    return torch.stack([torch.zeros(LENGTH, dtype=torch.int32), torch.arange(LENGTH, dtype=torch.int32) // 3])


KINDS = ("sorted", "any order", "padding on a rank", "one document", "a document in a row")
BALANCES = ("documents", "head_tail", "contiguous")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"window_left": 3},
    {"causal": False},
    {"softcap": 1.5, "qk_scale": 0.7, "heads": (4, 4)},
    {"sinks": True, "heads": (8, 1)},
    {"causal": False, "window_left": 2, "window_right": 4, "sinks": True},
    {"dtype": torch.float64, "window_left": 5, "sinks": True, "backend": "reference"},
    {"dtype": torch.float64, "heads": (4, 4)},  # aten, which gives no logsumexp
)


Mesh = DeviceMesh | tuple[DeviceMesh, DeviceMesh]


def mesh_of(*sizes: int) -> Mesh:
    """Of so many ranks, or the pair of so many that exchange heads and so many that gather keys."""
    if len(sizes) == 1:
        return init_device_mesh("cpu", sizes)
    mesh = init_device_mesh("cpu", sizes[::-1], mesh_dim_names=("keys", "heads"))
    return mesh["heads"], mesh["keys"]


def check_one(ids: Tensor, mesh: Mesh, balance: str, method: str, options: dict[str, Any], bucket: int) -> None:
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    heads, kv_heads = options.pop("heads", (4, 2))
    generator = torch.Generator().manual_seed(2)
    whole = [
        torch.randn(BATCH, LENGTH, number, width, generator=generator, dtype=dtype).requires_grad_()
        for number, width in ((heads, DIM), (kv_heads, DIM), (kv_heads, 4))
    ]
    grad = torch.randn(BATCH, LENGTH, heads, 4, generator=generator, dtype=dtype)
    sinks = torch.randn(heads, generator=generator).requires_grad_() if options.pop("sinks", False) else None
    if sinks is not None:
        whole.append(sinks)
    expected = selfattn.multihead_attention(*whole[:3], ids, **options, sinks=sinks)
    expected_grads = torch.autograd.grad(expected, whole, grad)

    layout = ContextLayout.from_segment_ids(ids, mesh, balance, bucket=bucket)
    # What stands in slots without a token has no influence where flash or reference serve.
    fill = 0.0 if dtype == torch.float64 and "backend" not in options else float("nan")
    own = [layout.shard(x.detach(), fill).requires_grad_() for x in whole[:3]]
    own += [x.detach().requires_grad_() for x in whole[3:]]
    out = context_parallel_attention(
        *own[:3], layout, method=method, **options, sinks=None if sinks is None else own[3]
    )
    grads = list(torch.autograd.grad(out, own, layout.shard(grad, fill)))
    for x in grads[3:]:
        dist.all_reduce(x)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-6 if sinks is not None else 1e-12
    named = dict(zip(("out", "dq", "dk", "dv"), [out, *grads[:3]], strict=True))
    for (name, found), reference in zip(named.items(), [expected, *expected_grads[:3]], strict=True):
        assert error(found, layout.shard(reference)) < tolerance, name
        assert not found[layout.indices < 0].any()
    if sinks is not None:
        assert error(grads[3], expected_grads[3]) < 2e-5


def check_grid(method: str, balance: str) -> None:
    """Each kind of ids with three of the options, other ones for every layout."""
    mesh = mesh_of(dist.get_world_size())
    options = itertools.cycle(OPTIONS)
    for _ in range(3 * BALANCES.index(balance)):
        next(options)
    for kind in KINDS:
        for call, bucket in zip([next(options) for _ in range(3)], (4, 1, 128), strict=True):
            try:
                check_one(make_ids(kind), mesh, balance, method, call, bucket)
            except Exception as failure:
                raise AssertionError(f"{kind}, {call}, bucket {bucket}") from failure


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("method", ["keys", "heads"])
def test_grid(ranks: Ranks, method: str, balance: str, size: int) -> None:
    ranks.run(check_grid, size, method, balance)


def check_pair() -> None:
    """Every option, with all kinds of ids and layouts in turn; a pair may be one of either step, too."""
    pairs, calls = [mesh_of(2, 2)] * len(OPTIONS) + [mesh_of(4, 1), mesh_of(1, 4)], itertools.cycle(OPTIONS)
    for mesh, options, kind, balance in zip(
        pairs, calls, itertools.cycle(KINDS), itertools.cycle(BALANCES), strict=False
    ):
        try:
            check_one(make_ids(kind), mesh, balance, "auto", options, bucket=4)
        except Exception as failure:
            raise AssertionError(f"{kind}, {balance}, {options}") from failure


def test_heads_within_nodes_and_keys_between(ranks: Ranks) -> None:
    ranks.run(check_pair, 4)


def check_groups_of_heads(sizes: tuple[int, ...], method: str, collectives: dict[str, int]) -> None:
    """So many rows that heads travel in two groups: one is attended to while the other comes, and goes back while the
    other is computed. Every eighth row is the same."""
    generator = torch.Generator().manual_seed(2)
    length = 16 * math.prod(sizes)
    rows = [torch.randn(8, length, heads, dim, generator=generator) for heads, dim in ((8, 8), (4, 8), (4, 256))]
    grad, sinks = (torch.randn(shape, generator=generator) for shape in ((8, length, 8, 256), (8,)))
    ids = torch.zeros(2048, length, dtype=torch.int32)
    layout = ContextLayout.from_segment_ids(ids, mesh_of(*sizes), "head_tail", bucket=1)
    own = [layout.shard(x.repeat(256, 1, 1, 1)).requires_grad_() for x in rows]
    own.append(sinks.clone().requires_grad_())
    options: dict[str, Any] = {"method": method, "sinks": own[3]}
    with torch.profiler.profile() as profile:
        out = context_parallel_attention(*own[:3], layout, **options)
        found = torch.autograd.grad(out, own, layout.shard(grad.repeat(256, 1, 1, 1)))
    names = [event.name for event in profile.events()]
    for name, number in collectives.items():
        assert names.count(f"_c10d_functional::{name}") == number, name

    rows.append(sinks)
    for x in rows:
        x.requires_grad_()
    reference = selfattn.multihead_attention(*rows[:3], ids[:8], sinks=sinks)
    of_eight = dataclasses.replace(layout, **{name: getattr(layout, name)[:8] for name in ("indices", "slots")})
    expected = [reference, *torch.autograd.grad(reference, rows, grad)]
    for x, whole in zip((out, *found[:3]), expected[:4], strict=True):
        for same in (x[:8], x[-8:]):
            assert error(same, of_eight.shard(whole)) < 2e-5
    (of_sinks,) = found[3:]
    dist.all_reduce(of_sinks)
    assert error(of_sinks, 256 * expected[4]) < 2e-5
    check_traced_shapes(own, layout, options)


def check_traced_shapes(own: list[Tensor], layout: ContextLayout, options: dict[str, Any]) -> None:
    """A tracer knows the shapes of what the forward pass keeps."""
    names = ("positions", "kv_positions", "shared", "group_size", "group_name", "heads_group_size", "heads_group_name")
    options = options | {name: getattr(layout, name) for name in names}
    found = []
    for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, torch.no_grad():
            *results, exchanged = torch.ops.selfattn.context_parallel_attention_forward(
                *own[:3], layout.segment_ids, layout.kv_segment_ids, **options
            )
        found.append([(x.shape, x.dtype) for x in (*results, *exchanged)])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("sizes", "method", "collectives"),
    [
        ((2,), "keys", {"all_gather_into_tensor": 4, "reduce_scatter_tensor": 2}),
        ((2,), "heads", {"all_to_all_single": 8}),
        ((2, 2), "auto", {"all_to_all_single": 8, "all_gather_into_tensor": 4, "reduce_scatter_tensor": 2}),
    ],
    ids=["keys", "heads", "a pair"],
)
def test_groups_of_heads(ranks: Ranks, sizes: tuple[int, ...], method: str, collectives: dict[str, int]) -> None:
    ranks.run(check_groups_of_heads, math.prod(sizes), sizes, method, collectives)


def check_half_precision() -> None:
    for method, (heads, kv_heads) in itertools.product(("keys", "heads"), ((8, 8), (8, 2))):
        # Values of a key head on a rank of its own are no multiple of 16 bytes.
        shapes = ((heads, 16), (kv_heads, 16), (kv_heads, 12))
        whole = [torch.randn(1, 64, *shape, dtype=torch.bfloat16) for shape in shapes]
        layout = ContextLayout.from_segment_ids(torch.zeros(1, 64, dtype=torch.int64), mesh_of(4), "head_tail")
        own = [layout.shard(x).requires_grad_() for x in whole]
        with torch.autocast("cpu", torch.bfloat16):
            out = context_parallel_attention(*(x.float() for x in own), layout, method=method)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        wide = [x.double().requires_grad_() for x in whole]
        expected = selfattn.multihead_attention(*wide, backend="reference")
        expected.sum().backward()
        assert error(out, layout.shard(expected)) < 1e-2
        for x, reference in zip(own, wide, strict=True):
            assert error(x.grad, layout.shard(reference.grad)) < 2e-2


def test_half_precision_and_autocast(ranks: Ranks) -> None:
    ranks.run(check_half_precision, 4)


class SumOfRanks(torch.autograd.Function):
    """The same tensor on every rank, whose gradient is the mean over ranks of n times what each has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad / dist.get_world_size()


def check_derivatives(sizes: tuple[int, ...], methods: tuple[str, ...]) -> None:
    layout = ContextLayout.from_segment_ids(torch.tensor([[0, 1, 0, 0, -1]]), mesh_of(*sizes), "head_tail", bucket=1)
    tensors = [torch.randn(1, 5, heads, 2, dtype=torch.float64) for heads in (2, 1, 1)]
    tensors.append(torch.randn(2, dtype=torch.float64))

    def whole_rows(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        own = [layout.shard(SumOfRanks.apply(x)) for x in (q, k, v)]
        out = context_parallel_attention(*own, layout, method=method, window_left=2, sinks=SumOfRanks.apply(sinks))
        return layout.unshard(out)

    for method in methods:  # noqa: B007 -- read by whole_rows
        torch.autograd.gradcheck(whole_rows, [x.requires_grad_() for x in tensors], nondet_tol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "methods"), [((2,), ("keys", "heads")), ((2, 2), ("auto",))], ids=["one axis", "a pair"]
)
def test_derivatives(ranks: Ranks, sizes: tuple[int, ...], methods: tuple[str, ...]) -> None:
    ranks.run(check_derivatives, math.prod(sizes), sizes, methods)


def check_documents_apart() -> None:
    ids = make_ids("any order")
    layout = ContextLayout.from_segment_ids(ids, mesh_of(2), "head_tail", bucket=1)
    whole = [torch.randn(BATCH, LENGTH, heads, DIM) for heads in (4, 2, 2)]
    for method in ("keys", "heads"):
        before = layout.unshard(context_parallel_attention(*map(layout.shard, whole), layout, method=method))
        for x in whole[1:]:
            x[:, 0] = float("nan")
        after = layout.unshard(context_parallel_attention(*map(layout.shard, whole), layout, method=method))
        is_other = ids != ids[:, :1]
        assert torch.equal(before[is_other], after[is_other])
        assert after[~is_other & (ids >= 0)].isnan().all()
        whole[1:] = [torch.randn_like(x) for x in whole[1:]]


def test_a_changed_token_changes_no_other_document(ranks: Ranks) -> None:
    ranks.run(check_documents_apart, 2)


BY_KEYS = ["all_gather_into_tensor"] * 2 + ["reduce_scatter_tensor"]
BY_HEADS = ["all_to_all_single"] * 4


def check_what_travels(sizes: tuple[int, ...], of_methods: dict[str, list[str]]) -> None:
    """Nothing where documents lie whole on ranks; of a split one, what the method says."""
    mesh, tensors = mesh_of(*sizes), [torch.randn(1, 16, 4, DIM, requires_grad=True) for _ in range(3)]
    length = 16 * math.prod(sizes)
    whole, split = torch.arange(length)[None] // 8, torch.zeros(1, length, dtype=torch.int64)
    for (method, of_method), index in itertools.product(of_methods.items(), (0, 1)):
        names = of_method if index else []
        layout = ContextLayout.from_segment_ids((whole, split)[index], mesh)
        layout.check()
        with torch.profiler.profile() as profile:
            torch.ops.selfattn.context_parallel_attention(
                *tensors,
                layout.segment_ids,
                layout.kv_segment_ids,
                positions=layout.positions,
                kv_positions=layout.kv_positions,
                shared=layout.shared,
                group_size=layout.group_size,
                group_name=layout.group_name,
                method=method,
                heads_group_size=layout.heads_group_size,
                heads_group_name=layout.heads_group_name,
            ).sum().backward()
        found = sorted(event.name for event in profile.events() if "c10d" in event.name and "wait" not in event.name)
        assert [name for name in found if name.startswith("_c10d_functional")] == [
            f"_c10d_functional::{n}" for n in names
        ]
        assert bool(found) == bool(names)


@pytest.mark.parametrize(
    ("sizes", "of_methods"),
    [((2,), {"keys": BY_KEYS, "heads": BY_HEADS}), ((2, 2), {"auto": sorted(BY_KEYS + BY_HEADS)})],
    ids=["one axis", "a pair"],
)
def test_only_split_documents_travel(ranks: Ranks, sizes: tuple[int, ...], of_methods: dict[str, list[str]]) -> None:
    ranks.run(check_what_travels, math.prod(sizes), sizes, of_methods)


def check_sharding() -> None:
    ids = make_ids("any order")
    for balance, sizes in zip(BALANCES, ((4,), (4,), (2, 2)), strict=True):
        layout = ContextLayout.from_segment_ids(ids, mesh_of(*sizes), balance)
        labels = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
        own = layout.shard(labels, -100)
        assert torch.equal(own, torch.where(layout.indices < 0, -100, labels.gather(1, layout.indices.clamp(min=0))))
        assert torch.equal(layout.unshard(own), labels)
        x = torch.randn(BATCH, LENGTH, 3, requires_grad=True)
        whole = layout.unshard(layout.shard(x).tanh())
        assert error(whole, x.tanh()) < 1e-6
        whole.sum().backward()
        mine = torch.zeros(BATCH, LENGTH + 1).scatter(1, layout.indices % (LENGTH + 1), 1.0)[:, :-1, None]
        assert error(x.grad, 4 * mine * (1 - x.tanh() ** 2)) < 1e-5  # of four losses
        sin, cos = layout.freqs(8)
        angles = selfattn.precompute_freqs(8, layout.document_positions)
        assert torch.equal(sin, angles[0]) and torch.equal(cos, angles[1])


def test_sharding_and_its_gradient(ranks: Ranks) -> None:
    ranks.run(check_sharding, 4)


def check_clean_operators() -> None:
    """opcheck, with collectives in the operator."""
    layout = ContextLayout.from_segment_ids(make_ids("sorted"), mesh_of(2), "head_tail", bucket=4)
    own = [torch.randn(BATCH, LENGTH // 2, heads, DIM, requires_grad=True) for heads in (4, 2, 2)]
    arguments = (*own, layout.segment_ids, layout.kv_segment_ids)
    options = {"positions": layout.positions, "kv_positions": layout.kv_positions, "shared": layout.shared}
    options |= {"group_size": 2, "group_name": layout.group_name, "local_start": layout.local_start}
    for method in ("keys", "heads"):
        for operator in ("", "_forward"):
            named = getattr(torch.ops.selfattn, f"context_parallel_attention{operator}").default
            torch.library.opcheck(named, arguments, {**options, "method": method})


def test_operators_are_clean(ranks: Ranks) -> None:
    ranks.run(check_clean_operators, 2)


def check_compiled(sizes: tuple[int, ...], method: str) -> None:
    layout = ContextLayout.from_segment_ids(make_ids("one document"), mesh_of(*sizes))
    own = [layout.shard(torch.randn(BATCH, LENGTH, 4, DIM)).requires_grad_() for _ in range(3)]
    function = lambda q, k, v: context_parallel_attention(q, k, v, layout, method=method) * 2  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for call in (function, compiled):
        out = call(*own)
        results.append([out, *torch.autograd.grad(out.square().sum(), own)])
    for found, reference in zip(*results, strict=True):
        assert torch.equal(found, reference)


@pytest.mark.parametrize(("sizes", "method"), [((2,), "heads"), ((2, 2), "auto")], ids=["one axis", "a pair"])
def test_compile_takes_it_whole(ranks: Ranks, sizes: tuple[int, ...], method: str) -> None:
    ranks.run(check_compiled, math.prod(sizes), sizes, method)


def check_thousand_ranks() -> None:
    for sizes, method, heads in (((1024,), "keys", 4), ((1024,), "heads", 1024), ((8, 128), "auto", 8)):
        mesh = mesh_of(*sizes)
        layout = ContextLayout.from_segment_ids(torch.zeros(1, 4096, dtype=torch.int32), mesh)
        assert (layout.indices.shape, layout.shared, layout.kv_positions.shape) == ((1, 4), 4, (1, 4096))
        with FakeTensorMode(allow_non_fake_inputs=True):
            q, k = torch.empty(1, 4, heads, DIM, requires_grad=True), torch.empty(1, 4, 2, DIM, requires_grad=True)

            def step(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
                out = context_parallel_attention(q, k, k, layout, method=method)  # noqa: B023
                return torch.autograd.grad(out.sum(), (q, k))

            graph = make_fx(step)(q, k).graph
        names = [
            str(node.target) for node in graph.nodes if "selfattn" in str(node.target) or "c10d" in str(node.target)
        ]
        operator = "selfattn.context_parallel_attention"
        assert names == [f"{operator}_forward.default", f"{operator}_backward.default"]
        (call, *_) = (node for node in graph.nodes if "_forward" in str(node.target))
        groups = (call.kwargs.get("heads_group_size", 1), call.kwargs["group_size"])
        assert groups == (sizes if len(sizes) == 2 else (1, *sizes))


def test_a_thousand_ranks() -> None:
    in_fake_job(1024, check_thousand_ranks)


def check_chosen_method() -> None:
    """By bytes, of both passes, where all tokens travel: of 2 ranks 6 NKV against 2 (NH + NKV)."""
    mesh = init_device_mesh("cpu", (2,))
    one, many = torch.zeros(1, 256, dtype=torch.int32), (torch.arange(256)[None] // 100).int()
    for ids, heads, kv_heads, expected in (
        (one, 6, 2, "keys"),
        (one, 6, 6, "heads"),
        (one, 12, 6, "keys"),
        (one, 3, 3, "keys"),  # heads that 2 ranks cannot share
        (many, 6, 6, "keys"),  # a layout evens out what ranks do by keys
    ):
        layout = ContextLayout.from_segment_ids(ids, mesh, "contiguous", bucket=1)
        with FakeTensorMode(allow_non_fake_inputs=True):
            q, k = (torch.empty(1, 128, number, DIM) for number in (heads, kv_heads))
            graph = make_fx(lambda q, k: context_parallel_attention(q, k, k, layout))(q, k).graph  # noqa: B023
        (call,) = (node for node in graph.nodes if "context_parallel" in str(node.target))
        assert call.kwargs["method"] == expected


def test_auto_moves_few_bytes() -> None:
    in_fake_job(2, check_chosen_method)


def check_refusals() -> None:
    """Each of them on every rank, before any collective."""
    mesh = mesh_of(2)
    ids = torch.zeros(1, 16, dtype=torch.int32)
    layout = ContextLayout.from_segment_ids(ids, mesh)
    q, k, v = (torch.randn(1, 8, heads, DIM) for heads in (3, 3, 3))
    rank = mesh.get_local_rank()

    def call(q: Tensor, k: Tensor, v: Tensor, layout: ContextLayout = layout, **options: Any) -> Tensor:
        return context_parallel_attention(q, k, v, layout, **options)

    with pytest.raises(TypeError, match="layout: expected a ContextLayout, got Tensor"):
        call(q, k, v, ids)
    for options, message in (
        ({"method": "heads"}, "method 'heads' needs a group_size that divides the 3 query heads"),
        ({"method": "ring"}, "method must be one of auto, heads, keys; got 'ring'"),
        ({"backend": "fast"}, "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call(q, k, v, **options)
    with pytest.raises(ValueError, match=r"segment_ids must have the shape \(B, S\) = \[1, 7\]"):
        call(q[:, :7], k[:, :7], v[:, :7])
    with pytest.raises(ValueError, match=r"group_size must be that of the group '.*', 2; got 4"):
        torch.ops.selfattn.context_parallel_attention(
            q,
            k,
            v,
            layout.segment_ids,
            layout.kv_segment_ids.repeat(1, 2),
            positions=layout.positions,
            kv_positions=layout.kv_positions.repeat(1, 2),
            shared=layout.shared,
            group_size=4,
            group_name=layout.group_name,
        )
    with pytest.raises(NotImplementedError, match="has no gradient of its gradient"):
        leaf = q.clone().requires_grad_()
        torch.autograd.grad(call(leaf, k, v).sum(), leaf, create_graph=True)
    # Ranks that disagree: an error on both, with the first call of a layout.
    for differing, message in (
        (
            lambda: call(q[:, :, : 3 - rank], k, v, ContextLayout.from_segment_ids(ids, mesh)),
            "the same q on the 2 ranks",
        ),
        (lambda: call(q, k, v, ContextLayout.from_segment_ids(ids + 5 * rank, mesh)), "the same segment_ids on"),
        (lambda: call(q, k, v, ContextLayout.from_segment_ids(ids, mesh, bucket=1 + rank)), "the same layout on"),
        (lambda: call(q, k, v, ContextLayout.from_segment_ids(ids, mesh), causal=bool(rank)), "the same options on"),
        (ContextLayout.from_segment_ids(ids + rank, mesh).check, "the same segment_ids on"),
    ):
        with pytest.raises(ValueError, match=message):
            differing()
    for arguments, kind, message in (
        ((ids.tolist(), mesh), TypeError, "ids: expected a tensor, got list"),
        ((ids, 2), TypeError, "mesh: expected a DeviceMesh or a pair of them, got int"),
        ((ids, init_device_mesh("cpu", (1, 2))), ValueError, "mesh: expected one dimension"),
    ):
        with pytest.raises(kind, match=message):
            ContextLayout.from_segment_ids(*arguments)
    for shape_of in (layout.shard, layout.unshard):
        with pytest.raises(ValueError, match=r"x: expected \(1, \d+\) tokens, got shape \(1, 3\)"):
            shape_of(torch.zeros(1, 3))


def test_refusals(ranks: Ranks) -> None:
    ranks.run(check_refusals, 2)


def check_refusals_of_pairs() -> None:
    heads, keys = mesh_of(2, 2)
    ids, rank = torch.zeros(1, 16, dtype=torch.int32), dist.get_rank()
    layout = ContextLayout.from_segment_ids(ids, (heads, keys))
    q, k, v = (torch.randn(1, 4, 6, DIM) for _ in range(3))
    for (own_q, own_k), options, message in (
        ((q[:, :, :3], k[:, :, :3]), {}, "a heads group needs a heads_group_size that divides the 3 query heads"),
        ((q, k[:, :, :3]), {}, "heads_group_size that .* divides the 3 key heads or is a multiple of them; got 2"),
        ((q, k), {"method": "heads"}, "method must be auto or keys beside a heads group, heads_group_size 2"),
        ((q, k), {"method": "ring"}, "method must be auto or keys beside a heads group, .*; got 'ring'"),
    ):
        with pytest.raises(ValueError, match=message):
            context_parallel_attention(own_q, own_k, own_k, layout, **options)
    names = ("kv_segment_ids", "kv_positions", "kv_order")
    gathered = {name: getattr(layout, name).repeat(1, 2) for name in names}
    for change, message in (
        ({"heads_group_size": 4, **gathered}, r"heads_group_size must be that of the group '.*', 2; got 4"),
        (
            {"heads_group_size": 1},
            r"kv_segment_ids must have the shape \(B, heads_group_size \* group_size \*",
        ),
        ({"heads_group_size": 0}, "heads_group_size must be from 1"),
    ):
        other = dataclasses.replace(layout, **change, _checked=[True])
        with pytest.raises(ValueError, match=message):
            context_parallel_attention(*(x.repeat(1, 1, 2, 1) for x in (q, k, v)), other)
    with pytest.raises(ValueError, match="the same segment_ids on the 4 ranks of the mesh"):
        ContextLayout.from_segment_ids(ids + (rank == 3), (heads, keys)).check()
    for mesh, kind, message in (
        ((heads, keys, keys), ValueError, r"mesh: expected a pair \(heads_mesh, keys_mesh\), got 3 in a tuple"),
        ((heads, 2), TypeError, "mesh: expected a DeviceMesh or a pair of them, got int"),
        ((heads, heads), ValueError, "mesh: expected a pair of two dimensions of one mesh, .* got ranks"),
        ((heads, init_device_mesh("cpu", (2, 2))), ValueError, "mesh: expected one dimension"),
    ):
        with pytest.raises(kind, match=message):
            ContextLayout.from_segment_ids(ids, mesh)


def test_refusals_of_pairs(ranks: Ranks) -> None:
    ranks.run(check_refusals_of_pairs, 4)
