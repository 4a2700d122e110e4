"""What tests and benchmarks share: calls of attention, patterns of segment ids, memory layouts, who may attend to whom,
and the dense formula with its gradients in any precision, on any device.

The formula multiplies what is masked by 0, so it is for finite numbers; reference.py knows nothing but allowed pairs.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

OPTIONS = ("causal", "qk_scale", "window_left", "window_right", "softcap")
IDS = ("segment_ids", "kv_segment_ids")
POSITIONS = ("positions", "kv_positions")


@dataclass(frozen=True)
class Case:
    """One call of attention and its backward pass."""

    name: str = ""
    batch: int = 2
    num_queries: int = 13
    num_keys: int = 0  # 0: num_queries
    num_heads: int = 4
    num_kv_heads: int = 2
    dim: int = 16
    value_dim: int = 0  # 0: dim
    ids: str | None = "packed"  # a kind of make_ids
    has_kv_ids: bool = False
    positions: str | None = None  # a kind of make_positions
    has_sinks: bool = False
    has_grad_lse: bool = False
    causal: bool = True
    qk_scale: float | None = None
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32
    layout: str = "bsnd"  # of LAYOUTS
    spread: float = 1.0  # standard deviation of q and k

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_keys", self.num_keys or self.num_queries)
        object.__setattr__(self, "value_dim", self.value_dim or self.dim)

    def __str__(self) -> str:
        usual = {field.name: field.default for field in fields(self)}
        usual |= {"num_keys": self.num_queries, "value_dim": self.dim}
        changes = [f"{name}={getattr(self, name)}" for name in usual if getattr(self, name) != usual[name]]
        return self.name or "-".join(changes) or "usual"

    @property
    def options(self) -> dict[str, Any]:
        """The options that are not defaults."""
        return {name: getattr(self, name) for name in OPTIONS if getattr(self, name) != getattr(Case, name)}

    def with_(self, **changes: Any) -> "Case":
        """The numbers of keys and of value dimensions stay unless they are named."""
        return replace(self, **changes)

    def random(self, length: int, heads: int, dim: int, dtype: torch.dtype | None, device: str) -> Tensor:
        """(B, length, heads, dim) of size 1, in the case's layout."""
        tensor = torch.randn(self.batch, length, heads, dim, dtype=torch.float64, device=device)
        return lay_out(tensor.to(dtype or self.dtype), self.layout)

    def tensors(self, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor]:
        """q, k, v and, where the case has them, ids and positions of queries and keys (int32) and sinks."""
        tensors = {
            "q": self.random(self.num_queries, self.num_heads, self.dim, dtype, device).mul_(self.spread),
            "k": self.random(self.num_keys, self.num_kv_heads, self.dim, dtype, device).mul_(self.spread),
            "v": self.random(self.num_keys, self.num_kv_heads, self.value_dim, dtype, device),
        }
        if self.ids is not None:
            tensors["segment_ids"] = make_ids(self.ids, self.batch, self.num_queries).to(device)
        if self.has_kv_ids:
            tensors["kv_segment_ids"] = make_ids(self.ids, self.batch, self.num_keys).to(device)
        if self.positions is not None:
            of_queries, of_keys = make_positions(self.positions, self.batch, self.num_queries, self.num_keys)
            tensors["positions"] = of_queries.to(device)
            if of_keys is not None:
                tensors["kv_positions"] = of_keys.to(device)
        if self.has_sinks:
            tensors["sinks"] = torch.randn(self.num_heads, dtype=torch.float64).to(device, dtype or self.dtype)
        return tensors

    def grads(self, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor]:
        """grad_out and, where the case has it, grad_lse (float32)."""
        grads = {"grad_out": self.random(self.num_queries, self.num_heads, self.value_dim, dtype, device)}
        if self.has_grad_lse:
            grads["grad_lse"] = torch.randn(self.batch, self.num_heads, self.num_queries, device=device)
        return grads

    def allowed(self, tensors: dict[str, Tensor]) -> Tensor:
        """(B, 1, Sq, Skv)."""
        ids = {name: tensors[name] for name in (*IDS, *POSITIONS) if name in tensors}
        windows = {"window_left": self.window_left, "window_right": self.window_right}
        return allowed_pairs(tensors["q"], tensors["k"], causal=self.causal, **windows, **ids)


