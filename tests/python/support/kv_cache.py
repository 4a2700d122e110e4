"""Attention over a KV cache: random calls of every kind, the promise in slow loops, the formula that bounds a kernel.

A test of a backend or a kernel is

    case = draw a CacheCase (``cases()``), or name one
    call = case.make(device)                      # arguments of attention_with_kv_cache, without ``backend``
    out, lse = selfattn.attention_with_kv_cache_lse(**call, backend=...)
    check_results(call, out, lse)                 # at most twice the error of the formula in the same precision

Whatever no query may see is poisoned: NaN in the slots, pages that are not there in the table.

Shapes as in selfattn.attention_with_kv_cache: R rows, P pages, q (B, Sq, NH, DQK).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from support.problems import allowed_pairs, dense_attention, error, norm_error

LENGTH_KINDS = ("mixed", "zero", "one", "edges", "full")
TABLE_KINDS = (None, "ordered", "shuffled", "shared", "ring")
"""None: no table, a page a row."""
ID_KINDS = (None, "decode", "chunks", "padded", "any_order", "step", "all_padding")
"""None: no ids, queries of row b in batch b."""
POSITION_KINDS = (None, "end", "any")
LAYOUTS = ("nhd", "hnd", "joined", "padded")
"""How the caches lie in memory: heads inside tokens, tokens inside heads, keys and values of a page side by side, rows
with elements around them."""
WINDOWS = ((-1, -1), (0, -1), (3, -1), (-1, 2), (5, 1))


@dataclass(frozen=True)
class CacheCase:
    """One call. The defaults are a decode step over pages."""

    rows: int = 3
    page_size: int = 4
    pages_per_row: int = 3  # 1 without a table
    num_queries: int = 1  # of a batch row; of all tokens, where there are ids
    num_heads: int = 4
    num_kv_heads: int = 2
    dim: int = 16
    value_dim: int = 0  # 0: dim
    lengths: str = "mixed"
    table: str | None = "shuffled"
    ids: str | None = None
    positions: str | None = None
    has_draft_mask: bool = False
    has_sinks: bool = False
    causal: bool = True
    qk_scale: float | None = None
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    split_keys: int = 0
    layout: str = "nhd"
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.table is None:  # the same slots in one page
            object.__setattr__(self, "page_size", self.page_size * self.pages_per_row)
            object.__setattr__(self, "pages_per_row", 1)
        object.__setattr__(self, "value_dim", self.value_dim or self.dim)

    def __str__(self) -> str:
        usual = {field.name: field.default for field in fields(self)} | {"value_dim": self.dim}
        changes = [f"{name}={getattr(self, name)}" for name in usual if getattr(self, name) != usual[name]]
        return "-".join(changes) or "usual"

    def with_(self, **changes: Any) -> "CacheCase":
        return replace(self, **changes)

    @property
    def capacity(self) -> int:
        return self.page_size * self.pages_per_row

    def make(self, device: str = "cpu") -> dict[str, Any]:
        """The arguments, on the device; options that are defaults are left out."""
        generator = torch.Generator().manual_seed(self.seed)
        call: dict[str, Any] = {"lengths": self._lengths(generator)}
        table, num_pages = self._table(generator)
        if table is not None:
            call["page_table"] = table
        ids = self._ids(generator)
        if ids is not None:
            call["segment_ids"] = ids
        batch, length = (self.rows, self.num_queries) if ids is None else ids.shape
        if self.positions is not None:
            call["positions"] = self._positions(generator, call, batch, length)
        call = {name: tensor.to(self.index_dtype) for name, tensor in call.items()}
        if self.has_draft_mask:
            call["draft_mask"] = torch.rand(batch, length, length, generator=generator) < 0.6
        if self.has_sinks:
            call["sinks"] = torch.randn(self.num_heads, generator=generator).to(self.dtype)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(self.dtype)

        call["q"] = randn(batch, length, self.num_heads, self.dim)
        call["k_cache"] = randn(num_pages, self.page_size, self.num_kv_heads, self.dim)
        call["v_cache"] = randn(num_pages, self.page_size, self.num_kv_heads, self.value_dim)
        for name in ("causal", "qk_scale", "window_left", "window_right", "softcap", "split_keys"):
            if getattr(self, name) != getattr(CacheCase, name):
                call[name] = getattr(self, name)
        poison(call, generator)
        call = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}
        call["k_cache"], call["v_cache"] = lay_out(call["k_cache"], call["v_cache"], self.layout)
        return call

    def _lengths(self, generator: torch.Generator) -> Tensor:
        def choose(*values: int) -> Tensor:
            return torch.tensor(values)[torch.randint(0, len(values), (self.rows,), generator=generator)]

        page, capacity = self.page_size, self.capacity
        match self.lengths:
            case "mixed":
                return torch.randint(0, capacity + 1, (self.rows,), generator=generator)
            case "zero":
                return torch.zeros(self.rows, dtype=torch.int64)
            case "one":
                return torch.ones(self.rows, dtype=torch.int64)
            case "edges":
                return choose(*(min(edge, capacity) for edge in (page - 1, page, page + 1, capacity - 1, capacity)))
            case "full":
                return torch.full((self.rows,), capacity)
        raise ValueError(self.lengths)

    def _table(self, generator: torch.Generator) -> tuple[Tensor | None, int]:
        shape, needed = (self.rows, self.pages_per_row), self.rows * self.pages_per_row
        match self.table:
            case None:
                return None, self.rows
            case "ordered":
                return torch.arange(needed).view(shape), needed
            case "shuffled":
                return torch.randperm(needed + 3, generator=generator)[:needed].view(shape), needed + 3
            case "shared":  # the first half of a row's pages is every row's
                table = torch.randperm(needed, generator=generator).view(shape)
                table[:, : self.pages_per_row // 2] = table[0, : self.pages_per_row // 2].clone()
                return table, needed
            case "ring":  # a row goes round in two pages
                pages = torch.arange(self.rows)[:, None] * 2 + torch.arange(self.pages_per_row)[None] % 2
                return pages, self.rows * 2
        raise ValueError(self.table)

    def _ids(self, generator: torch.Generator) -> Tensor | None:
        def draw(low: int, shape: tuple[int, ...]) -> Tensor:
            return torch.randint(low, self.rows, shape, generator=generator)

        match self.ids:
            case None:
                return None
            case "decode":  # a token of each of some rows, in one batch row
                return torch.randperm(self.rows, generator=generator)[None, : max(self.num_queries, 1)]
            case "chunks":  # runs, prefill chunks beside single tokens
                return torch.sort(draw(0, (1, self.num_queries))).values
            case "padded":
                ids = torch.sort(draw(0, (2, self.num_queries))).values
                ids[:, self.num_queries - self.num_queries // 3 :] = -1
                return ids
            case "any_order":
                return draw(-1, (2, self.num_queries))
            case "step":  # of a server: runs in any order, a long chunk, one of about 64 tokens, else single tokens
                order, counts = torch.randperm(self.rows, generator=generator), torch.ones(self.rows, dtype=torch.int64)
                short = min(62 + self.seed % 2, max(self.num_queries - self.rows, 0) // 2)
                counts[-1] += short
                counts[0] += max(self.num_queries - self.rows - short, 0)
                return order.repeat_interleave(counts)[None, : self.num_queries]
            case "all_padding":
                return torch.full((1, self.num_queries), -2)
        raise ValueError(self.ids)

    def _positions(self, generator: torch.Generator, call: dict[str, Tensor], batch: int, length: int) -> Tensor:
        if self.positions == "end":  # what they are without
            return torch.tensor(positions_of_tokens(call | {"q": torch.zeros(batch, length, 1, 1)}))
        return torch.randint(-2, self.capacity + 2, (batch, length), generator=generator)


def lay_out(keys: Tensor, values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The same caches in that memory layout; NaN lies around them."""
    match layout:
        case "nhd":
            return keys, values
        case "hnd":
            return tuple(cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (keys, values))
        case "joined":
            room = keys.new_full((keys.shape[0], 2, *keys.shape[1:3], max(keys.shape[3], values.shape[3])), math.nan)
            joined = room[:, 0, :, :, : keys.shape[3]], room[:, 1, :, :, : values.shape[3]]
        case "padded":
            joined = tuple(
                torch.nn.functional.pad(torch.full_like(cache, math.nan), (8, 8), value=math.nan)[..., 8:-8]
                for cache in (keys, values)
            )
        case _:
            raise ValueError(layout)
    for cache, room in zip((keys, values), joined, strict=True):
        room.copy_(cache)
    return joined


