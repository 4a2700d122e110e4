"""What transformers says about a mask, as a small tensor that travels to the layers in the mask's place.

transformers asks for a mask once for each type of layer, before the layers run, and hands what it gets to every one of
them. It must be a 4-D tensor: ``generate()`` feeds the masks of static caches back in as ``attention_mask``, and leaves
alone nothing else. What the layers need is one number a key, and a few facts that the host must know without reading a
tensor, so the facts are in the shape:

    (B, 1, rows, Skv) int32, where rows is a Diagonal, + 5 if the window of the layers' configuration holds
    row 0: 0 for a key that may be attended to, -1 for padding and for a part of the cache that is not written
    row 1 (of Diagonal.GIVEN): d in every element; query i sees key j where j <= i + d
    every row of Diagonal.LENGTH: the length of the cache with these queries, one number in memory
"""

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import torch
import transformers
import transformers.masking_utils as masking
from torch import Tensor


class Diagonal(Enum):
    """Where the last key of a query stands, and whether every key may be attended to."""

    ONE_QUERY = 1  # one query, which sees every key that row 0 allows: causality and the window are in row 0
    UNPADDED = 2  # query i sees j <= i + Skv - Sq, and no key is padding
    BOTTOM_RIGHT = 3  # query i sees j <= i + Skv - Sq
    TOP_LEFT = 4  # query i sees j <= i: the rest of a static cache is not written
    GIVEN = 5  # query i sees j <= i + d
    LENGTH = 6  # query i sees j <= i + length - Sq, no key is padding, and the length stands on the device


_WINDOWED = 5  # one query sees to its window by itself, so no two cases have as many rows
_LARGEST = Diagonal.LENGTH.value
MAX_DRAFTS = 32  # queries of a draft_mask of attention_with_kv_cache


class MaskFacts(NamedTuple):
    """What a mask of this module says."""

    diagonal: Diagonal
    windowed: bool
    tensor: Tensor

    @property
    def keys(self) -> Tensor:
        """(B, Skv) int32: 0, or -1 for a key that nobody may attend to."""
        return self.tensor[:, 0, 0]

    @property
    def offset(self) -> Tensor:
        """0-dim int32: d, where the diagonal is given."""
        return self.tensor[0, 0, 1, 0]

    @property
    def lengths(self) -> Tensor:
        """(B,) int32, expanded: keys in use with those of the queries, where they are given as a length."""
        return self.tensor[:, 0, 0, 0]

    def key_by_key(self, q_length: int, window: int | None) -> "MaskFacts":
        """What a length says, as a mask that documents can be laid over."""
        keys, offset = torch.zeros_like(self.keys, memory_format=torch.contiguous_format), self.lengths[0] - q_length
        diagonal = Diagonal.ONE_QUERY if q_length == 1 else Diagonal.GIVEN
        return read_mask(_rows(diagonal, keys, offset, window), *keys.shape)


_NEEDED = ("causal_mask_function", "and_masks", "sliding_window_overlay", "packed_sequence_mask_function")
_missing = [name for name in (*_NEEDED, "remap_positions_for_packed_sequence") if not hasattr(masking, name)]
if _missing:
    raise ImportError(
        f"selfattn: transformers must be 5.24 or one that builds its masks alike; got {transformers.__version__}, "
        f"whose masking_utils lacks {', '.join(_missing)}"
    )

# The functions that transformers builds masks of are closures, known by their code.
_AND = masking.and_masks(masking.causal_mask_function).__code__
_WINDOW = masking.sliding_window_overlay(1).__code__
_REMAP = masking.remap_positions_for_packed_sequence(masking.causal_mask_function, torch.zeros(1, 1)).__code__
_PACKED = masking.packed_sequence_mask_function(torch.zeros(1, 1)).__code__
_CAUSAL = masking.causal_mask_function.__code__


