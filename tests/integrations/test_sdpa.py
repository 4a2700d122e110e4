"""selfattn behind PyTorch's flash attention operators: on the CPU in the place of stand-ins for PyTorch's kernels."""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.profiler import ProfilerActivity, profile

from selfattn.integrations import sdpa

aten = torch.ops.aten
OPERATORS = (
    "_flash_attention_forward",
    "_flash_attention_backward",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_backward",
)
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


class FellBack(Exception):
    """The stand-in for PyTorch's kernel was called."""


@pytest.fixture
def active() -> Iterator[list[tuple]]:
    """selfattn in the place of kernels for the CPU that say with what they were called: PyTorch has none."""
    calls = []

    def stand_in(name: str, *args, **kwargs) -> tuple:
        calls.append((name, args, kwargs))
        raise FellBack(name)

    before = torch.library.Library("aten", "IMPL")
    for name in OPERATORS:
        before.impl(name, functools.partial(stand_in, name), "CPU")
    activation = sdpa._override("CPU")
    yield calls
    activation.remove()


def results_of_query(query: Tensor, *_, **__) -> tuple:
    """What the third operator returns, with the query wherever a tensor stands."""
    return query, query, None, None, 5, 5, query, query, query


def heads(batch_size: int, num_heads: int, length: int, head_dim: int = 16, layout: str = "BSHD") -> Tensor:
    """(B, H, S, D), laid out in memory as said."""
    if layout == "BSHD":
        tensor = torch.randn(batch_size, length, num_heads, head_dim).transpose(1, 2)
    else:
        tensor = torch.randn(batch_size, num_heads, length, head_dim)
    return tensor.requires_grad_()


def reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float | None = None) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, allowed, scale=scale, enable_gqa=True)


def bottom_right(q_length: int, kv_length: int, left: int = -1, right: int = -1) -> Tensor:
    distance = torch.arange(kv_length) - (torch.arange(q_length)[:, None] + kv_length - q_length)
    allowed = torch.ones(q_length, kv_length, dtype=torch.bool)
    return allowed & ((distance <= right) | (right < 0)) & ((-distance <= left) | (left < 0))


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[-1])).sum(), inputs)


