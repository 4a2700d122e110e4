"""vmap of every operator, and of its gradient alone, equals a loop over the map, and is not one."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from support import reference
from support.problems import error, make_ids, make_positions
from torch import Tensor

import selfattn

SIZE = 3
"""Elements of the map: no other dimension has this length."""
ops = torch.ops.selfattn


@pytest.fixture(autouse=True)
def no_loop_in_silence() -> Iterator[None]:
    """Without a batching rule PyTorch calls an operator once for each element: here torch.func.vmap raises instead, and
    is_grads_batched warns."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    torch._C._debug_only_display_vmap_fallback_warnings(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule")
        yield
    torch._C._debug_only_display_vmap_fallback_warnings(False)
    torch._C._functorch._set_vmap_fallback_enabled(True)


def random(*shape: int, device: str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    # CUDA's kernels know no float32, which on the CPU tells a wrong result from a rounding best.
    return torch.randn(shape).to(device, dtype or (torch.float32 if device == "cpu" else torch.bfloat16))


def inputs(device: str, batch: int = 2, length: int = 6, size: int | None = None) -> dict[str, Tensor]:
    """q, k, v, segment_ids of one call, or of ``size`` calls with the map in front."""
    lead = () if size is None else (size,)
    calls = 1 if size is None else size
    of_heads = {"q": 4, "k": 2, "v": 2}
    named = {name: random(*lead, batch, length, heads, 8, device=device) for name, heads in of_heads.items()}
    ids = make_ids("packed", calls * batch, length).view(*lead, batch, length)
    return named | {"segment_ids": ids.to(device)}


def mapped_at(tensor: Tensor, dim: int | None) -> Tensor:
    """A tensor with the map in front, with it at ``dim`` instead; its first element where ``dim`` is None."""
    return tensor[0] if dim is None else tensor.movedim(0, dim)


def loop(function: Callable, dims: tuple, *tensors: Tensor) -> tuple[Tensor, ...]:
    results = []
    for index in range(SIZE):
        element = [t if d is None else t.select(d, index) for t, d in zip(tensors, dims, strict=True)]
        result = function(*element)
        results.append(result if isinstance(result, tuple) else (result,))
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def check_vmap(function: Callable, dims: tuple, *tensors: Tensor, tolerance: float | None = None) -> None:
    """The results, and the gradients of floating point tensors, of a vmap and of a loop."""
    both = []
    for run in (lambda *t: torch.vmap(function, in_dims=dims)(*t), partial(loop, function, dims)):
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
        results = run(*leaves)
        results = [r for r in (results if isinstance(results, tuple) else (results,)) if r.is_floating_point()]
        torch.manual_seed(1)
        loss = sum((r.float() * torch.randn(r.shape).to(r.device)).sum() for r in results)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else []
        both.append([*results, *(g for g in gradients if g is not None)])
    assert len(both[0]) == len(both[1])
    for actual, expected in zip(*both, strict=True):
        assert error(actual, expected) < (tolerance or (2e-6 if actual.dtype == torch.float32 else 2e-2))


IN_DIMS = [
    (0, 0, 0, 0),
    (1, -1, 2, 1),
    (0, None, None, None),
    (None, 0, None, None),
    (None, None, -1, None),
    (None, None, None, 0),
    (None, None, None, -1),
    (2, 1, None, None),
]


@pytest.mark.parametrize("backend", ["flash", "auto", "reference"])
@pytest.mark.parametrize("dims", IN_DIMS, ids=str)
def test_attention_over_any_dimension_of_any_tensor(dims: tuple, backend: str, device: str) -> None:
    tensors = [mapped_at(t, d) for t, d in zip(inputs(device, size=SIZE).values(), dims, strict=True)]
    check_vmap(partial(selfattn.multihead_attention, backend=backend), dims, *tensors)
    check_vmap(partial(selfattn.multihead_attention_lse, backend=backend), dims, *tensors)


@pytest.mark.parametrize("ids_dim", [0, None])
def test_attention_equals_float64(ids_dim: int | None, device: str) -> None:
    many = inputs(device, size=SIZE)
    ids = mapped_at(many.pop("segment_ids"), ids_dim)
    leaves = [t.requires_grad_() for t in many.values()]
    out = torch.vmap(partial(selfattn.multihead_attention, backend="flash"), (0, 0, 0, ids_dim))(*leaves, ids)
    found = torch.autograd.grad(out.float().square().sum(), leaves)
    doubles = [t.detach().cpu().double().requires_grad_() for t in leaves]
    exact = torch.stack(
        [
            reference.attention(*(t[i] for t in doubles), (ids if ids_dim is None else ids[i]).cpu())[0]
            for i in range(SIZE)
        ]
    )
    wanted = torch.autograd.grad(exact.square().sum(), doubles)
    for actual, expected in zip([out, *found], [exact, *wanted], strict=True):
        assert error(actual, expected) < (2e-6 if device == "cpu" else 2e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False, "window_left": 2, "window_right": 1},
        {"softcap": 1.5},
        {"qk_scale": 0.3, "causal": False},
    ],
    ids=str,
)
def test_options_reach_every_element(options: dict, device: str) -> None:
    if device == "cuda" and "softcap" in options:
        options = options | {"backend": "reference"}
    tensors = inputs(device, size=SIZE)
    check_vmap(partial(selfattn.multihead_attention_lse, **options), (0, 0, 0, 0), *tensors.values())


