"""Every bad argument of the attention operators raises the right kind of error, with the argument's name."""

import pytest
import torch

import selfattn

ARGUMENTS = {
    "q": torch.zeros(2, 6, 4, 8),
    "k": torch.zeros(2, 6, 2, 8),
    "v": torch.zeros(2, 6, 2, 8),
    "segment_ids": torch.zeros(2, 6, dtype=torch.int32),
}
IDS = ARGUMENTS["segment_ids"]

BAD = {
    # name of the test: (changed arguments, kind of error, what the message names first, and what else it says)
    "q_rank": ({"q": torch.zeros(6, 4, 8)}, ValueError, "q", r"\[6, 4, 8\]"),
    "k_rank": ({"k": torch.zeros(2, 6, 2, 8, 1)}, ValueError, "k", r"\[2, 6, 2, 8, 1\]"),
    "v_rank": ({"v": torch.zeros(2, 6, 16)}, ValueError, "v", r"\[2, 6, 16\]"),
    "q_dtype": ({"q": torch.zeros(2, 6, 4, 8, dtype=torch.int32)}, TypeError, "q", "Int"),
    "q_complex": ({"q": torch.zeros(2, 6, 4, 8, dtype=torch.complex64)}, TypeError, "q", "Complex"),
    "k_dtype": ({"k": torch.zeros(2, 6, 2, 8, dtype=torch.bfloat16)}, TypeError, "k", "Float.*BFloat16"),
    "v_dtype": ({"v": torch.zeros(2, 6, 2, 8, dtype=torch.float64)}, TypeError, "v", "Float.*Double"),
    "k_device": ({"k": torch.zeros(2, 6, 2, 8, device="meta")}, TypeError, "k", "cpu.*meta"),
    "v_device": ({"v": torch.zeros(2, 6, 2, 8, device="meta")}, TypeError, "v", "cpu.*meta"),
    "k_batch": ({"k": torch.zeros(3, 6, 2, 8)}, ValueError, "k", "2.*3"),
    "v_batch": ({"v": torch.zeros(3, 6, 2, 8)}, ValueError, "v", "3"),
    "k_head_dim": ({"k": torch.zeros(2, 6, 2, 16)}, ValueError, "k", "8.*16"),
    "v_length": ({"v": torch.zeros(2, 5, 2, 8)}, ValueError, "v", "5"),
    "v_heads": ({"v": torch.zeros(2, 6, 4, 8)}, ValueError, "v", "4"),
    "head_counts": (
        {"k": torch.zeros(2, 6, 3, 8), "v": torch.zeros(2, 6, 3, 8)}, ValueError, "the heads of q", "4 and 3",
    ),
    "ids_dtype_float": ({"segment_ids": IDS.float()}, TypeError, "segment_ids", "int32 or int64.*Float"),
    "ids_dtype_bool": ({"segment_ids": IDS.bool()}, TypeError, "segment_ids", "int32 or int64.*Bool"),
    "ids_dtype_int16": ({"segment_ids": IDS.short()}, TypeError, "segment_ids", "int32 or int64.*Short"),
    "ids_rank": ({"segment_ids": IDS[0]}, ValueError, "segment_ids", "1"),
    "ids_length": ({"segment_ids": IDS[:, :5]}, ValueError, "segment_ids", r"\[2, 6\].*\[2, 5\]"),
    "ids_batch": ({"segment_ids": IDS[:1]}, ValueError, "segment_ids", r"\[2, 6\].*\[1, 6\]"),
    "ids_device": ({"segment_ids": IDS.to("meta")}, TypeError, "segment_ids", "cpu.*meta"),
    "ids_too_large": ({"segment_ids": IDS.long() + 2**31}, ValueError, "segment_ids", "int32"),
    "ids_too_small": ({"segment_ids": IDS.long() - 2**31 - 1}, ValueError, "segment_ids", "int32"),
    "kv_ids_dtype": ({"kv_segment_ids": IDS.float()}, TypeError, "kv_segment_ids", "int32 or int64.*Float"),
    "kv_ids_rank": ({"kv_segment_ids": IDS[0]}, ValueError, "kv_segment_ids", "1"),
    "kv_ids_length": ({"kv_segment_ids": IDS[:, :5]}, ValueError, "kv_segment_ids", r"\[2, 6\].*\[2, 5\]"),
    "kv_ids_device": ({"kv_segment_ids": IDS.to("meta")}, TypeError, "kv_segment_ids", "cpu.*meta"),
    "kv_ids_too_large": ({"kv_segment_ids": IDS.long() + 2**31}, ValueError, "kv_segment_ids", "int32"),
    "kv_ids_alone": ({"segment_ids": None, "kv_segment_ids": IDS}, ValueError, "kv_segment_ids", "segment_ids"),
    "kv_ids_missing": (
        {"k": torch.zeros(2, 9, 2, 8), "v": torch.zeros(2, 9, 2, 8)}, ValueError, "kv_segment_ids", "6 and 9",
    ),
    "positions_dtype": ({"positions": IDS.float()}, TypeError, "positions", "int32 or int64.*Float"),
    "positions_rank": ({"positions": IDS[0]}, ValueError, "positions", "1"),
    "positions_length": ({"positions": IDS[:, :5]}, ValueError, "positions", r"\[2, 6\].*\[2, 5\]"),
    "positions_batch": ({"positions": IDS[:1]}, ValueError, "positions", r"\[2, 6\].*\[1, 6\]"),
    "positions_device": ({"positions": IDS.to("meta")}, TypeError, "positions", "cpu.*meta"),
    "positions_too_large": ({"positions": IDS.long() + 2**31}, ValueError, "positions", "int32"),
    "positions_too_small": ({"positions": IDS.long() - 2**62}, ValueError, "positions", "int32"),
    "positions_unread": ({"positions": IDS.long() + 2**62, "causal": False}, ValueError, "positions", "int32"),
    "kv_positions_dtype": ({"positions": IDS, "kv_positions": IDS.bool()}, TypeError, "kv_positions", "Bool"),
    "kv_positions_length": (
        {"positions": IDS, "kv_positions": IDS[:, :5]}, ValueError, "kv_positions", r"\[2, 6\].*\[2, 5\]",
    ),
    "kv_positions_device": ({"positions": IDS, "kv_positions": IDS.to("meta")}, TypeError, "kv_positions", "cpu.*meta"),
    "kv_positions_too_large": (
        {"positions": IDS, "kv_positions": IDS.long() + 2**62}, ValueError, "kv_positions", "int32",
    ),
    "kv_positions_alone": ({"kv_positions": IDS}, ValueError, "kv_positions", "positions.*alone"),
    "kv_positions_missing": (
        {"segment_ids": None, "k": torch.zeros(2, 9, 2, 8), "v": torch.zeros(2, 9, 2, 8), "positions": IDS},
        ValueError, "kv_positions", "6 and 9",
    ),
    "scale_nan": ({"qk_scale": float("nan")}, ValueError, "qk_scale", "finite.*nan"),
    "scale_infinite": ({"qk_scale": float("inf")}, ValueError, "qk_scale", "finite.*inf"),
    "window_left": ({"window_left": -2}, ValueError, "window_left", "-1.*-2"),
    "window_right": ({"window_right": -7}, ValueError, "window_right", "-1.*-7"),
    "softcap_negative": ({"softcap": -1.0}, ValueError, "softcap", "-1"),
    "softcap_nan": ({"softcap": float("nan")}, ValueError, "softcap", "nan"),
    "softcap_infinite": ({"softcap": float("inf")}, ValueError, "softcap", "inf"),
    "sinks_rank": ({"sinks": torch.zeros(4, 1)}, ValueError, "sinks", r"4.*\[4, 1\]"),
    "sinks_heads": ({"sinks": torch.zeros(2)}, ValueError, "sinks", r"4.*\[2\]"),
    "sinks_dtype": ({"sinks": torch.zeros(4, dtype=torch.int64)}, TypeError, "sinks", "Long"),
    "sinks_device": ({"sinks": torch.zeros(4, device="meta")}, TypeError, "sinks", "cpu.*meta"),
    "backend_unknown": ({"backend": "fastest"}, ValueError, "(unknown )?backend", "fastest"),
    "backend_empty": ({"backend": ""}, ValueError, "(unknown )?backend", "auto"),
    "backend_upper_case": ({"backend": "Flash"}, ValueError, "(unknown )?backend", "Flash"),
}  # fmt: skip


@pytest.mark.parametrize("function", ["multihead_attention", "multihead_attention_lse", "explain_backend"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_argument_is_named(function: str, bad: str) -> None:
    changes, error, name, detail = BAD[bad]
    with pytest.raises(error, match=rf"^selfattn: {name}\b.*{detail}"):
        getattr(selfattn, function)(**ARGUMENTS | changes)


def test_the_unchanged_arguments_are_good() -> None:
    assert selfattn.multihead_attention(**ARGUMENTS).shape == (2, 6, 4, 8)


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"flash.*cudnn.*aten.*reference"):
        selfattn.multihead_attention(**ARGUMENTS, backend="fastest")


@pytest.mark.gpu
def test_ids_on_another_device_are_named() -> None:
    on_gpu = {name: ARGUMENTS[name].cuda() for name in "qkv"}
    with pytest.raises(TypeError, match=r"^selfattn: segment_ids .*cuda.*cpu"):
        selfattn.multihead_attention(**on_gpu, segment_ids=IDS)
