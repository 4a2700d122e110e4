"""Writes torchscript_<version>.pt, exported_<version>.pt2 and aotinductor_<version>.pt2: calls of the operators with
their arguments and results, as a script, an exported program and a compiled package, saved by the library of that
version. Later libraries must load them and give the same (tests/python/doors/test_saved_calls.py).

    SELFATTN_LIBRARY=<the library of that version> python tests/data/make_saved_calls.py <version>

torchscript_0.1.0.pt has those of attention and the layer alone, which were there first. The files stay as they were
written: this program is for those of later versions.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config, cpp_builder

torch.ops.load_library(os.environ["SELFATTN_LIBRARY"])


class Calls(torch.nn.Module):
    """forward() gives the results; those of the version that wrote the file are ``expected_0``, ``expected_1`` ..."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            self.register_buffer(name, torch.randn(1, 7, heads, 8))
        self.register_buffer("ids", torch.tensor([[0, 1, 0, 1, 1, -1, 0]], dtype=torch.int32))
        self.register_buffer("sinks", torch.randn(4))
        self.register_buffer("x", torch.randn(1, 7, 16))
        self.register_buffer("weight", torch.randn(16, 16) / 4)
        self.register_buffer("k_cache", torch.randn(3, 4, 2, 8))  # pages of 4 slots
        self.register_buffer("v_cache", torch.randn(3, 4, 2, 8))
        self.register_buffer("table", torch.tensor([[2, 0], [1, 1]], dtype=torch.int32))
        self.register_buffer("lengths", torch.tensor([7, 3], dtype=torch.int32))
        self.register_buffer("slots", torch.tensor([[6, 2, 7, 3, 4, 0, 5]], dtype=torch.int32))

    def forward(self) -> list[Tensor]:
        q, k, v, ids = self.q, self.k, self.v, self.ids
        ops = torch.ops.selfattn
        results = [ops.multihead_attention(q, k, v), ops.multihead_attention(q, k, v, ids, False, 0.3, "reference")]
        results.append(
            ops.multihead_attention(
                q,
                k,
                v,
                ids,
                backend="flash",
                kv_segment_ids=ids,
                window_left=3,
                window_right=1,
                softcap=2.0,
                sinks=self.sinks,
            )
        )
        results += list(ops.multihead_attention_lse(q[:, 4:], k, v, window_left=3))
        out, lse = ops.flash_attention(q, k, v, ids, window_left=3, sinks=self.sinks)
        results += [out, lse]
        results += list(ops.flash_attention_backward(out, lse, q, k, v, out, lse, ids, window_left=3))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        ops.flash_attention_backward(out, None, q, k, v, out, lse, ids, softcap=0.0, dq=dq, dk=dk, dv=dv)
        results += [dq, dk, dv]
        w = self.weight
        results.append(ops.self_attention(self.x, w, w, w, w, segment_ids=ids, head_dim=8, window_left=2))
        return results + self.around_attention() + self.over_a_cache()

    def around_attention(self) -> list[Tensor]:
        q, k, v, ids = self.q, self.k, self.v, self.ids
        ops = torch.ops.selfattn
        results = [ops.multihead_attention(q, k, v, ids, positions=self.slots, kv_positions=self.slots)]
        out, lse = ops.multihead_attention_lse(q, k[:, :3], v[:, :3], causal=False)
        other_out, other_lse = ops.multihead_attention_lse(q, k[:, 3:], v[:, 3:], causal=False)
        results += list(ops.merge_attention(out, lse, other_out, other_lse))
        results.append(ops.segment_mask(ids))
        segments = ops.segment_ids_from_cu_seqlens(torch.tensor([0, 3, 5]), 7)
        results += [segments, ops.cu_seqlens_from_segment_ids(segments[None], 4)]
        results.append(ops.segment_ids_from_positions(torch.tensor([[0, 1, 2, 0, 1, 0, 1]])))
        sin, cos = ops.precompute_freqs(8, None, 7)
        results += list(ops.apply_rotary_emb(q, k, sin, cos, pairing="half"))
        results += list(ops.rope_tables(8, None, 7, rope_type="linear", factor=2.0))
        norm = torch.ones(8)
        results += list(ops.qk_norm_rope(q, k, norm, norm, sin, cos))
        results += list(ops.qk_norm_rope_backward(q, k, q, k, norm, norm, eps=1e-5))
        out, lse = ops.qk_norm_rope_attention(q, k, v, norm, norm, segment_ids=ids, window_left=3)
        results += [out, lse]
        results += list(
            ops.qk_norm_rope_attention_backward(
                out, None, q, k, v, out, lse, norm, norm, segment_ids=ids, window_left=3
            )
        )
        w = self.weight
        query, key, value = ops.project_query_key_value(self.x, w, w, w)
        results += [query, key, value]
        results.append(ops.projected_attention(query, key, value, segment_ids=ids, head_dim=8, softcap=2.0))
        return results

    def over_a_cache(self) -> list[Tensor]:
        q, k, v = self.q, self.k, self.v
        k_cache, v_cache, lengths, table = self.k_cache.clone(), self.v_cache.clone(), self.lengths, self.table
        row_of = torch.tensor([[0, 1, 0, 1, 0, -1, 0]])
        ops = torch.ops.selfattn
        results = [ops.attention_with_kv_cache(q[:, :1].expand(2, 1, 4, 8), k_cache, v_cache, lengths, table)]
        results += list(
            ops.attention_with_kv_cache_lse(
                q, k_cache, v_cache, lengths, table, row_of, window_left=2, softcap=2.0, sinks=self.sinks
            )
        )
        results += list(ops.flash_attention_kv_cache(q, k_cache, v_cache, lengths, table, row_of))
        results.append(ops.kv_cache_positions(lengths, row_of, 7, 8))
        results.append(ops.kv_cache_pages(table, torch.ones_like(table, dtype=torch.bool), 3))
        results.append(ops.lengths_after_append(torch.tensor([2, 0], dtype=torch.int32), row_of, 7))
        ops.append_kv_cache(k, v, self.slots, table[:1], k_cache=k_cache, v_cache=v_cache)
        results += [k_cache.clone(), v_cache.clone()]
        norm = torch.ones(8)
        results.append(
            ops.qk_norm_rope_append(q, k, v, self.slots, table[:1], None, norm, norm, k_cache=k_cache, v_cache=v_cache)
        )
        results += [k_cache.clone(), v_cache.clone()]
        x, w = self.x[:, :4], self.weight
        empty = torch.zeros(1, dtype=torch.int32)
        results.append(
            ops.self_attention_kv_cache(
                x, w, w, w, w, head_dim=8, k_cache=k_cache, v_cache=v_cache, lengths=empty, page_table=table[:1]
            )
        )
        query, key, value = ops.project_query_key_value(x, w, w, w)
        results.append(
            ops.projected_attention_kv_cache(
                query, key, value, head_dim=8, k_cache=k_cache, v_cache=v_cache, lengths=empty + 2, page_table=table[:1]
            )
        )
        results += [k_cache, v_cache]
        return results