def poison(call: dict[str, Any], generator: torch.Generator) -> None:
    """NaN in every slot that no query sees, and entries of the table that must not be read."""
    page_size, num_pages = call["k_cache"].shape[1], call["k_cache"].shape[0]
    seen_slots = torch.zeros(num_pages, page_size, dtype=torch.bool)
    table = call.get("page_table")
    seen_entries = None if table is None else torch.zeros_like(table, dtype=torch.bool)
    if "draft_mask" in call:
        seen = {(row, slot) for b, i, row in tokens(call) for slot in visible_slots(call, b, i)}
    else:
        seen = {
            (row + first, slot)
            for first, _, of_row in row_calls(call)
            for row, slot in visible_pairs(of_row).any(1).nonzero().tolist()
        }
    for row, slot in seen:
        page, offset = divmod(slot, page_size)
        if seen_entries is not None:
            seen_entries[row, page] = True
        seen_slots[page_of(call, row, page), offset] = True
    call["k_cache"][~seen_slots] = math.nan
    call["v_cache"][~seen_slots] = math.nan
    if table is not None:
        nowhere = torch.tensor([-1, -7, num_pages, 2**31 - 1, 0])[torch.randint(0, 5, table.shape, generator=generator)]
        call["page_table"] = torch.where(seen_entries, table, nowhere.to(table.dtype))


