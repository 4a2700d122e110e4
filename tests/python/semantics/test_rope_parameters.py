"""RopeParameters gives the frequencies and factors of the papers, in numbers worked out by hand, and their tables."""

import json

import pytest
import torch
from support import reference
from support.problems import error

import selfattn
from selfattn import RopeParameters

YARN = {"rotary_dim": 16, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LONGROPE = {
    "rotary_dim": 4,
    "rope_type": "longrope",
    "original_max_position_embeddings": 4096,
    "factor": 32.0,
    "short_factor": [2.0, 5.0],
    "long_factor": [4.0, 50.0],
}
DYNAMIC = {"rotary_dim": 8, "rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048}
LLAMA3 = {
    "rotary_dim": 8,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LAST_OF_YARN = [0.0025, 0.0007905694150420948, 0.00025, 7.905694150420948e-05]

# Parameters, the largest length, and the frequencies.
FREQUENCIES = {
    "default": ({"rotary_dim": 8}, 9, [1.0, 0.1, 0.01, 0.001]),
    "theta": ({"rotary_dim": 4, "rope_theta": 100.0}, 9, [1.0, 0.1]),
    "linear": ({"rotary_dim": 8, "rope_type": "linear", "factor": 4.0}, 9, [0.25, 0.025, 0.0025, 0.00025]),
    "dynamic_short": (DYNAMIC, 2048, [1.0, 0.1, 0.01, 0.001]),
    # The base is 10000 * 3^(8 / 6) = 43267.487.
    "dynamic_long": (DYNAMIC, 4096, [1.0, 0.06933612743506347, 0.004807498567691361, 1 / 3000]),
    # 163 and 16 turns in 1024 tokens, 1.63 of the third pair: it keeps (1.63 - 1) / (4 - 1) of its frequency.
    "llama3": (LLAMA3, 9, [1.0, 0.1, 0.003086760967011274, 0.000125]),
    # 32 turns at pair 0.21, one at pair 3.22: the blend runs from pair 0 to 4, or between those very places.
    "yarn": (YARN, 9, [1.0, 0.2569350598886808, 0.0625, 0.01383496476323666, *LAST_OF_YARN]),
    "yarn_not_truncated": (
        YARN | {"truncate": False},
        9,
        [1.0, 0.25397231355700634, 0.05539863663460478, 0.00963994285097862, *LAST_OF_YARN],
    ),
    "longrope_short": (LONGROPE, 4096, [0.5, 0.002]),
    "longrope_long": (LONGROPE, 4097, [0.25, 0.0002]),
}

# Parameters, and the attention factor.
FACTORS = {
    "default": ({"rotary_dim": 8}, 1.0),
    "linear": ({"rotary_dim": 8, "rope_type": "linear", "factor": 4.0}, 1.0),
    "dynamic": (DYNAMIC, 1.0),
    "llama3": (LLAMA3, 1.0),
    "yarn": (YARN, 1.138629436111989),
    "yarn_given": (YARN | {"attention_factor": 1.5}, 1.5),
    "yarn_shorter": (YARN | {"factor": 0.5}, 1.0),
    "yarn_mscale": (YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}, 1.0259286501478286),
    "yarn_equal_mscales": (YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}, 1.0),
    "yarn_one_mscale": (YARN | {"mscale": 0.7}, 1.138629436111989),
    "longrope": (LONGROPE, 1.1902380714238083),
    "longrope_given": (LONGROPE | {"factor": None, "attention_factor": 1.1}, 1.1),
    "longrope_shorter": (LONGROPE | {"factor": 1.0}, 1.0),
}
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 4096], [3, 4, 5, 6, 100000, 0]])


@pytest.mark.parametrize("case", FREQUENCIES)
def test_frequencies_are_those_worked_out_by_hand(case: str) -> None:
    fields, length, wanted = FREQUENCIES[case]
    sin, cos = RopeParameters(**fields).tables(torch.tensor([1]), length, dtype=torch.float64)
    found = torch.atan2(sin, cos)[0, 0]  # the angle of one token's step
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("case", FACTORS)
def test_attention_factor_is_that_worked_out_by_hand(case: str) -> None:
    fields, wanted = FACTORS[case]
    parameters = RopeParameters(**fields)
    sin, cos = parameters.tables(POSITIONS, dtype=torch.float64)
    torch.testing.assert_close(sin.square() + cos.square(), torch.full_like(sin, wanted**2), rtol=1e-13, atol=0)


def test_dynamic_and_longrope_alone_depend_on_the_length() -> None:
    for fields, *_ in (*FREQUENCIES.values(), *FACTORS.values()):
        parameters = RopeParameters(**fields)
        short, long = (parameters.tables(9, length)[0] for length in (1, 100_000))
        assert torch.equal(short, long) != parameters.depends_on_length


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions_dtype", [torch.int64, torch.int32, torch.float64])
def test_tables_of_positions(dtype: torch.dtype, positions_dtype: torch.dtype) -> None:
    found = RopeParameters(rotary_dim=12, rope_theta=500.0).tables(POSITIONS.to(positions_dtype), dtype=dtype)
    for actual, wanted in zip(found, reference.rotary_frequencies(12, POSITIONS, 500.0), strict=True):
        assert actual.dtype == dtype and actual.shape == (2, 6, 6)
        assert error(actual, wanted) < max(torch.finfo(dtype).eps, 1e-10)


