"""python -m selfattn: what is installed here, what serves, and whether it computes what it should.

A bug report needs what this prints. It exits with 1 where a check of the self-test fails.
"""

import copy
import platform
import sys
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import selfattn
from selfattn._library import build_of, library_path

# The largest error, of the largest element of the expected result: roundings of the dtype add up over a few products.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
TOKENS, HEADS, KV_HEADS, HEAD_DIM = 96, 4, 2, 64
WIDTH = HEADS * HEAD_DIM
CONFIG = selfattn.SelfAttentionConfig(head_dim=HEAD_DIM, num_kv_heads=KV_HEADS, qk_norm=True)


def devices() -> list[torch.device]:
    """The CPU, and the CUDA devices where the library was built with CUDA."""
    found = [torch.device("cpu")]
    if build_of(library_path()).get("cuda"):
        found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return found


def describe_device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def describe_installation() -> list[str]:
    build = build_of(library_path())
    lines = [
        f"selfattn {build.get('version', 'of unknown version')}, {library_path()}",
        f"built for torch {build.get('torch', 'unknown')}, CUDA {build.get('cuda') or 'none'}",
        f"here: torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, Python {platform.python_version()}, "
        f"{platform.platform()}",
        "devices:",
        *(f"  {device}: {describe_device(device)}" for device in devices()),
    ]
    if torch.cuda.is_available() and not build.get("cuda"):
        lines.append("  this build of selfattn has no kernels for the CUDA devices: ATen's operators serve there")
    lines.append("families of kernels in this build:")
    lines += [f"  {family}: {targets}" for family, targets in build.get("kernels", {}).items()]
    return lines


# ---------------------------------------------------------------- what serves


def make_ids(device: torch.device) -> Tensor:
    """(1, TOKENS): three documents, and padding."""
    lengths = torch.tensor([40, 1, 47, TOKENS - 88])
    ids = torch.repeat_interleave(torch.tensor([0, 1, 2, -1], dtype=torch.int32), lengths)
    return ids[None].to(device)


def make_heads(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v (1, TOKENS, heads, HEAD_DIM)."""
    return [torch.randn(1, TOKENS, heads, HEAD_DIM).to(device, dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def describe_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Of calls with segment ids."""
    reasons = selfattn.explain_backend(*make_heads(device, dtype), make_ids(device)).splitlines()
    return [f"  {device}, {str(dtype).removeprefix('torch.')}:", *(f"    {reason}" for reason in reasons)]


# ---------------------------------------------------------------- the self-test


def largest_error(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Of each pair the largest difference, of the largest expected element; NaN where there is a NaN."""
    pairs = [(a.detach().double(), e.detach().double()) for a, e in zip(actual, expected, strict=True)]
    return torch.stack([(a - e).abs().max() / e.abs().max() for a, e in pairs]).max().item()


def attention_error(device: torch.device, dtype: torch.dtype) -> float:
    """Of out and the gradients, to the formula in float64; what stands in the padding must not matter."""
    ids = make_ids(device)
    heads = make_heads(device, dtype)
    results = []
    for tensors, backend in ((heads, "auto"), ([tensor.double() for tensor in heads], "reference")):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = selfattn.multihead_attention(*leaves, ids, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    spoilt = [tensor.masked_fill((ids < 0)[..., None, None], float("nan")) for tensor in heads]
    with torch.no_grad():
        isolated = selfattn.multihead_attention(*spoilt, ids)
    results[0] += (isolated[ids >= 0],)
    results[1] += (results[1][0][ids >= 0],)
    return largest_error(*results)


def layer_error(device: torch.device, dtype: torch.dtype) -> float:
    """Of a layer's output and its weights' gradients, to those of the same layer on the formula in float64."""
    layer = selfattn.SelfAttention(WIDTH, CONFIG).to(device, dtype)
    x = torch.randn(1, TOKENS, WIDTH).to(device, dtype)
    oracle = copy.deepcopy(layer).double()
    results = []
    for each, inputs in ((layer, x), (oracle, x.double())):
        out = each(inputs, segment_ids=make_ids(device))
        results.append((out, *torch.autograd.grad(out.square().sum(), list(each.parameters()))))
    return largest_error(*results)


@torch.no_grad()
def cache_error(device: torch.device, dtype: torch.dtype) -> float:
    """Of a layer that reads its tokens in three pieces through a KV cache, to one pass over them."""
    layer = selfattn.SelfAttention(WIDTH, CONFIG).to(device, dtype).eval()
    x = torch.randn(1, TOKENS, WIDTH).to(device, dtype)
    cache = selfattn.KVCache.dense(
        layers=1, batch=1, max_length=TOKENS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype, device=device
    )
    pieces = []
    for piece in x.split([TOKENS - 10, 9, 1], dim=1):
        pieces.append(layer(piece, cache=cache.layer(0)))
        cache.advance(piece.shape[1])
    return largest_error([torch.cat(pieces, dim=1)], [layer(x)])


CHECKS: dict[str, Callable[[torch.device, torch.dtype], float]] = {
    "attention": attention_error,
    "layer": layer_error,
    "KV cache": cache_error,
}


def run_check(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong; None where nothing is."""
    torch.manual_seed(0)
    try:
        error = CHECKS[name](device, dtype)
    except Exception as exception:
        return f"{type(exception).__name__}: {exception}"
    limit = TOLERANCES[dtype]
    return None if error <= limit else f"its error is {error:.1e}, and must be at most {limit:.0e}"


def main() -> int:
    print(*describe_installation(), sep="\n")
    print("backends, of calls with segment ids:")
    for device in devices():
        for dtype in TOLERANCES:
            print(*describe_backends(device, dtype), sep="\n")
    print("self-test:")
    start = time.perf_counter()
    complaints = []
    for device in devices():
        for dtype in TOLERANCES:
            for name in CHECKS:
                complaint = run_check(name, device, dtype)
                complaints += [complaint] if complaint else []
                print(f"  {device}, {str(dtype).removeprefix('torch.')}, {name}: {complaint or 'ok'}")
    checks = len(devices()) * len(TOLERANCES) * len(CHECKS)
    verdict = f"FAILED in {len(complaints)} of {checks} checks" if complaints else f"passed, {checks} checks"
    print(f"self-test {verdict}, {time.perf_counter() - start:.1f} s")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
