"""What a packed batch is: the numbers, and how they print."""

from dataclasses import dataclass, field
from os import PathLike

import torch
from torch import Tensor

from selfattn.flops import attention_flops
from selfattn.packing_report.pairs import PositionRules, count_allowed_keys, find_runs
from selfattn.packing_report.visited import Tiling, VisitedBlocks, find_visited

_TOKENS = 1 << 20  # rows of a tile and tokens that are looked at together
_BAR = 30  # characters
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_KERNEL_NAMES = {"sm90": "CUDA (sm90)", "sm80": "CUDA (sm80)", "cpu": "CPU"}


@dataclass(frozen=True)
class Spread:
    """The least, the middle and the largest of some values."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Tensor) -> "Spread":
        ordered = values.double().sort().values
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        return cls(float(ordered[0]), float(middle), float(ordered[-1]))


@dataclass(frozen=True)
class Packing:
    """What was asked about. Ids are int64 on the CPU, padding is -1."""

    segment_ids: Tensor  # (B, Sq)
    kv_segment_ids: Tensor | None  # (B, Skv), where the keys have ids of their own
    rules: PositionRules
    tiling: Tiling
    head_dim: int
    v_head_dim: int
    num_heads: int
    num_kv_heads: int

    @property
    def key_ids(self) -> Tensor:
        return self.segment_ids if self.kv_segment_ids is None else self.kv_segment_ids

    def visited(self, rows: slice) -> VisitedBlocks:
        has_own_key_ids = self.kv_segment_ids is not None
        return find_visited(self.segment_ids[rows], self.key_ids[rows], has_own_key_ids, self.rules, self.tiling)


@dataclass(frozen=True)
class PackingReport:
    """What ``packing_report`` found. ``print`` shows it as a table, ``draw`` as a picture.

    A document is the tokens of one id in a row, wherever they stand. Pairs are those of one query head, blocks those of
    one query head on CUDA and of one group of heads on the CPU; both are sums over the rows of the batch.
    """

    rows: int
    query_length: int
    key_length: int
    documents: Spread  #: a row
    lengths: Spread | None  #: tokens a document; None: there is no document
    length_histogram: tuple[tuple[int, int, int], ...]  #: (least length, largest length, documents), by powers of two
    fill: Spread  #: the share of a row's tokens that is not padding
    padding: int  #: tokens
    key_padding: int  #: tokens; those of `padding` where the keys have no ids of their own
    contiguous_rows: int  #: rows that the kernels take as intervals; in the others they compare ids
    pairs: int  #: the score square
    allowed_pairs: int
    blocks: int  #: of the score square
    visited_blocks: int
    dense_allowed_pairs: int  #: the same without ids: one document a row, no padding
    dense_visited_blocks: int
    notes: tuple[str, ...]  #: what looks wrong
    packing: Packing = field(repr=False, compare=False)

    @property
    def allowed_share(self) -> float:
        """Of the score square."""
        return self.allowed_pairs / self.pairs

    @property
    def visited_share(self) -> float:
        """Of the score square, in blocks."""
        return self.visited_blocks / self.blocks

    @property
    def dense_flops(self) -> int:
        """Of a forward pass over the whole score square, all rows and heads, as ``FlopCounterMode`` counts it."""
        p = self.packing
        query = (self.rows, self.query_length, p.num_heads, p.head_dim)
        key, value = ((self.rows, self.key_length, p.num_kv_heads, dim) for dim in (p.head_dim, p.v_head_dim))
        return attention_flops(query, key, value)

    @property
    def allowed_flops(self) -> int:
        """Of the allowed pairs: what has to be computed."""
        return self.dense_flops // self.pairs * self.allowed_pairs

    @property
    def visited_flops(self) -> int:
        """Of the visited blocks, whole ones at the edges too: what the kernels compute."""
        p = self.packing
        heads = p.num_heads // p.tiling.group
        block = p.tiling.query_tile * p.tiling.key_block * 2 * (p.head_dim + p.v_head_dim)
        return self.visited_blocks * heads * block

    def draw(self, path: str | PathLike, row: int = 0) -> None:
        """Draws the score square of a row: the allowed pairs, over the blocks that the kernels visit.

        Args:
            path: of the picture; its ending says the format (.png).
            row: of the batch.

        Raises:
            ImportError: matplotlib, which draws, is not installed.
            IndexError: there is no such row.
        """
        from selfattn.packing_report.picture import draw

        draw(self, path, row)

    def __str__(self) -> str:
        p = self.packing
        lines = [self._title(), ""]
        documents = [("documents a row", _spread(self.documents, ",.0f"), "")]
        if self.lengths:
            documents += [("document length", _spread(self.lengths, ",.0f"), "tokens")]
        documents += [("fill of a row", _spread(self.fill, ".1%"), "")]
        lines += _align([("", ("min", "median", "max"), ""), *documents])
        tokens = self.rows * self.query_length
        lines += ["", f"padding  {self.padding:,} of {tokens:,} tokens ({self.padding / tokens:.1%})"]
        if p.kv_segment_ids is not None:
            keys = self.rows * self.key_length
            lines += [f"padding  {self.key_padding:,} of {keys:,} keys ({self.key_padding / keys:.1%})"]
        lines += self._histogram()

        flops = (self.allowed_flops, self.visited_flops)
        dense_pairs = _share(self.dense_allowed_pairs, self.pairs), _share(self.dense_visited_blocks, self.blocks)
        of_dense = (
            _share(self.allowed_pairs, self.dense_allowed_pairs),
            _share(self.visited_blocks, self.dense_visited_blocks),
        )
        shares = [
            ("", ("allowed", "visited"), ""),
            ("share of the score square", (f"{self.allowed_share:.2%}", f"{self.visited_share:.2%}"), ""),
            ("the same, one document a row", dense_pairs, "without ids or padding, by the same mask"),
            ("FLOPs forward", tuple(_flops(x) for x in flops), self._heads()),
            ("share of one document a row", of_dense, ""),
        ]
        lines += ["", *_align(shares), "", self._kernels()]
        for note in self.notes:
            lines += ["", f"NOTE: {note}"]
        return "\n".join(lines)

    def _title(self) -> str:
        tokens = f"{self.query_length:,} tokens"
        if self.packing.kv_segment_ids is not None:
            tokens = f"{self.query_length:,} queries and {self.key_length:,} keys"
        return f"Packed batch of {_count(self.rows, 'row')} of {tokens}, {self.packing.rules}"

    def _heads(self) -> str:
        p = self.packing
        dims = f"{p.head_dim}" if p.head_dim == p.v_head_dim else f"{p.head_dim} and {p.v_head_dim}"
        heads = f"{_count(p.num_heads, 'query head')} of dimension {dims}"
        return f"{heads}; the whole square takes {_flops(self.dense_flops)}"

    def _kernels(self) -> str:
        tiling = self.packing.tiling
        rows = f"{tiling.query_tile} {'queries' if tiling.group == 1 else 'rows of queries x heads of a group'}"
        name = _KERNEL_NAMES[tiling.kernels]
        return (
            f"Visited: {self.visited_blocks:,} of {self.blocks:,} blocks of {rows} x {tiling.key_block} keys, by the "
            f"forward kernels for {name}.\n"
            f"They take {self.contiguous_rows:,} of {_count(self.rows, 'row')} as intervals, without comparing ids."
        )

    def _histogram(self) -> list[str]:
        if len(self.length_histogram) < 2:
            return []
        most = max(count for _, _, count in self.length_histogram)
        rows = [
            (f"{least:,} to {largest:,}" if least < largest else f"{least:,}", (f"{count:,}",), _bar(count, most))
            for least, largest, count in self.length_histogram
        ]
        return ["", *_align([("tokens a document", ("documents",), ""), *rows])]


def make_report(packing: Packing, notes: tuple[str, ...]) -> PackingReport:
    ids, keys, rules, tiling = packing.segment_ids, packing.key_ids, packing.rules, packing.tiling
    rows, query_length, key_length = len(ids), ids.shape[1], keys.shape[1]
    allowed = visited = lonely = 0
    contiguous_rows, documents, lengths = 0, [], []
    step = max(1, _TOKENS // max(query_length * tiling.group, key_length))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        keys_of_queries = count_allowed_keys(ids[part], keys[part], rules)
        allowed += int(keys_of_queries.sum())
        lonely += int(((keys_of_queries == 0) & (ids[part] >= 0)).sum())
        blocks = packing.visited(part)
        visited += int(blocks.count().sum())
        contiguous_rows += int((~blocks.compares).sum())
        for counted, whole in zip(_documents(ids[part]), (documents, lengths), strict=True):
            whole.append(counted)
    if lonely:
        notes += (
            f"{_count(lonely, 'query', 'queries')} that are not padding may attend to no key: their output is 0.",
        )
    document_lengths, is_real = torch.cat(lengths), ids >= 0
    one_document = torch.zeros(1, query_length, dtype=torch.int64), torch.zeros(1, key_length, dtype=torch.int64)
    return PackingReport(
        rows=rows,
        query_length=query_length,
        key_length=key_length,
        documents=Spread.of(torch.cat(documents)),
        lengths=Spread.of(document_lengths) if len(document_lengths) else None,
        length_histogram=_bins(document_lengths),
        fill=Spread.of(is_real.double().mean(1)),
        padding=int((~is_real).sum()),
        key_padding=int((keys < 0).sum()),
        contiguous_rows=contiguous_rows,
        pairs=rows * query_length * key_length,
        allowed_pairs=allowed,
        blocks=rows * tiling.query_tiles(query_length) * tiling.key_blocks(key_length),
        visited_blocks=visited,
        dense_allowed_pairs=rows * int(count_allowed_keys(*one_document, rules).sum()),
        dense_visited_blocks=rows
        * int(find_visited(*one_document, query_length != key_length, rules, tiling).count().sum()),
        notes=notes,
        packing=packing,
    )


def _documents(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) documents of each row, and the lengths of all of them."""
    runs = find_runs(ids.sort(1).values)  # each id is one run
    is_first = runs.is_first
    return is_first.sum(1), (runs.end - runs.begin)[is_first]


