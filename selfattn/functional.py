"""The operators of ``torch.ops.selfattn`` as Python functions, with their names, defaults and meanings.

Each function is one call of the operator, so it can be scripted, compiled and exported. (TorchScript knows no
keyword-only arguments with defaults, so the operators' keyword-only arguments are ordinary ones here.)

Shapes use B batch, S (Sq, Skv) tokens, NH query heads, NKV key/value heads (NH a multiple of NKV), DQK and DV head
dimensions; of a KV cache R rows and P pages. Errors are raised by the operator, before any work: TypeError, ValueError
or NotImplementedError, with the argument's name, what was expected and what came.
"""

import torch
from torch import Tensor


def multihead_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    qk_scale: float | None = None,
    backend: str = "auto",
    kv_segment_ids: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
) -> Tensor:
    """Exact attention inside documents: softmax(qk_scale * q k^T, over the allowed pairs) v.

    A pair (i, j) is allowed iff ``segment_ids[b, i] == kv_segment_ids[b, j]`` and neither is negative; if ``causal``,
    j' <= i'; and i' - window_left <= j' <= i' + window_right. There i' and j' are the tokens' ``positions`` and
    ``kv_positions``, or without them i' = i + Skv - Sq, which aligns the last query with the last key, and j' = j. A
    query with no allowed key gets 0 and gives no gradients.

    Args:
        q: (B, Sq, NH, DQK), float32, bfloat16 or float16 (float64 in the backends reference and aten).
        k: (B, Skv, NKV, DQK), of q's dtype and device. Any strides with a contiguous last dimension cost no copy.
        v: (B, Skv, NKV, DV).
        segment_ids: (B, Sq) int32 or int64, in any order; ids may be used again; negative is padding.
        causal: no query sees a later key.
        qk_scale: factor of the logits; None is 1 / sqrt(DQK).
        backend: a name or alias of ``AttentionBackend``. "auto" takes the first that can serve the call, see
            ``explain_backend``.
        kv_segment_ids: (B, Skv) int32 or int64; None is ``segment_ids``, and then Sq == Skv.
        window_left: keys to the left of i' that are allowed; -1 is unbounded.
        window_right: keys to the right of i' that are allowed; -1 is unbounded.
        softcap: c > 0 turns the scaled logits into c * tanh(logits / c) (Gemma 2, arXiv:2408.00118).
        sinks: (NH,) one extra logit a head in the softmax's denominator (gpt-oss, arXiv:2508.10925).
        positions: (B, Sq) int32 or int64 values that fit in int32, in any order, with repetitions: what ``causal`` and
            the windows compare. They are compared between equal ids alone, so those of a document and those of a whole
            row or sequence give the same. They rotate nothing.
        kv_positions: (B, Skv) int32 or int64; None is ``positions``, and then Sq == Skv. Not without ``positions``.

    Returns:
        (B, Sq, NH, DV), of q's dtype.

    Raises:
        TypeError, ValueError: a bad argument.
        NotImplementedError: an explicit ``backend`` that cannot serve the call; the message gives every reason.
    """
    return torch.ops.selfattn.multihead_attention(
        q,
        k,
        v,
        segment_ids,
        causal,
        qk_scale,
        backend,
        kv_segment_ids=kv_segment_ids,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        sinks=sinks,
        positions=positions,
        kv_positions=kv_positions,
    )


