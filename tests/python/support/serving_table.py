"""Which backends must serve a call, and which one ``auto`` must take: one table, decided without asking the library.

TABLE says the rules of docs/semantics.md once, as data; that document shows it as ``render`` writes it. A test leaves a
backend out, or expects its refusal, where this table says so and nowhere else: a backend that stops serving then fails
the tests instead of emptying them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
ORDER = ("flash", "cudnn", "aten", "reference")
"""``auto`` takes the first of these that serves."""
ALIASES = {"pallas_triton": "flash", "triton": "flash", "xla": "aten"}
MOST_TOKENS_WITH_IDS = 524_288
"""Of a row on CUDA: what the kernel that prepares segments holds in shared memory."""
MOST_TOKENS = 2**29
"""Of a row on CUDA: positions and windows are counted in 32 bits."""


@dataclass(frozen=True)
class Call:
    """What the choice of a backend may depend on. The defaults are a call that every backend of its device serves."""

    device: str = "cpu"  # "cpu", "cuda" or "meta"
    capability: tuple[int, int] = (9, 0)  # of a CUDA device
    cudnn_version: int = 91000
    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    num_queries: int = 6
    num_keys: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    causal: bool = True
    qk_scale: float | None = None
    has_ids: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    has_sinks: bool = False
    has_positions: bool = False
    wants_lse: bool = False
    requires_grad: bool = False
    is_deterministic: bool = False  # torch.use_deterministic_algorithms
    transform: str | None = None  # of torch.func: "vmap", "grad", "jvp"
    has_tangent: bool = False  # forward-mode differentiation

    def with_(self, **changes: Any) -> "Call":
        return replace(self, **changes)


def reads_positions(call: Call) -> bool:
    """Nothing but causality and windows does."""
    return call.has_positions and (call.causal or call.window_left >= 0 or call.window_right >= 0)


FEATURES: dict[str, Callable[[Call], bool]] = {
    "segment ids": lambda call: call.has_ids,
    "rows of more than 524,288 tokens with segment ids or positions": lambda call: (
        (call.has_ids or reads_positions(call)) and max(call.num_queries, call.num_keys) > MOST_TOKENS_WITH_IDS
    ),
    "rows of more than 2^29 tokens": lambda call: max(call.num_queries, call.num_keys) > MOST_TOKENS,
    "windows": lambda call: call.window_left >= 0 or call.window_right >= 0,
    "softcap": lambda call: call.softcap > 0,
    "sinks": lambda call: call.has_sinks,
    "positions": reads_positions,
    "lse": lambda call: call.wants_lse,
    "causal with Sq != Skv": lambda call: call.causal and call.num_queries != call.num_keys,
    "one query or one key": lambda call: call.num_queries <= 1 or call.num_keys <= 1,
    "gradients in deterministic mode": lambda call: call.requires_grad and call.is_deterministic,
    "empty tensors": lambda call: (
        0 in (call.batch, call.num_queries, call.num_keys, call.num_heads, call.num_kv_heads, call.value_dim)
    ),
    "`torch.func` transforms": lambda call: call.transform is not None,
    "`torch.func` transforms but vmap": lambda call: call.transform not in (None, "vmap"),
    "forward mode": lambda call: call.has_tangent,
}
"""What a call may ask for beyond dtypes and head dimensions, by the name that the document has for it."""


@dataclass(frozen=True)
class Limits:
    """What a backend serves on a kind of device: everything that is not ruled out here."""

    dtypes: tuple[torch.dtype, ...] = DTYPES
    min_capability: tuple[int, int] | None = None
    dim_bytes: int = 1  # of which a head dimension, in bytes, must be a multiple
    max_dim: int | None = None
    refuses: tuple[str, ...] = ()  # keys of FEATURES

    def admit(self, call: Call) -> bool:
        if call.dtype not in self.dtypes:
            return False
        if self.min_capability is not None and call.capability < self.min_capability:
            return False
        for dim in (call.dim, call.value_dim):
            if dim * call.dtype.itemsize % self.dim_bytes != 0 or (self.max_dim is not None and dim > self.max_dim):
                return False
        return not any(FEATURES[name](call) for name in self.refuses)


KERNELS_LEAVE = ("empty tensors", "`torch.func` transforms", "forward mode")
"""What PyTorch's kernels leave to ``reference``."""
OUR_KERNELS_LEAVE = ("empty tensors", "`torch.func` transforms but vmap", "forward mode")
"""What this project's kernels leave to ``reference``."""
CUDNN = Limits(
    dtypes=HALF,
    min_capability=(8, 0),
    dim_bytes=16,
    max_dim=128,
    refuses=(
        "segment ids",
        "windows",
        "softcap",
        "sinks",
        "positions",
        "lse",
        "causal with Sq != Skv",
        "one query or one key",
        "gradients in deterministic mode",
        *KERNELS_LEAVE,
    ),
)
ATEN = Limits(refuses=("softcap", "sinks", "lse", *KERNELS_LEAVE))
TABLE: dict[tuple[str, str], Limits] = {
    ("flash", "cpu"): Limits(dtypes=(torch.float32, *HALF), max_dim=512, refuses=OUR_KERNELS_LEAVE),
    ("flash", "cuda"): Limits(
        dtypes=(torch.float32, *HALF),
        min_capability=(8, 0),
        max_dim=256,
        refuses=(
            "rows of more than 524,288 tokens with segment ids or positions",
            "rows of more than 2^29 tokens",
            *OUR_KERNELS_LEAVE,
        ),
    ),
    ("cudnn", "cuda"): CUDNN,
    ("aten", "cpu"): ATEN,
    ("aten", "cuda"): ATEN,
    ("reference", "cpu"): Limits(),
    ("reference", "cuda"): Limits(),
}
"""(backend, device) -> its limits. A backend without a row does not serve there. The scale of the logits, grouped
queries, strides, kinds of ids and every pattern of them rule nothing out anywhere."""