def _bins(lengths: Tensor) -> tuple[tuple[int, int, int], ...]:
    if not len(lengths):
        return ()
    counts = torch.bincount(lengths.double().log2().floor().long()).tolist()
    first = next(power for power, count in enumerate(counts) if count)
    return tuple((2**power, 2 ** (power + 1) - 1, counts[power]) for power in range(first, len(counts)))


def _align(rows: list[tuple[str, tuple[str, ...], str]]) -> list[str]:
    """Lines of a name, values and a remark, each in its column."""
    name_width = max(len(name) for name, _, _ in rows)
    value_width = max(len(value) for _, values, _ in rows for value in values)
    return [
        f"{name:<{name_width}}  {'  '.join(f'{value:>{value_width}}' for value in values)}  {remark}".rstrip()
        for name, values, remark in rows
    ]


def _spread(spread: Spread, form: str) -> tuple[str, ...]:
    return tuple(format(value, form) for value in (spread.min, spread.median, spread.max))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def _flops(flops: int) -> str:
    thousands = min(max(len(str(flops)) - 1, 0) // 3, len(_PREFIXES) - 1)
    return f"{flops / 1000**thousands:,.1f} {_PREFIXES[thousands]}FLOP"


def _bar(count: int, most: int) -> str:
    return "#" * (-(-count * _BAR // most))


def _count(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
