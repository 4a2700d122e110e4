"""Promise: a bad argument of the operators over a cache raises the right kind of error, with the argument's name; so
does a value out of range on the CPU, eager and compiled alike, and before anything is written."""

import pytest
import torch

import selfattn

GOOD = {
    "q": torch.zeros(2, 3, 4, 8),
    "k_cache": torch.zeros(6, 4, 2, 8),
    "v_cache": torch.zeros(6, 4, 2, 8),
    "lengths": torch.tensor([3, 8]),
    "page_table": torch.tensor([[0, 1], [2, 3]]),
}
IDS = torch.zeros(2, 3, dtype=torch.int32)
BAD = {
    "q_rank": ({"q": torch.zeros(2, 4, 8)}, ValueError, "q"),
    "q_dtype": ({"q": GOOD["q"].double()}, TypeError, "q"),
    "q_head_dim": ({"q": torch.zeros(2, 3, 4, 16)}, ValueError, "q"),
    "q_heads": ({"q": torch.zeros(2, 3, 3, 8)}, ValueError, "heads of q"),
    "q_device": ({"q": GOOD["q"].to("meta")}, TypeError, "q"),
    "k_cache_rank": ({"k_cache": torch.zeros(24, 2, 8)}, ValueError, "k_cache"),
    "k_cache_dtype": ({"k_cache": GOOD["k_cache"].int()}, TypeError, "k_cache"),
    "k_cache_no_slots": (
        {"k_cache": torch.zeros(6, 0, 2, 8), "v_cache": torch.zeros(6, 0, 2, 8)}, ValueError, "k_cache",
    ),
    "v_cache_pages": ({"v_cache": torch.zeros(5, 4, 2, 8)}, ValueError, "v_cache"),
    "v_cache_dtype": ({"v_cache": GOOD["v_cache"].bfloat16()}, TypeError, "v_cache"),
    "lengths_dtype": ({"lengths": torch.tensor([3.0, 8.0])}, TypeError, "lengths"),
    "lengths_rank": ({"lengths": torch.tensor([[3, 8]])}, ValueError, "lengths"),
    "lengths_rows": ({"lengths": torch.tensor([3, 8, 1])}, ValueError, "lengths"),
    "page_table_rank": ({"page_table": torch.tensor([0, 1])}, ValueError, "page_table"),
    "page_table_rows": ({"page_table": torch.tensor([[0, 1]])}, ValueError, "page_table"),
    "page_table_dtype": ({"page_table": torch.zeros(2, 2)}, TypeError, "page_table"),
    "no_page_table": ({"page_table": None}, ValueError, "k_cache must have one page a row without page_table"),
    "ids_shape": ({"segment_ids": IDS[:, :2]}, ValueError, "segment_ids"),
    "ids_dtype": ({"segment_ids": IDS.float()}, TypeError, "segment_ids"),
    "positions_shape": ({"positions": IDS[:1]}, ValueError, "positions"),
    "sinks_shape": ({"sinks": torch.zeros(2)}, ValueError, "sinks"),
    "draft_mask_dtype": ({"draft_mask": torch.ones(2, 3, 3)}, TypeError, "draft_mask"),
    "draft_mask_shape": ({"draft_mask": torch.ones(2, 3, 4, dtype=torch.bool)}, ValueError, "draft_mask"),
    "draft_mask_ids": (
        {"draft_mask": torch.ones(2, 3, 3, dtype=torch.bool), "segment_ids": IDS}, ValueError, "draft_mask",
    ),
    "draft_mask_length": (
        {"q": torch.zeros(2, 33, 4, 8), "draft_mask": torch.ones(2, 33, 33, dtype=torch.bool)},
        ValueError,
        "draft_mask",
    ),
    "split_keys": ({"split_keys": 100}, ValueError, "split_keys"),
    "split_keys_negative": ({"split_keys": -64}, ValueError, "split_keys"),
    "window_left": ({"window_left": -2}, ValueError, "window_left"),
    "qk_scale": ({"qk_scale": float("nan")}, ValueError, "qk_scale"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap"),
    "backend": ({"backend": "fastest"}, ValueError, "backend"),
}  # fmt: skip
VALUES = {
    "length_negative": ({"lengths": torch.tensor([-1, 8])}, "lengths"),
    "length_over_capacity": ({"lengths": torch.tensor([3, 9])}, "lengths"),
    "id_no_row": ({"segment_ids": IDS + 2}, "segment_ids"),
    "page_negative": ({"page_table": torch.tensor([[0, 1], [2, -1]])}, "page_table"),
    "page_too_large": ({"page_table": torch.tensor([[6, 1], [2, 3]])}, "page_table"),
    "position_too_large": ({"positions": IDS.long() + 2**31}, "positions"),
}
FUNCTIONS = (
    selfattn.attention_with_kv_cache,
    selfattn.attention_with_kv_cache_lse,
    selfattn.explain_kv_cache_backend,
)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("changes", "kind", "name"), BAD.values(), ids=BAD.keys())
def test_bad_argument_is_named(changes: dict, kind: type[Exception], name: str, function) -> None:
    with pytest.raises(kind, match=rf"^selfattn: (the )?{name}"):
        function(**(GOOD | changes))


