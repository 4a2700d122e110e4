"""What the configurations of this package share."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

_Config = TypeVar("_Config", bound="_ValidatedConfig")


class _ValidatedConfig:
    """Dictionaries in and out, and the words of the errors, for dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them: numbers, strings, lists and nested dictionaries."""
        plain = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, _ValidatedConfig):
                value = value.to_dict()
            plain[f.name] = list(value) if isinstance(value, tuple) else value
        return plain

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """The inverse of ``to_dict``; absent fields take their defaults.

        Raises:
            TypeError: ``values`` is no mapping, or a field has a wrong type.
            ValueError: an unknown field, or a field with a bad value; the message names it.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__}.from_dict: expected a mapping, got {type(values).__name__}")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(
                f"{cls.__name__}: unknown field{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}; "
                f"expected fields out of {', '.join(known)}"
            )
        return cls(**values)

    def _fail(self, error: type[Exception], name: str, expected: str) -> None:
        raise error(f"{type(self).__name__}.{name}: expected {expected}, got {getattr(self, name)!r}")

    def _check_int(self, name: str, minimum: int, expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            self._fail(TypeError, name, expected)
        if value < minimum:
            self._fail(ValueError, name, expected)

    def _check_bool(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            self._fail(TypeError, name, "a bool")

    def _check_real(self, name: str, is_allowed, expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._fail(TypeError, name, expected)
        if not (math.isfinite(value) and is_allowed(value)):
            self._fail(ValueError, name, expected)

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        value = getattr(self, name)
        expected = f"one of {', '.join(map(repr, choices))}"
        if not isinstance(value, str):
            self._fail(TypeError, name, expected)
        if value not in choices:
            self._fail(ValueError, name, expected)
