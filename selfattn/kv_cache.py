"""Where the keys and values of a model's layers are kept between calls, and who has which page of it.

A cache is plain tensors: ``SelfAttention`` and the operators take those of a layer, and whatever reads or writes
tensors may read and write them. R rows, each a sequence; P pages.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree


class KVCacheLayer(NamedTuple):
    """The cache as one layer sees it: what ``SelfAttention`` takes as ``cache``, and TorchScript as a tuple.

    Attributes:
        keys: (P, page_size, NKV, DQK); a dense cache has a page a row.
        values: (P, page_size, NKV, DV).
        lengths: (R,) int32, slots in use, one tensor for all layers.
        page_table: (R, pages of a row) int32, -1 where there is no page; None in a dense cache.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    page_table: Tensor | None = None


_pytree._register_namedtuple(KVCacheLayer, serialized_type_name="selfattn.KVCacheLayer")
torch.serialization.add_safe_globals([KVCacheLayer])


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"KVCache: {name}: expected an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"KVCache: {name}: expected a positive number, got {size}")


class KVCache:
    """Keys and values of every layer of a model, for a batch of sequences; made by ``dense`` or ``paged``.

        cache = selfattn.KVCache.dense(layers, batch, max_length, num_kv_heads, head_dim)
        with torch.no_grad():
            for i, layer in enumerate(model):
                x = layer(x, cache=cache.layer(i))  # writes, then attends
            cache.advance(x.shape[1])               # once a step

    Attributes:
        keys: a (P, page_size, NKV, DQK) tensor for each layer.
        values: a (P, page_size, NKV, DV) tensor for each layer.
        lengths: (R,) int32 on the device, slots in use.
        page_table: (R, pages of a row) int32 on the device, or None.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], lengths: Tensor, page_table: Tensor | None = None
    ) -> None:
        self.keys = keys
        self.values = values
        self.lengths = lengths
        self.page_table = page_table
        self._allocator: PageAllocator | None = None

    @classmethod
    def dense(
        cls,
        layers: int,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "KVCache":
        """A row of ``max_length`` slots for each sequence.

        Args:
            layers: how many layers share the lengths.
            batch: R, the sequences.
            max_length: slots of a row.
            num_kv_heads: NKV.
            head_dim: DQK.
            value_dim: DV; None is ``head_dim``.
            dtype: of keys and values; None is PyTorch's default.
            device: where everything lies.

        Raises:
            TypeError, ValueError: a size that is no positive int.
        """
        return cls._make(layers, batch, max_length, num_kv_heads, head_dim, value_dim, dtype, device, batch)

    @classmethod
    def paged(
        cls,
        layers: int,
        num_pages: int,
        page_size: int = 64,
        *,
        max_sequences: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "KVCache":
        """A pool of pages, which a table deals out to sequences: by a ``PageAllocator``, or by whoever writes it.

        Args:
            layers: how many layers share the table and the lengths.
            num_pages: P.
            page_size: slots of a page; with flash a multiple of 16.
            max_sequences: R.
            max_length: slots that a row must be able to hold; rounded up to whole pages.
            num_kv_heads, head_dim, value_dim, dtype, device: as ``dense``.

        Raises:
            TypeError, ValueError: a size that is no positive int.
        """
        _check_sizes(max_sequences=max_sequences, max_length=max_length, page_size=page_size)
        table = torch.full((max_sequences, -(-max_length // page_size)), -1, dtype=torch.int32, device=device)
        return cls._make(
            layers, num_pages, page_size, num_kv_heads, head_dim, value_dim, dtype, device, max_sequences, table
        )

    @classmethod
    def _make(
        cls, layers, num_pages, page_size, num_kv_heads, head_dim, value_dim, dtype, device, batch, page_table=None
    ) -> "KVCache":
        value_dim = head_dim if value_dim is None else value_dim
        _check_sizes(layers=layers, batch=batch, num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=value_dim)
        _check_sizes(**({"max_length": page_size} if page_table is None else {"num_pages": num_pages}))
        shape = (num_pages, page_size, num_kv_heads)
        keys = [torch.zeros(*shape, head_dim, dtype=dtype, device=device) for _ in range(layers)]
        values = [torch.zeros(*shape, value_dim, dtype=dtype, device=device) for _ in range(layers)]
        return cls(keys, values, torch.zeros(batch, dtype=torch.int32, device=device), page_table)

    @property
    def page_size(self) -> int:
        """Slots of a page; of a row, in a dense cache."""
        return self.keys[0].shape[1]

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.page_size * (1 if self.page_table is None else self.page_table.shape[1])

    def layer(self, index: int) -> KVCacheLayer:
        """The cache of one layer: views, no copies."""
        return KVCacheLayer(self.keys[index], self.values[index], self.lengths, self.page_table)

    def advance(self, counts: int | Tensor) -> None:
        """After all layers: ``counts`` more slots are in use, a number for every row or (R,) of each."""
        self.lengths.add_(counts)

    def reset(self, rows: int | Sequence[int] | Tensor | None = None) -> None:
        """Empties rows, or all; their pages stay theirs."""
        if rows is None:
            self.lengths.zero_()
        else:
            self.lengths.index_fill_(0, self._as_index(rows), 0)

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Row i becomes what row indices[i] is, as beam search asks for; in place.

        In pages, the whole pages are shared, and rows that would come to share what lies behind them each get pages of
        their own there, with a copy of the unfilled last page. That needs the cache's ``PageAllocator``, which reads
        the indices and the lengths from the device.

        Args:
            indices: (R,) rows.

        Raises:
            ValueError: not R rows of the cache, or a paged cache without a ``PageAllocator``.
            RuntimeError: too few pages are free; nothing is changed.
        """
        index = self._as_index(indices)
        if index.shape != self.lengths.shape:
            raise ValueError(
                f"KVCache: indices: expected one for each of {len(self.lengths)} rows, got shape {tuple(index.shape)}"
            )
        if self.page_table is None:
            copied, onto = index, torch.arange(len(index), device=index.device)
        elif self._allocator is None:
            raise ValueError("KVCache: reorder: expected a PageAllocator for this paged cache, got none")
        else:
            copied, onto = (self._as_index(pages) for pages in self._allocator._reorder(index.tolist()))
        for cache in (*self.keys, *self.values):
            cache.index_copy_(0, onto, cache.index_select(0, copied))
        self.lengths.copy_(self.lengths.index_select(0, index))

    def _as_index(self, rows: int | Sequence[int] | Tensor) -> Tensor:
        return torch.as_tensor(rows, dtype=torch.int64, device=self.lengths.device).reshape(-1)


