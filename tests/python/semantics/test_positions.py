"""Causality and windows compare the positions that a call gives, wherever its tokens stand.

Beside the cases of support/cases.py: what the positions are for, each call against the one without them.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from support.cases import BACKENDS_ON_CPU, PLACES, ROUNDING
from support.problems import error, make_ids, make_positions, zigzag
from support.serving_table import describe, is_refused
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import selfattn

OPS = torch.ops.selfattn
LENGTH = 150  # of a few tiles
WINDOWS = [{}, {"window_left": 20}, {"causal": False, "window_left": 30, "window_right": 7}]


def heads(device: str, batch: int = 2, length: int = LENGTH, keys: int | None = None) -> list[Tensor]:
    """q, k, v that want gradients."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    lengths = (length, keys or length, keys or length)
    return [
        torch.randn(batch, tokens, n, 16, device=device, dtype=dtype, requires_grad=True)
        for tokens, n in zip(lengths, (4, 2, 2), strict=True)
    ]


def tolerance(device: str) -> float:
    return ROUNDING[torch.float32 if device == "cpu" else torch.bfloat16]


def with_gradients(function: Callable, tensors: list[Tensor]) -> list[Tensor]:
    """out, and the gradients that come from it by a rule that follows each token."""
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), tensors)]


def check_same(actual: list[Tensor], expected: list[Tensor], device: str) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert error(one, other) < 10 * tolerance(device)


def is_left_out(device: str, backend: str, tensors: list[Tensor], **options) -> bool:
    """Where the serving table says so, and then the backend refuses."""
    call = partial(selfattn.multihead_attention, *tensors, **options, backend=backend)
    return is_refused(backend, describe(*tensors, **options), call)


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_indices_as_positions_change_nothing(device: str, backend: str, windows: dict) -> None:
    for keys in (LENGTH, 260, 70):
        tensors = heads(device, keys=keys)
        positions, kv_positions = (p.to(device) for p in make_positions("index", 2, LENGTH, keys))
        # Any shift does as well: positions are compared with each other alone.
        for shift in (0, 1000, -5):
            given = {"positions": positions + shift, "kv_positions": kv_positions.long() + shift, **windows}
            if is_left_out(device, backend, tensors, **given):
                return
            run = partial(selfattn.multihead_attention, backend=backend)
            plain = with_gradients(lambda *t: run(*t, **windows), tensors)  # noqa: B023
            same = with_gradients(lambda *t: run(*t, **given), tensors)  # noqa: B023
            if backend == "flash" and device == "cpu":
                assert all(torch.equal(one, other) for one, other in zip(same, plain, strict=True))
            check_same(same, plain, device)


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_chunks_of_queries_are_the_rows_of_the_whole(device: str, backend: str, windows: dict) -> None:
    """A prefill in chunks, each against a cache with room for later tokens."""
    tensors = heads(device)
    q, k, v = (tensor.detach() for tensor in tensors)
    row = torch.arange(LENGTH, device=device).expand(2, LENGTH)
    whole = selfattn.multihead_attention(q, k, v, backend="reference", **windows)
    for chunk in (slice(0, 40), slice(40, 41), slice(41, LENGTH)):
        given = {"positions": row[:, chunk], "kv_positions": row, **windows}
        if is_left_out(device, backend, [q[:, chunk], k, v], **given):
            return
        out = selfattn.multihead_attention(q[:, chunk], k, v, backend=backend, **given)
        assert error(out, whole[:, chunk]) < tolerance(device)


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("has_ids", [False, True])
@pytest.mark.parametrize("order", ["zigzag", "any"])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_tokens_of_any_order_are_the_row_in_that_order(
    device: str, backend: str, order: str, has_ids: bool, windows: dict
) -> None:
    tensors = heads(device)
    ids = make_ids("shuffled" if order == "any" else "packed", 2, LENGTH).to(device) if has_ids else None
    places = (zigzag(LENGTH) if order == "zigzag" else torch.randperm(LENGTH)).to(device)
    there = [tensor.detach()[:, places].requires_grad_() for tensor in tensors]
    given = {"segment_ids": ids[:, places] if has_ids else None, "positions": places.expand(2, -1), **windows}
    if is_left_out(device, backend, there, **given):
        return
    run = partial(selfattn.multihead_attention, backend=backend)
    expected = with_gradients(lambda *t: run(*t, ids, **windows), tensors)
    actual = with_gradients(lambda *t: run(*t, **given), there)
    check_same(actual, [tensor[:, places] for tensor in expected], device)


