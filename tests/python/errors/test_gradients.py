"""The operators of the gradients believe nothing: every tensor that does not fit the call is named, on each device."""

import pytest
import torch
from torch import Tensor

import selfattn  # noqa: F401 - loads the operators

OPS = torch.ops.selfattn
NAMES = ("grad_out", "grad_lse", "q", "k", "v", "out", "lse")


def make_arguments(device: str, dtype: torch.dtype = torch.float32, with_results: bool = False) -> dict[str, Tensor]:
    q, k = torch.randn(2, 6, 4, 8).to(device, dtype), torch.randn(2, 6, 2, 8).to(device, dtype)
    arguments = {"q": q, "k": k, "v": torch.randn(2, 6, 2, 16).to(device, dtype)}
    out, lse = torch.zeros(2, 6, 4, 16).to(device, dtype), torch.zeros(2, 4, 6, device=device)
    arguments |= {"out": out, "lse": lse, "grad_out": torch.randn(2, 6, 4, 16).to(device, dtype), "grad_lse": lse + 1}
    if with_results:
        arguments |= {f"d{name}": torch.empty_like(arguments[name]) for name in "qkv"}
    return arguments


def spoil(tensor: Tensor, how: str) -> Tensor:
    if how == "shorter":
        return tensor[:1]
    if how == "transposed":
        return tensor.transpose(1, 2).contiguous()
    if how == "flat":
        return tensor.flatten()
    if how == "empty":
        return tensor[..., :0]
    if how == "float64":
        return tensor.double()
    assert how == "other_device"
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu" if tensor.is_meta else "meta")