def multihead_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    qk_scale: float | None = None,
    backend: str = "auto",
    kv_segment_ids: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``multihead_attention`` that also returns the logarithm of the softmax's denominator, with its gradient.

    Results over disjoint keys are merged into the result over all of them by ``merge_attention``.

    Arguments are those of ``multihead_attention``.

    Returns:
        out (B, Sq, NH, DV), of q's dtype, and lse (B, NH, Sq) float32, the natural logarithm, with the sink counted;
        -inf for a query with no allowed key (its sink, where there are sinks).

    Raises what ``multihead_attention`` raises.
    """
    return torch.ops.selfattn.multihead_attention_lse(
        q,
        k,
        v,
        segment_ids,
        causal,
        qk_scale,
        backend,
        kv_segment_ids=kv_segment_ids,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        sinks=sinks,
        positions=positions,
        kv_positions=kv_positions,
    )


def explain_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    qk_scale: float | None = None,
    backend: str = "auto",
    kv_segment_ids: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
) -> str:
    """Which backend this call would take, and why no other: one line a backend.

    Arguments are those of ``multihead_attention``; nothing is computed.

    Returns:
        Text to read, with every reason for which a backend cannot serve.

    Raises what ``multihead_attention`` raises for a bad argument.
    """
    return torch.ops.selfattn.explain_backend(
        q,
        k,
        v,
        segment_ids,
        causal,
        qk_scale,
        backend,
        kv_segment_ids=kv_segment_ids,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        sinks=sinks,
        positions=positions,
        kv_positions=kv_positions,
    )


def merge_attention(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results of ``multihead_attention_lse`` over disjoint keys as the result over all of them.

    With lse = log(exp(lse_1) + exp(lse_2)), out is the sum of exp(lse_i - lse) out_i (FlashAttention-2,
    arXiv:2307.08691, section 2.3.1), computed in float32 or wider and differentiable any number of times. A row
    without keys (lse -inf) adds nothing, whatever stands in its out; without keys in both parts it gives 0 and -inf.
    An lse of +inf takes all the weight, two of them half each. Of parts of one attention with sinks, one alone may
    have been given the sinks.

    Args:
        out: (B, Sq, NH, DV), float32, bfloat16, float16 or float64.
        lse: (B, NH, Sq) float32 or float64.
        other_out: of out's shape, dtype and device.
        other_lse: of lse's shape, dtype and device.

    Returns:
        out and lse over the keys of both, of the dtypes of ``out`` and ``lse``.

    Raises:
        TypeError, ValueError: a bad argument.
    """
    return torch.ops.selfattn.merge_attention(out, lse, other_out, other_lse)


def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    page_table: Tensor | None = None,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    qk_scale: float | None = None,
    backend: str = "auto",
    positions: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    draft_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    split_keys: int = 0,
) -> Tensor:
    """Exact attention of new tokens to a KV cache, dense or in pages, which already holds their keys and values.

    A row of the cache is a sequence. Slot s of row r is slot s % page_size of page ``page_table[r, s // page_size]``,
    or without a table slot s of page r. A query stands at a slot of its row, its position, and may attend to a slot s
    of that row if s < lengths[row]; if ``causal``, s <= position; and position - window_left <= s <= position +
    window_right. A query without such a slot, or at a negative position, gets 0. The host reads no value, and no
    largest length is asked for: a call can be captured in a CUDA graph and replayed with other lengths, tables and ids.

    Args:
        q: (B, Sq, NH, DQK), float32, bfloat16 or float16 (float64 in the backends reference and aten).
        k_cache: (P, page_size, NKV, DQK), of q's dtype and device, with any strides: a (P, NKV, page_size, DQK) tensor
            is given as its transpose.
        v_cache: (P, page_size, NKV, DV).
        lengths: (R,) int32 or int64, slots in use with those of this call's tokens (FlashAttention's ``cache_seqlens``
            are those before an append). From 0 to the capacity of a row.
        page_table: (R, pages of a row) int32 or int64. Pages may be shared and may repeat. None is one page a row, P ==
            R. An entry whose pages hold no slot that a query may attend to may have any value.
        segment_ids: (B, Sq) int32 or int64, the row of each query, in any order; negative is padding. None is row b for
            all of batch b, B == R.
        causal: no query sees a later slot.
        qk_scale: factor of the logits; None is 1 / sqrt(DQK).
        backend: as in ``multihead_attention``; "cudnn" serves no cache.
        positions: (B, Sq) int32 or int64 values that fit in int32, the slot at which each query stands. None is
            lengths[row] - (queries of that row at or after it), so that a row's last query stands at its last slot.
        window_left: slots to the left of the position that are allowed; -1 is unbounded.
        window_right: slots to the right; -1 is unbounded.
        softcap: c > 0 turns the scaled logits into c * tanh(logits / c).
        sinks: (NH,) one extra logit a head in the softmax's denominator.
        draft_mask: (B, Sq, Sq) bool, without ``segment_ids``, Sq <= 32: what each query sees of the last Sq slots of
            its row, in the place of ``causal`` (trees of drafts).
        k_scale: reserved for quantised caches; must be None.
        v_scale: as ``k_scale``.
        split_keys: slots of a partial result, a multiple of 64: with flash the bits of a row then do not depend on the
            other rows of the call. 0 leaves the split to the kernel.

    Returns:
        (B, Sq, NH, DV), of q's dtype.

    Raises:
        TypeError, ValueError: a bad argument. Lengths, ids and entries of the table that are out of range: ValueError
            on the CPU, an assertion on a CUDA device.
        NotImplementedError: an explicit ``backend`` that cannot serve the call; the message gives every reason.
    """
    return torch.ops.selfattn.attention_with_kv_cache(
        q,
        k_cache,
        v_cache,
        lengths,
        page_table,
        segment_ids,
        causal,
        qk_scale,
        backend,
        positions=positions,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        sinks=sinks,
        draft_mask=draft_mask,
        k_scale=k_scale,
        v_scale=v_scale,
        split_keys=split_keys,
    )