def limits_of(backend: str, call: Call) -> Limits | None:
    """Meta tensors stand for those of a CPU. ATen asks for cuDNN 9.10 beyond 128 features, and for a Hopper GPU."""
    limits = TABLE.get((backend, "cpu" if call.device == "meta" else call.device))
    if backend == "cudnn" and limits is not None and call.capability == (9, 0) and call.cudnn_version >= 91000:
        return replace(limits, max_dim=256)
    return limits


def serving(call: Call) -> list[str]:
    """The backends that must serve ``call``, in the order of ``auto``; every other one must refuse it."""
    rows = {backend: limits_of(backend, call) for backend in ORDER}
    return [backend for backend, limits in rows.items() if limits is not None and limits.admit(call)]


def chosen(call: Call) -> str:
    """The backend that ``auto`` must take."""
    return serving(call)[0]


def must_serve(backend: str, call: Call) -> bool:
    """Whether ``backend``, an alias or ``auto`` must serve ``call``."""
    return backend == "auto" or ALIASES.get(backend, backend) in serving(call)


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    qk_scale: float | None = None,
    kv_segment_ids: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    wants_lse: bool = False,
) -> Call:
    """The facts of a call with these arguments, outside transforms and forward mode."""
    on_cuda = q.device.type == "cuda"
    return Call(
        device=q.device.type,
        capability=torch.cuda.get_device_capability(q.device) if on_cuda else Call.capability,
        cudnn_version=(torch.backends.cudnn.version() or 0) if on_cuda else Call.cudnn_version,
        dtype=q.dtype,
        batch=q.shape[0],
        num_queries=q.shape[1],
        num_keys=k.shape[1],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        dim=q.shape[3],
        value_dim=v.shape[3],
        causal=causal,
        qk_scale=qk_scale,
        has_ids=segment_ids is not None,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        has_sinks=sinks is not None,
        has_positions=positions is not None,
        wants_lse=wants_lse,
        requires_grad=torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in (q, k, v, sinks)),
        is_deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def is_refused(backend: str, call: Call, function: Callable[[], Any]) -> bool:
    """Whether ``backend`` must refuse ``call``; where it must, ``function``, which makes it, is seen to raise so."""
    if must_serve(backend, call):
        return False
    name = ALIASES.get(backend, backend)
    with pytest.raises(NotImplementedError, match=f"^selfattn: backend '{name}' cannot serve this call: "):
        function()
    return True


