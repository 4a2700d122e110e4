"""Every bad argument of the rotary operators raises the right kind of error, with the argument's name."""

import pytest
import torch

import selfattn

Q, K = torch.zeros(2, 6, 4, 8), torch.zeros(2, 6, 2, 8)
SIN = COS = torch.zeros(1, 6, 4)
WIDE = torch.zeros(1, 6, 5)
POSITIONS = torch.zeros(2, 6, dtype=torch.int64)

BAD_FREQUENCIES = {
    "odd": ({"feat_dim": 7, "max_length": 4}, ValueError, "feat_dim", "7"),
    "zero": ({"feat_dim": 0, "max_length": 4}, ValueError, "feat_dim", "0"),
    "neither": ({"feat_dim": 8}, ValueError, "exactly one of pos_idx and max_length", "neither"),
    "both": ({"feat_dim": 8, "pos_idx": POSITIONS, "max_length": 6}, ValueError, "exactly one of pos_idx", "both"),
    "rank": ({"feat_dim": 8, "pos_idx": POSITIONS[None]}, ValueError, "pos_idx", r"\[1, 2, 6\]"),
    "no_values": (
        {"feat_dim": 8, "pos_idx": POSITIONS.to("meta"), "device": "cpu"}, TypeError, "pos_idx", "cpu.*meta",
    ),
    "length": ({"feat_dim": 8, "max_length": -1}, ValueError, "max_length", "-1"),
    "theta_zero": ({"feat_dim": 8, "max_length": 4, "theta": 0.0}, ValueError, "theta", "0"),
    "theta_nan": ({"feat_dim": 8, "max_length": 4, "theta": float("nan")}, ValueError, "theta", "nan"),
    "dtype": ({"feat_dim": 8, "max_length": 4, "dtype": torch.int32}, TypeError, "dtype", "Int"),
}  # fmt: skip

BAD_ROTATIONS = {
    "xq_rank": ({"xq": Q[0]}, ValueError, "xq", r"\[6, 4, 8\]"),
    "xk_rank": ({"xk": K[0]}, ValueError, "xk", r"\[6, 2, 8\]"),
    "xq_dtype": ({"xq": Q.int()}, TypeError, "xq", "Int"),
    "xk_dtype": ({"xk": K.long()}, TypeError, "xk", "Long"),
    "odd_dim": ({"xq": Q[..., :7], "xk": K[..., :7]}, ValueError, "xq", "even head dimension.*7"),
    "sin_alone": ({"freqs_sin": SIN}, ValueError, "freqs_sin and freqs_cos", "together"),
    "cos_alone": ({"freqs_cos": COS}, ValueError, "freqs_sin and freqs_cos", "together"),
    "sin_length": ({"freqs_sin": SIN[:, :5], "freqs_cos": COS}, ValueError, "freqs_sin", r"\[1, 5, 4\]"),
    "cos_dim": ({"freqs_sin": SIN, "freqs_cos": COS[..., :2]}, ValueError, "freqs_cos", r"\[1, 6, 2\]"),
    "sin_width": ({"freqs_sin": WIDE, "freqs_cos": COS}, ValueError, "freqs_sin", r"1 to 4.*\[1, 6, 5\]"),
    "cos_width": ({"freqs_sin": SIN, "freqs_cos": WIDE}, ValueError, "freqs_cos", r"1 to 4.*\[1, 6, 5\]"),
    "width_for_xk": (
        {"xk": K[..., :6], "freqs_sin": SIN, "freqs_cos": COS}, ValueError, "freqs_sin", r"1 to 3.*xk.*\[1, 6, 4\]",
    ),
    "no_width": ({"freqs_sin": SIN[..., :0], "freqs_cos": COS[..., :0]}, ValueError, "freqs_sin", r"\[1, 6, 0\]"),
    "widths": ({"freqs_sin": SIN[..., :3], "freqs_cos": COS}, ValueError, "freqs_cos", r"columns.*3.*\[1, 6, 4\]"),
    "sin_batch": ({"freqs_sin": SIN.expand(3, 6, 4), "freqs_cos": COS}, ValueError, "freqs_sin", r"\[3, 6, 4\]"),
    "sin_rank": ({"freqs_sin": SIN[0], "freqs_cos": COS}, ValueError, "freqs_sin", r"\[6, 4\]"),
    "sin_dtype": ({"freqs_sin": SIN.int(), "freqs_cos": COS}, TypeError, "freqs_sin", "Int"),
    "cos_device": ({"freqs_sin": SIN, "freqs_cos": COS.to("meta")}, TypeError, "freqs_cos", "cpu.*meta"),
    "theta": ({"theta": -1.0}, ValueError, "theta", "-1"),
    "pairing": ({"pairing": "pairs"}, ValueError, "pairing", "interleaved.*half.*pairs"),
}  # fmt: skip