class PageAllocator:
    """Who has which page of a paged cache, on the host: a list of free pages, and how many rows share each other one.

    It writes the cache's table, from pinned memory and without waiting for the device; only ``KVCache.reorder`` of a
    cache that has an allocator reads from the device. Engines with a manager of their own write the table themselves.

        allocator = selfattn.PageAllocator(cache)
        allocator.reserve(sequence, tokens)                    # room for so many tokens in all
        shared = allocator.share(source, sequence, tokens)     # a prefix, whole pages of it
        allocator.release(sequence)

    Args:
        cache: of ``KVCache.paged``, whose table nobody else writes.

    Raises:
        ValueError: a dense cache, or one that has an allocator.
    """

    def __init__(self, cache: KVCache) -> None:
        if cache.page_table is None:
            raise ValueError("PageAllocator: cache: expected one of KVCache.paged, got a dense one")
        if cache._allocator is not None:
            raise ValueError("PageAllocator: cache: expected one without an allocator, got one that has one")
        cache._allocator = self
        self._cache = cache
        self._num_pages = cache.keys[0].shape[0]
        self._free = list(range(self._num_pages - 1, -1, -1))  # the next one last
        self._rows_with_page: Counter[int] = Counter()
        self._pages_of_row: list[list[int]] = [[] for _ in range(len(cache.lengths))]

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    def reserve(self, sequence: int, tokens: int) -> None:
        """Gives a sequence pages for ``tokens`` tokens in all; those that it has stay.

        Raises:
            ValueError: no such sequence, or more tokens than a row holds.
            RuntimeError: too few pages are free; nothing is changed.
        """
        pages = self._pages(sequence)
        if not 0 <= tokens <= self._cache.capacity:
            raise ValueError(f"PageAllocator: tokens: expected 0 to {self._cache.capacity}, got {tokens}")
        missing = max(-(-tokens // self._cache.page_size) - len(pages), 0)
        self._require_free(missing, len(self._free))
        self._extend(sequence, [self._take() for _ in range(missing)])

    def share(self, source: int, sequence: int, tokens: int) -> int:
        """Gives an empty sequence the whole pages of the first ``tokens`` tokens of another, and that length.

        Args:
            source: a sequence that has written them.
            sequence: one without pages.
            tokens: of the common prefix.

        Returns:
            The tokens that are shared: whole pages of them. The sequence computes the others itself.

        Raises:
            ValueError: no such sequence, one that has pages, or more tokens than ``source`` has pages for.
        """
        pages = self._pages(source)
        if self._pages(sequence):
            raise ValueError(f"PageAllocator: sequence: expected one without pages, got {sequence}, which has some")
        if not 0 <= tokens <= len(pages) * self._cache.page_size:
            raise ValueError(
                f"PageAllocator: tokens: expected 0 to {len(pages) * self._cache.page_size}, which sequence {source} "
                f"has pages for, got {tokens}"
            )
        shared = pages[: tokens // self._cache.page_size]
        for page in shared:
            self._rows_with_page[page] += 1
        self._extend(sequence, shared)
        self._cache.lengths[sequence].fill_(len(shared) * self._cache.page_size)
        return len(shared) * self._cache.page_size

    def release(self, sequence: int) -> None:
        """Ends a sequence: its length becomes 0, its entries -1, and the pages that nobody shares are free.

        Raises:
            ValueError: no such sequence.
        """
        for page in reversed(self._pages(sequence)):
            self._drop(page)
        self._pages_of_row[sequence] = []
        self._cache.page_table[sequence].fill_(-1)
        self._cache.lengths[sequence].zero_()

    def _pages(self, sequence: int) -> list[int]:
        if not 0 <= sequence < len(self._pages_of_row):
            raise ValueError(f"PageAllocator: sequence: expected 0 to {len(self._pages_of_row) - 1}, got {sequence}")
        return self._pages_of_row[sequence]

    def _require_free(self, missing: int, free: int) -> None:
        if missing > free:
            raise RuntimeError(
                f"PageAllocator: out of pages: {missing} more are needed, and of {self._num_pages} pages {free} are "
                "free; release a sequence, or make the cache with more pages"
            )

    def _take(self) -> int:
        page = self._free.pop()
        self._rows_with_page[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._rows_with_page[page] -= 1
        if self._rows_with_page[page] == 0:
            self._free.append(page)

    def _extend(self, sequence: int, pages: list[int]) -> None:
        first = len(self._pages_of_row[sequence])
        self._pages_of_row[sequence] += pages
        self._write(sequence, first)

    def _write(self, sequence: int, first: int = 0) -> None:
        """The row's entries from the first one on."""
        entries = torch.tensor(self._pages_of_row[sequence][first:], dtype=torch.int32)
        if len(entries) == 0:
            return
        table = self._cache.page_table
        if table.is_cuda:
            entries = entries.pin_memory()
        table[sequence, first : first + len(entries)].copy_(entries, non_blocking=True)

    def _reorder(self, indices: list[int]) -> tuple[list[int], list[int]]:
        """Deals the pages out anew, for KVCache.reorder; gives the pages to copy, and those to copy them onto.

        The first row that takes a source's place has its pages behind the full ones, too; every other one gets new
        ones there.
        """
        lengths, page_size = self._cache.lengths.tolist(), self._cache.page_size
        heirs: dict[int, int] = {}
        kept, added = [], []  # of each row: the source's pages that it has, and how many new ones
        for row, source in enumerate(indices):
            pages, full = self._pages(source), lengths[source] // page_size
            is_heir = heirs.setdefault(source, row) == row
            kept.append(list(pages) if is_heir else pages[:full])
            added.append(0 if is_heir else len(pages) - full)
        rows_with_page = Counter(page for pages in kept for page in pages)
        free = [page for page in range(self._num_pages) if page not in rows_with_page]
        self._require_free(sum(added), len(free))
        copied, onto = [], []
        for row, source in enumerate(indices):
            new = [free.pop() for _ in range(added[row])]
            if new and lengths[source] % page_size != 0:
                copied.append(self._pages(source)[len(kept[row])])
                onto.append(new[0])
            kept[row] += new
        self._pages_of_row = kept
        self._free = free
        self._rows_with_page = Counter(page for pages in kept for page in pages)
        self._cache.page_table.fill_(-1)
        for row in range(len(kept)):
            self._write(row)
        return copied, onto