class TestDense:
    @pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
    @pytest.mark.parametrize("num_kv_heads", [4, 2])
    @pytest.mark.parametrize(("q_length", "kv_length", "is_causal"), [(9, 9, True), (9, 9, False), (5, 12, True)])
    @pytest.mark.parametrize("scale", [None, 0.3])
    def test_outputs_and_gradients(self, active, layout, num_kv_heads, q_length, kv_length, is_causal, scale) -> None:
        q, k, v = (
            heads(2, 4, q_length, layout=layout),
            *(heads(2, num_kv_heads, kv_length, layout=layout) for _ in "kv"),
        )
        out, lse, cum_q, cum_k, max_q, max_k, state, offset, debug = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, is_causal, scale=scale
        )
        allowed = bottom_right(q_length, kv_length, right=0 if is_causal else -1)
        torch.testing.assert_close(out, reference(q, k, v, allowed, scale), **TOLERANCE[torch.float32])
        scores = q @ k.repeat_interleave(4 // num_kv_heads, 1).mT * (0.25 if scale is None else scale)
        expected = scores.masked_fill(~allowed, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(lse, expected, **TOLERANCE[torch.float32])

        promised = aten._scaled_dot_product_flash_attention(*(x.detach().to("meta") for x in (q, k, v)), 0.0, is_causal)
        assert cum_q is None and cum_k is None and (max_q, max_k) == (q_length, kv_length) == promised[4:6]
        for given, meta in zip((out, lse, state, offset, debug), (*promised[:2], *promised[6:]), strict=True):
            assert (given.dtype, given.shape, given.stride()) == (meta.dtype, meta.shape, meta.stride())

        given = gradients(out, q, k, v)
        for one, other, x in zip(given, gradients(reference(q, k, v, allowed, scale), q, k, v), (q, k, v), strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE[torch.float32])
            assert one.stride() == torch.empty_like(x).stride()
        assert not active

    def test_inference_mode(self, active) -> None:
        with torch.inference_mode():
            q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
            out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
            torch.testing.assert_close(out, reference(q, k, v, bottom_right(9, 9, right=0)), **TOLERANCE[torch.float32])
        assert not active

    def test_row_without_keys_has_pytorchs_lse(self, active) -> None:
        """+inf, as PyTorch's kernels give it and their gradients take it."""
        q, k, v = heads(1, 2, 5), heads(1, 2, 3), heads(1, 2, 3)
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        assert (lse[..., :2] == torch.inf).all() and lse[..., 2:].isfinite().all()
        assert (out[:, :, :2] == 0).all()
        dq, dk, _ = gradients(out, q, k, v)
        assert (dq[:, :, :2] == 0).all() and dq.isfinite().all() and dk.isfinite().all()

    @pytest.mark.parametrize("windows", [(None, None), (-1, 0), (3, 0), (2, 1), (-1, -1)])
    def test_operator_below(self, active, windows) -> None:
        q, k, v = (heads(2, 4, 9).detach().transpose(1, 2) for _ in range(3))
        left, right = windows
        out, lse, *rest = aten._flash_attention_forward(
            q, k, v, None, None, 9, 9, 0.0, False, False, window_size_left=left, window_size_right=right
        )
        allowed = bottom_right(9, 9, *(-1 if w is None else w for w in windows))
        expected = reference(*(x.transpose(1, 2) for x in (q, k, v)), allowed).transpose(1, 2)
        torch.testing.assert_close(out, expected, **TOLERANCE[torch.float32])
        assert lse.shape == (2, 4, 9) and len(rest) == 3 and not active
        grad_out = torch.randn_like(out)
        dq, dk, dv = aten._flash_attention_backward(
            grad_out, q, k, v, out, lse, None, None, 9, 9, 0.0, False, *rest[:2],
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        expected = reference(*(x.transpose(1, 2) for x in inputs), allowed).transpose(1, 2)
        for one, other in zip((dq, dk, dv), torch.autograd.grad(expected, inputs, grad_out), strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE[torch.float32])


def lengths(*of_documents: int, dtype: torch.dtype = torch.int32, device: str = "cpu") -> Tensor:
    return torch.tensor([0, *of_documents]).cumsum(0).to(dtype).to(device)


def ragged(total: int, num_heads: int = 4, **options) -> Tensor:
    return torch.randn(total, num_heads, 16, **options).requires_grad_()


def each_document(q, k, v, cu_q: Tensor, cu_k: Tensor, windows: tuple[int, int] = (-1, -1)) -> Tensor:
    """(T, H, D), one call a document."""
    outs = []
    for q_rows, k_rows in zip(cu_q.tolist(), cu_k.tolist(), strict=True):
        if not q_rows:
            before = (0, 0)
            continue
        parts = (
            x[a:b].transpose(0, 1)
            for x, a, b in ((q, before[0], q_rows), (k, before[1], k_rows), (v, before[1], k_rows))
        )
        q_part, k_part, v_part = parts
        allowed = bottom_right(q_part.shape[1], k_part.shape[1], *windows).to(q.device)
        outs.append(reference(q_part[None], k_part[None], v_part[None], allowed)[0].transpose(0, 1))
        before = (q_rows, k_rows)
    return torch.cat(outs)


class TestRagged:
    @pytest.mark.parametrize("windows", [(-1, -1), (-1, 0), (2, 0), (1, 2)])
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_varlen_attn(self, active, windows, dtype) -> None:
        q, k, v, cu = ragged(13), ragged(13), ragged(13), lengths(4, 1, 8, dtype=dtype)
        out, lse = varlen.varlen_attn(
            q, k, v, cu, cu, 8, 8, window_size=windows, return_aux=varlen.AuxRequest(lse=True)
        )
        expected = each_document(q, k, v, cu, cu, windows)
        torch.testing.assert_close(out, expected, **TOLERANCE[torch.float32])
        assert lse.shape == (4, 13) and lse.dtype == torch.float32
        for one, other in zip(gradients(out, q, k, v), gradients(expected, q, k, v), strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE[torch.float32])
        assert not active

    def test_other_lengths_of_keys(self, active) -> None:
        """Without a diagonal; one document has no keys, and no lse but +inf."""
        q, k, v = ragged(9), ragged(14), ragged(14)
        cu_q, cu_k = lengths(4, 2, 3), lengths(5, 0, 9)
        out, lse = varlen.varlen_attn(q, k, v, cu_q, cu_k, 4, 9, return_aux=varlen.AuxRequest(lse=True))
        assert (out[4:6] == 0).all() and (lse[:, 4:6] == torch.inf).all()
        rows = [0, 1, 2, 3, 6, 7, 8]
        expected = each_document(q[rows], k, v, lengths(4, 3), lengths(5, 9))
        torch.testing.assert_close(out[rows], expected, **TOLERANCE[torch.float32])
        given = gradients(out, q, k, v)
        for one, other in zip(given, gradients(expected, q, k, v), strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE[torch.float32])
        assert not active

    def test_tokens_behind_the_last_document(self, active) -> None:
        q, k, v, cu = ragged(10), ragged(10), ragged(10), lengths(4, 3)
        out = varlen.varlen_attn(q, k, v, cu, cu, 4, 4, window_size=(-1, 0))
        expected = each_document(q, k, v, cu, cu, (-1, 0))
        torch.testing.assert_close(out[:7], expected, **TOLERANCE[torch.float32])
        for gradient in gradients(out, q, k, v):
            assert (gradient[7:] == 0).all()

    def test_compiled(self, active) -> None:
        compiled = torch.compile(varlen.varlen_attn, backend="aot_eager", fullgraph=True)
        q, k, v, cu = ragged(13), ragged(13), ragged(13), lengths(4, 1, 8)
        out = compiled(q, k, v, cu, cu, 8, 8, window_size=(-1, 0))
        expected = each_document(q, k, v, cu, cu, (-1, 0))
        torch.testing.assert_close(out, expected, **TOLERANCE[torch.float32])
        for one, other in zip(gradients(out, q, k, v), gradients(expected, q, k, v), strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE[torch.float32])

    def test_lengths_of_equal_numbers_in_two_memories_fall_back(self, active) -> None:
        """Only the device knows that they are equal, and the diagonal of each document stands on it."""
        q, k, v = ragged(13), ragged(13), ragged(13)
        with pytest.raises(FellBack):
            varlen.varlen_attn(q, k, v, lengths(4, 9), lengths(4, 9), 9, 9, window_size=(-1, 0))
        name, args, kwargs = active[0]
        assert name == "_flash_attention_forward" and args[8] is True
        assert kwargs["window_size_left"] == -1 and kwargs["window_size_right"] == 0


class TestFallBack:
    @pytest.mark.parametrize(
        "change",
        [
            {"dropout_p": 0.1},
            {"return_debug_mask": True},
            {"is_causal": True, "q": torch.randn(1, 2, 5, 600)},
            {"q": torch.randn(1, 2, 5, 16).double()},
            {"q": torch.randn(1, 2, 0, 16)},
            {"v": torch.randn(1, 2, 5, 8)},
        ],
        ids=["dropout", "debug mask", "wide heads", "float64", "empty", "narrower values"],
    )
    def test_scaled_dot_product(self, active, change) -> None:
        tensors = {"q": torch.randn(1, 2, 5, 16), **change}
        q = tensors["q"]
        k = torch.randn(1, 2, 5, q.shape[3]).to(q.dtype)
        v = tensors.get("v", k)
        options = {name: value for name, value in change.items() if not isinstance(value, Tensor)}
        with pytest.raises(FellBack, match="_scaled_dot_product_flash_attention"):
            aten._scaled_dot_product_flash_attention(q, k, v, **options)
        # Arguments arrive as they were given.
        _, args, kwargs = active[0]
        assert all(one is other for one, other in zip(args, (q, k, v), strict=False))
        given = dict(zip(("dropout_p", "is_causal", "return_debug_mask"), args[3:], strict=False)) | kwargs
        assert given.items() >= options.items()

    @pytest.mark.parametrize("option", ["seqused_k", "alibi_slopes"])
    def test_options_without_a_meaning_in_selfattn(self, active, option) -> None:
        q, cu = ragged(8).detach(), lengths(8)
        other = torch.ones(1, dtype=torch.int32)
        with pytest.raises(FellBack):
            aten._flash_attention_forward(q, q, q, cu, cu, 8, 8, 0.0, False, False, **{option: other})
        assert active[0][2][option] is other

    def test_gradients_of_dropout(self, active) -> None:
        q, state = torch.randn(1, 5, 2, 16), torch.zeros(2, dtype=torch.uint64)
        args = (q, q, q, q, q, torch.zeros(1, 2, 5), None, None, 5, 5, 0.1, True, state, state)
        with pytest.raises(FellBack, match="_flash_attention_backward"):
            aten._flash_attention_backward(*args)
        with pytest.raises(FellBack, match="_scaled_dot_product_flash_attention_backward"):
            aten._scaled_dot_product_flash_attention_backward(*args)
        assert [len(args) for _, args, _ in active] == [14, 14]


LATER = "selfattn_later_aten"
LATER_ARGUMENTS = {
    "_flash_attention_forward": "int num_splits=0, Tensor? block_table=None, *, ",
    "_flash_attention_backward": "bool deterministic=False, *, ",
}


@contextmanager
def operators_like_atens(namespace: str, change: Callable[[str, str], str], kernel: Callable) -> Iterator[None]:
    """Under ``namespace``, with the schemas that ``change(name, schema)`` gives: gone afterwards, for exporters look at
    every operator that there is."""
    with torch.library._scoped_library(namespace, "DEF") as library:
        for name in OPERATORS:
            library.define(change(name, str(getattr(aten, name).default._schema).removeprefix("aten::")))
            library.impl(name, kernel, "CPU")
        yield


@pytest.fixture
def later() -> Iterator[list[tuple]]:
    """The operators of a version of PyTorch that has more arguments, first among those with a keyword."""
    calls = []

    def grow(name: str, schema: str) -> str:
        return schema.replace("*, ", LATER_ARGUMENTS.get(name, "*, "))

    with operators_like_atens(
        LATER, grow, lambda *args, **kwargs: calls.append((args, kwargs)) or (torch.zeros(()),) * 5
    ):
        activation = sdpa._override("CPU", LATER)
        yield calls
        activation.remove()


class TestLaterVersions:
    """Where PyTorch's operators have grown: what selfattn does not know, PyTorch's own kernel does."""

    def forward(self, *later, **options) -> tuple:
        q = torch.randn(1, 5, 2, 16)
        return getattr(torch.ops, LATER)._flash_attention_forward(
            q, q, q, None, None, 5, 5, 0.0, True, False, *later, **options
        )

    @pytest.mark.parametrize("arguments", [(), (0,), (0, None)])
    def test_arguments_that_are_their_defaults_change_nothing(self, later, arguments) -> None:
        out, lse, *_ = self.forward(*arguments, window_size_left=2)
        assert out.shape == (1, 5, 2, 16) and lse.shape == (1, 2, 5) and not later

    @pytest.mark.parametrize(
        "arguments", [(2,), (0, torch.zeros(1, dtype=torch.int32))], ids=["num_splits", "block_table"]
    )
    def test_others_fall_back(self, later, arguments) -> None:
        self.forward(*arguments, scale=0.5)
        args, kwargs = later[0]
        assert args[10] == arguments[0] and kwargs["scale"] == 0.5
        assert len(arguments) == 1 or args[11] is arguments[1]

    def test_another_order_of_arguments(self) -> None:
        """They are read by name."""
        calls = []

        def turn(_name: str, schema: str) -> str:
            return schema.replace("float dropout_p, bool is_causal", "bool is_causal, float dropout_p")

        q = torch.randn(1, 5, 2, 16)
        with operators_like_atens("selfattn_turned_aten", turn, lambda *args, **kwargs: calls.append(args)):
            activation = sdpa._override("CPU", "selfattn_turned_aten")
            turned = torch.ops.selfattn_turned_aten
            out = turned._flash_attention_forward(q, q, q, None, None, 5, 5, True, 0.0, False)[0]
            activation.remove()
        expected = reference(*(x.transpose(1, 2) for x in (q, q, q)), bottom_right(5, 5, right=0)).transpose(1, 2)
        torch.testing.assert_close(out, expected, **TOLERANCE[torch.float32])
        assert not calls

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("dropout_p", "dropout", "must have the argument dropout_p"),
            ("Tensor debug_attn_mask)", "Tensor debug_attn_mask, Tensor more)", "must return 5 values"),
        ],
    )
    def test_schemas_that_mean_something_else_are_refused(self, old, new, message) -> None:
        namespace = f"selfattn_other_{old.split()[0]}"
        other = operators_like_atens(
            namespace, lambda _, schema: schema.replace(old, new), lambda *args, **kwargs: None
        )
        with other, pytest.raises(NotImplementedError, match=message):
            sdpa._override("CPU", namespace)


class TestRegistration:
    def test_removing_restores_the_kernels_of_before(self, active) -> None:
        q = torch.randn(1, 2, 5, 16)
        inner = sdpa._override("CPU")
        inner.remove()
        assert len(aten._scaled_dot_product_flash_attention(q, q, q)) == 9  # those of the fixture
        with pytest.raises(FellBack):
            aten._scaled_dot_product_flash_attention(q, q, q, 0.1)

    def test_no_python_runs_inside_a_call(self, active) -> None:
        """Forward, backward and ragged: nothing between PyTorch's operator and selfattn's."""
        q, cu = torch.randn(1, 2, 5, 16), lengths(2, 3)
        rows = q[0].transpose(0, 1)
        names = []

        def run() -> None:
            out, lse, *_, state, offset, _ = aten._scaled_dot_product_flash_attention.default(q, q, q)
            aten._scaled_dot_product_flash_attention_backward.default(
                q, q, q, q, out, lse, None, None, 5, 5, 0.0, False, state, offset
            )
            aten._flash_attention_forward.default(rows, rows, rows, cu, cu, 3, 3, 0.0, True, False)

        assert {"selfattn::flash_attention", "selfattn::flash_attention_backward"} <= operators_of(run)
        sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
        try:
            run()
        finally:
            sys.setprofile(None)
        assert names == ["run", "__call__", "__call__", "__call__"] and not active  # those of the operators called here

    @pytest.mark.parametrize("is_older_first", [True, False])
    def test_activations_may_end_in_any_order(self, active, is_older_first) -> None:
        q = torch.randn(1, 2, 5, 16)
        older, newer = sdpa._override("CPU"), sdpa._override("CPU")
        first, second = (older, newer) if is_older_first else (newer, older)
        for activation in (first, first, second):  # removing twice changes nothing
            activation.remove()
            assert len(aten._scaled_dot_product_flash_attention(q, q, q)) == 9
            with pytest.raises(FellBack):
                aten._scaled_dot_product_flash_attention(q, q, q, 0.1)

    def test_an_activation_ends_with_its_handle(self) -> None:
        before = torch.library.Library("aten", "IMPL")
        for name in OPERATORS:
            before.impl(name, lambda *args, **kwargs: (args[0],) * 5, "CPU")
        q = torch.randn(1, 5, 2, 16)
        call = functools.partial(aten._flash_attention_forward, q, q, q, None, None, 5, 5, 0.0, True, False)
        activation = sdpa._override("CPU")
        assert call()[0] is not q
        del activation
        assert call()[0] is q

    def test_an_implementation_activated_later_stays(self, active) -> None:
        """As FA3's does whose function nobody but its caller runs: the registry removes one before the next."""
        q, activation = torch.randn(1, 2, 5, 16), sdpa._override("CPU")
        later = torch.library.Library("aten", "IMPL")
        later.impl(OPERATORS[2], results_of_query, "CPU", allow_override=True)
        assert aten._scaled_dot_product_flash_attention(q, q, q)[0] is q
        activation.remove()
        assert aten._scaled_dot_product_flash_attention(q, q, q)[0] is q
        later._destroy()
        assert aten._scaled_dot_product_flash_attention(q, q, q)[0] is not q  # the fixture's

    def test_a_device_without_kernels(self) -> None:
        with pytest.raises(NotImplementedError, match="must have a kernel of aten::_flash_attention_forward for CPU"):
            sdpa._override("CPU")

    def test_the_registry_swaps_implementations(self, active, monkeypatch) -> None:
        """What FA3 and FA4 do: a handle that keeps a library."""
        override = sdpa._override
        monkeypatch.setattr(sdpa, "_override", lambda _: override("CPU"))
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)

        def activate_other() -> Mock:
            library = torch.library.Library("aten", "IMPL")
            library.impl(OPERATORS[2], results_of_query, "CPU", allow_override=True)
            return Mock(remove=library._destroy)

        q = torch.randn(1, 2, 5, 16)
        sdpa.register()
        torch.nn.attention.register_flash_attention_impl("another", register_fn=activate_other)
        try:
            for name in ("selfattn", "selfattn", "another", "selfattn", "another"):
                torch.nn.attention.activate_flash_attention_impl(name)
                result = aten._scaled_dot_product_flash_attention(q, q, q)
                assert (result[0] is q) == (name == "another")
        finally:
            torch.nn.attention.restore_flash_attention_impl()
        assert aten._scaled_dot_product_flash_attention(q, q, q)[0] is not q and not active  # the fixture's

    def test_activates_by_name_and_only_when_asked(self, monkeypatch) -> None:
        activated = []
        monkeypatch.setattr(sdpa, "_override", lambda key: activated.append(key) or Mock())
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        sdpa.register()
        sdpa.register()
        assert torch.nn.attention.list_flash_attention_impls().count("selfattn") == 1
        assert not activated and torch.nn.attention.current_flash_attention_impl() is None
        torch.nn.attention.activate_flash_attention_impl("selfattn")
        assert activated == ["CUDA"] and torch.nn.attention.current_flash_attention_impl() == "selfattn"
        torch.nn.attention.restore_flash_attention_impl()
        assert torch.nn.attention.current_flash_attention_impl() is None

    def test_torch_without_the_registry(self, monkeypatch) -> None:
        monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
        with pytest.raises(RuntimeError, match=r"register_flash_attention_impl.*got torch " + torch.__version__[:4]):
            sdpa.register()

    def test_torch_without_cuda(self, monkeypatch) -> None:
        sdpa.register()
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
        with pytest.raises(RuntimeError, match="built with CUDA"):
            torch.nn.attention.activate_flash_attention_impl("selfattn")
        assert torch.nn.attention.current_flash_attention_impl() is None

    def test_importing_selfattn_does_not_register(self) -> None:
        code = "import torch.nn.attention as a, selfattn; assert 'selfattn' not in a.list_flash_attention_impls()"
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.parametrize("name", OPERATORS)
    def test_arguments_are_those_of_the_operator(self, name) -> None:
        """A version of PyTorch that changes a schema is seen here: what is not in this list falls back."""
        schema = getattr(aten, name).default._schema
        qkv, lengths = "query key value", "cum_seq_q cum_seq_k max_q max_k"
        saved = f"grad_out {qkv} out logsumexp {lengths} dropout_p is_causal"
        windows = "window_size_left window_size_right"
        numbers = "dropout_p is_causal return_debug_mask scale"
        expected = {
            "_flash_attention_forward": f"{qkv} {lengths} {numbers} {windows} seqused_k alibi_slopes",
            "_flash_attention_backward": f"{saved} rng_state unused scale {windows}",
            "_scaled_dot_product_flash_attention": f"{qkv} {numbers}",
            "_scaled_dot_product_flash_attention_backward": f"{saved} philox_seed philox_offset scale",
        }
        assert [argument.name for argument in schema.arguments] == expected[name].split()


