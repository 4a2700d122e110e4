"""CUDA flash: what a query may not attend to has no influence on out, lse, dq, dk and dv, whatever bits stand there."""

import pytest
import torch
from support.cases import CudaCase, long
from torch import Tensor

import selfattn  # noqa: F401

pytestmark = pytest.mark.gpu

POISONED = ("q", "k", "v", "grad_out", "all")
VALUES = {"nan": float("nan"), "inf": float("inf"), "minus_inf": -float("inf"), "huge": 3e38}

# Of each form of the kernels: short rows take the split backward, long ones the fused one, D 256 always; the last two
# leave the choice to the device.
PROBLEMS = {
    **{
        f"short_{ids}_d{dim}{'' if causal else '_full'}": CudaCase(ids=ids, dim=dim, causal=causal)
        for ids in ("padding_around", "shuffled_padding", "blocks", "one_row_reversed", "permuted")
        for dim in (64, 128, 256)
        for causal in (True, False)
    },
    **{f"dense_d{dim}": CudaCase(dim=dim) for dim in (40, 64, 96, 128, 192, 256)},
    "values_narrower": CudaCase(dim=192, value_dim=128, ids="padding_around"),
    **{
        f"float32_{ids}_d{dim}": CudaCase(ids=ids, dim=dim, dtype=torch.float32)
        for ids in (None, "padding_around", "shuffled_padding")
        for dim in (64, 128, 256)
    },
    "float32_softcap": CudaCase(ids="blocks", dtype=torch.float32, softcap=2.0),
    "float32_long": long(2600, ids="long_documents", dim=64, dtype=torch.float32),
    **{
        f"unaligned_{dtype}_{ids}_d{dim}": CudaCase(ids=ids, dim=dim, layout=layout, dtype=getattr(torch, dtype))
        for dtype in ("bfloat16", "float32")
        for ids in (None, "padding_around", "shuffled_padding")
        for dim, layout in ((33, "surrounded"), (99, "bsnd"), (250, "odd"))
    },
    "unaligned_pair": CudaCase(dim=101, value_dim=7, ids="padding_around", softcap=2.0),
    "unaligned_sinks": CudaCase(dim=63, ids="shuffled_padding", has_sinks=True, layout="surrounded_bnsd"),
    "unaligned_long": long(2689, ids="long_documents", dim=99),
    "fp16": CudaCase(dtype=torch.float16, ids="padding_around"),
    "grad_lse": CudaCase(has_grad_lse=True, ids="padding_around"),
    "window": CudaCase(window_left=30, window_right=20, causal=False),
    "window_ids": CudaCase(window_left=40, ids="padding_around"),
    "one_key_head": CudaCase(num_heads=8, num_kv_heads=1, ids="padding_around"),
    "separate": CudaCase(ids="shuffled_padding", has_kv_ids=True, num_queries=200, num_keys=333, causal=False),
    "fewer_queries": CudaCase(num_queries=100, num_keys=400),
    "more_queries": CudaCase(num_queries=400, num_keys=100),
    **{
        f"long_{ids}_d{dim}": long(2689, ids=ids, dim=dim)
        for ids in (None, "long_documents", "shuffled_padding", "documents")
        for dim in (64, 128, 256)
    },
    **{
        f"softcap_short_{ids}_d{dim}": CudaCase(ids=ids, dim=dim, softcap=2.0)
        for ids in (None, "padding_around", "shuffled_padding")
        for dim in (64, 128, 256)
    },
    **{
        f"softcap_{cap:g}_long_{ids}_d{dim}": long(2689, ids=ids, dim=dim, softcap=cap)
        for cap in (2.0, 1e4)  # the second takes the split backward of its own
        for ids in (None, "long_documents", "shuffled_padding")
        for dim in (64, 128, 256)
    },
    "softcap_sinks": CudaCase(ids="padding_around", softcap=2.0, has_sinks=True),
    "long_full": long(2600, ids="long_documents", causal=False),
    "long_padded_bnsd": long(2600, ids="padding_around", layout="bnsd"),
    **{f"either_{ids}": long(1500, batch=4, ids=ids, causal=False) for ids in ("documents", "mostly_long_documents")},
}


