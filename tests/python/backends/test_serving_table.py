"""Every backend serves what the serving table says, refuses the rest with its reasons, and ``auto`` takes the first."""

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import ROOT
from support.serving_table import (
    DTYPES,
    FEATURES,
    MOST_TOKENS,
    MOST_TOKENS_WITH_IDS,
    ORDER,
    Call,
    chosen,
    describe,
    must_serve,
    render,
    serving,
)
from torch import Tensor

import selfattn

OPS = torch.ops.selfattn
SEMANTICS = ROOT / "docs" / "semantics.md"

DIMS = {
    "cpu": ((16, 16), (5, 3), (64, 32), (32, 264), (512, 512), (513, 8), (8, 520), (1, 1)),
    "cuda": (
        (16, 16),
        (5, 3),
        (12, 16),
        (16, 12),
        (6, 16),
        (252, 4),
        (16, 260),
        (128, 128),
        (136, 8),
        (8, 136),
        (256, 256),
        (255, 1),
        (257, 8),
        (264, 8),
        (8, 264),
    ),
}
LENGTHS = ((2, 6, 6), (2, 5, 9), (1, 9, 5), (1, 1, 1), (1, 1, 7), (2, 7, 1), (2, 0, 4), (2, 4, 0), (0, 4, 4))
WINDOWS = ((-1, -1), (3, -1), (-1, 0))
SCALES = (None, 0.7, 0.0, -0.3)
HEADS = ((4, 2), (4, 4), (3, 1), (0, 1))
MODES = (
    {},
    {"requires_grad": True},
    {"requires_grad": True, "is_deterministic": True},
    {"is_deterministic": True},
    {"has_tangent": True},
    {"transform": "vmap"},
    {"transform": "grad"},
    {"transform": "jvp"},
)


def base_call(device: str) -> Call:
    on_cuda = device == "cuda"
    return Call(
        device=device,
        capability=torch.cuda.get_device_capability() if on_cuda else Call.capability,
        cudnn_version=(torch.backends.cudnn.version() or 0) if on_cuda else Call.cudnn_version,
    )


def grid(device: str) -> list[Call]:
    """Every combination of dtype, head dimensions, lengths and options; modes, scales and heads beside each option."""
    base = base_call(device)
    calls = [
        base.with_(
            dtype=dtype,
            dim=dim,
            value_dim=value_dim,
            batch=batch,
            num_queries=num_queries,
            num_keys=num_keys,
            causal=causal,
            has_ids=has_ids,
            window_left=window[0],
            window_right=window[1],
            softcap=softcap,
            has_sinks=has_sinks,
        )
        for dtype, (dim, value_dim), (batch, num_queries, num_keys), causal, has_ids, window, softcap, has_sinks in (
            itertools.product(
                DTYPES,
                DIMS["cuda" if device == "cuda" else "cpu"],
                LENGTHS,
                (True, False),
                (False, True),
                WINDOWS,
                (0.0, 1.5),
                (False, True),
            )
        )
    ]
    calls += [
        base.with_(
            dtype=dtype,
            qk_scale=scale,
            num_heads=heads[0],
            num_kv_heads=heads[1],
            has_ids=has_ids,
            softcap=softcap,
            has_sinks=has_sinks,
            **mode,
        )
        for dtype, scale, heads, has_ids, softcap, has_sinks, mode in itertools.product(
            DTYPES, SCALES, HEADS, (False, True), (0.0, 1.5), (False, True), MODES
        )
    ]
    calls += [
        base.with_(
            dtype=dtype,
            batch=batch,
            num_queries=num_queries,
            num_keys=num_keys,
            causal=causal,
            has_ids=has_ids,
            window_left=window[0],
            window_right=window[1],
            has_positions=True,
            **mode,
        )
        for dtype, (batch, num_queries, num_keys), causal, has_ids, window, mode in itertools.product(
            DTYPES, LENGTHS, (True, False), (False, True), WINDOWS, MODES
        )
    ]
    return calls


def tensors_of(call: Call) -> dict[str, Tensor]:
    """Arguments of the call, small random numbers."""

    def make(*shape: int) -> Tensor:
        tensor = torch.rand(shape, device=call.device, dtype=torch.float32).to(call.dtype)
        return tensor.requires_grad_() if call.requires_grad else tensor

    tensors = {
        "q": make(call.batch, call.num_queries, call.num_heads, call.dim),
        "k": make(call.batch, call.num_keys, call.num_kv_heads, call.dim),
        "v": make(call.batch, call.num_keys, call.num_kv_heads, call.value_dim),
    }
    if call.has_ids:
        ids = {"segment_ids": call.num_queries, "kv_segment_ids": call.num_keys}
        for name, length in ids.items():
            tensors[name] = torch.zeros(call.batch, length, dtype=torch.int32, device=call.device)
    if call.has_positions:
        positions = {"positions": call.num_queries, "kv_positions": call.num_keys}
        for name, length in positions.items():
            tensors[name] = torch.zeros(call.batch, length, dtype=torch.int64, device=call.device)
    if call.has_sinks:
        tensors["sinks"] = make(call.num_heads)
    return tensors


