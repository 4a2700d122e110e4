"""Finds libselfattn.so, checks that it fits the installed torch, and loads it once."""

import contextlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from selfattn._when_imported import when_imported

ENVIRONMENT_VARIABLE = "SELFATTN_LIBRARY"
PACKAGED_LIBRARY = Path(__file__).parent / "lib" / "libselfattn.so"
KERNEL_OPERATORS = (
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_backward.into",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "qk_norm_rope_backward.in_place",
    "qk_norm_rope_attention",
    "qk_norm_rope_attention_backward",
    "context_parallel_attention_forward",
    "context_parallel_attention_backward",
    "flash_attention_kv_cache",
    "append_kv_cache",
    "qk_norm_rope_append",
    "kv_cache_positions",
    "positions_of_append",
    "kv_cache_pages",
)


def load() -> None:
    """Registers the operators of ``torch.ops.selfattn``.

    The environment variable ``SELFATTN_LIBRARY`` names the library if it is set, else the one inside this package is
    taken. The same file may have been loaded before (``torch.ops.load_library``); without a file of its own the package
    serves with whatever is loaded.

    Raises:
        ImportError: there is no library, it was built for another torch, or the process has loaded another one. The
            message says what to do.
    """
    chosen_by_user = os.environ.get(ENVIRONMENT_VARIABLE)
    path = library_path()
    if hasattr(torch.ops.selfattn, "multihead_attention"):
        _check_loaded(path)
    else:
        _load(path, chosen_by_user)
    # torch 2.11 imports the module itself, 2.15 with the first jagged tensor.
    when_imported("torch.nested._internal.nested_tensor", _register_refusals)


def library_path() -> Path:
    """The library that the package loads."""
    return Path(os.environ.get(ENVIRONMENT_VARIABLE) or PACKAGED_LIBRARY)


def build_of(library: Path) -> dict[str, Any]:
    """What the build wrote beside the library (CMakeLists.txt): the ``version``, the ``torch`` and the ``cuda`` (None:
    without) that it was compiled for, and the ``kernels``, by family the instruction sets or architectures. Empty where
    the file was moved without it."""
    path = library.with_suffix(".json")
    return json.loads(path.read_text()) if path.is_file() else {}


def _load(path: Path, chosen_by_user: str | None) -> None:
    if not path.is_file():
        where = f"the environment variable {ENVIRONMENT_VARIABLE} names" if chosen_by_user else "the package expects"
        raise ImportError(
            f"selfattn: {where} {path}, but there is no such file. Build and install it with `pip install .` in the "
            f"project's folder, or set {ENVIRONMENT_VARIABLE} to a libselfattn.so."
        )
    built_for = build_of(path).get("torch")
    if built_for is not None and _major_minor(built_for) != _major_minor(torch.__version__):
        raise ImportError(_mismatch(built_for))
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"{_mismatch(built_for)} The loader said: {error}") from error


def _register_refusals(nested_tensor: ModuleType) -> None:
    for name in KERNEL_OPERATORS:
        with contextlib.suppress(RuntimeError):  # an earlier import in this process has done it
            torch.library.register_torch_dispatch(f"selfattn::{name}", nested_tensor.NestedTensor, _refuse_jagged)


def _refuse_jagged(cls: type, operator: torch._ops.OpOverload, _types: tuple, args: tuple, kwargs: dict | None) -> None:
    """In inference mode the Python class of jagged tensors comes before the kernels that refuse them by name."""
    arguments = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | (
        kwargs or {}
    )
    name = next(name for name, value in arguments.items() if isinstance(value, cls))
    raise TypeError(
        f"selfattn: {name} must be a dense tensor; got a nested one; pack the documents into rows and give segment_ids "
        "(segment_ids_from_cu_seqlens makes them of the offsets)"
    )


def _check_loaded(path: Path) -> None:
    """PyTorch ends the process at a second definition of an operator, so two libraries cannot live in one."""
    loaded = _loaded_libraries()
    if not loaded or not path.is_file() or any(os.path.samefile(path, other) for other in loaded):
        return
    raise ImportError(
        f"selfattn: the process has loaded {' and '.join(loaded)}, which defines the operators of "
        f"torch.ops.selfattn, and this package would load {path}; PyTorch can hold one of them only. Load one file "
        f"everywhere: set {ENVIRONMENT_VARIABLE} to {loaded[0]}, or do not load that one before."
    )


def _loaded_libraries() -> list[str]:
    """Files of the process that may have defined the operators: loaded through torch.ops, or named like the library."""
    files = [file for file in torch.ops.loaded_libraries if _defines_operators(file)]
    maps = Path("/proc/self/maps")
    if maps.is_file():
        mapped = [line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()]
        files += [file for file in mapped if Path(file).name.startswith("libselfattn.") and os.path.isfile(file)]
    return sorted({os.path.realpath(file) for file in files})


def _defines_operators(file: str) -> bool:
    try:
        return b"selfattn::multihead_attention" in Path(file).read_bytes()
    except OSError:
        return False


def _major_minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def _mismatch(built_for: str | None) -> str:
    built = f"torch {built_for}" if built_for else "another torch"
    cure = "build it again with `pip install --no-build-isolation --force-reinstall --no-deps .`"
    if built_for:
        cure += f", or install torch {built_for}, or the wheel of selfattn for this torch"
    return (
        f"selfattn: the library was built for {built}, and the installed torch is {torch.__version__}; a compiled "
        f"extension serves one version of torch only. To cure it, {cure}."
    )