@pytest.mark.parametrize("kind", ["documents", "shuffled", "mixed_padding", "reused"])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_index_in_the_row_and_in_the_document_are_the_same(device: str, backend: str, kind: str) -> None:
    """With ids alone: causality compares tokens of one document."""
    tensors, ids = heads(device), make_ids(kind, 2, LENGTH).to(device)
    row = torch.arange(LENGTH, device=device).expand(2, LENGTH)
    # Each token's number among those of its id that stand before it.
    before = (ids[:, :, None] == ids[:, None]) & (row[:, None] < row[:, :, None])
    both = [{"positions": row}, {"positions": before.sum(2)}]
    if any(is_left_out(device, backend, tensors, segment_ids=ids, **given) for given in both):
        return
    run = partial(selfattn.multihead_attention, segment_ids=ids, backend=backend)
    expected = with_gradients(lambda *t: run(*t), tensors)
    for given in both:
        check_same(with_gradients(lambda *t: run(*t, **given), tensors), expected, device)  # noqa: B023


@pytest.mark.parametrize("windows", [{}, {"window_left": 8}], ids=str)
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_rows_of_a_cache_are_filled_to_their_own_length(device: str, backend: str, windows: dict) -> None:
    lengths, room, steps = (90, 33, 130), 150, 3
    q, _, _ = heads(device, batch=3, length=steps)
    _, k, v = heads(device, batch=3, length=room)
    filled = torch.tensor(lengths, device=device)[:, None]
    positions = filled - steps + torch.arange(steps, device=device)
    kv_positions = torch.arange(room, device=device).expand(3, room)
    given = {"positions": positions, "kv_positions": kv_positions, **windows}
    if is_left_out(device, backend, [q, k, v], **given):
        return
    out = selfattn.multihead_attention(q, k, v, backend=backend, **given)
    for row, length in enumerate(lengths):
        alone = q[row : row + 1], k[row : row + 1, :length], v[row : row + 1, :length]
        expected = selfattn.multihead_attention(*alone, backend="reference", **windows)
        assert error(out[row : row + 1], expected) < tolerance(device)


@pytest.mark.parametrize("backend", ["reference", "flash", "auto"])
def test_parts_of_a_causal_row_merge_into_the_whole(backend: str) -> None:
    """Context parallelism: the queries of a rank meet the keys of each, and lse says how much each part counts."""
    q, k, v = heads("cpu")
    places = zigzag(LENGTH)
    whole, whole_lse = selfattn.multihead_attention_lse(q, k, v, backend=backend)
    half = LENGTH // 2

    def part(keys: Tensor) -> tuple[Tensor, Tensor]:
        given = {"positions": places[None, :half].expand(2, -1), "kv_positions": keys.expand(2, -1)}
        return selfattn.multihead_attention_lse(q[:, places[:half]], k[:, keys], v[:, keys], backend=backend, **given)

    out, lse = selfattn.merge_attention(*part(places[:half]), *part(places[half:]))
    assert error(out, whole[:, places[:half]]) < 5e-6
    assert error(lse, whole_lse[:, :, places[:half]]) < 5e-6


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
def test_equal_positions_see_each_other(backend: str) -> None:
    q, k, v = heads("cpu")
    ones = torch.ones(2, LENGTH, dtype=torch.int32)
    out = selfattn.multihead_attention(q, k, v, positions=ones, window_left=0, backend=backend)
    assert error(out, selfattn.multihead_attention(q, k, v, causal=False, backend=backend)) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
@pytest.mark.parametrize("window", [0, 2**31, 2**32 - 2, 2**32 - 1, 2**40, 2**62, 2**63 - 1])
def test_far_positions_and_wide_windows_overflow_nothing(backend: str, window: int) -> None:
    numbers = [-(2**31), -(2**31) + 1, -1, 0, 2**31 - 2, 2**31 - 1]
    for order in (numbers, numbers[::-1], [numbers[i] for i in (3, 0, 5, 2, 4, 1)]):
        positions = torch.tensor([order])
        q, k = torch.randn(1, 6, 1, 8), torch.randn(1, 6, 1, 8)
        v = torch.eye(6).view(1, 6, 1, 6)  # the output is the weights
        for causal in (True, False):
            for side in ("window_left", "window_right"):
                options = {"positions": positions, "causal": causal, side: window}
                weights = selfattn.multihead_attention(q, k, v, backend=backend, **options)[0, :, 0]
                for i, own in enumerate(order):
                    for j, other in enumerate(order):
                        is_far = own - other > window if side == "window_left" else other - own > window
                        is_allowed = not (causal and other > own) and not is_far
                        assert (weights[i, j] > 0) == is_allowed, (own, other, options)


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
def test_rows_that_see_no_key_are_empty(backend: str) -> None:
    q, k, v = heads("cpu", keys=70)
    positions, kv_positions = make_positions("future", 2, LENGTH, 70)
    positions[:, 50] = 2**31 - 1  # but one
    out = selfattn.multihead_attention(q, k, v, positions=positions, kv_positions=kv_positions, backend=backend)
    sees = torch.arange(LENGTH) == 50
    assert (out[:, ~sees] == 0).all() and (out[:, sees] != 0).all()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert (dq[:, ~sees] == 0).all() and (dq[:, sees] != 0).any()
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv))
    if backend in ("reference", "flash"):
        both = {"positions": positions, "kv_positions": kv_positions, "backend": backend}
        _, lse = selfattn.multihead_attention_lse(q, k, v, **both)
        assert (lse[..., ~sees] == -torch.inf).all() and lse[..., sees].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