# ---------------------------------------------------------------- the promise, in loops


def tokens(call: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(batch, index, row of the cache) of each query in order; the row is -1 where it has none."""
    batch, length = call["q"].shape[:2]
    ids = None if call.get("segment_ids") is None else call["segment_ids"].tolist()
    return [(b, i, b if ids is None else max(ids[b][i], -1)) for b in range(batch) for i in range(length)]


def positions_of_tokens(call: dict[str, Any]) -> list[list[int]]:
    """The slot of each query, (B, Sq); -1 for those of no row."""
    batch, length = call["q"].shape[:2]
    if call.get("positions") is not None:
        given = call["positions"].tolist()
        positions = [[-1] * length for _ in range(batch)]
        for b, i, row in tokens(call):
            positions[b][i] = given[b][i] if row >= 0 else -1
        return positions
    following = call["lengths"].tolist()  # the slot after the row's next token from the end
    positions = [[-1] * length for _ in range(batch)]
    for b, i, row in reversed(tokens(call)):
        if row >= 0:
            following[row] -= 1
            positions[b][i] = following[row]
    return positions


def visible_slots(call: dict[str, Any], b: int, i: int) -> list[int]:
    """The slots of its row that query i of batch row b may attend to."""
    row = b if call.get("segment_ids") is None else int(call["segment_ids"][b, i])
    if row < 0:
        return []
    position, length = positions_of_tokens(call)[b][i], int(call["lengths"][row])
    num_queries = call["q"].shape[1]
    draft_mask, causal = call.get("draft_mask"), call.get("causal", True)
    window_left, window_right = call.get("window_left", -1), call.get("window_right", -1)
    slots = []
    for slot in range(length if position >= 0 else 0):
        draft = slot - (length - num_queries)
        if draft_mask is not None and draft >= 0:
            is_allowed = bool(draft_mask[b, i, draft])
        else:
            is_allowed = not causal or slot <= position
        if window_left >= 0 and slot < position - window_left:
            is_allowed = False
        if window_right >= 0 and slot > position + window_right:
            is_allowed = False
        if is_allowed:
            slots.append(slot)
    return slots


def page_of(call: dict[str, Any], row: int, page: int) -> int:
    return row if call.get("page_table") is None else int(call["page_table"][row, page])


def gather(call: dict[str, Any], cache: Tensor, row: int, slots: list[int]) -> Tensor:
    """(slots, NKV, D)."""
    page_size = cache.shape[1]
    places = [(page_of(call, row, slot // page_size), slot % page_size) for slot in slots]
    return torch.stack([cache[place] for place in places]) if places else cache.new_zeros(0, *cache.shape[2:])


def attention(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """out (B, Sq, NH, DV) and lse (B, NH, Sq) by the formula, one query and one head after the other, in float64 on the
    CPU, differentiable."""
    call = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in call.items()}
    q, keys, values = call["q"].double(), call["k_cache"].double(), call["v_cache"].double()
    sinks = None if call.get("sinks") is None else call["sinks"].double()
    batch, length, num_heads, dim = q.shape
    group, softcap = num_heads // keys.shape[2], call.get("softcap", 0.0)
    scale = 1 / math.sqrt(dim) if call.get("qk_scale") is None else call["qk_scale"]
    outs, lses = [], []
    for b, i, row in tokens(call):
        slots = visible_slots(call, b, i)
        k, v = gather(call, keys, row, slots), gather(call, values, row, slots)
        for head in range(num_heads):
            logits = scale * (k[:, head // group] @ q[b, i, head])
            if softcap > 0:
                logits = softcap * torch.tanh(logits / softcap)
            counted = logits if sinks is None else torch.cat([logits, sinks[head : head + 1]])
            lse = torch.logsumexp(counted, 0) if len(counted) else torch.tensor(-math.inf, dtype=torch.float64)
            lses.append(lse)
            outs.append(torch.exp(logits - lse) @ v[:, head // group])
    if not outs:
        return q.new_zeros(batch, length, num_heads, values.shape[3]), q.new_zeros(batch, num_heads, length)
    out = torch.stack(outs).view(batch, length, num_heads, values.shape[3])
    return out, torch.stack(lses).view(batch, length, num_heads).transpose(1, 2)


# ---------------------------------------------------------------- what bounds a kernel

FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Relative error in the norm that rounding alone explains, where the same-precision formula happens to be exact."""
ABSOLUTE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
"""Largest error of one element, as ``error`` measures it."""


def formula(call: dict[str, Any], precision: torch.dtype, rounding: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """out and lse by dense products of each query with the slots that it sees, in ``precision``; ``rounding`` as in
    dense_attention."""
    call = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in call.items()}
    batch, length, num_heads, _ = call["q"].shape
    out = torch.zeros(batch, length, num_heads, call["v_cache"].shape[3], dtype=precision)
    lse = torch.zeros(batch, num_heads, length, dtype=precision)
    options = {name: call[name] for name in ("qk_scale", "softcap", "sinks") if name in call}
    for b, i, row in tokens(call):
        slots = visible_slots(call, b, i)
        k, v = (gather(call, call[name], row, slots)[None] for name in ("k_cache", "v_cache"))
        if not slots:
            k, v = (tensor.new_zeros(1, 1, *tensor.shape[2:]) for tensor in (k, v))
        ids = {"segment_ids": torch.zeros(1, 1), "kv_segment_ids": torch.full((1, k.shape[1]), 0 if slots else -1)}
        one = dense_attention(
            call["q"][b, i][None, None], k, v, causal=False, precision=precision, rounding=rounding, **ids, **options
        )
        out[b, i], lse[b, :, i] = one["out"][0, 0], one["lse"][0, :, 0]
    return out, lse


def row_calls(call: dict[str, Any]) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """A call without draft mask as some without ids: the first row of the cache of each, which of the tokens (B, Sq)
    are its own, and its arguments."""
    ids = call.get("segment_ids")
    if ids is None:
        yield 0, torch.ones(call["q"].shape[:2], dtype=torch.bool, device=call["q"].device), call
        return
    positions = torch.tensor(positions_of_tokens(call), device=ids.device)
    rest = {name: value for name, value in call.items() if name != "segment_ids"}
    for row in ids[ids >= 0].unique().tolist():
        per_row = ("lengths", "page_table") if "page_table" in call else ("lengths", "k_cache", "v_cache")
        own = {name: call[name][row : row + 1] for name in per_row}
        is_own = ids == row
        yield row, is_own, rest | own | {"q": call["q"][is_own][None], "positions": positions[is_own][None]}


def visible_pairs(call: dict[str, Any]) -> Tensor:
    """(B, Sq, slots of a row), True for what visible_slots names, of a call without ids and draft mask."""
    return allowed_pairs(**_as_rows(call))[:, 0]


def _as_rows(call: dict[str, Any]) -> dict[str, Any]:
    """That call as arguments of allowed_pairs, with keys that have a shape alone."""
    device, length, lengths = call["q"].device, call["q"].shape[1], call["lengths"].long()[:, None]
    positions = lengths - length + torch.arange(length, device=device)
    if call.get("positions") is not None:
        positions = call["positions"].long()
    pages_per_row = 1 if call.get("page_table") is None else call["page_table"].shape[1]
    slots = torch.arange(pages_per_row * call["k_cache"].shape[1], device=device).expand(len(lengths), -1)
    return {
        "q": call["q"],
        "k": slots[..., None, None],
        "segment_ids": torch.where(positions < 0, -1, 0),
        "kv_segment_ids": torch.where(slots < lengths, 0, -1),
        "positions": positions,
        "kv_positions": slots,
        "causal": call.get("causal", True),
        "window_left": call.get("window_left", -1),
        "window_right": call.get("window_right", -1),
    }


def rows_formula(call: dict[str, Any], precision: torch.dtype, rounding: torch.dtype | None = None) -> list[Tensor]:
    """As ``formula``, of a call without draft mask, by one dense product a row, on the device of the call."""
    q, v = call["q"], call["v_cache"]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=precision, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=precision, device=q.device)
    if call.get("sinks") is not None:
        lse[:] = call["sinks"]
    for _, is_own, of_row in row_calls(call):
        own_out, own_lse = _formula_without_ids(of_row, precision, rounding)
        out[is_own], lse[is_own] = own_out.flatten(0, 1), own_lse.transpose(1, 2).flatten(0, 1)
    return [out, lse.transpose(1, 2)]