def documents(batch: int, length: int, mean: float) -> Tensor:
    """(batch, length) ids of documents side by side, each token the first of one with probability 1 / mean."""
    return (torch.rand(batch, length) < 1 / mean).cumsum(1)


def names(documents: Tensor) -> Tensor:
    """Another id of 31 bits for each number of a document, in no order."""
    return (documents.long() * 1640531527 + 12345) % 2**31


def make_ids(kind: str, batch: int, length: int) -> Tensor:
    """Segment ids (batch, length) int32 of a kind that the semantics must serve."""
    positions = torch.arange(length).expand(batch, length)
    match kind:
        case "packed":  # four documents side by side, padding at the end
            ids = torch.sort(torch.randint(0, 4, (batch, length)), dim=1).values
            ids[:, length - length // 6 :] = -1
        case "documents":
            ids = documents(batch, length, 90)
        case "short_documents":
            ids = documents(batch, length, 5)
        case "long_documents":
            ids = documents(batch, length, 2000)
            ids[:, -40:] = -1
        case "padding_after":
            ids = documents(batch, length, 40)
            ids[:, length - length // 6 :] = -1
        case "padding_around":  # of two values, before the documents in the first row alone
            ids = documents(batch, length, 60)
            ids[:, length - length // 3 :] = -1
            ids[0, : length // 5] = -7
        case "mostly_long_documents":
            ids = torch.zeros(batch, length)
            ids[-1] = documents(1, length, 90)
        case "mostly_short_documents":
            ids = documents(batch, length, 90)
            ids[0], ids[-1] = 0, 0
        case "one_row_reversed":  # its ids descend
            ids = documents(batch, length, 70)
            ids[0] = ids[0].flip(0)
        case "one_document":
            ids = torch.full((batch, length), 7)
        case "distinct":  # every document has one token
            ids = positions
        case "permuted":  # the same in any order
            ids = torch.stack([torch.randperm(length) for _ in range(batch)])
        case "descending":
            ids = (length - positions) // 20
        case "named":  # documents side by side whose ids are hashes
            ids = names(documents(batch, length, length / 5 + 1))
        case "named_padding":  # some padding between them, and at the end
            ids = names(documents(batch, length, length / 9 + 1))
            ids[torch.rand(batch, length) < 0.1] = -1
            ids[:, length - length // 6 :] = -3
            first_of_run = torch.cat([torch.ones(batch, 1), (ids.diff() != 0)], 1).bool()
            ids = torch.where(ids < 0, ids, names((first_of_run & (ids >= 0)).cumsum(1)))
        case "reused":  # runs 0 1 0 1: an id that comes back is the same document
            ids = positions // 3 % 2
        case "reused_tiles":  # so that some blocks of a kernel are skipped and some are full
            ids = positions // 64 % 3
        case "blocks":  # the same in any order
            ids = torch.randint(0, 5, (batch, length // 50 + 1)).repeat_interleave(50, 1)[:, :length]
        case "shuffled":  # the tokens of a document anywhere
            ids = torch.randint(0, 3, (batch, length))
        case "shuffled_padding":  # some padding between them
            ids = torch.randint(-1, 4, (batch, length))
        case "mixed_padding":  # negative ids of several values between them, as many as tokens
            ids = torch.randint(-3, 3, (batch, length))
        case "all_padding":
            ids = torch.full((batch, length), -1)
        case "padding_but_one_row":
            ids = torch.full((batch, length), -1)
            ids[0] = 3
        case _:
            raise ValueError(kind)
    return ids.to(torch.int32).contiguous()


def zigzag(length: int, ranks: int = 2) -> Tensor:
    """(length,) the order in which context parallelism hands a row's tokens to ranks, so that causal work is even: of
    2 * ranks chunks each rank has one from the front and one from the back."""
    chunks = torch.arange(length).tensor_split(2 * ranks)
    return torch.cat([chunk for rank in range(ranks) for chunk in (chunks[rank], chunks[-1 - rank])])


def make_positions(kind: str, batch: int, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor | None]:
    """positions (batch, num_queries) and kv_positions (batch, num_keys) int32 of a kind that the semantics must serve;
    None for the keys where the queries' serve for them."""
    of_queries, of_keys = (torch.arange(length).expand(batch, length) for length in (num_queries, num_keys))
    match kind:
        case "index":  # as without positions
            of_queries = of_queries + num_keys - num_queries
        case "zigzag":
            of_queries, of_keys = (zigzag(length).expand(batch, length) for length in (num_queries, num_keys))
        case "gathered":  # the queries of one rank, the keys of all
            of_keys = zigzag(num_keys).expand(batch, num_keys)
            of_queries = of_keys[:, :num_queries]
        case "restarting":  # in each document of about 7
            of_queries, of_keys = of_queries % 7, of_keys % 7
        case "cache":  # of rows that are filled to different lengths, whose last tokens are the queries
            filled = torch.randint(num_keys // 3, num_keys + 1, (batch, 1))
            of_queries = filled - num_queries + of_queries
            of_keys = torch.where(of_keys < filled, of_keys, 2**31 - 1)
        case "any":  # some are negative, many equal
            of_queries, of_keys = (torch.randint(-5, 6, (batch, length)) for length in (num_queries, num_keys))
        case "permuted":
            of_queries, of_keys = (
                torch.stack([torch.randperm(length) for _ in range(batch)]) for length in (num_queries, num_keys)
            )
        case "extreme":
            numbers = torch.tensor([-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 2, 2**31 - 1])
            of_queries, of_keys = (
                numbers[torch.randint(0, len(numbers), (batch, length))] for length in (num_queries, num_keys)
            )
        case "extreme_in_order":
            numbers = torch.tensor([-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 2, 2**31 - 1])
            of_queries, of_keys = (
                numbers[torch.randint(0, len(numbers), (batch, length)).sort().values]
                for length in (num_queries, num_keys)
            )
        case "future":  # nothing may be seen
            of_keys = of_keys + num_queries
        case "alike":  # of queries and keys, by default
            return of_queries.flip(1).to(torch.int32), None
        case _:
            raise ValueError(kind)
    return of_queries.to(torch.int32).contiguous(), of_keys.to(torch.int32).contiguous()


LAYOUTS = {
    "bsnd": ((0, 1, 2, 3), 0, 0, 0),
    "bnsd": ((0, 2, 1, 3), 0, 0, 0),
    "padded": ((0, 1, 2, 3), 0, 0, 8),
    "odd": ((0, 1, 2, 3), 0, 0, 3),
    "surrounded": ((0, 1, 2, 3), 1, 1, 2),
    "surrounded_bnsd": ((0, 2, 1, 3), 1, 1, 2),
    "surrounded_bsdn": ((0, 1, 3, 2), 1, 1, 2),
}
"""Order of the dimensions in memory, and what lies around: tokens at both ends, elements before and after each row."""


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values (B, S, N, D) in that memory layout, with NaN, which nobody may read, in what lies around."""
    order, tokens, before, after = LAYOUTS[layout]
    room = pad(tensor, (before, after, 0, 0, tokens, tokens), value=math.nan).permute(order).contiguous().permute(order)
    return room.narrow(1, tokens, tensor.shape[1]).narrow(3, before, tensor.shape[3])


def allowed_pairs(
    q: Tensor,
    k: Tensor,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    *,
    kv_segment_ids: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
) -> Tensor:
    """(B, 1, Sq, Skv), True where a query may attend to a key."""
    query = torch.arange(q.shape[1], device=q.device)[None, :, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1], device=q.device)[None, None]
    if positions is not None:
        kv_positions = positions if kv_positions is None else kv_positions
        query, key = positions.long()[:, :, None], kv_positions.long()[:, None]
    allowed = torch.ones(q.shape[0], q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if causal:
        allowed &= key <= query
    if window_left >= 0:
        allowed &= key >= query - window_left
    if window_right >= 0:
        allowed &= key <= query + window_right
    if segment_ids is None:
        return allowed[:, None]
    key_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    same = (segment_ids[:, :, None] == key_ids[:, None]) & (segment_ids >= 0)[:, :, None]
    return (same & allowed)[:, None]


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    qk_scale: float | None = None,
    *,
    kv_segment_ids: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    precision: torch.dtype = torch.float64,
    rounding: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """out, lse and, with grad_out, dq, dk, dv by the formula in ``precision``; the gradients from a forward pass's
    ``out`` and ``lse`` where they are given. The formula in a kernel's own precision is that in float32 with
    ``rounding`` to the dtype of q of what enters a product or leaves: P, dS and the results."""
    windows = {"window_left": window_left, "window_right": window_right}
    tokens = {"kv_segment_ids": kv_segment_ids, "positions": positions, "kv_positions": kv_positions}
    masked = ~allowed_pairs(q, k, segment_ids, causal, **tokens, **windows)
    group, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5 if qk_scale is None else qk_scale

    def rounded(tensor: Tensor) -> Tensor:
        return tensor if rounding is None else tensor.to(rounding).to(precision)

    def of_kv_heads(tensor: Tensor) -> Tensor:
        return rounded(tensor.unflatten(1, (-1, group)).sum(2)).transpose(1, 2)

    q = q.detach().to(precision).transpose(1, 2)
    k, v = (tensor.detach().to(precision).transpose(1, 2).repeat_interleave(group, 1) for tensor in (k, v))
    logits = scale * (q @ k.mT)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    scores = counted = logits.masked_fill(masked, -math.inf)
    if sinks is not None:
        column = sinks.detach().to(precision)[None, :, None, None].expand(*scores.shape[:3], 1)
        counted = torch.cat([scores, column], -1)
    largest = counted.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    total = (counted - largest).exp().sum(-1, keepdim=True)
    p, divisor = (scores - largest).exp(), total.masked_fill(total == 0.0, 1.0)
    own_out = rounded(rounded(p) @ v / divisor)
    results = {"out": own_out.transpose(1, 2), "lse": (largest + total.log())[..., 0]}
    if grad_out is None:
        return results
    p, out = p / divisor, own_out if out is None else out.to(precision).transpose(1, 2)
    if lse is not None:
        p = (scores - lse.to(precision).masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    grad_out = grad_out.to(precision).transpose(1, 2)
    delta = (grad_out * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.to(precision)[..., None]
    ds = p * (grad_out @ v.mT - delta)
    if softcap > 0:
        ds = ds * (1 - (logits / softcap).square())
    ds = rounded(ds)
    results["dq"] = rounded(scale * (ds @ k)).transpose(1, 2)
    return results | {"dk": of_kv_heads(scale * (ds.mT @ q)), "dv": of_kv_heads(rounded(p).mT @ grad_out)}


UNIT = 0.3
"""The random inputs are of size 1, and so are most results."""


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest element of ``expected``, which counts as at least UNIT: a gradient
    that is exactly 0 comes out as the rounding of its terms. Infinite where NaN or infinities differ."""
    actual, expected = actual.detach().to("cpu", torch.float64), expected.detach().to("cpu", torch.float64)
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    finite = expected.isfinite()
    if not torch.equal(actual[~finite], expected[~finite]) or not actual[finite].isfinite().all():
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(expected[finite].abs().max().item(), UNIT)
    return (actual[finite] - expected[finite]).abs().max().item() / scale


def norm_error(actual: Tensor, expected: Tensor, smallest: float = 1e-6) -> float:
    """Norm of the deviation over the norm of ``expected``, which counts as at least ``smallest``. Fails by itself where
    NaN or infinities differ."""
    actual, expected = actual.detach().double(), expected.detach().to(actual.device, torch.float64)
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite]), "infinities differ"
    assert actual[finite].isfinite().all(), "not finite"
    return ((actual[finite] - expected[finite]).norm() / expected[finite].norm().clamp_min(smallest)).item()
