"""Backends: aliases name the same backend, "auto" finds one that can, an explicit one that cannot says why."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import selfattn

Q = K = V = torch.randn(1, 8, 2, 16, generator=torch.Generator().manual_seed(0))
ALIASES = {"xla": "aten", "triton": "flash", "pallas_triton": "flash"}


def lines(text: str) -> dict[str, str]:
    """backend -> what is said of it."""
    return {
        name: line
        for line in text.splitlines()
        for name in ("flash", "cudnn", "aten", "reference")
        if line.lstrip().startswith(name)
    }


def test_explanation_has_a_line_a_backend_and_one_choice() -> None:
    said = lines(selfattn.explain_backend(Q, K, V))
    assert sorted(said) == ["aten", "cudnn", "flash", "reference"]
    assert sum("chosen" in line for line in said.values()) == 1


@pytest.mark.parametrize(("alias", "backend"), ALIASES.items())
def test_alias_explains_as_its_backend(alias: str, backend: str) -> None:
    assert selfattn.explain_backend(Q, K, V, backend=alias) == selfattn.explain_backend(Q, K, V, backend=backend)


def test_alias_computes_as_its_backend() -> None:
    assert torch.equal(
        selfattn.multihead_attention(Q, K, V, backend="xla"), selfattn.multihead_attention(Q, K, V, backend="aten")
    )


def test_auto_serves_what_only_the_reference_can() -> None:
    q = Q.double()
    options = {"softcap": 1.0, "sinks": torch.zeros(2, dtype=torch.float64)}
    assert "chosen" in lines(selfattn.explain_backend(q, q, q, **options))["reference"]
    out = selfattn.multihead_attention(q, q, q, **options)
    assert torch.equal(out, selfattn.multihead_attention(q, q, q, backend="reference", **options))


def test_backend_that_cannot_serve_gives_every_reason() -> None:
    with pytest.raises(NotImplementedError, match=r"^selfattn: .*'?aten'? cannot serve this call: .*softcap.*;.*sinks"):
        selfattn.multihead_attention(Q, K, V, backend="aten", softcap=1.0, sinks=torch.zeros(2))


def test_gpu_backend_on_a_cpu_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"cudnn.*cannot serve this call: .*CUDA"):
        selfattn.multihead_attention(Q, K, V, backend="cudnn")


def test_refusals_of_the_explanation_are_those_of_the_error() -> None:
    q = Q.double()
    said = lines(selfattn.explain_backend(q, q, q, softcap=2.0))["aten"]
    with pytest.raises(NotImplementedError) as raised:
        selfattn.multihead_attention(q, q, q, backend="aten", softcap=2.0)
    reason = str(raised.value).split("cannot serve this call: ")[1].splitlines()[0]
    assert reason in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fake_tensors_of_a_device_that_is_not_there_are_composed() -> None:
    with FakeTensorMode():
        q = torch.zeros(2, 13, 4, 8, device="cuda", dtype=torch.bfloat16)
        said = dict(line.split(": ", 1) for line in selfattn.explain_backend(q, q, q).splitlines())
        assert selfattn.multihead_attention(q, q, q).shape == q.shape
    assert said["aten"] == "chosen"
    for name in ("flash", "cudnn"):
        assert "there is no device cuda:0" in said[name] or "no kernels for cuda:0" in said[name]