def _formula_without_ids(
    call: dict[str, Any], precision: torch.dtype, rounding: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    rows, page_size, table = _as_rows(call), call["k_cache"].shape[1], call.get("page_table")
    slots = rows["kv_positions"]
    table = torch.arange(len(slots), device=slots.device)[:, None] if table is None else table.long()
    pages = table.clamp(0, call["k_cache"].shape[0] - 1).repeat_interleave(page_size, 1)
    unseen = ~visible_pairs(call).any(1)[..., None, None]
    k, v = (call[name][pages, slots % page_size].masked_fill(unseen, 0.0) for name in ("k_cache", "v_cache"))
    options = {name: call[name] for name in ("qk_scale", "softcap", "sinks") if name in call}
    results = dense_attention(**rows | {"k": k, "v": v}, **options, precision=precision, rounding=rounding)
    return results["out"], results["lse"]


def check_results(call: dict[str, Any], out: Tensor, lse: Tensor | None = None, by_rows: bool = False) -> None:
    """The error against float64 is at most twice that of the formula in the same precision. ``by_rows``: both by
    rows_formula."""
    dtype = call["q"].dtype
    of_kernel = torch.promote_types(dtype, torch.float32), dtype
    if by_rows:
        (exact_out, exact_lse), (own_out, own_lse) = (
            [result.cpu() for result in rows_formula(call, *precision)] for precision in ((torch.float64,), of_kernel)
        )
    else:
        exact_out, exact_lse = attention(call)
        own_out, own_lse = formula(call, *of_kernel)
    named = [("out", out, exact_out, own_out, dtype)]
    if lse is not None:
        lse_dtype = torch.float32
        named.append(("lse", lse, exact_lse, own_lse, lse_dtype))
    for name, actual, exact, own, kind in named:
        assert actual.dtype == kind, f"{name} is {actual.dtype}"
        exact = exact.detach()
        allowed = 2 * norm_error(own, exact, smallest=1e-3) + FLOOR[kind]
        found = norm_error(actual.cpu(), exact, smallest=1e-3)
        assert found <= allowed, f"{name}: error {found}, allowed {allowed}"
        assert error(actual, exact) <= ABSOLUTE[kind], f"{name}: an element is off by {error(actual, exact)}"
    blind = torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)
    if by_rows:
        for _, is_own, of_row in row_calls(call):
            blind[is_own] = ~visible_pairs(of_row).any(-1).flatten()
    else:
        for b, i, _ in tokens(call):
            blind[b, i] = not visible_slots(call, b, i)
    assert (out[blind] == 0).all(), "out must be 0 where a query sees no key"


