"""Rotary parameters of one layer: the frequencies of long-context models, and the tables that the operators take."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfattn._validated_config import _ValidatedConfig

# Each type's fields, beyond rotary_dim and rope_theta: those that it needs, those that it may have.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor", "original_max_position_embeddings"), ()),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("original_max_position_embeddings", "short_factor", "long_factor"), ("factor", "attention_factor")),
}
_OPTIONAL_FIELDS = tuple(dict.fromkeys(name for needed, allowed in _FIELDS.values() for name in needed + allowed))
_POSITIVE = "a positive finite number"


@dataclass(frozen=True, kw_only=True)
class RopeParameters(_ValidatedConfig):
    """The rotary embedding of one layer, under the names of transformers' ``rope_parameters``.

    A field that ``rope_type`` does not use stays None. With R = ``rotary_dim``, the plain inverse frequencies are
    f_i = rope_theta^(-2i / R), i < R / 2, in radians a token (RoFormer, arXiv:2104.09864); a type changes them:

    - "default": as they are.
    - "linear": f / factor.
    - "dynamic": f of the base rope_theta * (factor * length / original - (factor - 1))^(R / (R - 2)), where length is
      at least the original one.
    - "llama3": f where the original length holds at least ``high_freq_factor`` turns, f / factor where it holds at most
      ``low_freq_factor``, and a blend, linear in the turns, between.
    - "yarn": f for pairs of more than ``beta_fast`` turns in the original length, f / factor for fewer than
      ``beta_slow``, a blend, linear in i, between (YaRN, arXiv:2309.00071, section 3.2); and an attention factor.
    - "longrope": f_i / short_factor[i] up to the original length, f_i / long_factor[i] beyond it (LongRoPE,
      arXiv:2402.13753); and an attention factor.

    Raises (when made): TypeError or ValueError with the field's name, what was expected and what came.
    """

    rotary_dim: int
    """R, the first elements of a head, those that rotate; even."""
    rope_type: str = "default"
    """"default", "linear", "dynamic", "llama3", "yarn" or "longrope"."""
    rope_theta: float = 10000.0
    """Base of the frequencies."""
    factor: float | None = None
    """By how much the context is longer than the original one."""
    original_max_position_embeddings: int | None = None
    """The original length, in tokens."""
    low_freq_factor: float | None = None
    """Pairs of fewer turns in the original length slow down."""
    high_freq_factor: float | None = None
    """Pairs of more turns stay as they are."""
    attention_factor: float | None = None
    """Of sines and cosines alike. None follows the other fields: 0.1 ln(factor) + 1 for yarn (section 3.4), or the
    quotient of that with ``mscale`` and with ``mscale_all_dim`` as weights of the logarithm; for longrope
    sqrt(1 + ln(factor) / ln(original_max_position_embeddings)); 1 where factor is at most 1."""
    beta_fast: float | None = None
    """None is 32."""
    beta_slow: float | None = None
    """None is 1."""
    mscale: float | None = None
    """None or 0 leaves the attention factor to ``factor`` alone, as one of the two without the other does."""
    mscale_all_dim: float | None = None
    """As ``mscale``."""
    truncate: bool | None = None
    """Whether yarn's blend begins and ends at whole pairs; None is True."""
    short_factor: Sequence[float] | None = None
    """R / 2 divisors of the frequencies."""
    long_factor: Sequence[float] | None = None
    """The same beyond the original length."""

    def __post_init__(self) -> None:
        self._check_int("rotary_dim", 2, "a positive even integer")
        if self.rotary_dim % 2:
            self._fail(ValueError, "rotary_dim", "a positive even integer")
        self._check_choice("rope_type", list(_FIELDS))
        needed, allowed = _FIELDS[self.rope_type]
        for name in _OPTIONAL_FIELDS:
            is_given = getattr(self, name) is not None
            if name in needed and not is_given:
                self._fail(ValueError, name, f"a value, which rope_type {self.rope_type!r} needs")
            if is_given and name not in needed + allowed:
                self._fail(ValueError, name, f"None, since rope_type {self.rope_type!r} does not use it")
        self._check_numbers()
        self._check_type()

    def _check_numbers(self) -> None:
        self._check_real("rope_theta", lambda theta: theta > 0, _POSITIVE)
        given = [name for name in _OPTIONAL_FIELDS if getattr(self, name) is not None]
        for name in given:
            if name == "truncate":
                self._check_bool(name)
            elif name == "original_max_position_embeddings":
                self._check_int(name, 1, "a positive number of tokens")
            elif name in ("short_factor", "long_factor"):
                self._check_divisors(name)
            elif name in ("mscale", "mscale_all_dim"):
                self._check_real(name, lambda value: value >= 0, "a finite number of at least 0")
            else:
                self._check_real(name, lambda value: value > 0, _POSITIVE)

    def _check_divisors(self, name: str) -> None:
        value, expected = getattr(self, name), f"{self.rotary_dim // 2} positive finite numbers, one a pair"
        if not isinstance(value, (list, tuple)):
            self._fail(TypeError, name, expected)
        if any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in value):
            self._fail(TypeError, name, expected)
        if len(value) != self.rotary_dim // 2 or not all(math.isfinite(item) and item > 0 for item in value):
            self._fail(ValueError, name, expected)
        object.__setattr__(self, name, tuple(float(item) for item in value))

    def _check_type(self) -> None:
        """What the formula of the type asks for."""
        if self.rope_type == "dynamic" and self.rotary_dim == 2:
            self._fail(ValueError, "rotary_dim", "at least 4, since rope_type 'dynamic' divides by rotary_dim - 2")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            self._fail(ValueError, "high_freq_factor", f"more than low_freq_factor, {self.low_freq_factor}")
        if self.rope_type == "yarn":
            if self.rope_theta <= 1:
                self._fail(ValueError, "rope_theta", "more than 1, since rope_type 'yarn' divides by its logarithm")
            if self._beta_fast < self._beta_slow:
                self._fail(ValueError, "beta_fast", f"at least beta_slow, {self._beta_slow}")
        if self.rope_type == "longrope" and self.attention_factor is None:
            if self.factor is None:
                self._fail(ValueError, "factor", "a value where attention_factor is None")
            if self.original_max_position_embeddings == 1:
                self._fail(ValueError, "original_max_position_embeddings", "more than 1 token")

    @classmethod
    def from_transformers(
        cls, rope_parameters: Mapping[str, Any], head_dim: int, max_position_embeddings: int | None = None
    ) -> "RopeParameters":
        """Those of one layer of a model of transformers.

        Args:
            rope_parameters: ``config.rope_parameters``, or its entry for the layer's type where it has one a type. The
                older key ``type`` serves where there is no ``rope_type``. Keys that are None count as absent.
            head_dim: D, of which int(D * partial_rotary_factor) elements rotate, an even number.
            max_position_embeddings: ``config.max_position_embeddings``: the original length of "dynamic", and where
                ``original_max_position_embeddings`` is absent; with that length it gives an absent ``factor`` of "yarn"
                and "longrope". None where nothing of this is absent.

        Returns:
            The parameters.

        Raises:
            TypeError, ValueError: an unknown type or key, a key that the type does not use, a bad value; named.
        """
        where = f"{cls.__name__}.from_transformers"
        if not isinstance(rope_parameters, Mapping):
            raise TypeError(f"{where}: rope_parameters: expected a mapping, got {type(rope_parameters).__name__}")
        for name, value in (("head_dim", head_dim), ("max_position_embeddings", max_position_embeddings)):
            if name == "max_position_embeddings" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{where}: {name}: expected a positive integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{where}: {name}: expected a positive integer, got {value}")
        known = {"type", "rope_type", "rope_theta", "partial_rotary_factor", *_OPTIONAL_FIELDS}
        unknown = [name for name in rope_parameters if name not in known]
        if unknown:
            raise ValueError(
                f"{where}: rope_parameters: expected the keys of one layer out of {', '.join(sorted(known))}; "
                f"got {', '.join(map(repr, unknown))}"
            )
        fields = {name: value for name, value in rope_parameters.items() if value is not None}
        old_type = fields.pop("type", "default")
        fields.setdefault("rope_type", old_type)
        fields["rotary_dim"] = _rotary_dim(where, head_dim, fields.pop("partial_rotary_factor", 1.0))
        if max_position_embeddings is None:
            return cls(**fields)
        if fields["rope_type"] == "dynamic":
            length = fields.setdefault("original_max_position_embeddings", max_position_embeddings)
            if length != max_position_embeddings:
                raise ValueError(
                    f"{where}: original_max_position_embeddings: expected max_position_embeddings, "
                    f"{max_position_embeddings}, which transformers takes for rope_type 'dynamic'; got {length!r}"
                )
        if fields["rope_type"] in ("llama3", "yarn", "longrope"):
            length = fields.setdefault("original_max_position_embeddings", max_position_embeddings)
            is_length = isinstance(length, int) and length > 0  # else the field's own check says so
            if fields["rope_type"] != "llama3" and "factor" not in fields and is_length:
                fields["factor"] = max_position_embeddings / length
        return cls(**fields)

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the largest length: rope_type "dynamic" and "longrope"."""
        return self.rope_type in ("dynamic", "longrope")

    def tables(
        self,
        positions: Tensor | int,
        length: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sines and cosines times the attention factor, as ``apply_rotary_emb`` and ``qk_norm_rope`` take them.

        Reads no value of ``positions`` on the host. Angles are computed in float64.

        Args:
            positions: (B, S) or (S,), integers or floating point: of each token, for packed rows its position in its
                document. An int S stands for 0..S-1.
            length: the largest position plus 1, or a bound that the frequencies shall be made for. Only "dynamic" and
                "longrope" use it. None is S: with a cache, or positions that start elsewhere, give it.
            dtype: of the results.
            device: of the results; None is that of ``positions``, or PyTorch's default.

        Returns:
            sin and cos, each (B, S, R / 2), with B = 1 for positions without a batch.

        Raises:
            TypeError, ValueError: a bad argument.
        """
        is_tensor = isinstance(positions, Tensor)
        if not is_tensor:
            _check_length("positions", positions)
        if length is not None:
            _check_length("length", length)
        return torch.ops.selfattn.rope_tables(
            self.rotary_dim,
            positions if is_tensor else None,
            None if is_tensor else positions,
            length=length,
            dtype=dtype,
            device=device if is_tensor or device is not None else torch.get_default_device(),
            **self._type_fields(),
        )

    def _type_fields(self) -> dict[str, Any]:
        """The keywords of ``rope_tables`` that the fields are, without ``rotary_dim``."""
        fields = {name: getattr(self, name) for name in ("rope_type", "rope_theta", *_OPTIONAL_FIELDS)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @property
    def _beta_fast(self) -> float:
        return 32.0 if self.beta_fast is None else self.beta_fast

    @property
    def _beta_slow(self) -> float:
        return 1.0 if self.beta_slow is None else self.beta_slow


def _rotary_dim(where: str, head_dim: int, partial_rotary_factor: float) -> int:
    expected = "a number in (0, 1] that makes an even number of elements rotate"
    if isinstance(partial_rotary_factor, bool) or not isinstance(partial_rotary_factor, (int, float)):
        raise TypeError(f"{where}: partial_rotary_factor: expected {expected}, got {partial_rotary_factor!r}")
    is_share = 0 < partial_rotary_factor <= 1
    rotary_dim = int(head_dim * partial_rotary_factor) if is_share else 0
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(
            f"{where}: partial_rotary_factor: expected {expected}, "
            f"got {partial_rotary_factor!r} with head_dim {head_dim}"
        )
    return rotary_dim


def _check_length(name: str, length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected a number of tokens, got {length!r}")
    if length < 0:
        raise ValueError(f"{name}: expected a number of tokens of at least 0, got {length}")