def create_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool | None = None,
    config: object = None,
    device: torch.device | str = "cpu",
    **_unused,  # dtype and whether a mask may be left out: nothing here is of a dtype or left out
) -> Tensor:
    """The mask of one type of layer: what ``AttentionMaskInterface`` calls.

    Args:
        batch_size: B.
        q_length: Sq.
        kv_length: Skv, the length of the keys that the cache will give.
        q_offset: the place of the first query in the sequence; a 0-dim tensor for static caches.
        kv_offset: the place of the first key in the sequence; above 0 for sliding caches.
        mask_function: which pairs are allowed, as a function of their indices.
        attention_mask: (B, tokens so far) bool, False for padding.
        local_size: the window of a sliding layer.
        use_vmap: whether the caller added a mask function of its own.
        allow_is_bidirectional_skip: given for attention in both directions, and only there.
        config: the model's configuration.
        device: of the result.

    Returns:
        The tensor that this module describes at its head.

    Raises:
        NotImplementedError: a pattern other than causal, with or without a window.
        ValueError: queries beyond the keys.
    """
    if allow_is_bidirectional_skip is not None:
        raise _refusal("attention in both directions")
    window = _window(mask_function, local_size, use_vmap, config)
    if torch.compiler.is_dynamo_compiling() and mask_function.__code__ is _AND:
        _assert_causal(mask_function, batch_size, q_length, device)

    offset = q_offset - kv_offset
    diagonal = _diagonal(offset, q_length, kv_length, attention_mask is not None, window)
    if diagonal is Diagonal.LENGTH:
        length = offset + q_length
        if not isinstance(length, Tensor):
            length = torch.full((), length, device=device)
        return length.to(torch.int32).expand(batch_size, 1, _count(diagonal, window), kv_length)
    return _rows(diagonal, _padding(attention_mask, batch_size, kv_length, kv_offset, device), offset, window)


def _count(diagonal: Diagonal, window: int | None) -> int:
    return diagonal.value + (_WINDOWED if window is not None else 0)


def _rows(diagonal: Diagonal, keys: Tensor, offset: int | Tensor, window: int | None) -> Tensor:
    rows = [keys]
    if diagonal is Diagonal.ONE_QUERY:
        # One key for one query: the shape stays while a static cache fills up, as compiled decoding needs.
        index = torch.arange(keys.shape[1], device=keys.device)
        seen = index <= offset
        if window is not None:
            seen = seen & (index > offset - window)
        rows = [torch.where(seen, keys, -1)]
        window = None
    elif diagonal is Diagonal.GIVEN:
        rows.append(torch.zeros_like(keys) + offset)
    rows += [keys] * (_count(diagonal, window) - len(rows))
    return torch.stack(rows, dim=1).to(torch.int32)[:, None]


def read_mask(mask: Tensor, batch_size: int, kv_length: int) -> MaskFacts:
    """What a mask says, checked against the keys that came.

    Args:
        mask: of ``create_mask``.
        batch_size: B of the queries.
        kv_length: Skv of the keys.

    Raises:
        NotImplementedError: a mask that somebody else made.
        ValueError: a mask for other keys.
    """
    own = isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.int32 and mask.shape[1] == 1
    rows = mask.shape[2] if own else 0
    if not 1 <= rows <= _LARGEST + _WINDOWED:
        came = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"selfattn: attention_mask must be None or (B, S) with 0 for padding, came as {came}: a dense mask cannot "
            "be served. Give documents as segment_ids, cu_seq_lens_q, seq_idx or position_ids."
        )
    if mask.shape[0] != batch_size or mask.shape[3] != kv_length:
        raise ValueError(
            f"selfattn: attention_mask was made for {mask.shape[0]} rows of {mask.shape[3]} keys, the layer came with "
            f"{batch_size} of {kv_length}"
        )
    windowed = rows > _LARGEST
    diagonal = Diagonal(rows - _WINDOWED if windowed else rows)
    return MaskFacts(diagonal, windowed, mask)