# ---------------------------------------------------------------- random calls


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> CacheCase:
    """Small calls of every kind; ``fixed`` fields are as given."""

    def choose(name: str, *values: Any) -> Any:
        return fixed[name] if name in fixed else draw(st.sampled_from(values))

    ids = choose("ids", *ID_KINDS)
    window = draw(st.sampled_from(WINDOWS))
    num_kv_heads = choose("num_kv_heads", 1, 2)
    drawn = {
        "rows": choose("rows", 1, 2, 4),
        "page_size": choose("page_size", 1, 4, 7, 16),
        "pages_per_row": choose("pages_per_row", 1, 2, 5),
        "num_queries": choose("num_queries", 1, 1, 2, 5) if ids is None else choose("num_queries", 1, 3, 9),
        "num_kv_heads": num_kv_heads,
        "num_heads": num_kv_heads * draw(st.sampled_from([1, 2, 3])),
        "dim": choose("dim", 8, 16),
        "value_dim": choose("value_dim", 0, 4),
        "lengths": choose("lengths", *LENGTH_KINDS),
        "table": choose("table", *TABLE_KINDS),
        "ids": ids,
        "positions": choose("positions", None, None, *POSITION_KINDS[1:]),
        "has_draft_mask": False if ids is not None else choose("has_draft_mask", False, False, True),
        "has_sinks": choose("has_sinks", False, True),
        "causal": choose("causal", True, True, False),
        "qk_scale": choose("qk_scale", None, 0.7),
        "window_left": window[0],
        "window_right": window[1],
        "softcap": choose("softcap", 0.0, 0.0, 1.5),
        "layout": choose("layout", *LAYOUTS),
        "index_dtype": choose("index_dtype", torch.int32, torch.int64),
        "seed": draw(st.integers(0, 2**20)),
    }
    return CacheCase(**(drawn | fixed))


def replays(
    attend: Callable[[dict[str, Any]], tuple[Tensor, Tensor]], calls: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], tuple[Tensor, Tensor]]]:
    """Each call, forth and back, with what one CUDA graph gives for it: captured of the first, and replayed over the
    values of each. The next replay overwrites the results."""
    static = {name: value.clone() if isinstance(value, Tensor) else value for name, value in calls[0].items()}
    attend(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = attend(static)
    for call in [*calls, *reversed(calls)]:
        for name, value in call.items():
            if isinstance(value, Tensor):
                static[name].copy_(value)
        graph.replay()
        yield call, results