def options_of(call: Call) -> dict:
    return {
        "causal": call.causal,
        "qk_scale": call.qk_scale,
        "window_left": call.window_left,
        "window_right": call.window_right,
        "softcap": call.softcap,
    }


@contextlib.contextmanager
def determinism(is_on: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(is_on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def ask(call: Call, function, **options):
    """What ``function`` says of the call, under its mode and its transform."""
    tensors = tensors_of(call)
    q = tensors.pop("q")
    answers = []

    def run(q: Tensor) -> Tensor:
        answers.append(function(q, **tensors, **options_of(call), **options))
        return q.sum()

    with determinism(call.is_deterministic), contextlib.ExitStack() as stack:
        if call.has_tangent:
            stack.enter_context(torch.autograd.forward_ad.dual_level())
            q = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        match call.transform:
            case None:
                run(q)
            case "vmap":
                torch.vmap(run)(torch.stack([q, q, q]))
            case "grad":
                torch.func.grad(run)(q)
            case "jvp":
                torch.func.jvp(run, (q,), (q,))
    return answers[0]


def verdicts(text: str) -> dict[str, str]:
    """backend -> "chosen", "can serve this call" or "cannot serve this call: ..."."""
    return dict(line.split(": ", 1) for line in text.splitlines())


def disagreement(call: Call) -> str | None:
    """What ``explain_backend`` says otherwise than the table."""
    said = verdicts(ask(call, selfattn.explain_backend))
    able = [backend for backend in ORDER if said[backend] in ("chosen", "can serve this call")]
    refusing = [backend for backend in ORDER if said[backend].startswith("cannot serve this call: ")]
    if able != serving(call) or [backend for backend in ORDER if backend not in able] != refusing:
        return f"must be served by {serving(call)}, is by {able}: {call}"
    if said[chosen(call)] != "chosen" or list(said.values()).count("chosen") != 1:
        return f"auto must take {chosen(call)}: {call} {said}"
    return None


def check_explanations(calls: list[Call]) -> None:
    wrong = [found for call in calls if (found := disagreement(call)) is not None]
    assert not wrong, f"{len(wrong)} of {len(calls)} calls, the first of them:\n" + "\n".join(wrong[:10])


def test_explanations_are_those_of_the_table(device: str) -> None:
    check_explanations(grid(device))


def test_explanations_of_meta_tensors_are_those_of_the_cpu() -> None:
    check_explanations(random.Random(0).sample(grid("meta"), 1000))


@pytest.mark.gpu
@pytest.mark.parametrize("most", [MOST_TOKENS_WITH_IDS, MOST_TOKENS])
def test_rows_that_hold_more_tokens_than_a_gpu_takes(most: int) -> None:
    """Of one element in memory, seen many times."""
    one = torch.zeros(1, 1, 1, 1, device="cuda", dtype=torch.bfloat16)
    id_of_all = torch.zeros(1, 1, device="cuda", dtype=torch.int32)
    for num_queries, num_keys, has_ids in itertools.product((1, most, most + 1), (1, most, most + 1), (False, True)):
        q, k = (one.expand(1, length, 1, 8) for length in (num_queries, num_keys))
        lengths = {"segment_ids": num_queries, "kv_segment_ids": num_keys}
        ids = {name: id_of_all.expand(1, length) for name, length in lengths.items()} if has_ids else {}
        call = describe(q, k, k, **ids)
        said = verdicts(selfattn.explain_backend(q, k, k, **ids))
        assert [name for name in ORDER if not said[name].startswith("cannot")] == serving(call), call
        assert said[chosen(call)] == "chosen"


OPTIONS: tuple[dict[str, Any], ...] = (
    *({"dtype": dtype} for dtype in DTYPES),
    *({"dim": dim, "value_dim": value_dim} for dim, value_dim in {*DIMS["cpu"], *DIMS["cuda"]}),
    *({"batch": batch, "num_queries": queries, "num_keys": keys} for batch, queries, keys in LENGTHS),
    {"num_queries": 5, "num_keys": 9, "causal": False},
    *({"num_heads": heads, "num_kv_heads": kv_heads} for heads, kv_heads in HEADS),
    *({"qk_scale": scale} for scale in SCALES),
    *({"window_left": left, "window_right": right} for left, right in WINDOWS),
    *({name: True} for name in ("has_ids", "has_sinks", "has_positions")),
    {"has_positions": True, "causal": False},
    {"has_positions": True, "causal": False, "window_left": 1},
    {"softcap": 1.5},
    *MODES,
)


def samples(device: str) -> list[Call]:
    """Calls with one option each, and a hundred of the grid, half of them such that ``flash`` serves."""
    generator = random.Random(1)
    served = [call for call in grid(device) if "flash" in serving(call)]
    alone = [base_call(device).with_(**option) for option in OPTIONS]
    return alone + generator.sample(grid(device), 50) + generator.sample(served, min(50, len(served)))


@pytest.mark.parametrize("wants_lse", [False, True])
@pytest.mark.parametrize("backend", [*ORDER, "auto", "triton", "xla"])
def test_backend_computes_or_raises_as_the_table_says(backend: str, wants_lse: bool, device: str) -> None:
    for call in samples(device):
        call = call.with_(wants_lse=wants_lse)
        function = selfattn.multihead_attention_lse if wants_lse else selfattn.multihead_attention
        if not must_serve(backend, call):
            with pytest.raises(NotImplementedError, match=r"^selfattn: backend '\w+' cannot serve this call: \w"):
                ask(call, function, backend=backend)
            continue
        answer = ask(call, function, backend=backend)
        out = answer[0] if wants_lse else answer
        assert out.shape[-4:] == (call.batch, call.num_queries, call.num_heads, call.value_dim), call
        assert out.dtype == call.dtype, call


@pytest.mark.parametrize("backend", ["flash", "reference", "auto"])
def test_backend_computes_under_vmap(backend: str, device: str) -> None:
    """Every sample, mapped over three."""
    for call in samples(device):
        if call.transform is None and not call.has_tangent and must_serve(backend, call.with_(transform="vmap")):
            ask(call.with_(transform="vmap"), selfattn.multihead_attention, backend=backend)


def test_refusal_gives_the_reasons_of_the_explanation(device: str) -> None:
    for call in samples(device):
        said = verdicts(ask(call, selfattn.explain_backend))
        for backend in set(ORDER) - set(serving(call)):
            with pytest.raises(NotImplementedError) as raised:
                ask(call, selfattn.multihead_attention, backend=backend)
            assert str(raised.value).splitlines()[0] == f"selfattn: backend '{backend}' {said[backend]}"


def attention_of(q: Tensor, k: Tensor, v: Tensor, ids: dict, sinks: Tensor | None, options: dict) -> None:
    OPS.flash_attention(q, k, v, **ids, **options, sinks=sinks)


def attention_backward_of(q: Tensor, k: Tensor, v: Tensor, ids: dict, sinks: Tensor | None, options: dict) -> None:
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[0], q.shape[2], q.shape[1]).float()
    OPS.flash_attention_backward(out, None, q, k, v, out, lse, **ids, **options)


def norm_rope_attention_of(q: Tensor, k: Tensor, v: Tensor, ids: dict, sinks: Tensor | None, options: dict) -> None:
    ids = {name: tensor for name, tensor in ids.items() if name == "segment_ids"}
    OPS.qk_norm_rope_attention(q, k, v, **ids, **options, sinks=sinks)


def norm_rope_attention_backward_of(
    q: Tensor, k: Tensor, v: Tensor, ids: dict, sinks: Tensor | None, options: dict
) -> None:
    ids = {name: tensor for name, tensor in ids.items() if name == "segment_ids"}
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[0], q.shape[2], q.shape[1]).float()
    OPS.qk_norm_rope_attention_backward(out, None, q, k, v, out, lse, **ids, **options)