@pytest.mark.parametrize("backend", ("reference", "aten", "auto"))
@pytest.mark.parametrize(("changes", "name"), VALUES.values(), ids=VALUES.keys())
def test_value_out_of_range_is_named(changes: dict, name: str, backend: str) -> None:
    with pytest.raises(ValueError, match=rf"^selfattn: {name} must hold"):
        selfattn.attention_with_kv_cache(**(GOOD | changes), backend=backend)


@pytest.mark.parametrize(("changes", "name"), VALUES.values(), ids=VALUES.keys())
def test_compiled_calls_keep_the_checks(changes: dict, name: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(selfattn.attention_with_kv_cache, backend="aot_eager", fullgraph=True)
    compiled(**GOOD)
    with pytest.raises(ValueError, match=rf"selfattn: {name} must hold"):
        compiled(**(GOOD | changes))


@pytest.mark.parametrize("options", [{"causal": False}, {"causal": False, "window_left": 2}], ids=str)
def test_lengths_are_checked_where_positions_matter_little(options: dict) -> None:
    with pytest.raises(ValueError, match=r"^selfattn: lengths must hold"):
        selfattn.attention_with_kv_cache(**(GOOD | {"lengths": torch.tensor([3, 9])}), **options)


# ---------------------------------------------------------------- writing

TOKENS = {
    "k": torch.ones(2, 3, 2, 8),
    "v": torch.ones(2, 3, 2, 8),
    "positions": torch.tensor([[0, 1, 2], [5, 6, 7]]),
    "k_cache": GOOD["k_cache"],
    "v_cache": GOOD["v_cache"],
    "page_table": GOOD["page_table"],
}
BAD_TOKENS = {
    "k_rank": ({"k": torch.ones(2, 3, 16)}, ValueError, "k"),
    "k_dtype": ({"k": TOKENS["k"].double()}, TypeError, "k"),
    "k_heads": ({"k": torch.ones(2, 3, 4, 8)}, ValueError, "k"),
    "v_length": ({"v": torch.ones(2, 2, 2, 8)}, ValueError, "v"),
    "v_dim": ({"v": torch.ones(2, 3, 2, 4)}, ValueError, "v"),
    "positions_dtype": ({"positions": TOKENS["positions"].float()}, TypeError, "positions"),
    "positions_shape": ({"positions": TOKENS["positions"][0]}, ValueError, "positions"),
    "page_table_rows": ({"page_table": GOOD["page_table"][:1]}, ValueError, "page_table"),
    "no_page_table": ({"page_table": None}, ValueError, "k_cache"),
    "ids_shape": ({"segment_ids": IDS[0]}, ValueError, "segment_ids"),
    "k_cache_dtype": ({"k_cache": GOOD["k_cache"].double()}, TypeError, "v_cache"),
}
BAD_PLACES = {
    "position_negative": ({"positions": torch.tensor([[0, 1, 2], [5, 6, -1]])}, "positions"),
    "position_over_capacity": ({"positions": torch.tensor([[0, 1, 2], [5, 6, 8]])}, "positions"),
    "page_missing": ({"page_table": torch.tensor([[0, 1], [2, -1]])}, "page_table"),
    "page_too_large": ({"page_table": torch.tensor([[0, 1], [2, 6]])}, "page_table"),
    "id_no_row": ({"segment_ids": IDS + 2}, "segment_ids"),
}


@pytest.mark.parametrize("operator", ("append_kv_cache", "qk_norm_rope_append"))
@pytest.mark.parametrize(("changes", "kind", "name"), BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_bad_token_is_named(changes: dict, kind: type[Exception], name: str, operator: str) -> None:
    query = {} if operator == "append_kv_cache" else {"q": torch.zeros(2, 3, 4, 8)}
    with pytest.raises(kind, match=rf"^selfattn: {name}"):
        getattr(selfattn, operator)(**(TOKENS | query | changes))


@pytest.mark.parametrize("operator", ("append_kv_cache", "qk_norm_rope_append"))
@pytest.mark.parametrize(("changes", "name"), BAD_PLACES.values(), ids=BAD_PLACES.keys())
def test_nothing_is_written_where_a_place_is_bad(changes: dict, name: str, operator: str) -> None:
    caches = {name: torch.zeros_like(GOOD[name]) for name in ("k_cache", "v_cache")}
    query = {} if operator == "append_kv_cache" else {"q": torch.zeros(2, 3, 4, 8)}
    with pytest.raises(ValueError, match=rf"^selfattn: {name} must hold"):
        getattr(selfattn, operator)(**(TOKENS | caches | query | changes))
    assert all((cache == 0).all() for cache in caches.values())


@pytest.mark.parametrize("name", ("k", "v", "k_cache", "v_cache"))
def test_a_wanted_gradient_is_refused(name: str) -> None:
    call = TOKENS | {key: TOKENS[key].clone() for key in ("k_cache", "v_cache")}
    call[name] = call[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=rf"^selfattn: {name} must not require a gradient, .*torch\.no_grad\(\)"):
        selfattn.append_kv_cache(**call)
    with torch.no_grad():
        selfattn.append_kv_cache(**call)
    assert (call["k_cache"][0, 0] == 1).all()


def test_positions_name_their_arguments() -> None:
    lengths = torch.tensor([3, 4])
    for arguments, kind, name in (
        ((lengths.float(), None, 1, 8), TypeError, "lengths"),
        ((lengths[None], None, 1, 8), ValueError, "lengths"),
        ((lengths, IDS, 2, 8), ValueError, "segment_ids"),
        ((lengths, None, -1, 8), ValueError, "{tokens}"),
        ((lengths, None, 3, 8, IDS[:1]), ValueError, "positions"),
        ((lengths, None, 3, 3), ValueError, "lengths must hold"),
        ((lengths, IDS + 2, 3, 8), ValueError, "segment_ids must hold"),
        ((lengths, IDS, 3, 16, IDS.long() + 2**31), ValueError, "positions must hold"),
    ):
        for operator, tokens in (
            (selfattn.kv_cache_positions, "num_queries"),
            (torch.ops.selfattn.positions_of_append, "num_tokens"),
        ):
            with pytest.raises(kind, match=rf"^selfattn: {name.format(tokens=tokens)}"):
                operator(*arguments)
    with pytest.raises(ValueError, match=r"^selfattn: lengths must hold"):  # after the call
        torch.ops.selfattn.positions_of_append(lengths, None, 5, 8)
    with pytest.raises(ValueError, match=r"^selfattn: num_tokens"):
        selfattn.lengths_after_append(lengths, None, -1)
