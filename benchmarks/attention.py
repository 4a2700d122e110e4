"""Times attention beside its peers: one process, one card, interleaved rounds, medians.

    python benchmarks/attention.py --pass forward --case "docs" --case "dense causal D128"

A case is run where its name contains one of the --case strings (all without). Every implementation is timed once a
round, the order turning from round to round, because the card's clock depends on what ran before. Writes one JSON line
a case, pass and implementation to --out and prints a table: TFLOP/s of allowed pairs, and the ratio to the best peer.
``peak_bytes`` of a row is the most memory that one call had above what was allocated before it: above the inputs, and
in the pass "backward" also above what its forward pass had saved.
"""

import argparse
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import CASES, FLOPS_PER_PAIR, Case
from measure import Call, add_options, describe_run, median_times, peak_bytes, sm_clock, synchronise
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import selfattn  # noqa: F401

OURS = "selfattn"
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, S, N, D) in and out, or (B, N, S, D) for SDPA: see prepare


def sdpa(backend: SDPBackend, case: Case) -> Forward:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)

    return forward


def fa2_varlen(case: Case) -> Forward:
    """FlashAttention 2 in PyTorch, given the document boundaries on the device and the longest on the host."""
    lengths = [length for row in case.document_lengths() for length in row]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    longest = max(lengths)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, boundaries, boundaries, longest, longest, window_size=(-1, 0))

    return forward


def flex(case: Case) -> Forward:
    """FlexAttention, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    ids = case.segment_ids()

    def is_allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (ids[b, i] == ids[b, j])

    mask = create_block_mask(is_allowed, case.batch, None, case.length, case.length, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def ours(case: Case) -> Forward:
    ids = case.segment_ids()
    return lambda q, k, v: torch.ops.selfattn.flash_attention(q, k, v, ids, case.causal)[0]


# name: (how to make it, layout of its tensors, whether it serves documents; None: both)
IMPLEMENTATIONS: dict[str, tuple[Callable[[Case], Forward], str, bool | None]] = {
    OURS: (ours, "BSND", None),
    "sdpa_cudnn": (lambda case: sdpa(SDPBackend.CUDNN_ATTENTION, case), "BNSD", False),
    "fa2_varlen": (fa2_varlen, "TND", True),
    "flex": (flex, "BNSD", True),
}
DEFAULT_IMPLEMENTATIONS = (OURS, "sdpa_cudnn", "fa2_varlen")


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """A (B, S, N, D) tensor as an implementation takes it; no copy."""
    if layout == "BNSD":
        return tensor.transpose(1, 2)
    return tensor.flatten(0, 1) if layout == "TND" else tensor


def prepare(name: str, case: Case, tensors: tuple[Tensor, ...], which: str) -> Call | None:
    """The call to time, run once; None, with the reason printed, where the implementation cannot run here."""
    make, layout, for_documents = IMPLEMENTATIONS[name]
    if for_documents is not None and for_documents != bool(case.mean):
        return None
    q, k, v, grad = (arrange(tensor, layout) for tensor in tensors)
    try:
        forward = make(case)
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        if which == "forward":
            call = torch.no_grad()(lambda: forward(q, k, v))
        elif which == "backward":
            out = forward(*leaves)
            call = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)  # noqa: E731
        else:
            call = lambda: torch.autograd.grad(forward(*leaves), leaves, grad)  # noqa: E731
        call()
        synchronise()
    except Exception as error:
        print(f"{case.name}: {name} left out: {str(error).splitlines()[0][:120]}", flush=True)
        return None
    return call


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pass", dest="passes", action="append", choices=list(FLOPS_PER_PAIR), help="may be repeated")
    add_options(parser, list(IMPLEMENTATIONS), "attention.jsonl")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    names = arguments.impl or DEFAULT_IMPLEMENTATIONS
    cases = [case for case in CASES if not arguments.case or any(part in case.name for part in arguments.case)]
    record = describe_run(arguments.commit)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with arguments.out.open("a") as out:
        for case in cases:
            tensors = (*case.tensors(), case.tensors()[0])
            for which in arguments.passes or ["forward"]:
                prepared = {name: prepare(name, case, tensors, which) for name in names}
                calls = {name: call for name, call in prepared.items() if call is not None}
                peaks = {name: peak_bytes(call) for name, call in calls.items()}
                times = median_times(calls, arguments.rounds, arguments.pause, arguments.ms)
                clocks = sm_clock()
                speeds = {name: case.flops(which) / ms / 1e9 for name, ms in times.items()}
                for name, ms in times.items():
                    row = {"case": case.name, "impl": name, "pass": which, "ms": round(ms, 4)}
                    row |= {"tflops": round(speeds[name], 1), "peak_bytes": peaks[name], **record, "clocks": clocks}
                    out.write(json.dumps(row) + "\n")
                peers = [speed for name, speed in speeds.items() if name != OURS]
                ratio = f"  ratio {speeds[OURS] / max(peers):.3f}" if peers and OURS in speeds else ""
                columns = "  ".join(f"{name} {speed:6.1f}" for name, speed in speeds.items())
                print(f"{case.name:32} {which:16} {columns}{ratio}", flush=True)


if __name__ == "__main__":
    main()
