"""CUDA flash: what a query may not attend to has no influence on out, lse, dq, dk and dv, whatever bits stand there."""

from dataclasses import replace

import pytest
import torch
from support.problems import Problem, allowed_pairs, long, make_ids
from torch import Tensor

pytestmark = pytest.mark.gpu

POISONED = ("q", "k", "v", "grad_out", "all")
VALUES = {"nan": float("nan"), "inf": float("inf"), "minus_inf": -float("inf")}

# Of each form of the kernels: short rows take the split backward, long ones the fused one, D 256 always; the last two
# leave the choice to the device.
PROBLEMS = {
    **{
        f"short_{ids}_d{dim}{'' if causal else '_full'}": Problem(ids=ids, dim=dim, causal=causal)
        for ids in ("packed_padded", "random", "blocks", "one_row_general", "distinct")
        for dim in (64, 128, 256)
        for causal in (True, False)
    },
    **{f"dense_d{dim}": Problem(dim=dim) for dim in (40, 64, 96, 128, 192, 256)},
    "values_narrower": Problem(dim=192, value_dim=128, ids="packed_padded"),
    "fp16": Problem(dtype=torch.float16, ids="packed_padded"),
    "grad_lse": Problem(has_grad_lse=True, ids="packed_padded"),
    "window": Problem(window_left=30, window_right=20, causal=False),
    "window_ids": Problem(window_left=40, ids="packed_padded"),
    "one_key_head": Problem(num_heads=8, num_kv_heads=1, ids="packed_padded"),
    "separate": Problem(ids="separate", num_queries=200, num_keys=333, causal=False),
    "fewer_queries": Problem(num_queries=100, num_keys=400),
    "more_queries": Problem(num_queries=400, num_keys=100),
    **{
        f"long_{ids}_d{dim}": long(2689, ids=ids, dim=dim)
        for ids in (None, "long_documents", "random", "packed")
        for dim in (64, 128, 256)
    },
    "long_full": long(2600, ids="long_documents", causal=False),
    "long_padded_bnsd": long(2600, ids="packed_padded", layout="bnsd"),
    **{f"either_{ids}": long(1500, batch=4, ids=ids, causal=False) for ids in ("packed", "mostly_long_documents")},
}


def chosen_tokens(problem: Problem, ids: Tensor | None, length: int) -> Tensor:
    """(B, length): tokens of one document, all padding, and (dense) some of the last ones."""
    chosen = torch.zeros(problem.batch, length, dtype=torch.bool, device="cuda")
    if ids is None:
        chosen[:, -3:] = True
        chosen[0, length // 2 : length // 2 + 2] = True
        return chosen
    for row in range(problem.batch):
        chosen[row] = ids[row] == ids[row, torch.randint(length, ()).item()]
    return chosen | (ids < 0)


def run(
    tensors: dict[str, Tensor], grad_lse: Tensor | None, problem: Problem, ids: Tensor | None, key_ids: Tensor | None
):
    """Every result, through autograd."""
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in ("q", "k", "v")}
    out, lse = torch.ops.selfattn.flash_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        ids,
        problem.causal,
        window_left=problem.window_left,
        window_right=problem.window_right,
        kv_segment_ids=key_ids,
    )
    grads = torch.autograd.grad(
        (out, lse) if grad_lse is not None else (out,),
        list(leaves.values()),
        (tensors["grad_out"], grad_lse) if grad_lse is not None else (tensors["grad_out"],),
    )
    return {"out": out.detach(), "lse": lse.detach().transpose(1, 2), "dq": grads[0], "dk": grads[1], "dv": grads[2]}


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("poisoned", POISONED)
@pytest.mark.parametrize("name", PROBLEMS)
def test_isolation_of_the_cuda_kernels(name: str, poisoned: str, value: str, is_deterministic: bool) -> None:
    import selfattn  # noqa: F401

    problem = PROBLEMS[name]
    if is_deterministic and problem.num_queries < 1000 and problem.dim <= 128:
        problem = replace(problem, batch=1)
    value_dim = problem.value_dim or problem.dim
    ids, key_ids = (
        (None, None)
        if problem.ids is None
        else make_ids(problem.ids, problem.batch, problem.num_queries, problem.num_keys)
    )
    ids = None if ids is None else ids.to("cuda", torch.int32)
    key_ids = None if key_ids is None else key_ids.to("cuda", torch.int32)

    def random(length: int, heads: int, dim: int) -> Tensor:
        return torch.randn(problem.batch, length, heads, dim, device="cuda").to(problem.dtype)

    clean = {
        "q": random(problem.num_queries, problem.num_heads, problem.dim),
        "k": random(problem.num_keys, problem.num_kv_heads, problem.dim),
        "v": random(problem.num_keys, problem.num_kv_heads, value_dim),
        "grad_out": random(problem.num_queries, problem.num_heads, value_dim),
    }
    grad_lse = torch.randn(problem.batch, problem.num_heads, problem.num_queries, device="cuda")
    grad_lse = grad_lse if problem.has_grad_lse else None
    query_tokens = chosen_tokens(problem, ids, problem.num_queries)
    key_tokens = query_tokens if problem.num_queries == problem.num_keys and key_ids is None else None
    if key_tokens is None:
        key_tokens = chosen_tokens(problem, ids if key_ids is None else key_ids, problem.num_keys)
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
    try:
        expected = run(clean, grad_lse, problem, ids, key_ids)
        actual = run(poisoned_tensors, grad_lse, problem, ids, key_ids)
    finally:
        torch.use_deterministic_algorithms(False)

    allowed = allowed_pairs(problem, ids, key_ids)[:, 0]  # (B, Sq, Skv)
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
