"""Context parallelism: the tokens of each row spread over ranks, documents kept apart."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.distributed.device_mesh import DeviceMesh

from selfattn.distributed._agreement import check_agreement, content_of
from selfattn.distributed._collectives import RankGroup
from selfattn.functional import precompute_freqs


@dataclass(frozen=True, eq=False)
class ContextLayout:
    """Which tokens of each row this rank of a mesh axis holds, and in which order: B rows of S tokens on n ranks, in
    shards of L = ceil(S / n) slots a row.

    A shard holds the tokens of split documents (those with tokens on several ranks) first, then those of whole ones,
    both document after document by their first tokens, then padding tokens, then slots that no token fills. Every row
    is dealt on its own.
    Made by ``from_segment_ids``, once a batch: every layer takes the same.
    """

    mesh: DeviceMesh | tuple[DeviceMesh, DeviceMesh]
    """Of one dimension, or a pair of such: the ranks that exchange heads, and those between whom keys travel."""
    balance: str
    bucket: int
    _: KW_ONLY
    indices: Tensor
    """(B, L) int64: the index in its row of each slot's token; -1 where no token is."""
    segment_ids: Tensor
    """(B, L) int32: the ids of this rank's tokens; -1 where no token is."""
    positions: Tensor
    """(B, L) int32: the index in the row; 0 where no token is."""
    document_positions: Tensor
    """(B, L) int32: how many earlier tokens of the row have the same id, for rotary tables; 0 in padding."""
    kv_segment_ids: Tensor
    """(B, n * shared) int32: of the first ``shared`` slots of every rank the number of the document among
    those of the row, which come by their first tokens; -1 but for split documents."""
    kv_positions: Tensor
    """(B, n * shared) int32."""
    kv_order: Tensor
    """(B, n * shared) int64: which of these slots comes first, second, ... by document, and in it by position; those of
    no split document are last."""
    slots: Tensor
    """(B, S) int64: the slot of each token of the row among the n * L of all ranks, rank after rank."""
    shared: int
    """The first slots of each shard, in which every split document lies; the same on every rank. Only these travel."""
    local_start: int
    """No whole document of this rank has a token before it, in any row."""
    documents_are_runs: bool
    """Whether the tokens of every document stand side by side in their row."""
    group_name: str
    """Of the mesh's process group, of ``group_size`` ranks; of a pair, the second's."""
    group_size: int
    heads_group_name: str = ""
    """Of the first of a pair, of ``heads_group_size`` ranks."""
    heads_group_size: int = 1
    _ids: Tensor = field(repr=False)
    _checked: list[bool] = field(default_factory=list, repr=False)

    @classmethod
    def from_segment_ids(
        cls,
        ids: Tensor,
        mesh: DeviceMesh | tuple[DeviceMesh, DeviceMesh],
        balance: str = "documents",
        *,
        bucket: int = 128,
        device: torch.device | str | None = None,
    ) -> "ContextLayout":
        """The layout of a batch.

        Args:
            ids: (B, S) int32 or int64 segment ids of whole rows, the same on every rank, in any order; equal ids are a
                document, negative ones padding. On the CPU, where data loaders have them; others are copied there.
            mesh: of one dimension, as ``mesh["cp"]``; or a pair (heads_mesh, keys_mesh) of dimensions of one mesh, as
                ``(mesh["cp_heads"], mesh["cp_keys"])``. Ranks of the first, which are near each other, exchange heads,
                and keys travel between those of the second; rank r of all n is rank r % h of the first, of h ranks,
                and rank r // h of the second.
            balance: "documents" deals whole documents by their work and splits only long ones. "head_tail" gives rank r
                parts r and 2n - 1 - r of 2n of each row, "contiguous" part r of n.
            bucket: ``shared`` is rounded up to a multiple of it. Larger ones give fewer shapes, for compiled or
                captured graphs.
            device: of the layout's tensors; None is the mesh's.

        Raises:
            TypeError: an argument of another type.
            ValueError: ids that are not (B, S) or do not fit in int32; a mesh of several dimensions, or a pair that is
                none of one mesh; another balance or bucket.
        """
        if not isinstance(ids, Tensor):
            raise TypeError(f"ContextLayout: ids: expected a tensor, got {type(ids).__name__}")
        meshes = _check_mesh(mesh)
        groups = [RankGroup.of_mesh(axis, overlaps=False) for axis in meshes]
        rank, size = 0, 1
        for group in groups:
            rank, size = rank + size * group.rank, size * group.size
        host_ids = ids.detach().cpu()
        found = torch.ops.selfattn.context_layout(host_ids, rank, size, balance, bucket)
        names = (
            "indices",
            "segment_ids",
            "positions",
            "document_positions",
            "kv_segment_ids",
            "kv_positions",
            "kv_order",
            "slots",
            "shared",
            "local_start",
            "documents_are_runs",
        )
        device = _device_of(meshes[0]) if device is None else device
        values = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in zip(names, found, strict=True)
        }
        values |= {"group_name": groups[-1].name, "group_size": groups[-1].size}
        if len(groups) == 2:
            values |= {"heads_group_name": groups[0].name, "heads_group_size": groups[0].size}
        return cls(mesh, balance, bucket, **values, _ids=host_ids)

    @property
    def _meshes(self) -> tuple[DeviceMesh, ...]:
        """From the fastest to the slowest."""
        return self.mesh if isinstance(self.mesh, tuple) else (self.mesh,)

    def shard(self, x: Tensor, fill: float = 0) -> Tensor:
        """This rank's tokens of whole rows. Differentiable.

        Args:
            x: (B, S, ...), the same on every rank.
            fill: for slots that no token fills; -100 for labels of ``cross_entropy``.

        Returns:
            (B, L, ...).

        Raises:
            ValueError: x of other rows.
        """
        _check_tokens(x, "x", self.slots.shape)
        indices = self.indices.to(x.device)
        rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        own = x[rows, indices.clamp(min=0)]
        if self.group_size * self.heads_group_size * indices.shape[1] == x.shape[1]:
            return own
        is_empty = (indices < 0).view(*indices.shape, *[1] * (x.dim() - 2))
        return own.masked_fill(is_empty, fill)

    def unshard(self, x: Tensor) -> Tensor:
        """Whole rows of every rank's tokens, on every rank. Differentiable: the gradients of all ranks are added up.

        Args:
            x: (B, L, ...).

        Returns:
            (B, S, ...), without what stood in slots that no token fills.

        Raises:
            ValueError: x of another shape than this rank's tokens.
        """
        _check_tokens(x, "x", self.indices.shape)
        for mesh in self._meshes:
            x = GatherShards.apply(RankGroup.of_mesh(mesh, overlaps=False), x)
        rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        return x[rows, self.slots.to(x.device)]

    def freqs(self, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
        """(sin, cos), each (B, L, head_dim / 2), of ``document_positions``."""
        return precompute_freqs(head_dim, self.document_positions, theta=theta)

    def check(self) -> None:
        """Compares the layout over ranks, by one small collective that the host waits for.

        Raises:
            ValueError: on every rank, where ranks have other ids or other arguments.
        """
        check_agreement(self._facts(), *self._meshes)

    def _facts(self) -> dict[str, object]:
        return {
            "segment_ids": content_of(self._ids),
            "layout": (self.balance, self.bucket, self.heads_group_size, self.group_size, self.shared),
        }

    def _check_call(self, call: dict[str, object]) -> None:
        """With the first call of the layout, and with all where TORCH_DISTRIBUTED_DEBUG is set."""
        if torch.compiler.is_compiling() or detect_fake_mode() is not None:
            return
        if self._checked and dist.get_debug_level() == dist.DebugLevel.OFF:
            return
        check_agreement(self._facts() | call, *self._meshes)
        self._checked.append(True)


class GatherShards(torch.autograd.Function):
    """(B, L, ...) of each rank -> (B, n L, ...), whose gradients are added up over ranks."""

    @staticmethod
    def forward(ctx: Any, group: RankGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return group.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.group.finish(ctx.group.start_scatter(grad))


def _check_mesh(mesh: object) -> tuple[DeviceMesh, ...]:
    """The mesh by itself, or the pair."""
    meshes = mesh if isinstance(mesh, tuple) else (mesh,)
    if isinstance(mesh, tuple) and len(mesh) != 2:
        raise ValueError(f"ContextLayout: mesh: expected a pair (heads_mesh, keys_mesh), got {len(mesh)} in a tuple")
    for axis in meshes:
        if not isinstance(axis, DeviceMesh):
            raise TypeError(f"ContextLayout: mesh: expected a DeviceMesh or a pair of them, got {type(axis).__name__}")
        if axis.ndim != 1:
            raise ValueError(f"ContextLayout: mesh: expected one dimension, as mesh['cp'] has, got {axis}")
    ranks = [axis.mesh.tolist() for axis in meshes]
    if len(ranks) == 2 and len(set(ranks[0]) & set(ranks[1])) != 1:
        raise ValueError(
            "ContextLayout: mesh: expected a pair of two dimensions of one mesh, which share this rank alone, got "
            f"ranks {ranks[0]} and {ranks[1]}"
        )
    return meshes


def _device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _check_tokens(x: Tensor, name: str, shape: torch.Size) -> None:
    if x.shape[:2] != shape:
        raise ValueError(f"ContextLayout: {name}: expected {tuple(shape)} tokens, got shape {tuple(x.shape)}")


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ContextLayout,
    *,
    method: str = "auto",
    causal: bool = True,
    qk_scale: float | None = None,
    backend: str = "auto",
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """``multihead_attention`` of whole rows whose tokens are spread over ranks: exact, for any layout.

    Documents that lie on one rank are attended to there. Of the others the first ``layout.shared`` slots of every rank
    travel, beside that work: by ``method`` "keys" every rank gathers their keys and values, by "heads" it is given all
    of these tokens and some of the heads. Over a pair of meshes, ranks of the first exchange heads, and gather the keys
    and values of these heads from those of the second. Without such documents there is no collective.

    Every rank of the layout's mesh, or pair, calls it, with its own tokens and the same options. Differentiable once;
    the gradient of ``sinks`` is this rank's share, to be summed over ranks as those of weights are.

    Args:
        q: (B, L, NH, DQK), in the order of ``layout``.
        k: (B, L, NKV, DQK).
        v: (B, L, NKV, DV).
        layout: of these rows, on q's device.
        method: "keys", "heads" or "auto", which takes "keys", or "heads" where every document is split and that moves
            fewer bytes in both passes. "heads" needs a number of ranks that divides NH, and divides NKV or is a
            multiple of it, and so does the first of a pair of meshes, beside which the method is "keys" or "auto", both
            the same.
        causal, qk_scale, backend, window_left, window_right, softcap, sinks: as ``multihead_attention``; windows count
            positions of the row.

    Returns:
        (B, L, NH, DV), of q's dtype; 0 in padding.

    Raises:
        TypeError, ValueError: a bad argument. The first call of a layout compares it, shapes and options over ranks:
            what differs is a ValueError on every rank. Later calls are compared where TORCH_DISTRIBUTED_DEBUG is set.
        NotImplementedError: a ``backend`` that cannot serve one of the calls; a gradient of the gradient.
    """
    if not isinstance(layout, ContextLayout):
        raise TypeError(f"context_parallel_attention: layout: expected a ContextLayout, got {type(layout).__name__}")
    options = {
        "method": method,
        "causal": causal,
        "qk_scale": qk_scale,
        "backend": backend,
        "window_left": window_left,
        "window_right": window_right,
        "softcap": softcap,
    }
    tensors = {
        name: None if x is None else (tuple(x.shape), x.dtype)
        for name, x in zip(("q", "k", "v", "sinks"), (q, k, v, sinks), strict=True)
    }
    layout._check_call(tensors | {"options": options})
    return torch.ops.selfattn.context_parallel_attention(
        q,
        k,
        v,
        layout.segment_ids,
        layout.kv_segment_ids,
        positions=layout.positions,
        kv_positions=layout.kv_positions,
        shared=layout.shared,
        group_size=layout.group_size,
        group_name=layout.group_name,
        **options,
        sinks=sinks,
        local_start=layout.local_start,
        documents_are_runs=layout.documents_are_runs,
        heads_group_name=layout.heads_group_name,
        heads_group_size=layout.heads_group_size,
        kv_order=layout.kv_order,
    )
