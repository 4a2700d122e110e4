"""Promise: a cache is plain tensors that advance, reset and reorder as sequences do; an allocator gives each sequence
pages, shares prefixes, and where there are too few says so and changes nothing."""

import io

import pytest
import torch

import selfattn
from selfattn import KVCache, KVCacheLayer, PageAllocator

SIZES = {"num_kv_heads": 2, "head_dim": 4}


def paged(num_pages: int = 6, rows: int = 3, max_length: int = 10, device: str = "cpu") -> KVCache:
    return KVCache.paged(2, num_pages, 4, max_sequences=rows, max_length=max_length, device=device, **SIZES)


def sequences(cache: KVCache) -> list[torch.Tensor]:
    """What each row holds, keys and values of all layers."""
    rows = []
    for row, length in enumerate(cache.lengths.tolist()):
        pages = [row] if cache.page_table is None else cache.page_table[row].tolist()
        slots = [(pages[slot // cache.page_size], slot % cache.page_size) for slot in range(length)]
        rows.append(torch.stack([each[place] for place in slots for each in (*cache.keys, *cache.values)]).clone()
                    if slots else torch.zeros(0))  # fmt: skip
    return rows


def write(cache: KVCache, row: int, count: int) -> None:
    """So many random tokens more in one row, in every layer."""
    ids = torch.full((1, count), row, device=cache.lengths.device)
    after = selfattn.lengths_after_append(cache.lengths, ids, count)
    slots = selfattn.kv_cache_positions(after, ids, count, cache.capacity)
    for index in range(len(cache.keys)):
        keys, values, _, table = cache.layer(index)
        k, v = (torch.randn(1, count, *each.shape[2:], device=keys.device) for each in (keys, values))
        selfattn.append_kv_cache(k, v, slots, keys, values, table, ids)
    cache.lengths.copy_(after)


def test_dense_tensors(device: str) -> None:
    cache = KVCache.dense(2, 3, 10, **SIZES, value_dim=6, dtype=torch.bfloat16, device=device)
    layer = cache.layer(1)
    assert isinstance(layer, tuple) and layer.page_table is None
    assert layer.keys.shape == (3, 10, 2, 4) and layer.values.shape == (3, 10, 2, 6)
    assert layer.keys.dtype == torch.bfloat16 and layer.keys.device.type == device
    assert layer.lengths.dtype == torch.int32 and layer.lengths.tolist() == [0, 0, 0]
    assert layer.lengths is cache.layer(0).lengths and cache.capacity == cache.page_size == 10


def test_paged_tensors(device: str) -> None:
    cache = paged(device=device)
    assert cache.keys[0].shape == (6, 4, 2, 4) and cache.capacity == 12
    assert cache.page_table.dtype == torch.int32 and cache.page_table.tolist() == [[-1] * 3] * 3


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_are_checked(size: int) -> None:
    with pytest.raises(ValueError, match=f"max_length: expected a positive number, got {size}"):
        KVCache.dense(1, 1, size, **SIZES)
    with pytest.raises(ValueError, match="num_pages"):
        paged(num_pages=size)
    with pytest.raises(TypeError, match="head_dim: expected an int, got float"):
        KVCache.dense(1, 1, 8, 2, 4.0)


def test_advance_and_reset(device: str) -> None:
    cache = KVCache.dense(1, 3, 10, **SIZES, device=device)
    lengths = cache.lengths
    cache.advance(2)
    cache.advance(torch.tensor([1, 0, 3], device=device))
    assert cache.lengths.tolist() == [3, 2, 5]
    cache.reset([0, 2])
    assert cache.lengths.tolist() == [0, 2, 0]
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0] and cache.lengths is lengths


@pytest.mark.parametrize("is_paged", (False, True))
@pytest.mark.parametrize("indices", ([0, 1, 2], [2, 0, 1], [1, 1, 1], [0, 0, 2], [2, 2, 0]), ids=str)
def test_rows_become_those_they_name(indices: list[int], is_paged: bool, device: str) -> None:
    cache = paged(num_pages=9, device=device) if is_paged else KVCache.dense(2, 3, 10, **SIZES, device=device)
    allocator = PageAllocator(cache) if is_paged else None
    for row, length in enumerate((7, 4, 9)):
        if allocator is not None:
            allocator.reserve(row, 10)
        write(cache, row, length)
    before = sequences(cache)
    cache.reorder(indices)
    for row, source in zip(sequences(cache), indices, strict=True):
        assert torch.equal(row, before[source])
    for row in range(3):  # what one writes then, no other sees
        after = sequences(cache)
        write(cache, row, 1)
        for other in set(range(3)) - {row}:
            assert torch.equal(sequences(cache)[other], after[other])
    if allocator is not None:
        for row in range(3):
            allocator.release(row)
        assert allocator.free_pages == 9


def test_reorder_without_pages_changes_nothing() -> None:
    cache = paged(num_pages=5)
    allocator = PageAllocator(cache)
    for row, length in enumerate((9, 1, 1)):  # 3 pages, and one each
        allocator.reserve(row, length)
        write(cache, row, length)
    before, table = sequences(cache), cache.page_table.clone()
    cache.lengths[0] = 3  # of which no page is full: each row would need three pages of its own
    with pytest.raises(RuntimeError, match="out of pages: 6 more are needed, and of 5 pages 2 are free"):
        cache.reorder([0, 0, 0])
    cache.lengths[0] = 9
    assert torch.equal(cache.page_table, table) and allocator.free_pages == 0
    for row, expected in zip(sequences(cache), before, strict=True):
        assert torch.equal(row, expected)


def test_reorder_checks_its_rows() -> None:
    cache = paged()
    with pytest.raises(ValueError, match="PageAllocator"):
        cache.reorder([0, 1, 2])
    PageAllocator(cache)
    with pytest.raises(ValueError, match="indices"):
        cache.reorder([0, 1])
    with pytest.raises(ValueError, match="sequence"):
        cache.reorder([0, 1, 3])


def test_pages_are_reserved_and_released(device: str) -> None:
    cache = paged(device=device)
    allocator = PageAllocator(cache)
    allocator.reserve(0, 5)
    allocator.reserve(2, 4)
    assert allocator.free_pages == 3
    allocator.reserve(0, 8)  # has them
    allocator.reserve(0, 9)
    table = cache.page_table.tolist()
    assert len({*table[0], table[2][0]}) == 4 and table[1] == [-1] * 3 and table[2][1:] == [-1, -1]
    cache.advance(3)
    allocator.release(0)
    assert allocator.free_pages == 5
    assert cache.page_table[0].tolist() == [-1] * 3 and cache.lengths.tolist() == [0, 3, 3]


def test_out_of_pages_changes_nothing(device: str) -> None:
    cache = paged(num_pages=3, device=device)
    allocator = PageAllocator(cache)
    allocator.reserve(0, 8)
    table = cache.page_table.clone()
    with pytest.raises(RuntimeError, match="out of pages: 2 more are needed, and of 3 pages 1 are free"):
        allocator.reserve(1, 5)
    assert torch.equal(cache.page_table, table) and allocator.free_pages == 1
    allocator.reserve(1, 4)


def test_prefixes_are_shared_by_whole_pages(device: str) -> None:
    cache = paged(device=device)
    allocator = PageAllocator(cache)
    allocator.reserve(0, 10)
    write(cache, 0, 10)
    prompt = sequences(cache)[0]
    assert allocator.share(0, 1, 7) == 4
    assert cache.lengths.tolist() == [10, 4, 0] and allocator.free_pages == 3
    assert torch.equal(sequences(cache)[1], prompt[: 4 * 4])
    allocator.release(0)  # the shared page stays
    assert allocator.free_pages == 5
    allocator.reserve(2, 12)
    write(cache, 2, 12)
    assert torch.equal(sequences(cache)[1], prompt[: 4 * 4])
    allocator.release(1)
    assert allocator.free_pages == 3


def test_allocator_names_what_is_wrong() -> None:
    cache = paged()
    allocator = PageAllocator(cache)
    with pytest.raises(ValueError, match="cache: expected one without an allocator"):
        PageAllocator(cache)
    with pytest.raises(ValueError, match=r"cache: expected one of KVCache\.paged"):
        PageAllocator(KVCache.dense(1, 1, 8, **SIZES))
    for call in (lambda: allocator.reserve(3, 1), lambda: allocator.release(-1), lambda: allocator.share(0, 5, 0)):
        with pytest.raises(ValueError, match="sequence: expected 0 to 2"):
            call()
    with pytest.raises(ValueError, match="tokens: expected 0 to 12, got 13"):
        allocator.reserve(0, 13)
    allocator.reserve(0, 4)
    with pytest.raises(ValueError, match="tokens: expected 0 to 4"):
        allocator.share(0, 1, 5)
    with pytest.raises(ValueError, match="sequence: expected one without pages"):
        allocator.share(1, 0, 0)


def test_layers_survive_a_file() -> None:
    layer = paged().layer(0)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, KVCacheLayer)
    assert torch.equal(loaded.page_table, layer.page_table)


def test_layers_are_pytrees() -> None:
    layer = paged().layer(0)
    leaves, spec = torch.utils._pytree.tree_flatten(layer)
    text = torch.utils._pytree.treespec_dumps(spec)
    restored = torch.utils._pytree.tree_unflatten(leaves, torch.utils._pytree.treespec_loads(text))
    assert isinstance(restored, KVCacheLayer) and restored.keys is layer.keys