@pytest.fixture(params=["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


@pytest.mark.parametrize("how", ["shorter", "transposed", "flat", "empty", "float64", "other_device"])
@pytest.mark.parametrize("bad", ["grad_out", "grad_lse", "out", "lse"])
def test_bad_gradient_is_named(bad: str, how: str, device: str) -> None:
    for name in ("flash_attention_backward", "flash_attention_backward.into"):
        arguments = make_arguments(device, dtype_of(device), with_results=name.endswith("into"))
        arguments[bad] = spoil(arguments[bad], how)
        error = TypeError if how in ("float64", "other_device") else ValueError
        operator = OPS.flash_attention_backward
        with pytest.raises(error, match=rf"^selfattn: {bad} must "):
            (operator.into if name.endswith("into") else operator.default)(**arguments)


@pytest.mark.parametrize("how", ["shorter", "transposed", "flat", "empty", "float64", "other_device"])
@pytest.mark.parametrize("bad", ["grad_out", "grad_lse", "out", "lse"])
def test_bad_gradient_of_norm_rope_and_attention_is_named(bad: str, how: str, device: str) -> None:
    arguments = make_arguments(device, dtype_of(device))
    arguments[bad] = spoil(arguments[bad], how)
    with pytest.raises(
        TypeError if how in ("float64", "other_device") else ValueError, match=rf"^selfattn: {bad} must "
    ):
        OPS.qk_norm_rope_attention_backward(**arguments)


@pytest.mark.parametrize("bad", ["grad_out", "grad_lse", "out", "lse"])
def test_bad_gradient_is_named_where_it_is_differentiated_again(bad: str) -> None:
    arguments = make_arguments("cpu")
    arguments["q"].requires_grad_()
    arguments[bad] = arguments[bad][:1]
    with pytest.raises(ValueError, match=rf"^selfattn: {bad} must "):
        OPS.flash_attention_backward(**arguments)


@pytest.mark.parametrize("how", ["shorter", "flat", "float64", "other_device", "strided"])
@pytest.mark.parametrize("bad", ["dq", "dk", "dv"])
def test_bad_memory_for_a_gradient_is_named(bad: str, how: str, device: str) -> None:
    arguments = make_arguments(device, dtype_of(device), with_results=True)
    result = arguments[bad]
    arguments[bad] = torch.stack([result, result], -1)[..., 0] if how == "strided" else spoil(result, how)
    with pytest.raises(
        TypeError if how in ("float64", "other_device") else ValueError, match=rf"^selfattn: {bad} must "
    ):
        OPS.flash_attention_backward.into(**arguments)


@pytest.mark.parametrize(
    ("result", "other"), [("dq", "q"), ("dq", "grad_out"), ("dk", "v"), ("dv", "out"), ("dv", "dk"), ("dk", "dq")]
)
def test_memory_that_is_still_read_is_named(result: str, other: str) -> None:
    shape = (2, 6, 4, 8)
    arguments = {name: torch.randn(shape) for name in ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv")}
    arguments |= {"lse": torch.zeros(2, 4, 6), "grad_lse": None, result: arguments[other]}
    with pytest.raises(ValueError, match=rf"^selfattn: d[qkv] must not share memory with {other}|with {result}"):
        OPS.flash_attention_backward.into(**arguments)


def test_memory_that_is_read_in_part_is_named() -> None:
    arguments = {name: torch.randn(2, 6, 4, 8) for name in ("q", "k", "v", "out", "grad_out", "dk", "dv")}
    memory = torch.randn(2 * 6 * 4 * 8 + 8)
    arguments |= {"out": memory[:-8].view(2, 6, 4, 8), "dq": memory[8:].view(2, 6, 4, 8)}
    with pytest.raises(ValueError, match=r"^selfattn: dq must not share memory with out but be all of it"):
        OPS.flash_attention_backward.into(lse=torch.zeros(2, 4, 6), grad_lse=None, **arguments)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("takes_memory", [False, True])
def test_gradient_into_memory_is_the_gradient(takes_memory: bool, device: str) -> None:
    dtype = dtype_of(device)
    q, k, v, grad = (torch.randn(2, 6, 4, 8).to(device, dtype) for _ in range(4))
    out, lse = OPS.flash_attention(q, k, v)
    expected = OPS.flash_attention_backward(grad, None, q, k, v, out, lse)
    results = (out, k, v) if takes_memory else tuple(torch.full_like(x, torch.nan) for x in (q, k, v))
    versions = [result._version for result in results]
    assert OPS.flash_attention_backward.into(grad, None, q, k, v, out, lse, dq=results[0], dk=results[1], dv=results[2]) is None  # fmt: skip  # noqa: E501
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)
    assert all(result._version > before for result, before in zip(results, versions, strict=True))


def anywhere(tensor: Tensor, offset: int) -> Tensor:
    """A contiguous copy that starts that many elements into its memory; what lies around it is 7."""
    memory = torch.full((tensor.numel() + 2 * offset,), 7.0, dtype=tensor.dtype, device=tensor.device)
    return memory[offset : offset + tensor.numel()].view_as(tensor).copy_(tensor)


def surroundings(tensor: Tensor) -> Tensor:
    offset, memory = tensor.storage_offset(), tensor._base
    return torch.cat([memory[:offset], memory[offset + tensor.numel() :]])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_scale", [None, -0.3])
@pytest.mark.parametrize("takes_memory", [False, True])
@pytest.mark.parametrize("offset", [1, 3, 4, 8])
def test_gradient_goes_into_memory_that_starts_anywhere(
    offset: int, takes_memory: bool, qk_scale: float | None, dtype: torch.dtype, device: str
) -> None:
    torch.use_deterministic_algorithms(True)
    for dim in (8, 64, 128, 136):
        q, k, v, grad = (torch.randn(2, 70, n, dim).to(device, dtype) for n in (4, 2, 2, 4))
        out, lse = OPS.flash_attention(q, k, v, qk_scale=qk_scale)
        expected = OPS.flash_attention_backward(grad, None, q, k, v, out, lse, qk_scale=qk_scale)
        results = [anywhere(x if takes_memory else torch.full_like(x, torch.nan), offset) for x in (out, k, v)]
        if takes_memory:
            out, k, v = results
        named = dict(zip(("dq", "dk", "dv"), results, strict=True))
        OPS.flash_attention_backward.into(grad, None, q, k, v, out, lse, qk_scale=qk_scale, **named)
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted)
            assert (surroundings(result) == 7).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("offset", [1, 3, 4, 8])
def test_norm_rope_gradient_goes_over_memory_that_starts_anywhere(
    offset: int, norm: bool, dtype: torch.dtype, device: str
) -> None:
    for dim in (24, 64, 128):
        q, k, grad_q, grad_k = (torch.randn(2, 9, n, dim).to(device, dtype) for n in (4, 2, 4, 2))
        heads = (q, k, *torch.rand(2, dim, device=device).unbind()) if norm else (None,) * 4
        expected = OPS.qk_norm_rope_backward(grad_q, grad_k, *heads, norm=norm)
        found = anywhere(grad_q, offset), anywhere(grad_k, offset)
        weights = OPS.qk_norm_rope_backward.in_place(*found, *heads, norm=norm)
        for mine, wanted in zip((*found, *weights), expected, strict=True):
            assert torch.equal(mine, wanted)
        assert all((surroundings(mine) == 7).all() for mine in found)


@pytest.mark.parametrize("operator", ["flash_attention_backward.into", "qk_norm_rope_backward.in_place"])
def test_operator_that_writes_into_memory_refuses_a_gradient(operator: str) -> None:
    if operator.startswith("flash"):
        call, arguments = OPS.flash_attention_backward.into, make_arguments("cpu", with_results=True)
    else:
        call = OPS.qk_norm_rope_backward.in_place
        arguments = {name: torch.randn(2, 6, 4, 8) for name in ("grad_q", "grad_k", "q", "k")}
    arguments["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"^selfattn: q must not require a gradient.*is not differentiable"):
        call(**arguments)
    with torch.no_grad():
        call(**arguments)


def test_strides_of_a_gradient_do_not_matter() -> None:
    arguments = make_arguments("cpu")
    arguments["grad_out"] = arguments["grad_out"][:1, :1].expand(2, 6, 4, 16)
    expected = OPS.flash_attention_backward(**arguments | {"grad_out": arguments["grad_out"].contiguous()})
    strided = arguments["grad_out"].transpose(0, 3).contiguous().transpose(0, 3)
    for grad_out in (arguments["grad_out"], strided):
        for result, wanted in zip(
            OPS.flash_attention_backward(**arguments | {"grad_out": grad_out}), expected, strict=True
        ):
            torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 8), (torch.float32, 520)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operator_holds_to_the_constraints_of_its_backend(dtype: torch.dtype, dim: int, device: str) -> None:
    q = torch.randn(1, 4, 2, dim, dtype=dtype, device=device)
    lse = torch.zeros(1, 2, 4, device=device)
    with pytest.raises(NotImplementedError, match=r"^selfattn: flash_attention cannot serve this call: .*(Double|520)"):
        OPS.flash_attention(q, q, q)
    with pytest.raises(NotImplementedError, match=r"^selfattn: flash_attention cannot serve this call: .*(Double|520)"):
        OPS.flash_attention_backward(q, None, q, q, q, q, lse)
