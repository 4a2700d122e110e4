"""Every bad argument of the segment operators raises the right kind of error, with the argument's name."""

import pytest
import torch

import selfattn

IDS = torch.zeros(2, 6, dtype=torch.int32)

BAD = {
    "mask_dtype": (selfattn.segment_mask, (IDS.float(),), TypeError, "segment_ids", "int32 or int64.*Float"),
    "mask_rank": (selfattn.segment_mask, (IDS[0],), ValueError, "segment_ids", "1"),
    "mask_kv_dtype": (selfattn.segment_mask, (IDS, IDS.bool()), TypeError, "kv_segment_ids", "int32 or int64.*Bool"),
    "mask_kv_batch": (selfattn.segment_mask, (IDS, IDS[:1]), ValueError, "kv_segment_ids", "2.*1"),
    "mask_kv_device": (selfattn.segment_mask, (IDS, IDS.to("meta")), TypeError, "kv_segment_ids", "cpu.*meta"),
    "mask_range": (selfattn.segment_mask, (IDS.long() + 2**31,), ValueError, "segment_ids", "int32"),
    "positions_dtype": (selfattn.segment_ids_from_positions, (IDS.float(),), TypeError, "positions", "Float"),
    "positions_rank": (selfattn.segment_ids_from_positions, (IDS[0],), ValueError, "positions", "1|6"),
    "cu_dtype": (selfattn.segment_ids_from_cu_seqlens, (torch.zeros(3), 6), TypeError, "cu_seqlens", "Float"),
    "cu_rank": (selfattn.segment_ids_from_cu_seqlens, (IDS, 6), ValueError, "cu_seqlens", "2"),
    "cu_empty": (selfattn.segment_ids_from_cu_seqlens, (IDS[0, :0], 6), ValueError, "cu_seqlens", "none"),
    "length": (selfattn.segment_ids_from_cu_seqlens, (IDS[0], -1), ValueError, "length", "-1"),
    "ids_dtype": (selfattn.cu_seqlens_from_segment_ids, (IDS.double(), 2), TypeError, "segment_ids", "Double"),
    "ids_rank": (selfattn.cu_seqlens_from_segment_ids, (IDS[0], 2), ValueError, "segment_ids", r"\[6\]"),
    "max_segments": (selfattn.cu_seqlens_from_segment_ids, (IDS, 0), ValueError, "max_segments", "0"),
    "too_many_runs": (
        selfattn.cu_seqlens_from_segment_ids, (torch.arange(6)[None], 5), ValueError, "max_segments", "5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_argument_is_named(bad: str) -> None:
    function, arguments, error, name, detail = BAD[bad]
    with pytest.raises(error, match=rf"^selfattn: {name}\b.*({detail})"):
        function(*arguments)
