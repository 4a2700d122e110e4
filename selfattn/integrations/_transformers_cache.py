"""A ``StaticCache`` of transformers as layers and operators of selfattn take it."""

from collections.abc import Sequence

from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from selfattn.kv_cache import KVCache, KVCacheLayer


class StaticKVCache(KVCache):
    """The memory of a ``StaticCache``, as a dense ``KVCache``: what either writes, the other sees.

    transformers keeps one length for all rows, and one tensor of it for each layer, which its ``update`` advances.
    ``advance`` does that for layers of selfattn, which write through ``layer(i)``.

    Args:
        cache: one whose memory is there already: after a prompt, or after ``early_initialization``.

    Attributes:
        keys: (R, slots, NKV, DQK) for each layer, views.
        values: (R, slots, NKV, DV), likewise.
        lengths: (R,) int64, the first layer's length, expanded.
        page_table: None.

    Raises:
        TypeError: no StaticCache.
        ValueError: a cache without memory.
        NotImplementedError: layers that roll (sliding windows), or that hold more than keys and values.
    """

    def __init__(self, cache: StaticCache) -> None:
        if not isinstance(cache, StaticCache):
            raise TypeError(f"StaticKVCache: cache: expected a StaticCache, got {type(cache).__name__}")
        for index, layer in enumerate(cache.layers):
            if type(layer) is not StaticLayer:
                raise NotImplementedError(
                    f"StaticKVCache: cache: expected StaticLayer alone, got a {type(layer).__name__} at layer {index}"
                )
            if not layer.is_initialized:
                raise ValueError(
                    "StaticKVCache: cache: expected one with memory, got one before its first prompt; call its "
                    "early_initialization"
                )
        self._static = cache
        self.page_table = None

    # Beam search of transformers puts other tensors into its layers, so they are asked for each time.
    @property
    def keys(self) -> list[Tensor]:
        return [layer.keys.transpose(1, 2) for layer in self._static.layers]

    @property
    def values(self) -> list[Tensor]:
        return [layer.values.transpose(1, 2) for layer in self._static.layers]

    @property
    def lengths(self) -> Tensor:
        return self.layer(0).lengths

    def layer(self, index: int) -> KVCacheLayer:
        """The cache of one layer: views, no copies."""
        layer = self._static.layers[index]
        lengths = layer.cumulative_length.expand(layer.keys.shape[0])
        return KVCacheLayer(layer.keys.transpose(1, 2), layer.values.transpose(1, 2), lengths)

    def advance(self, counts: int | Tensor) -> None:
        """After all layers: ``counts`` more slots are in use, one number for every row.

        Raises:
            ValueError: a number for each row.
        """
        if isinstance(counts, Tensor) and counts.dim() != 0:
            raise ValueError(
                f"StaticKVCache: counts: expected one number, since all rows share a length, got shape "
                f"{tuple(counts.shape)}"
            )
        for layer in self._static.layers:
            layer.cumulative_length.add_(counts)

    def reset(self, rows: int | Sequence[int] | Tensor | None = None) -> None:
        """Empties the cache.

        Raises:
            ValueError: rows.
        """
        if rows is not None:
            raise ValueError("StaticKVCache: rows: expected None, since all rows share a length")
        self._static.reset()

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Row i becomes what row indices[i] is, in place.

        Args:
            indices: (R,) rows.

        Raises:
            ValueError: not R rows.
        """
        index = self._as_index(indices)
        if index.shape != self.lengths.shape:
            raise ValueError(
                f"StaticKVCache: indices: expected one for each of {len(self.lengths)} rows, got shape "
                f"{tuple(index.shape)}"
            )
        for cache in (*self.keys, *self.values):
            cache.copy_(cache.index_select(0, index))