def _diagonal(offset: int | Tensor, q_length: int, kv_length: int, padded: bool, window: int | None) -> Diagonal:
    known = not isinstance(offset, Tensor)
    if known and offset + q_length > kv_length:
        raise ValueError(
            f"selfattn: the last of {q_length} queries stands at key {offset + q_length - 1}, beyond the {kv_length} "
            "keys that the cache gives"
        )
    if known and offset + q_length == kv_length:
        if padded:
            return Diagonal.BOTTOM_RIGHT
        # One token into a full sliding cache, static ones among them: the same case as while it was filling up.
        return Diagonal.LENGTH if q_length == 1 and kv_length == window else Diagonal.UNPADDED
    if known and offset == 0 and q_length > 1:
        return Diagonal.TOP_LEFT
    if not padded and q_length <= MAX_DRAFTS:
        return Diagonal.LENGTH
    return Diagonal.ONE_QUERY if q_length == 1 else Diagonal.GIVEN


def _padding(
    attention_mask: Tensor | None, batch_size: int, kv_length: int, kv_offset: int, device: torch.device | str
) -> Tensor:
    """(B, Skv) int32: 0, or -1 for padding. The mask covers the whole sequence, the keys of a sliding cache its end."""
    if attention_mask is None:
        return torch.zeros(batch_size, kv_length, dtype=torch.int32, device=device)
    real = attention_mask[:, kv_offset : kv_offset + kv_length].to(device=device, dtype=torch.int32)
    missing = kv_length - real.shape[1]
    if missing > 0:  # what a static cache has not written yet
        real = torch.nn.functional.pad(real, (0, missing))
    return real - 1


def _window(mask_function: Callable, local_size: int | None, use_vmap: bool, config: object) -> int | None:
    """The window of a mask that is causal, and None without one."""
    if use_vmap:
        raise _refusal("a mask function of the caller (or_mask_function, and_mask_function)")
    window = _traced_window(mask_function, local_size, config) if torch.compiler.is_dynamo_compiling() else None
    if not torch.compiler.is_dynamo_compiling():
        causal, window = _rules(mask_function)
        if not causal:
            raise _refusal("attention in both directions")
    if window is not None and window != getattr(config, "sliding_window", None):
        # The layers take the window's width from their configuration.
        raise _refusal(f"a window of {window} where config.sliding_window is {getattr(config, 'sliding_window', None)}")
    return window


def _rules(mask_function: Callable) -> tuple[bool, int | None]:
    """Whether the mask is causal, and its window."""
    code = getattr(mask_function, "__code__", None)
    if code is _CAUSAL:
        return True, None
    if code is _PACKED:  # the layers find the documents by themselves
        return False, None
    held = dict(zip(code.co_freevars, mask_function.__closure__ or (), strict=True)) if code is not None else {}
    held = {name: cell.cell_contents for name, cell in held.items()}
    if code is _WINDOW:
        return False, held["sliding_window"]
    if code is _REMAP:  # a window counts positions inside a document, as it does between the document's neighbours
        return _rules(held["mask_function"])
    if code is _AND:
        causal, windows = zip(*(_rules(part) for part in held["mask_functions"]), strict=True)
        return any(causal), min((window for window in windows if window is not None), default=None)
    raise _refusal(f"the mask function {getattr(mask_function, '__qualname__', mask_function)!r}")


def _traced_window(mask_function: Callable, local_size: int | None, config: object) -> int | None:
    """As ``_rules``, from the outermost function and the sizes: torch.compile cannot look into a closure."""
    code = mask_function.__code__
    if code is not _CAUSAL and code is not _AND:
        raise _refusal("a pattern other than causal, with or without a window")
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        raise _refusal("attention in chunks")
    return local_size


def _assert_causal(mask_function: Callable, batch_size: int, q_length: int, device: torch.device | str) -> None:
    """Under torch.compile a mask of blocks that see both ways looks like one of packed documents from outside.

    Only such a mask lets a query see the key to its right. The values stay on the device.
    """
    batch = torch.arange(batch_size, device=device)[:, None]
    query = torch.arange(q_length - 1, device=device)[None]
    ahead = mask_function(batch, torch.zeros_like(batch), query, query + 1)
    torch._assert_async(~ahead.any(), "selfattn: the mask lets a query see a later key, which cannot be served")


def _refusal(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"selfattn: cannot serve {what}: expected a causal mask, with or without the window config.sliding_window. "
        "Use another attn_implementation for this model."
    )