def test_tables_of_a_number_are_those_of_its_positions() -> None:
    parameters = RopeParameters(**YARN)
    for by_number, by_row, wanted in zip(
        parameters.tables(5),
        parameters.tables(torch.arange(5)),
        parameters.tables(torch.arange(5)[None]),
        strict=True,
    ):
        assert by_number.dtype == torch.float32 and by_number.shape == (1, 5, 8)
        assert torch.equal(by_number, wanted) and torch.equal(by_row, wanted)
    assert parameters.tables(0)[0].shape == (1, 0, 8)


@pytest.mark.parametrize("fields", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_length_is_that_of_the_row_unless_given(fields: dict) -> None:
    parameters = RopeParameters(**fields | {"original_max_position_embeddings": 4})
    positions = torch.tensor([[7, 8]])  # far positions in a short row, as with a cache
    short, long = (parameters.tables(positions, length)[0] for length in (2, 9))
    assert torch.equal(parameters.tables(positions)[0], short) and not torch.equal(short, long)
    assert torch.equal(parameters.tables(9)[0][:, 7:], long)


def test_no_value_is_read_on_the_host() -> None:
    for fields, *_ in FREQUENCIES.values():
        sin, cos = RopeParameters(**fields).tables(POSITIONS.to("meta"))
        assert sin.is_meta and cos.is_meta and sin.shape == (2, 6, fields["rotary_dim"] // 2)


@pytest.mark.gpu
def test_cuda_is_not_synchronised() -> None:
    positions = POSITIONS.cuda()
    for fields, length, _ in FREQUENCIES.values():
        parameters = RopeParameters(**fields)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = parameters.tables(positions, length, dtype=torch.float64)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for actual, wanted in zip(found, parameters.tables(POSITIONS, length, dtype=torch.float64), strict=True):
            torch.testing.assert_close(actual.cpu(), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fields", [YARN, LLAMA3, DYNAMIC, LONGROPE], ids=lambda fields: fields["rope_type"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_equals_eager(dynamic: bool, fields: dict) -> None:
    torch.compiler.reset()
    parameters = RopeParameters(**fields | {"original_max_position_embeddings": 10})
    compiled = torch.compile(parameters.tables, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (6, 9, 12, 15):  # within the original length and beyond it
        positions = torch.randint(0, length, (2, length))
        for actual, wanted in zip(compiled(positions), parameters.tables(positions), strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("fields", [YARN, LONGROPE], ids=["yarn", "longrope"])
def test_operators_take_the_tables(fields: dict, pairing: str) -> None:
    """A factor, and a part of the head: forward and gradients."""
    sin, cos = RopeParameters(**fields).tables(POSITIONS)
    q, k = (torch.randn(2, 6, heads, 24, requires_grad=True) for heads in (4, 2))
    weights = [torch.rand(24, requires_grad=True) for _ in range(2)]
    leaves = [q, k, *weights]
    found = selfattn.qk_norm_rope(*leaves, sin, cos, pairing=pairing)
    wanted = [
        reference.rotate(reference.rms_norm(x, weight, 1e-6), sin, cos, pairing)
        for x, weight in zip((q, k), weights, strict=True)
    ]
    grads = [torch.randn_like(x) for x in found]
    of_found = torch.autograd.grad(found, leaves, grads)
    of_wanted = torch.autograd.grad(wanted, leaves, [grad.double() for grad in grads])
    for actual, expected in zip((*found, *of_found), (*wanted, *of_wanted), strict=True):
        assert error(actual, expected) < 2e-6


@pytest.mark.parametrize("case", [*FREQUENCIES, *FACTORS])
def test_dictionaries_and_json_keep_everything(case: str) -> None:
    parameters = RopeParameters(**(FREQUENCIES | FACTORS)[case][0])
    assert RopeParameters.from_dict(json.loads(json.dumps(parameters.to_dict()))) == parameters
    assert hash(parameters) == hash(RopeParameters.from_dict(parameters.to_dict()))


def test_from_transformers_reads_one_layer() -> None:
    read = RopeParameters.from_transformers
    assert read({}, 64, 2048) == RopeParameters(rotary_dim=64)
    assert read({"type": "linear", "factor": 2, "rope_theta": 5e5}, 64, 2048) == RopeParameters(
        rotary_dim=64, rope_type="linear", factor=2, rope_theta=5e5
    )
    assert read({"partial_rotary_factor": 0.75, "rope_type": "default", "factor": None}, 128, 1) == RopeParameters(
        rotary_dim=96
    )
    assert read({"rope_type": "dynamic", "factor": 2.0}, 8, 2048) == RopeParameters(**DYNAMIC)
    assert read({"rope_type": "yarn"} | {"original_max_position_embeddings": 256}, 16, 1024) == RopeParameters(**YARN)
    of_phi = {name: value for name, value in LONGROPE.items() if name not in ("rotary_dim", "factor")}
    assert read(of_phi | {"partial_rotary_factor": 0.5}, 8, 32 * 4096) == RopeParameters(**LONGROPE)
    of_llama = {name: value for name, value in LLAMA3.items() if name != "rotary_dim"}
    del of_llama["original_max_position_embeddings"]
    assert read(of_llama, 8, 1024) == RopeParameters(**LLAMA3)