@pytest.mark.parametrize("kv_dim", [0, None])
def test_ids_of_keys_of_their_own(kv_dim: int | None, device: str) -> None:
    tensors = list(inputs(device, size=SIZE).values())
    tensors[0], tensors[3] = tensors[0][:, :, :4], tensors[3][:, :, :4]  # fewer queries than keys
    kv_ids = mapped_at(make_ids("shuffled", SIZE * 2, 6).view(SIZE, 2, 6).to(device), kv_dim)

    def function(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, kv_ids: Tensor) -> tuple[Tensor, Tensor]:
        return selfattn.multihead_attention_lse(q, k, v, ids, kv_segment_ids=kv_ids, backend="flash")

    check_vmap(function, (0, 0, 0, 0, kv_dim), *tensors, kv_ids)


@pytest.mark.parametrize("backend", ["auto", "flash", "reference"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kv_dim", [0, 1, None])
@pytest.mark.parametrize("dim", [0, -1, None])
def test_positions_of_each_element(
    dim: int | None, kv_dim: int | None, dtype: torch.dtype, backend: str, device: str
) -> None:
    if device == "cuda" and backend == "flash":
        backend = "reference"  # by the serving table flash takes no positions there
    q, k, v, _ = inputs(device, size=SIZE).values()
    both = make_positions("any", SIZE * 2, 4, 6)
    of_queries, of_keys = (p.view(SIZE, 2, -1).to(device, dtype) for p in both)

    def function(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, kv_positions: Tensor) -> tuple[Tensor, Tensor]:
        options = {"positions": positions, "kv_positions": kv_positions, "window_left": 4, "backend": backend}
        return selfattn.multihead_attention_lse(q, k, v, **options)

    dims = (0, 0, None, dim, kv_dim)
    check_vmap(function, dims, q[:, :, :4], k, v[0], mapped_at(of_queries, dim), mapped_at(of_keys, kv_dim))
    only_positions = (None, None, None, dim, kv_dim)
    if dim is not None or kv_dim is not None:
        tensors = q[0, :, :4], k[0], v[0]
        check_vmap(function, only_positions, *tensors, mapped_at(of_queries, dim), mapped_at(of_keys, kv_dim))


def test_positions_of_queries_alone_serve_the_keys_of_each_element(device: str) -> None:
    q, k, v, ids = inputs(device, size=SIZE).values()
    positions = make_positions("permuted", SIZE * 2, 6, 6)[0].view(SIZE, 2, 6).to(device)
    function = lambda q, k, v, ids, p: selfattn.multihead_attention_lse(q, k, v, ids, positions=p)  # noqa: E731
    check_vmap(function, (0, 0, 0, 0, 0), q, k, v, ids, positions)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ids_dim", [0, None])
@pytest.mark.parametrize("sinks_dim", [0, 1, None])
def test_sinks_of_each_element(sinks_dim: int | None, ids_dim: int | None, dtype: torch.dtype, device: str) -> None:
    q, k, v, ids = inputs(device, size=SIZE).values()
    sinks = mapped_at(random(SIZE, 4, device=device, dtype=torch.float32), sinks_dim)

    def function(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return selfattn.multihead_attention_lse(q, k, v, ids, sinks=sinks, backend="flash")

    check_vmap(function, (0, 0, None, ids_dim, sinks_dim), q, k, v[0], mapped_at(ids, ids_dim).to(dtype), sinks)


def test_large_ids_are_refused_inside_a_map() -> None:
    q, k, v, ids = inputs("cpu", size=SIZE).values()
    ids = ids.long()
    ids[1, 0, 0] = 2**40
    with pytest.raises(ValueError, match=r"^selfattn: segment_ids must hold values that fit in int32"):
        torch.vmap(selfattn.multihead_attention)(q, k, v, ids)


def test_large_positions_are_refused_inside_a_map() -> None:
    q, k, v, ids = inputs("cpu", size=SIZE).values()
    positions = ids.long()
    positions[1, 0, 0] = 2**62
    with pytest.raises(ValueError, match=r"^selfattn: positions must hold values that fit in int32"):
        torch.vmap(lambda q, k, v, p: selfattn.multihead_attention(q, k, v, positions=p))(q, k, v, positions)


def test_maps_of_maps(device: str) -> None:
    q, k, v, ids = inputs(device, size=SIZE).values()
    attend = partial(selfattn.multihead_attention, backend="flash")
    per_row = torch.vmap(lambda q, k, v, ids: attend(q[None], k[None], v[None], ids[None])[0])
    check_vmap(per_row, (0, 0, 0, 0), q, k, v, ids)
    # Each level maps another tensor.
    crossed = torch.vmap(torch.vmap(attend, (None, 0, None, None)), (0, None, None, None))(q, k, v[0], ids[0])
    expected = torch.stack([torch.stack([attend(a, b, v[0], ids[0]) for b in k]) for a in q])
    assert error(crossed, expected) < (2e-6 if device == "cpu" else 2e-2)


def test_out_dims_and_chunks(device: str) -> None:
    q, k, v, ids = inputs(device, size=SIZE).values()
    attend = partial(selfattn.multihead_attention, backend="flash")
    expected = loop(attend, (0, 0, 0, 0), q, k, v, ids)[0]
    for options in ({"out_dims": -1}, {"out_dims": 2}, {"chunk_size": 2}, {"randomness": "different"}):
        out = torch.vmap(attend, **options)(q, k, v, ids)
        assert torch.equal(out.movedim(options.get("out_dims", 0), 0), expected)


def test_map_without_elements(device: str) -> None:
    q, k, v, ids = (t.detach().requires_grad_(t.is_floating_point()) for t in inputs(device, size=0).values())
    sinks = torch.zeros(0, 4, device=device, requires_grad=True)
    out, lse = torch.vmap(lambda q, k, v, ids, s: selfattn.multihead_attention_lse(q, k, v, ids, sinks=s))(
        q, k, v, ids, sinks
    )
    assert out.shape == q.shape and lse.shape == (0, 2, 4, 6)
    out.sum().backward()
    assert q.grad.shape == q.shape
    weights = torch.ones(0, 8, device=device)
    rotated, _ = torch.vmap(lambda q, k, w: selfattn.qk_norm_rope(q, k, w, w))(q, k, weights)
    assert rotated.shape == q.shape


def test_bad_arguments_are_named_with_their_own_shapes() -> None:
    q, k, v, _ = inputs("cpu", size=SIZE).values()
    with pytest.raises(ValueError, match=r"^selfattn: k must have the head dimension of q, 8; got 7"):
        torch.vmap(selfattn.multihead_attention)(q, k[..., :7], v)
    with pytest.raises(ValueError, match=r"^selfattn: q must have four dimensions .*; got shape \[6, 4, 8\]"):
        torch.vmap(selfattn.multihead_attention)(q[:, 0], k, v)


def test_autocast_casts_inside_a_map() -> None:
    q, k, v, ids = inputs("cpu", size=SIZE).values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.vmap(selfattn.multihead_attention)(q, k, v, ids)
        expected = loop(selfattn.multihead_attention, (0, 0, 0, 0), q, k, v, ids)[0]
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_explanation_names_what_serves_a_map() -> None:
    texts = []

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        texts.append(selfattn.explain_backend(q, k, v))
        return q

    q, k, v, _ = inputs("cpu", size=SIZE).values()
    torch.vmap(function)(q, k, v)
    torch.vmap(torch.func.grad(lambda q, k, v: function(q, k, v).sum()))(q, k, v)
    assert texts[0].startswith("flash: chosen")
    assert texts[1].startswith("flash: cannot serve this call: a torch.func transform other than vmap")
    assert texts[1].endswith("reference: chosen")


@pytest.mark.parametrize("map_outside", [True, False])
def test_maps_and_derivatives_nest(map_outside: bool, device: str) -> None:
    q, k, v, ids = inputs(device, size=SIZE).values()

    def loss(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        q, k = selfattn.qk_norm_rope(q, k, norm=True)
        return selfattn.multihead_attention(q, k, v, ids).float().square().sum()

    if map_outside:
        found = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v, ids)
    else:
        found = torch.func.grad(lambda *t: torch.vmap(loss)(*t).sum(), argnums=(0, 1, 2))(q, k, v, ids)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    wanted = torch.autograd.grad(sum(loss(*(t[i] for t in leaves), ids[i]) for i in range(SIZE)), leaves)
    for actual, expected in zip(found, wanted, strict=True):
        assert error(actual, expected) < (1e-5 if device == "cpu" else 3e-2)


def test_hessian_equals_second_derivatives() -> None:
    # The gradient of the gradient is a formula of PyTorch's operators, of which is_grads_batched does not know all.
    warnings.filterwarnings("ignore", message=".*batching rule for aten::(masked_fill|matmul)")
    q, k, v, ids = inputs("cpu", batch=1, length=3).values()

    def loss(q: Tensor, backend: str = "auto") -> Tensor:
        return selfattn.multihead_attention(q, k, v, ids, backend=backend).square().sum()

    expected = torch.autograd.functional.hessian(partial(loss, backend="reference"), q)
    assert error(torch.func.hessian(loss)(q), expected) < 1e-5
    assert error(torch.autograd.functional.hessian(loss, q, vectorize=True), expected) < 1e-5


OVER_A_CACHE = (
    "kv_cache_positions",
    "positions_of_append",
    "kv_cache_pages",
    "flash_attention_kv_cache",
    "append_kv_cache",
    "qk_norm_rope_append",
)
"""PyTorch maps what reads a KV cache by a loop of its own, and refuses what writes one: kv_cache/test_vmap.py."""


def test_every_operator_has_a_rule() -> None:
    mapped_by_pytorch = {f"selfattn::{name}" for name in OVER_A_CACHE}
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("selfattn::")]
    assert mapped_by_pytorch <= set(names)
    names = [name for name in names if name not in mapped_by_pytorch]
    has_rule = torch._C._dispatch_has_kernel_for_dispatch_key
    assert len(names) > 15
    assert [name for name in names if not has_rule(name, "FuncTorchBatched")] == []
    # What a backward pass calls, which is_grads_batched maps.
    gradients = [name for name in names if "_backward" in name]
    assert [name for name in gradients if not has_rule(name, "Batched")] == []


# ------------------------------------------------------------------------------------------------ the norm and rotation
@pytest.mark.parametrize("weights_dim", [0, 1, None, "none"])
@pytest.mark.parametrize(
    "angles", ["nothing", "tables", "tables_of_rows", "tables_of_a_part", "positions", "positions_of_rows"]
)
@pytest.mark.parametrize("dims", [(0, 0), (1, None), (None, -1), (None, None)], ids=str)
def test_norm_and_rotation(dims: tuple, angles: str, weights_dim: int | str | None, device: str) -> None:
    many = inputs(device, size=SIZE)
    tensors = [mapped_at(many[name], dim) for name, dim in zip("qk", dims, strict=True)]
    rows = 2 if angles.endswith("of_rows") else 1
    positions = torch.randint(0, 50, (SIZE, rows, 6), device=device)
    for angles_dim in (0, None) if angles != "nothing" else (None,):
        if dims == (None, None) and angles_dim is None and weights_dim in (None, "none"):
            continue  # nothing is mapped
        given, given_dims = list(tensors), list(dims)
        names = []
        if weights_dim != "none":
            weights = 1 + torch.rand(2, SIZE, 8, device=device)
            given += [mapped_at(weights[0], weights_dim), mapped_at(weights[1], weights_dim)]
            given_dims += [weights_dim, weights_dim]
            names += ["q_weight", "k_weight"]
        if angles.startswith("positions"):
            given.append(mapped_at(positions, angles_dim))
            given_dims.append(angles_dim)
            names.append("positions")
        elif angles.startswith("tables"):
            flat = selfattn.precompute_freqs(4 if angles.endswith("of_a_part") else 8, positions.flatten(0, 1))
            given += [mapped_at(t.view(SIZE, rows, 6, -1), angles_dim) for t in flat]
            given_dims += [angles_dim, angles_dim]
            names += ["freqs_sin", "freqs_cos"]

        for tables_want_gradients in (False, True) if angles.startswith("tables") else (False,):

            def function(q: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
                named = dict(zip(names, rest, strict=True))  # noqa: B023
                if not tables_want_gradients:  # noqa: B023
                    named |= {name: t.detach() for name, t in named.items() if name.startswith("freqs")}
                return selfattn.qk_norm_rope(q, k, **named)

            check_vmap(function, tuple(given_dims), *given, tolerance=3e-6 if device == "cpu" else 2e-2)


@pytest.mark.parametrize("angles_dim", [0, None])
def test_rotation_alone(angles_dim: int | None, device: str) -> None:
    q, k, *_ = inputs(device, size=SIZE).values()
    sin, cos = (
        mapped_at(t.view(SIZE, 2, 6, 4), angles_dim)
        for t in selfattn.precompute_freqs(8, torch.randint(0, 50, (SIZE * 2, 6), device=device))
    )
    check_vmap(
        lambda q, k, sin, cos: selfattn.apply_rotary_emb(q, k, sin.detach(), cos.detach(), pairing="half"),
        (0, 0, angles_dim, angles_dim),
        q,
        k,
        sin,
        cos,
    )
    check_vmap(selfattn.apply_rotary_emb, (0, None), q, k[0])


def test_heads_of_other_batches_turn_by_their_own_angles() -> None:
    q, k, positions = random(SIZE, 1, 6, 4, 8), random(2, 6, 2, 8), torch.randint(0, 50, (SIZE, 1, 6))
    weight = 1 + torch.rand(8)

    def function(q: Tensor, k: Tensor, positions: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return selfattn.qk_norm_rope(q, k, weight, weight, positions=positions)

    check_vmap(function, (0, None, 0, None), q, k, positions, weight)


@pytest.mark.parametrize("weights_dim", [0, None])
@pytest.mark.parametrize("positions_dim", [0, None])
@pytest.mark.parametrize("kv_batch", [1, 2])
def test_gradient_of_the_norm_and_rotation_as_an_operator(
    kv_batch: int, positions_dim: int | None, weights_dim: int | None, device: str
) -> None:
    shapes = (1, 6, 4, 8), (kv_batch, 6, 2, 8)
    grads = [random(SIZE, *shape, device=device) for shape in shapes]
    heads = [random(*shape, device=device) for shape in shapes]
    weights = mapped_at(1 + torch.rand(SIZE, 8, device=device), weights_dim)
    positions = mapped_at(torch.randint(0, 50, (SIZE, 1, 6), device=device), positions_dim)

    def function(grad_q: Tensor, grad_k: Tensor, weight: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return ops.qk_norm_rope_backward(grad_q, grad_k, *heads, weight, None, positions=positions)

    def first_three(*tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*tensors)[:3]  # the gradient of a weight that is not there has no elements

    tolerance = 1e-5 if device == "cpu" else 2e-2
    check_vmap(first_three, (0, 0, weights_dim, positions_dim), *grads, weights, positions, tolerance=tolerance)
    with torch.no_grad():  # the kernels, where autograd does not ask for a gradient of the gradient
        found = torch.vmap(first_three, (0, 0, weights_dim, positions_dim))(*grads, weights, positions)
        expected = loop(first_three, (0, 0, weights_dim, positions_dim), *grads, weights, positions)
    for actual, wanted in zip(found, expected, strict=True):
        assert error(actual, wanted) < tolerance


@pytest.mark.parametrize("weights_dim", [0, None])
def test_gradient_of_norm_rotation_and_attention_as_an_operator(weights_dim: int | None, device: str) -> None:
    q, k, v, ids = inputs(device).values()
    weights = mapped_at(1 + torch.rand(SIZE, 8, device=device), weights_dim)
    out, lse = ops.qk_norm_rope_attention(q, k, v, segment_ids=ids)
    grads = random(SIZE, *out.shape, device=device)

    def function(grad: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return ops.qk_norm_rope_attention_backward(grad, None, q, k, v, out, lse, weight, weight, segment_ids=ids)

    found = torch.vmap(function, (0, weights_dim))(grads, weights)
    for actual, wanted in zip(found, loop(function, (0, weights_dim), grads, weights), strict=True):
        assert error(actual, wanted) < (1e-5 if device == "cpu" else 3e-2)


@pytest.mark.parametrize("extra", ["nothing", "sinks", "weights", "both"])
@pytest.mark.parametrize("ids_dim", [0, None])
def test_norm_rotation_and_attention_as_one(ids_dim: int | None, extra: str, device: str) -> None:
    q, k, v, ids = inputs(device, size=SIZE).values()
    weights = 1 + torch.rand(SIZE, 8, device=device)
    sinks = torch.randn(SIZE, 4, device=device)
    sinks_dim, weights_dim = (0 if extra in (name, "both") else None for name in ("sinks", "weights"))

    def function(q: Tensor, k: Tensor, v: Tensor, w: Tensor, ids: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return ops.qk_norm_rope_attention(q, k, v, w, w, segment_ids=ids, sinks=sinks)

    dims = (0, 0, 0, weights_dim, ids_dim, sinks_dim)
    given = [q, k, v, mapped_at(weights, weights_dim), mapped_at(ids, ids_dim), mapped_at(sinks, sinks_dim)]
    check_vmap(function, dims, *given, tolerance=1e-5 if device == "cpu" else 3e-2)


# --------------------------------------------------------------------------------------------------- gradients as a map
def check_batched_gradients(outs: tuple[Tensor, ...], leaves: list[Tensor], tolerance: float) -> None:
    """is_grads_batched, and the same by torch.func.vmap, equal one backward pass an element."""
    grads = [torch.randn(SIZE, *out.shape, device=out.device).to(out.dtype) for out in outs]
    expected = loop(lambda *g: torch.autograd.grad(outs, leaves, g, retain_graph=True), (0,) * len(outs), *grads)
    by_func = torch.vmap(lambda *g: torch.autograd.grad(outs, leaves, g, retain_graph=True))(*grads)
    batched = torch.autograd.grad(outs, leaves, grads, is_grads_batched=True)  # last: the graph ends here
    for actual, again, wanted in zip(batched, by_func, expected, strict=True):
        assert error(actual, wanted) < tolerance
        assert error(again, wanted) < tolerance


@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("has_ids", [True, False])
def test_batched_gradients_of_the_attention(has_ids: bool, has_sinks: bool, device: str) -> None:
    q, k, v, ids = inputs(device).values()
    sinks = torch.randn(4, device=device, requires_grad=True) if has_sinks else None
    leaves = [t.requires_grad_() for t in (q, k, v)]
    outs = selfattn.multihead_attention_lse(
        *leaves, ids if has_ids else None, sinks=sinks, causal=False, backend="flash"
    )
    check_batched_gradients(outs, leaves + [sinks] * has_sinks, 5e-6 if device == "cpu" else 2e-2)


def test_maps_of_maps_of_batched_gradients(device: str) -> None:
    """Their tensors hold every level at once, each its own."""
    vmap = partial(torch._vmap_internals._vmap, allow_none_pass_through=True)
    *tensors, ids = inputs(device).values()
    out, lse = selfattn.multihead_attention_lse(*tensors, ids, backend="flash")
    grads, qs, outer = (random(SIZE, *out.shape, device=device) for _ in range(3))

    def backward(grad: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        return ops.flash_attention_backward(grad, None, q, *tensors[1:], out, lse, ids)

    def one_level(q: Tensor) -> tuple[Tensor, ...]:
        return vmap(lambda grad: backward(grad, q))(grads)

    found = vmap(one_level)(qs), vmap(lambda shift: vmap(lambda grad, q: backward(grad + shift, q))(grads, qs))(outer)
    exact = (
        [[backward(grad, q) for grad in grads] for q in qs],
        [[backward(grad + shift, q) for grad, q in zip(grads, qs, strict=True)] for shift in outer],
    )
    for actual, expected in zip(found, exact, strict=True):
        for index in range(3):
            wanted = torch.stack([torch.stack([each[index] for each in row]) for row in expected])
            assert error(actual[index], wanted) < (2e-6 if device == "cpu" else 2e-2)


@pytest.mark.parametrize("weighted", [True, False])
def test_batched_gradients_of_the_norm_and_rotation(weighted: bool, device: str) -> None:
    q, k, *_ = inputs(device).values()
    weights = [(1 + torch.rand(8, device=device)).requires_grad_() for _ in range(2 * weighted)]
    leaves = [q.requires_grad_(), k.requires_grad_(), *weights]
    check_batched_gradients(selfattn.qk_norm_rope(*leaves), leaves, 5e-6 if device == "cpu" else 2e-2)


CONFIGS = [
    {},
    {"qk_norm": True},
    {"use_bias": True, "num_kv_heads": 2},
    {"qk_norm": True, "sinks": True, "num_kv_heads": 1, "use_bias": True},
    {"sinks": True, "causal": False},
]


def make_layer(device: str, **options) -> selfattn.SelfAttention:
    config = selfattn.SelfAttentionConfig(head_dim=8, **options)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    layer = selfattn.SelfAttention(32, config, device=device, dtype=dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=0.0, std=0.4)
    return layer


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_batched_gradients_of_a_layer(options: dict, device: str) -> None:
    layer = make_layer(device, **options)
    x = random(2, 6, 32, device=device).requires_grad_()
    ids = make_ids("packed", 2, 6).to(device)
    leaves = [x, *layer.parameters()]
    check_batched_gradients((layer(x, segment_ids=ids),), leaves, 2e-5 if device == "cpu" else 6e-2)


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"use_bias": True, "sinks": True}], ids=str)
def test_vectorized_jacobian_of_a_layer(options: dict, device: str) -> None:
    layer = make_layer(device, **options)
    x, ids = random(1, 3, 32, device=device), make_ids("one_document", 1, 3).to(device)

    def function(x: Tensor) -> Tensor:
        return layer(x, segment_ids=ids)

    found = torch.autograd.functional.jacobian(function, x, vectorize=True)
    expected = torch.autograd.functional.jacobian(function, x)
    assert error(found, expected) < (1e-5 if device == "cpu" else 5e-2)


def test_batched_gradients_can_be_differentiated() -> None:
    q, k, v, ids = inputs("cpu").values()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    grads = torch.randn(SIZE, 2, 6, 4, 8)

    def penalty(is_batched: bool) -> Tensor:
        q, k = selfattn.qk_norm_rope(*leaves[:2], torch.full((8,), 1.5), None)
        out = selfattn.multihead_attention(q, k, leaves[2], ids, backend="flash")
        if is_batched:
            first = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, create_graph=True)
            return sum(g.square().sum() for g in first)
        each = [torch.autograd.grad(out, leaves, g, create_graph=True) for g in grads]
        return sum(g.square().sum() for first in each for g in first)

    found, wanted = (torch.autograd.grad(penalty(is_batched), leaves) for is_batched in (True, False))
    for actual, expected in zip(found, wanted, strict=True):
        assert error(actual, expected) < 1e-5


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "num_kv_heads": 2}, {"sinks": True}], ids=str)
def test_an_ensemble_of_layers(options: dict, device: str) -> None:
    layers = [make_layer(device, **options) for _ in range(SIZE)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x, ids = random(2, 6, 32, device=device), make_ids("packed", 2, 6).to(device)

    def function(parameters: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(layers[0], (parameters, buffers), (x, None, ids))

    out = torch.vmap(function, in_dims=(0, None))(parameters, x)
    expected = torch.stack([layer(x, segment_ids=ids) for layer in layers])
    tolerance = 1e-5 if device == "cpu" else 5e-2
    assert error(out, expected) < tolerance
    found = torch.autograd.grad(out.float().square().sum(), list(parameters.values()))
    wanted = torch.autograd.grad(expected.float().square().sum(), [p for layer in layers for p in layer.parameters()])
    for index, actual in enumerate(found):
        assert error(actual, torch.stack(wanted[index :: len(found)])) < tolerance


def test_rows_of_a_layer_as_a_map(device: str) -> None:
    layer = make_layer(device, qk_norm=True, num_kv_heads=2, use_bias=True)
    x, ids = random(SIZE, 6, 32, device=device), make_ids("packed", SIZE, 6).to(device)
    out = torch.vmap(lambda x, ids: layer(x[None], segment_ids=ids[None])[0])(x, ids)
    assert error(out, layer(x, segment_ids=ids)) < (1e-5 if device == "cpu" else 5e-2)


def test_dropout_of_a_layer_asks_for_the_randomness() -> None:
    layer = make_layer("cpu", dropout_rate=0.5)
    x = random(SIZE, 2, 6, 32)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(layer)(x)
    x = x[:1].expand_as(x)
    same, different = (torch.vmap(layer, randomness=kind)(x) for kind in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


# ------------------------------------------------------------------------------------------------------------ the rest
def test_converters_of_segments() -> None:
    ids = make_ids("packed", SIZE * 2, 6).view(SIZE, 2, 6)
    positions = torch.arange(6).expand(SIZE, 2, 6) % torch.tensor([2, 3, 4]).view(SIZE, 1, 1)
    boundaries = torch.tensor([[0, 2, 6], [0, 3, 6], [0, 1, 4]])
    calls = [
        (selfattn.segment_mask, ids),
        (selfattn.segment_ids_from_positions, positions),
        (partial(selfattn.segment_ids_from_cu_seqlens, length=6), boundaries),
        (partial(selfattn.cu_seqlens_from_segment_ids, max_segments=6), ids),
        (lambda rows: selfattn.precompute_freqs(8, rows)[0], positions),
    ]
    for function, many in calls:
        assert torch.equal(torch.vmap(function)(many), torch.stack([function(one) for one in many]))


@pytest.mark.parametrize("name", ["into", "in_place"])
def test_operators_that_write_into_memory_write_into_that_of_the_map(name: str) -> None:
    q, k, v, ids = inputs("cpu", size=SIZE).values()
    if name == "in_place":
        expected = torch.vmap(lambda gq, gk, q, k: ops.qk_norm_rope_backward(gq, gk, q, k))(q, k, q + 1, k + 1)[:2]
        found = (q.clone(), k.clone())
        torch.vmap(lambda gq, gk, q, k: ops.qk_norm_rope_backward.in_place(gq, gk, q, k)[0].sum())(*found, q + 1, k + 1)
    else:
        out, lse = torch.vmap(selfattn.multihead_attention_lse)(q, k, v, ids)
        expected = torch.vmap(lambda g, *t: ops.flash_attention_backward(g, None, *t))(q, q, k, v, out, lse, ids)
        found = tuple(torch.empty_like(t) for t in (q, k, v))

        def function(grad: Tensor, *t: Tensor) -> Tensor:
            ops.flash_attention_backward.into(grad, None, *t[:6], dq=t[6], dk=t[7], dv=t[8])
            return grad

        torch.vmap(function)(q, q, k, v, out, lse, ids, *found)
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_compiled_map_equals_eager(dtype: torch.dtype, dynamic: bool) -> None:
    torch.compiler.reset()
    attend = torch.vmap(lambda q, k, v, ids: selfattn.multihead_attention(*selfattn.qk_norm_rope(q, k), v, ids))
    compiled = torch.compile(attend, backend="aot_eager", dynamic=dynamic)
    for length in (6, 7):
        *tensors, ids = inputs("cpu", length=length, size=SIZE).values()
        results = []
        for function in (attend, compiled):
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = function(*leaves, ids.to(dtype))
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for actual, expected in zip(*results, strict=True):
            assert error(actual, expected) < 1e-5


def test_nodes_have_names_to_read() -> None:
    q, k, v, ids = inputs("cpu").values()
    q.requires_grad_()
    assert "CppNode<selfattn::FlashAttention>" in selfattn.multihead_attention(q, k, v, ids).grad_fn.name()
    assert "CppNode<selfattn::QkNormRope>" in selfattn.qk_norm_rope(q, k)[0].grad_fn.name()
    out, _ = ops.qk_norm_rope_attention(q, k, v)
    assert "CppNode<selfattn::QkNormRopeAttention>" in out.grad_fn.name()
    layer = make_layer("cpu")
    names, nodes = set(), [layer(torch.randn(1, 3, 32)).grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert "torch::autograd::CppNode<selfattn::QueryKeyValueProjections>" in names
    assert not [name for name in names if "anonymous" in name]