def test_positions_that_no_rule_reads_are_checked_and_change_nothing(backend: str) -> None:
    q, k, v = heads("cpu")
    given = {"positions": make_positions("any", 2, LENGTH, LENGTH)[0], "causal": False, "backend": backend}
    expected = selfattn.multihead_attention(q, k, v, causal=False, backend=backend)
    assert torch.equal(selfattn.multihead_attention(q, k, v, **given), expected)
    with pytest.raises(ValueError, match=r"^selfattn: positions must have the shape"):
        selfattn.multihead_attention(q, k, v, **given | {"positions": given["positions"][:, 1:]})


@pytest.mark.parametrize("kv_type", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("own_type", [torch.int32, torch.int64])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_integer_types_and_strides_of_positions_do_not_matter(
    device: str, backend: str, own_type: torch.dtype, kv_type: torch.dtype | None
) -> None:
    tensors = heads(device, length=13)
    positions, kv_positions = (p.to(device) for p in make_positions("any", 2, 13, 13))
    keys = {} if kv_type is None else {"kv_positions": kv_positions}
    if is_left_out(device, backend, tensors, positions=positions, **keys):
        return
    run = partial(selfattn.multihead_attention, *tensors, backend=backend)
    expected = run(positions=positions, **keys)
    strided = torch.stack([positions, positions], -1).to(own_type)[..., 0]
    keys = {name: tensor.to(kv_type).T.contiguous().T for name, tensor in keys.items()}
    assert torch.equal(run(positions=strided, **keys), expected)


KERNELS: dict[str, Callable] = {
    "flash_attention": lambda q, *p: OPS.flash_attention(q, q, q, positions=p[0], kv_positions=p[1]),
    "reference": lambda q, *p: selfattn.multihead_attention(
        q, q, q, positions=p[0], kv_positions=p[1], backend="reference"
    ),
    "aten": lambda q, *p: selfattn.multihead_attention(q, q, q, positions=p[0], kv_positions=p[1], backend="aten"),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", KERNELS)
def test_values_are_checked_by_the_device(name: str, device: str) -> None:
    """In the graph of a call on fake tensors, which need no GPU: int64 is narrowed once, and the host reads nothing."""
    if (name, device) == ("flash_attention", "cuda"):
        return
    with FakeTensorMode():
        q = torch.zeros(2, 13, 4, 8, device=device, dtype=torch.bfloat16)
        positions = [torch.zeros(2, 13, device=device, dtype=torch.int64) for _ in range(2)]
        graph = make_fx(KERNELS[name])(q, *positions).graph
    targets = [node.target for node in graph.nodes]
    assert targets.count(torch.ops.aten._assert_async.msg) == 2
    assert torch.ops.aten._local_scalar_dense.default not in targets


def test_a_promise_of_order_changes_nothing(device: str) -> None:
    """It is for the kernels alone, and given to flash_attention."""
    tensors = [tensor.detach() for tensor in heads(device)]
    ids, row = (torch.arange(LENGTH, device=device).expand(2, LENGTH) for _ in range(2))
    given = {"segment_ids": ids // 40, "positions": row, "window_left": 20}
    if is_left_out(device, "flash", tensors, **given):
        return
    for one, other in zip(
        OPS.flash_attention(*tensors, **given, in_order=True), OPS.flash_attention(*tensors, **given), strict=True
    ):
        assert error(one, other) < tolerance(device)
    with pytest.raises(ValueError, match="in_order must come with positions; got in_order alone"):
        OPS.flash_attention(*tensors, in_order=True)


def test_cudnn_takes_no_positions() -> None:
    """On fake tensors, which need no GPU."""
    with FakeTensorMode():
        q = torch.zeros(2, 13, 4, 8, device="cuda", dtype=torch.bfloat16)
        positions = torch.zeros(2, 13, device="cuda", dtype=torch.int32)
        said = selfattn.explain_backend(q, q, q, positions=positions).splitlines()
    assert [line.partition(":")[0] for line in said] == ["flash", "cudnn", "aten", "reference"]
    assert "positions must not be given where causality reads them" in said[1]
    assert said[3] == "reference: can serve this call"
