"""RopeParameters with a bad value cannot be made; the error names the field, what was expected and what came."""

import pytest
import torch

from selfattn import RopeParameters

DEFAULT = {"rotary_dim": 8}
LINEAR = DEFAULT | {"rope_type": "linear", "factor": 2.0}
DYNAMIC = DEFAULT | {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
YARN = DYNAMIC | {"rope_type": "yarn"}
LLAMA3 = DYNAMIC | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = DYNAMIC | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}

BAD_FIELDS = [
    (DEFAULT, "rotary_dim", 7, ValueError),
    (DEFAULT, "rotary_dim", 0, ValueError),
    (DEFAULT, "rotary_dim", 8.0, TypeError),
    (DEFAULT, "rope_type", "ntk", ValueError),
    (DEFAULT, "rope_type", "proportional", ValueError),
    (DEFAULT, "rope_type", None, TypeError),
    (DEFAULT, "rope_theta", 0.0, ValueError),
    (DEFAULT, "rope_theta", float("nan"), ValueError),
    (DEFAULT, "rope_theta", "1e4", TypeError),
    (DEFAULT, "factor", 2.0, ValueError),  # not used by the type
    (LINEAR, "factor", None, ValueError),
    (LINEAR, "factor", -1.0, ValueError),
    (LINEAR, "factor", True, TypeError),
    (LINEAR, "attention_factor", 1.0, ValueError),
    (LINEAR, "truncate", True, ValueError),
    (DYNAMIC, "original_max_position_embeddings", None, ValueError),
    (DYNAMIC, "original_max_position_embeddings", 0, ValueError),
    (DYNAMIC, "original_max_position_embeddings", 64.0, TypeError),
    (DYNAMIC, "rotary_dim", 2, ValueError),
    (DYNAMIC, "long_factor", [1.0] * 4, ValueError),
    (LLAMA3, "high_freq_factor", 1.0, ValueError),
    (LLAMA3, "low_freq_factor", None, ValueError),
    (LLAMA3, "low_freq_factor", float("inf"), ValueError),
    (YARN, "beta_fast", 0.5, ValueError),
    (YARN, "beta_fast", 0, ValueError),
    (YARN, "beta_slow", "1", TypeError),
    (YARN, "attention_factor", 0.0, ValueError),
    (YARN, "mscale", -1.0, ValueError),
    (YARN, "mscale_all_dim", "1", TypeError),
    (YARN, "truncate", 0, TypeError),
    (YARN, "rope_theta", 1.0, ValueError),
    (LONGROPE, "short_factor", [1.0] * 3, ValueError),
    (LONGROPE, "long_factor", [1.0, 1.0, 1.0, 0.0], ValueError),
    (LONGROPE, "long_factor", 2.0, TypeError),
    (LONGROPE, "long_factor", ["1"] * 4, TypeError),
    (LONGROPE, "factor", None, ValueError),
    (LONGROPE, "original_max_position_embeddings", 1, ValueError),
]

# rope_parameters, head_dim and max_position_embeddings, the error, what it says.
BAD_SOURCES = {
    "no_mapping": (([], 64, 128), TypeError, "rope_parameters: expected a mapping.*list"),
    "layer_types": (({"full_attention": {}}, 64, 128), ValueError, "one layer.*'full_attention'"),
    "sections": (({"mrope_section": [1, 2]}, 64, 128), ValueError, "'mrope_section'"),
    "type": (({"rope_type": "su"}, 64, 128), ValueError, "rope_type.*'longrope'.*'su'"),
    "unused": (({"rope_type": "default", "factor": 2.0}, 64, 128), ValueError, "factor.*does not use.*2.0"),
    "share": (({"partial_rotary_factor": 0.3}, 64, 128), ValueError, "partial_rotary_factor.*0.3.*64"),
    "no_share": (({"partial_rotary_factor": 0.0}, 64, 128), ValueError, "partial_rotary_factor.*0.0"),
    "share_type": (({"partial_rotary_factor": "half"}, 64, 128), TypeError, "partial_rotary_factor.*'half'"),
    "odd_head": (({}, 63, 128), ValueError, "partial_rotary_factor.*63"),
    "head_dim": (({}, 64.0, 128), TypeError, "head_dim.*64.0"),
    "length": (({}, 64, 0), ValueError, "max_position_embeddings.*0"),
    "two_lengths": (
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}, 64, 128),
        ValueError,
        "original_max_position_embeddings.*128.*64",
    ),
    "original": (
        ({"rope_type": "yarn", "original_max_position_embeddings": 0}, 64, 128),
        ValueError,
        "factor|original",
    ),
}

BAD_TABLES = {
    "rank": ({"positions": torch.zeros(1, 2, 3)}, ValueError, r"positions.*\[1, 2, 3\]"),
    "dtype": ({"positions": torch.zeros(3, dtype=torch.bool)}, TypeError, "positions.*Bool"),
    "list": ({"positions": [0, 1]}, TypeError, r"positions.*\[0, 1\]"),
    "negative": ({"positions": -1}, ValueError, "positions.*-1"),
    "length": ({"positions": 3, "length": -1}, ValueError, "length.*-1"),
    "length_type": ({"positions": 3, "length": torch.tensor(3)}, TypeError, "length.*tensor"),
    "result": ({"positions": 3, "dtype": torch.int32}, TypeError, "dtype.*Int"),
}


@pytest.mark.parametrize(("good", "name", "value", "error"), BAD_FIELDS, ids=lambda part: str(part)[:24])
def test_bad_field_is_named(good: dict, name: str, value: object, error: type[Exception]) -> None:
    RopeParameters(**good)
    with pytest.raises(error, match=rf"^RopeParameters\.{name}: expected .*, got "):
        RopeParameters(**good | {name: value})


@pytest.mark.parametrize("bad", BAD_SOURCES)
def test_from_transformers_names_what_it_cannot_read(bad: str) -> None:
    arguments, error, text = BAD_SOURCES[bad]
    with pytest.raises(error, match=rf"^RopeParameters.*{text}"):
        RopeParameters.from_transformers(*arguments)


@pytest.mark.parametrize("bad", BAD_TABLES)
def test_tables_name_the_bad_argument(bad: str) -> None:
    arguments, error, text = BAD_TABLES[bad]
    with pytest.raises(error, match=text):
        RopeParameters(rotary_dim=8).tables(**arguments)


def test_unknown_field_is_named() -> None:
    with pytest.raises(ValueError, match="unknown field 'rope_scale'"):
        RopeParameters.from_dict({"rotary_dim": 8, "rope_scale": 2.0})