class FewCalls(Calls):
    """What AOTInductor compiles. A package shows no buffers: the results are followed by the expected ones."""

    def forward(self) -> list[Tensor]:
        return [*self.results(), self.expected_0.clone(), self.expected_1.clone()]

    def results(self) -> list[Tensor]:
        ops, w = torch.ops.selfattn, self.weight
        out = ops.multihead_attention(self.q, self.k, self.v, self.ids, window_left=3, sinks=self.sinks)
        return [out, ops.self_attention(self.x, w, w, w, w, segment_ids=self.ids, head_dim=8)]


def write_package(calls: FewCalls, path: Path) -> None:
    """For every x86-64 processor: AOTInductor compiles for the one that it runs on."""
    right = cpp_builder._get_optimization_cflags

    def portable(*arguments: object, **options: object) -> tuple[list[str], list[str]]:
        compiler_flags, linker_flags = right(*arguments, **options)
        return [flag.replace("march=native", "march=x86-64-v2") for flag in compiler_flags], linker_flags

    with mock.patch.object(cpp_builder, "_get_optimization_cflags", portable), config.patch({"cpp.simdlen": 1}):
        torch._inductor.aoti_compile_and_package(torch.export.export(calls, ()), package_path=str(path))


def with_expected(calls: Calls, results: list[Tensor]) -> Calls:
    for index, expected in enumerate(results):
        calls.register_buffer(f"expected_{index}", expected)
    return calls


@torch.no_grad()
def main(version: str) -> None:
    calls, few = Calls(), FewCalls()
    folder = Path(__file__).parent
    with_expected(calls, calls())
    torch.jit.script(calls).save(str(folder / f"torchscript_{version}.pt"))
    torch.export.save(torch.export.export(calls, ()), folder / f"exported_{version}.pt2")
    write_package(with_expected(few, few.results()), folder / f"aotinductor_{version}.pt2")


if __name__ == "__main__":
    main(sys.argv[1])