def attention_with_kv_cache_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    page_table: Tensor | None = None,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    qk_scale: float | None = None,
    backend: str = "auto",
    positions: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    draft_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    split_keys: int = 0,
) -> tuple[Tensor, Tensor]:
    """``attention_with_kv_cache`` that also returns the logarithm of the softmax's denominator.

    Results over disjoint keys (a shared prefix and the rest) are merged by ``merge_attention``.

    Arguments are those of ``attention_with_kv_cache``.

    Returns:
        out (B, Sq, NH, DV), of q's dtype, and lse (B, NH, Sq) float32, the natural logarithm, with the sink counted;
        -inf for a query that sees no slot (its sink, where there are sinks).

    Raises what ``attention_with_kv_cache`` raises.
    """
    return torch.ops.selfattn.attention_with_kv_cache_lse(
        q,
        k_cache,
        v_cache,
        lengths,
        page_table,
        segment_ids,
        causal,
        qk_scale,
        backend,
        positions=positions,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        sinks=sinks,
        draft_mask=draft_mask,
        k_scale=k_scale,
        v_scale=v_scale,
        split_keys=split_keys,
    )


def explain_kv_cache_backend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    page_table: Tensor | None = None,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    qk_scale: float | None = None,
    backend: str = "auto",
    positions: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    draft_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    split_keys: int = 0,
) -> str:
    """Which backend this call of ``attention_with_kv_cache`` would take, and why no other: one line a backend.

    Arguments are those of ``attention_with_kv_cache``; nothing is computed, and no value is read.

    Returns:
        Text to read, with every reason for which a backend cannot serve.

    Raises what ``attention_with_kv_cache`` raises for a bad argument.
    """
    return torch.ops.selfattn.explain_kv_cache_backend(
        q,
        k_cache,
        v_cache,
        lengths,
        page_table,
        segment_ids,
        causal,
        qk_scale,
        backend,
        positions=positions,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        sinks=sinks,
        draft_mask=draft_mask,
        k_scale=k_scale,
        v_scale=v_scale,
        split_keys=split_keys,
    )