def chosen_tokens(problem: CudaCase, ids: Tensor | None, length: int) -> Tensor:
    """(B, length): tokens of one document, all padding, and (dense) some of the last ones."""
    chosen = torch.zeros(problem.batch, length, dtype=torch.bool, device="cuda")
    if ids is None:
        chosen[:, -3:] = True
        chosen[0, length // 2 : length // 2 + 2] = True
        return chosen
    for row in range(problem.batch):
        chosen[row] = ids[row] == ids[row, torch.randint(length, ()).item()]
    return chosen | (ids < 0)


def run(problem: CudaCase, tensors: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every result, through autograd."""
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in ("q", "k", "v")}
    results = torch.ops.selfattn.flash_attention(**{**tensors, **leaves}, **problem.options)
    out, lse = (result.detach() for result in results)
    gradients = torch.autograd.grad(results[: len(grads)], list(leaves.values()), list(grads.values()))
    return {"out": out, "lse": lse.transpose(1, 2), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("value", ("nan", "inf", "minus_inf"))
@pytest.mark.parametrize("poisoned", POISONED)
@pytest.mark.parametrize("name", PROBLEMS)
def test_isolation_of_the_cuda_kernels(name: str, poisoned: str, value: str, is_deterministic: bool) -> None:
    check_isolation(PROBLEMS[name].with_(spread=1.0), poisoned, value, is_deterministic)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("poisoned", POISONED)
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name.startswith("float32")])
def test_isolation_where_products_take_tf32(name: str, poisoned: str, value: str) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        check_isolation(PROBLEMS[name].with_(spread=1.0), poisoned, value, True)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def check_isolation(problem: CudaCase, poisoned: str, value: str, is_deterministic: bool) -> None:
    if is_deterministic and problem.num_queries < 1000 and problem.dim <= 128:
        problem = problem.with_(batch=1)
    tensors, grads = problem.tensors(device="cuda"), problem.grads(device="cuda")
    ids = tensors.get("segment_ids")
    query_tokens = key_tokens = chosen_tokens(problem, ids, problem.num_queries)
    if problem.has_kv_ids or problem.num_queries != problem.num_keys:
        key_tokens = chosen_tokens(problem, tensors.get("kv_segment_ids", ids), problem.num_keys)
    clean = {key: (tensors | grads)[key] for key in ("q", "k", "v", "grad_out")}
    bad = {key: key_tokens if key in ("k", "v") else query_tokens for key in clean}
    bad = {key: tokens if poisoned in (key, "all") else torch.zeros_like(tokens) for key, tokens in bad.items()}
    poisoned_tensors = {key: tensor.clone() for key, tensor in clean.items()}
    for key, tensor in poisoned_tensors.items():
        rows = tensor[bad[key]]  # (tokens, heads, dim): one element or a whole row
        if rows.numel():
            rows[0::2] = VALUES[value]
            rows[1::2, :, torch.randint(rows.shape[-1], ()).item()] = VALUES[value]
            tensor[bad[key]] = rows

    torch.use_deterministic_algorithms(is_deterministic)
    expected = run(problem, tensors, grads)
    poisoned_grad = {"grad_out": poisoned_tensors.pop("grad_out")}
    actual = run(problem, tensors | poisoned_tensors, grads | poisoned_grad)

    allowed = problem.allowed(tensors)[:, 0]  # (B, Sq, Skv)
    bad_key = bad["k"] | bad["v"]
    of_forward = bad["q"] | (allowed & bad_key[:, None]).any(-1)
    of_query = of_forward | bad["grad_out"]
    of_key = (allowed & (of_query[:, :, None] | bad_key[:, None])).any(-2)
    influenced = {"out": of_forward, "lse": of_forward, "dq": of_query, "dk": of_key, "dv": of_key}
    for result, tokens in influenced.items():
        tokens = tokens & (allowed.any(-1) if result in ("out", "lse", "dq") else allowed.any(-2))
        mine, clean_result = actual[result][~tokens].float(), expected[result][~tokens].float()
        if is_deterministic or result in ("out", "lse"):  # bit for bit
            same = mine == clean_result
        else:  # dq is added up in any order
            same = torch.isclose(mine, clean_result, rtol=3e-2, atol=1e-2)
        assert same.all(), f"{result}: {(~same).sum().item()} of {same.numel()} elements were influenced"
    if value == "nan":
        has_nan = actual["out"].isnan().flatten(2).any(-1)
        must = (allowed & (bad["v"] | bad["k"])[:, None]).any(-1) | (bad["q"] & allowed.any(-1))
        assert has_nan[must].all(), "an allowed NaN has to show in out"
        must_grad = (must | bad["grad_out"]) & allowed.any(-1)
        assert actual["dq"].isnan().flatten(2).any(-1)[must_grad].all(), "an allowed NaN has to show in dq"