BAD_NORMS = {
    "widths": ({"freqs_sin": SIN[..., :3], "freqs_cos": COS}, ValueError, "freqs_cos", r"columns.*3.*\[1, 6, 4\]"),
    "q_weight_shape": ({"q_weight": torch.ones(4)}, ValueError, "q_weight", r"8.*\[4\]"),
    "k_weight_rank": ({"k_weight": torch.ones(2, 8)}, ValueError, "k_weight", r"8.*\[2, 8\]"),
    "k_weight_dtype": ({"k_weight": torch.ones(8, dtype=torch.int32)}, TypeError, "k_weight", "Int"),
    "eps_negative": ({"eps": -1.0}, ValueError, "eps", "-1"),
    "eps_nan": ({"eps": float("nan")}, ValueError, "eps", "nan"),
    "weight_without_norm": ({"norm": False, "q_weight": torch.ones(8)}, ValueError, "q_weight", "norm"),
    "positions_without_rope": ({"rope": False, "positions": POSITIONS}, ValueError, "freqs_sin", "positions.*rope"),
    "positions_and_freqs": (
        {"positions": POSITIONS, "freqs_sin": SIN, "freqs_cos": COS}, ValueError, "positions", "freqs_sin",
    ),
    "positions_shape": ({"positions": POSITIONS[:, :5]}, ValueError, "positions", r"\[2, 5\]"),
    "positions_device": ({"positions": POSITIONS.to("meta")}, TypeError, "positions", "cpu.*meta"),
    "pairing": ({"pairing": "pairs"}, ValueError, "pairing", "pairs"),
    "q_rank": ({"q": Q[0]}, ValueError, "q", r"\[6, 4, 8\]"),
    "weight_device": ({"q_weight": torch.ones(8, device="meta")}, TypeError, "q_weight", "cpu.*meta"),
}  # fmt: skip

BAD_GRADIENTS = {
    "sin_width": ({"freqs_sin": WIDE, "freqs_cos": COS}, ValueError, "freqs_sin", r"1 to 4.*\[1, 6, 5\]"),
    "no_q": ({"q": None}, ValueError, "q", "norm"),
    "no_k": ({"k": None}, ValueError, "k", "norm"),
    "grad_q_rank": ({"grad_q": Q[0]}, ValueError, "grad_q", r"\[6, 4, 8\]"),
    "grad_k_shape": ({"grad_k": K[:, :5]}, ValueError, "grad_k", r"\[2, 6, 2, 8\].*\[2, 5, 2, 8\]"),
    "grad_q_dtype": ({"grad_q": Q.bfloat16()}, TypeError, "grad_q", "Float.*BFloat16"),
    "grad_k_device": ({"grad_k": K.to("meta")}, TypeError, "grad_k", "cpu.*meta"),
    "positions_shape": ({"positions": POSITIONS[:, :5]}, ValueError, "positions", r"\[2, 5\]"),
    "pairing": ({"pairing": "pairs"}, ValueError, "pairing", "pairs"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_FREQUENCIES)
def test_precompute_freqs_names_the_bad_argument(bad: str) -> None:
    arguments, error, name, detail = BAD_FREQUENCIES[bad]
    with pytest.raises(error, match=rf"^selfattn: {name}\b.*{detail}"):
        selfattn.precompute_freqs(**arguments)


@pytest.mark.parametrize("bad", BAD_ROTATIONS)
def test_apply_rotary_emb_names_the_bad_argument(bad: str) -> None:
    changes, error, name, detail = BAD_ROTATIONS[bad]
    with pytest.raises(error, match=rf"^selfattn: {name}\b.*{detail}"):
        selfattn.apply_rotary_emb(**{"xq": Q, "xk": K} | changes)


@pytest.mark.parametrize("bad", BAD_NORMS)
def test_qk_norm_rope_names_the_bad_argument(bad: str) -> None:
    changes, error, name, detail = BAD_NORMS[bad]
    with pytest.raises(error, match=rf"^selfattn: {name}\b.*{detail}"):
        selfattn.qk_norm_rope(**{"q": Q, "k": K} | changes)


@pytest.mark.parametrize("bad", BAD_GRADIENTS)
def test_qk_norm_rope_backward_names_the_bad_argument(bad: str) -> None:
    changes, error, name, detail = BAD_GRADIENTS[bad]
    arguments = {"grad_q": Q, "grad_k": K, "q": Q, "k": K} | changes
    with pytest.raises(error, match=rf"^selfattn: {name}\b.*{detail}"):
        torch.ops.selfattn.qk_norm_rope_backward(**arguments)
