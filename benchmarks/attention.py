"""Times attention beside its peers: one process, one card, interleaved rounds, medians.

    python benchmarks/attention.py --pass forward --case "docs" --case "dense causal D128"
    python benchmarks/attention.py --set family --family sm80 --pass forward --pass backward
    python benchmarks/attention.py --set memory --pass forward --pass forward+backward --impl selfattn --impl auto

A case of the --set (cases.py) is run where its name contains one of the --case strings (all without). Every
implementation that serves a case is timed once a round, the order turning from round to round, because the card's clock
depends on what ran before. Writes one JSON line a case, pass and implementation to --out and prints a table: TFLOP/s of
allowed pairs, and the ratio to the best peer. ``peak_bytes`` of a row is the most memory that one call had above what
was allocated before it: above the inputs, and in the pass "backward" also above what its forward pass had saved.
``--family`` forces a family of this library's CUDA kernels; a row says which ran.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import PASSES, SETS, Case
from measure import (
    Call,
    add_family_option,
    add_options,
    describe_run,
    median_times,
    peak_bytes,
    sm_clock,
    synchronise,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import selfattn

OURS = "selfattn"
OURS_COMPOSED = "auto"
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]  # in the layout of its Implementation, in and out


@dataclass(frozen=True)
class Implementation:
    make: Callable[[Case], Forward]
    layout: str  # of its tensors: "BSND", "BNSD", or "TND" with the rows of a batch behind each other
    serves: Callable[[Case], bool] = lambda case: True


def sdpa(backend: SDPBackend) -> Callable[[Case], Forward]:
    def make(case: Case) -> Forward:
        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)

        return forward

    return make


def sdpa_efficient_mask(case: Case) -> Forward:
    """PyTorch's memory-efficient kernel under a boolean mask (B, 1, S, S), made beforehand."""
    ids = case.segment_ids()
    mask = (ids[:, None, :, None] == ids[:, None, None, :]).tril_()

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

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

    ids, softcap = case.segment_ids(), case.softcap

    def is_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (ids[b, i] == ids[b, j])

    def is_causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    def cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    torch.compiler.reset()  # each case has a graph of its own
    mask = None
    if case.causal:
        rule, batch = (is_causal, None) if ids is None else (is_document, case.batch)
        mask = create_block_mask(rule, batch, None, case.length, case.length, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, score_mod=cap if softcap else None, block_mask=mask)


def ours(case: Case) -> Forward:
    ids = case.segment_ids()
    options = {"softcap": case.softcap} if case.softcap else {}
    return lambda q, k, v: torch.ops.selfattn.flash_attention(q, k, v, ids, case.causal, **options)[0]


def ours_composed(case: Case) -> Forward:
    """What a user gets: the first backend that serves, which composes where the kernels do not."""
    ids = case.segment_ids()
    return lambda q, k, v: selfattn.multihead_attention(q, k, v, ids, case.causal, softcap=case.softcap)


def is_plain(case: Case) -> bool:
    """What FlashAttention 2 and cuDNN have as PyTorch calls them."""
    return not case.softcap and not case.precision


IMPLEMENTATIONS = {
    OURS: Implementation(ours, "BSND"),
    OURS_COMPOSED: Implementation(ours_composed, "BSND"),
    "sdpa_cudnn": Implementation(
        sdpa(SDPBackend.CUDNN_ATTENTION), "BNSD", lambda case: is_plain(case) and not case.mean
    ),
    "fa2": Implementation(sdpa(SDPBackend.FLASH_ATTENTION), "BNSD", lambda case: is_plain(case) and not case.mean),
    "fa2_varlen": Implementation(fa2_varlen, "TND", lambda case: is_plain(case) and bool(case.mean)),
    "flex": Implementation(flex, "BNSD"),
    "sdpa_efficient_mask": Implementation(sdpa_efficient_mask, "BNSD", lambda case: bool(case.mean and case.precision)),
}
DEFAULT_IMPLEMENTATIONS = {
    "usual": (OURS, "sdpa_cudnn", "fa2_varlen"),
    "family": (OURS, "sdpa_cudnn", "fa2", "fa2_varlen", "flex", "sdpa_efficient_mask"),
    "memory": (OURS, OURS_COMPOSED, "fa2", "fa2_varlen", "flex", "sdpa_efficient_mask"),
}


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """A (B, S, N, D) tensor as an implementation takes it; no copy."""
    if layout == "BNSD":
        return tensor.transpose(1, 2)
    return tensor.flatten(0, 1) if layout == "TND" else tensor


def prepare(name: str, case: Case, tensors: tuple[Tensor, ...], which: str) -> Call | None:
    """The call to time, run once; None, with the reason printed, where the implementation cannot run here."""
    implementation = IMPLEMENTATIONS[name]
    if not implementation.serves(case):
        return None
    q, k, v, grad = (arrange(tensor, implementation.layout) for tensor in tensors)
    try:
        forward = implementation.make(case)
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
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        print(f"{case.name}: {name} left out: {reason}", flush=True)
        return None
    return call


def choose_precision(case: Case) -> None:
    """What PyTorch's products, FlexAttention and this library's kernels make of float32."""
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pass", dest="passes", action="append", choices=PASSES, help="may be repeated")
    parser.add_argument("--set", choices=list(SETS), default="usual", help="of cases")
    add_family_option(parser)
    add_options(parser, list(IMPLEMENTATIONS), "attention.jsonl")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    names = arguments.impl or DEFAULT_IMPLEMENTATIONS[arguments.set]
    cases = [
        case for case in SETS[arguments.set] if not arguments.case or any(part in case.name for part in arguments.case)
    ]
    record = describe_run(arguments.commit)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with arguments.out.open("a") as out:
        for case in cases:
            choose_precision(case)
            tensors = (*case.tensors(), case.tensors()[2])
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
                peers = [speed for name, speed in speeds.items() if name not in (OURS, OURS_COMPOSED)]
                ratio = f"  ratio {speeds[OURS] / max(peers):.3f}" if peers and OURS in speeds else ""
                columns = "  ".join(f"{name} {speed:6.1f}" for name, speed in speeds.items())
                print(f"{case.name:32} {which:16} {columns}{ratio}", flush=True)


if __name__ == "__main__":
    main()