@pytest.mark.parametrize(
    "operator",
    [attention_of, attention_backward_of, norm_rope_attention_of, norm_rope_attention_backward_of],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("where", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operators_below_flash_refuse_what_flash_refuses(operator, where: str) -> None:
    """By dtype, head dimensions and options. (Empty tensors they take: their results are empty or zero.)"""
    for call in samples(where):
        joins_norm = operator in (norm_rope_attention_of, norm_rope_attention_backward_of)
        if FEATURES["empty tensors"](call) or call.transform is not None or call.has_tangent:
            continue
        if joins_norm and (call.dim % 2 != 0 or call.num_queries != call.num_keys or call.has_positions):
            continue
        call = call.with_(requires_grad=False)
        tensors = tensors_of(call)
        q, k, v = (tensors.pop(name) for name in "qkv")
        arguments = (q, k, v, {name: tensors[name] for name in tensors if name != "sinks"}, tensors.get("sinks"))
        if must_serve("flash", call):
            operator(*arguments, options_of(call))
            continue
        with pytest.raises(NotImplementedError, match=r"^selfattn: .*cannot serve this call: \w"):
            operator(*arguments, options_of(call))


def test_facts_of_a_call_are_read_from_its_arguments(device: str) -> None:
    for call in samples(device):
        if call.transform is None and not call.has_tangent:
            with determinism(call.is_deterministic):
                found = describe(**tensors_of(call), **options_of(call), wants_lse=call.wants_lse)
            assert found == call


def test_every_feature_and_limit_of_the_table_is_tried() -> None:
    """Of those that rule a backend out on a GPU, too: the calls are built without one."""
    for device in ("cpu", "cuda"):
        calls = [Call(device=device).with_(**option) for option in OPTIONS]
        calls += [call.with_(wants_lse=True) for call in calls]
        for name, has in FEATURES.items():
            assert any(has(call) for call in calls) or "tokens" in name, name  # long rows have a test of their own
        for backend in ORDER[:-1]:
            found = {must_serve(backend, call) for call in calls}
            assert found == {True, False} or (backend, device) == ("cudnn", "cpu")


def test_document_shows_the_table() -> None:
    text = SEMANTICS.read_text()
    assert render() in text, "docs/semantics.md must hold what serving_table.render() gives:\n" + render()