def skip_refused(refusal: NotImplementedError, backend: str, call: Call) -> None:
    """For a test that met ``refusal``: leaves the case out where ``backend`` must refuse ``call``, else fails."""
    if must_serve(backend, call):
        raise refusal
    pytest.skip(f"by the serving table {backend} does not serve this case")


def skip_unless_flash_serves(device: str, dtype: torch.dtype, dim: int) -> None:
    """For tests of what only ``flash`` does, on a GPU that its kernels are not for."""
    call = describe(*(torch.zeros(1, 8, 2, dim, device=device, dtype=dtype) for _ in range(3)), wants_lse=True)
    if not must_serve("flash", call):
        pytest.skip(f"by the serving table flash does not serve {dtype} of width {dim} on this {device} device")


CACHE_FEATURES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "softcap": lambda call: call.get("softcap", 0.0) > 0,
    "sinks": lambda call: call.get("sinks") is not None,
    "lse": lambda call: call.get("wants_lse", False),
    "fixed splits": lambda call: call.get("split_keys", 0) > 0,
    "empty tensors": lambda call: any(call[name].numel() == 0 for name in ("q", "k_cache", "v_cache")),
    "float64": lambda call: call["q"].dtype == torch.float64,
    "float32 on CUDA": lambda call: call["q"].is_cuda and call["q"].dtype == torch.float32,
    "unaligned head dimensions on CUDA": lambda call: (
        call["q"].is_cuda and any(call[name].shape[-1] % 8 for name in ("k_cache", "v_cache"))
    ),
    "wide head dimensions on CUDA": lambda call: (
        call["q"].is_cuda and any(call[name].shape[-1] > 256 for name in ("k_cache", "v_cache"))
    ),
    "small pages on CUDA": lambda call: (
        call["q"].is_cuda
        and call.get("page_table") is not None
        and call["page_table"].shape[1] > 1
        and call["k_cache"].shape[1] % 16 != 0
    ),
}
"""What a call over a KV cache may ask for."""
CACHE_TABLE: dict[str, tuple[str, ...]] = {
    "flash": (
        "float64",
        "empty tensors",
        "float32 on CUDA",
        "unaligned head dimensions on CUDA",
        "wide head dimensions on CUDA",
        "small pages on CUDA",
    ),
    "aten": ("softcap", "sinks", "lse", "fixed splits", "empty tensors"),
    "reference": (),
}
"""backend -> what it refuses over a KV cache, on every device. A backend without a row serves no cache."""


def serves_cache(backend: str, call: dict[str, Any], wants_lse: bool = False) -> bool:
    """Whether ``backend`` must serve these arguments of attention_with_kv_cache, or with ``wants_lse`` of its lse."""
    if backend == "auto":
        return True
    refused = CACHE_TABLE.get(backend)
    return refused is not None and not any(CACHE_FEATURES[name](call | {"wants_lse": wants_lse}) for name in refused)


def render() -> str:
    """TABLE as docs/semantics.md shows it."""
    lines = [
        "| name | device | dtypes | head dimensions | refuses |",
        "|---|---|---|---|---|",
    ]
    for backend in ORDER:
        rows = [(device, limits) for (name, device), limits in TABLE.items() if name == backend]
        if len(rows) == 2 and rows[0][1] == rows[1][1]:
            rows = [("every", rows[0][1])]
        lines += [_render_row(backend, device, limits) for device, limits in rows]
    return "\n".join(lines)


def _render_row(backend: str, device: str, limits: Limits) -> str:
    place = {"cpu": "CPU", "cuda": "CUDA", "every": "every"}[device]
    if limits.min_capability is not None:
        place += f", compute capability {'.'.join(map(str, limits.min_capability))} or newer"
    dtypes = "every" if limits.dtypes == DTYPES else ", ".join(str(dtype)[len("torch.") :] for dtype in limits.dtypes)
    dims = "any" if limits.max_dim is None else f"up to {limits.max_dim}"
    if limits.dim_bytes > 1:
        dims = f"multiples of {limits.dim_bytes // HALF[0].itemsize} {dims}"
    if backend == "cudnn":
        dims += " (256 on 9.0 with cuDNN 9.10 or newer)"
    return f"| `{backend}` | {place} | {dtypes} | {dims} | {', '.join(limits.refuses) or 'nothing'} |"