def append_kv_cache(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor | None = None,
    segment_ids: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes keys and values of tokens into a KV cache. Not differentiable.

    Args:
        k: (B, S, NKV, DQK), of the cache's dtype and device (under autocast it is cast).
        v: (B, S, NKV, DV).
        positions: (B, S) int32 or int64, the slot of each token in its row (``kv_cache_positions``). No two tokens of a
            call may have the same slot.
        k_cache: (P, page_size, NKV, DQK), with any strides; written.
        v_cache: (P, page_size, NKV, DV); written.
        page_table: (R, pages of a row), as ``attention_with_kv_cache``.
        segment_ids: (B, S) the row of each token; one with a negative id is not written. None is row b for batch b.
        k_scale: reserved for quantised caches; must be None.
        v_scale: as ``k_scale``.

    Returns:
        None.

    Raises:
        TypeError, ValueError: a bad argument. A position, an id or a page out of range: ValueError on the CPU, before
            anything is written; an assertion on a CUDA device.
        RuntimeError: an argument requires a gradient outside of ``torch.no_grad()``.
    """
    torch.ops.selfattn.append_kv_cache(
        k,
        v,
        positions,
        page_table,
        segment_ids,
        k_cache=k_cache,
        v_cache=v_cache,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def qk_norm_rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor | None = None,
    segment_ids: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    freqs_sin: Tensor | None = None,
    freqs_cos: Tensor | None = None,
    norm: bool = True,
    eps: float = 1e-6,
    rope: bool = True,
    theta: float = 10000.0,
    pairing: str = "interleaved",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """``qk_norm_rope`` and ``append_kv_cache`` as one operator: what stands between a layer's projections and
    ``attention_with_kv_cache``. Not differentiable.

    Args:
        q: (B, S, NH, DQK), of the cache's dtype and device (under autocast q, k and v are cast).
        k: (B, S, NKV, DQK).
        v: (B, S, NKV, DV), written as it is.
        positions: as ``append_kv_cache``; where there are no tables, also what q and k are rotated by.
        k_cache: as ``append_kv_cache``.
        v_cache: as ``append_kv_cache``.
        page_table: as ``append_kv_cache``.
        segment_ids: as ``append_kv_cache``.
        q_weight: (DQK,) scale of the norm of q; None is ones.
        k_weight: (DQK,) scale of the norm of k; None is ones.
        freqs_sin: (1 or B, S, R / 2), as ``qk_norm_rope``: the rotation, where it is not that of the slots (the
            siblings of a tree of drafts share a rotation, and not a slot).
        freqs_cos: as ``freqs_sin``; both or neither.
        norm: whether to normalise.
        eps: added to the mean square.
        rope: whether to rotate.
        theta: base of the frequencies where there are no tables.
        pairing: as ``apply_rotary_emb``.
        k_scale: reserved for quantised caches; must be None.
        v_scale: as ``k_scale``.

    Returns:
        The new q.

    Raises what ``append_kv_cache`` raises.
    """
    return torch.ops.selfattn.qk_norm_rope_append(
        q,
        k,
        v,
        positions,
        page_table,
        segment_ids,
        q_weight,
        k_weight,
        freqs_sin,
        freqs_cos,
        k_cache=k_cache,
        v_cache=v_cache,
        norm=norm,
        eps=eps,
        rope=rope,
        theta=theta,
        pairing=pairing,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def kv_cache_positions(
    lengths: Tensor,
    segment_ids: Tensor | None,
    num_queries: int,
    capacity: int,
    positions: Tensor | None = None,
) -> Tensor:
    """The slots of a call's tokens in their rows of a KV cache, for ``append_kv_cache`` and for rotary tables.

    Args:
        lengths: (R,) int32 or int64, slots in use with those of these tokens (``lengths_after_append``).
        segment_ids: (B, num_queries) int32 or int64, the row of each token; negative is none. None is R rows of
            num_queries tokens.
        num_queries: tokens of a batch row.
        capacity: slots of a row: page_size times the pages of a row.
        positions: (B, num_queries) the slots, where they are not the last ones of the row: checked and passed on.

    Returns:
        (B, num_queries) int64: lengths[row] - (tokens of that row at or after it), and -1 for a token of no row.

    Raises:
        TypeError, ValueError: a bad argument. A length outside of 0 to ``capacity``, an id that is no row, a position
            that does not fit in int32: ValueError on the CPU, an assertion on a CUDA device.
    """
    return torch.ops.selfattn.kv_cache_positions(lengths, segment_ids, num_queries, capacity, positions)


def lengths_after_append(lengths: Tensor, segment_ids: Tensor | None, num_tokens: int) -> Tensor:
    """Slots of a KV cache in use after a call whose tokens are appended.

    Args:
        lengths: (R,) int32 or int64, those before.
        segment_ids: (B, num_tokens) int32 or int64, the row of each token; negative is none. None is ``num_tokens`` in
            each row.
        num_tokens: tokens of a batch row.

    Returns:
        (R,), of the dtype of ``lengths``.

    Raises:
        TypeError, ValueError: a bad argument.
    """
    return torch.ops.selfattn.lengths_after_append(lengths, segment_ids, num_tokens)


def segment_mask(segment_ids: Tensor, kv_segment_ids: Tensor | None = None) -> Tensor:
    """The dense mask that the ids stand for, for code that needs one; the attention operators never build it.

    Args:
        segment_ids: (B, Sq) int32 or int64.
        kv_segment_ids: (B, Skv); None is ``segment_ids``.

    Returns:
        bool (B, 1, Sq, Skv), True where the ids are equal and not negative.

    Raises:
        TypeError, ValueError: ids of another dtype or shape.
    """
    return torch.ops.selfattn.segment_mask(segment_ids, kv_segment_ids)


def segment_ids_from_positions(positions: Tensor) -> Tensor:
    """Segment ids of rows that come with each token's position in its document.

    Args:
        positions: (B, S) int32 or int64. A document starts where the position is not its left neighbour's + 1.

    Returns:
        (B, S) int32: 0, 1, 2, ... along each row.

    Raises:
        TypeError, ValueError: positions of another dtype or shape.
    """
    return torch.ops.selfattn.segment_ids_from_positions(positions)


def segment_ids_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Tensor:
    """Segment ids of a row whose document boundaries are given as cumulative lengths.

    Args:
        cu_seqlens: (N + 1,) int32 or int64: 0, then the end of each document.
        length: tokens of the row.

    Returns:
        (length,) int32: the document's number, -1 past the last boundary.

    Raises:
        TypeError, ValueError: boundaries of another dtype or shape, a negative length.
    """
    return torch.ops.selfattn.segment_ids_from_cu_seqlens(cu_seqlens, length)


def cu_seqlens_from_segment_ids(segment_ids: Tensor, max_segments: int) -> Tensor:
    """Cumulative lengths of each row's runs of equal ids, without a host synchronisation.

    Args:
        segment_ids: (B, S) int32 or int64.
        max_segments: columns of the result, less one: at least the number of runs in any row.

    Returns:
        (B, max_segments + 1) int32: 0, then the end of each run; the tail repeats S.

    Raises:
        TypeError, ValueError: ids of another dtype or shape, max_segments below 1.
    """
    return torch.ops.selfattn.cu_seqlens_from_segment_ids(segment_ids, max_segments)


def precompute_freqs(
    feat_dim: int,
    pos_idx: Tensor | None = None,
    max_length: int | None = None,
    theta: float = 10000.0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Sines and cosines of the rotary embedding (RoFormer, arXiv:2104.09864): angle = position * theta^(-2i / D).

    Args:
        feat_dim: D, the head dimension; even.
        pos_idx: (B, S) or (S,) positions of the tokens. For packed rows: each token's position in its document.
        max_length: S, for the positions 0..S-1; exactly one of ``pos_idx`` and ``max_length`` is given.
        theta: base of the frequencies.
        dtype: of the results; None is float32.
        device: of the results; None is that of ``pos_idx``, or the CPU.

    Returns:
        sin and cos, each (B, S, D / 2), with B = 1 for positions without a batch.

    Raises:
        TypeError, ValueError: a bad argument.
    """
    return torch.ops.selfattn.precompute_freqs(feat_dim, pos_idx, max_length, theta, dtype=dtype, device=device)


def apply_rotary_emb(
    xq: Tensor,
    xk: Tensor,
    freqs_sin: Tensor | None = None,
    freqs_cos: Tensor | None = None,
    theta: float = 10000.0,
    pairing: str = "interleaved",
) -> tuple[Tensor, Tensor]:
    """Rotates q and k by the angles of their positions (RoFormer, arXiv:2104.09864).

    Args:
        xq: (B, S, NH, D).
        xk: (B, S, NKV, D).
        freqs_sin: (1 or B, S, R / 2) of ``precompute_freqs`` or ``RopeParameters.tables``: the first R <= D elements of
            a head rotate, the others stay. None rotates all by the positions 0..S-1.
        freqs_cos: as ``freqs_sin``; both or neither. A factor in both scales what rotates.
        theta: base of the frequencies where none are given.
        pairing: "interleaved" rotates the pairs (2i, 2i + 1); "half" the pairs (i, i + R / 2), as the checkpoints of
            Hugging Face expect.

    Returns:
        The rotated xq and xk, of their dtypes.

    Raises:
        TypeError, ValueError: a bad argument.
    """
    return torch.ops.selfattn.apply_rotary_emb(xq, xk, freqs_sin, freqs_cos, theta, pairing=pairing)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    freqs_sin: Tensor | None = None,
    freqs_cos: Tensor | None = None,
    norm: bool = True,
    eps: float = 1e-6,
    rope: bool = True,
    positions: Tensor | None = None,
    theta: float = 10000.0,
    pairing: str = "interleaved",
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head of q and k (arXiv:1910.07467), then the rotary step, as one operator.

    Args:
        q: (B, S, NH, D).
        k: (B, S, NKV, D).
        q_weight: (D,) scale of the norm of q; None is ones.
        k_weight: (D,) scale of the norm of k; None is ones.
        freqs_sin: (1 or B, S, R / 2), as ``apply_rotary_emb``. The norm is that of whole heads.
        freqs_cos: as ``freqs_sin``; both or neither.
        norm: whether to normalise.
        eps: added to the mean square.
        rope: whether to rotate.
        positions: (B, S) of the tokens, instead of the frequencies; None with no frequencies is 0..S-1.
        theta: base of the frequencies where none are given.
        pairing: as ``apply_rotary_emb``.

    Returns:
        The new q and k, of their dtypes.

    Raises:
        TypeError, ValueError: a bad argument.
    """
    return torch.ops.selfattn.qk_norm_rope(
        q,
        k,
        q_weight,
        k_weight,
        freqs_sin,
        freqs_cos,
        norm=norm,
        eps=eps,
        rope=rope,
        positions=positions,
        theta=theta,
        pairing=pairing,
    )
