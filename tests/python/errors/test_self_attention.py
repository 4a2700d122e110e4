"""Every bad argument of self_attention raises the right kind of error, with the name that its caller knows."""

import pytest
import torch

import selfattn  # noqa: F401 - loads the operators

WIDTH = 32
GOOD = {
    "x": torch.randn(2, 6, WIDTH),
    "q_weight": torch.randn(WIDTH, WIDTH),
    "k_weight": torch.randn(16, WIDTH),
    "v_weight": torch.randn(16, WIDTH),
    "out_weight": torch.randn(WIDTH, WIDTH),
    "q_bias": torch.randn(WIDTH),
    "k_bias": torch.randn(16),
    "v_bias": torch.randn(16),
    "out_bias": torch.randn(WIDTH),
    "q_norm_weight": torch.ones(8),
    "k_norm_weight": torch.ones(8),
    "sinks": torch.zeros(4),
    "freqs_sin": torch.zeros(1, 6, 4),
    "freqs_cos": torch.ones(1, 6, 4),
    "segment_ids": torch.zeros(2, 6, dtype=torch.int32),
    "head_dim": 8,
}
TENSORS = [name for name, value in GOOD.items() if isinstance(value, torch.Tensor)]
WITHOUT_FREQUENCIES = {"freqs_sin": None, "freqs_cos": None}

BAD_NUMBERS = {
    "head_dim": (0, -8, 7, 3, 2**62),
    "norm_eps": (-1.0, float("nan"), float("inf")),
    "rope_theta": (0.0, -1.0, float("nan"), float("inf"), 1e-320),
    "qk_scale": (float("nan"), float("inf")),
    "window_left": (-2,),
    "window_right": (-7,),
    "softcap": (-1.0, float("nan"), float("inf"), 1e-320),
    "dropout_rate": (-0.1, 1.0, float("nan")),
}


def call(**changes) -> torch.Tensor:
    return torch.ops.selfattn.self_attention(**GOOD | changes)


def test_the_unchanged_arguments_are_good() -> None:
    assert call().shape == (2, 6, WIDTH)


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_bad_number_is_named(name: str) -> None:
    for value in BAD_NUMBERS[name]:
        others = "|q_weight" if name == "head_dim" else ""  # one that is valid and does not fit the weights
        with pytest.raises(ValueError, match=rf"^selfattn: ({name}{others}) must "):
            call(**WITHOUT_FREQUENCIES, **{name: value})


@pytest.mark.parametrize(("name", "known"), [("rope_pairing", "interleaved.*half"), ("backend", "flash.*reference")])
def test_bad_text_is_named(name: str, known: str) -> None:
    with pytest.raises(ValueError, match=rf"^selfattn: {name} must be .*{known}.*'no such'"):
        call(**{name: "no such"})


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_of_another_shape_is_named(name: str) -> None:
    tensor = GOOD[name]
    for bad in (tensor[..., :-1], tensor.unsqueeze(0), tensor[..., :0]):
        # These must fit each other: which of the two is wrong nobody can tell.
        names = {"q_weight": "x|q_weight", "freqs_sin": "freqs_sin|freqs_cos"}.get(name, name)
        with pytest.raises(ValueError, match=rf"^selfattn: ({names}) must "):
            call(**{name: bad})


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_of_another_dtype_is_named(name: str) -> None:
    bad_dtypes = [torch.complex64, torch.bool]
    if ("weight" in name and "norm" not in name) or "bias" in name or name == "x":
        bad_dtypes += [torch.bfloat16, torch.float64, torch.int64]
    for dtype in bad_dtypes:
        with pytest.raises(TypeError, match=rf"^selfattn: ({name}|x) must "):
            call(**{name: GOOD[name].to(dtype)})


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_on_another_device_is_named(name: str) -> None:
    # Where x itself is elsewhere, it is the first of the others that is not where x is.
    with pytest.raises(
        TypeError, match=rf"^selfattn: ({name if name != 'x' else 'q_weight'}) must be on the device of x"
    ):
        call(**{name: GOOD[name].to("meta")})


@pytest.mark.parametrize("missing", ["q_norm_weight", "k_norm_weight"])
def test_one_norm_weight_alone_is_refused(missing: str) -> None:
    with pytest.raises(ValueError, match=r"^selfattn: q_norm_weight and k_norm_weight must be given together"):
        call(**{missing: None})


@pytest.mark.parametrize("name", ["k_weight", "v_weight"])
def test_heads_that_do_not_fit_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^selfattn: {name} must "):
        call(**{name: torch.randn(24, WIDTH), f"{name[0]}_bias": None})