@pytest.fixture
def active_on_cuda() -> Iterator[None]:
    sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("selfattn")
    yield
    torch.nn.attention.restore_flash_attention_impl()


def operators_of(function) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    return {event.key for event in record.key_averages()}


def check_norms(given: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """bfloat16's results beside float32's: single elements of a gradient are sums of many that almost cancel."""
    for one, other in zip(given, expected, strict=True):
        assert ((one.float() - other).norm() / other.norm()).item() < 1e-2


@pytest.mark.gpu
class TestOnGpu:
    """Through PyTorch's own doors."""

    @pytest.mark.parametrize("num_kv_heads", [4, 2])
    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_scaled_dot_product_attention(self, active_on_cuda, num_kv_heads, is_causal, compiled) -> None:
        q, k, v = (
            torch.randn(2, 130, n, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for n in (4, num_kv_heads, num_kv_heads)
        )
        attend = torch.compile(F.scaled_dot_product_attention) if compiled else F.scaled_dot_product_attention

        def run() -> tuple[Tensor, ...]:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out = attend(q, k, v, is_causal=is_causal, enable_gqa=True)
            return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

        if not compiled:
            assert {"selfattn::flash_attention", "selfattn::flash_attention_backward"} <= operators_of(run)
        inputs = [x.detach().float().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(SDPBackend.MATH):
            expected = F.scaled_dot_product_attention(*inputs, is_causal=is_causal, enable_gqa=True)
        expected = expected, *torch.autograd.grad(expected.square().sum(), inputs)
        check_norms(run(), expected)

    @pytest.mark.parametrize("windows", [(-1, -1), (-1, 0), (20, 0)])
    def test_varlen_attn(self, active_on_cuda, windows) -> None:
        q, k, v = (torch.randn(300, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        cu = lengths(100, 7, 193, device="cuda")

        def run() -> tuple[Tensor, ...]:
            out = varlen.varlen_attn(q, k, v, cu, cu, 193, 193, window_size=windows)
            return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

        assert "selfattn::flash_attention_backward" in operators_of(run)
        torch.cuda.set_sync_debug_mode("error")
        try:
            given = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        inputs = [x.detach().float().requires_grad_() for x in (q, k, v)]
        expected = each_document(*inputs, cu, cu, windows)
        expected = expected, *torch.autograd.grad(expected.square().sum(), inputs)
        check_norms(given, expected)

    def test_falls_back_to_pytorchs_kernels(self, active_on_cuda) -> None:
        """Dropout, and lengths in two memories, which PyTorch's own kernels take."""
        q = torch.randn(1, 4, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

        def dense() -> None:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).sum().backward()

        assert not any("selfattn" in name for name in operators_of(dense))
        assert q.grad.isfinite().all()
        x = torch.randn(128, 4, 64, device="cuda", dtype=torch.bfloat16)
        cu_q, cu_k = lengths(100, 28, device="cuda"), lengths(100, 28, device="cuda")
        out = varlen.varlen_attn(x, x, x, cu_q, cu_k, 100, 100, window_size=(-1, 0))
        expected = each_document(x.float(), x.float(), x.float(), cu_q, cu_k, (-1, 0))
        torch.testing.assert_close(out.float(), expected, **TOLERANCE[torch.bfloat16])

    def test_restoring(self, active_on_cuda) -> None:
        torch.nn.attention.restore_flash_attention_impl()
        x = torch.randn(1, 4, 128, 64, device="cuda", dtype=torch.bfloat16)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            names = operators_of(lambda: F.scaled_dot_product_attention(x, x, x))
        assert not any("selfattn" in name for name in names)
        torch.nn.attention.activate_flash_attention_impl("selfattn")
