"""selfattn behind PyTorch's own attention: ``F.scaled_dot_product_attention`` and ``varlen_attn`` on CUDA.

    import selfattn.integrations.sdpa
    selfattn.integrations.sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("selfattn")

docs/integrations.md says which calls arrive here, and which of them are served.
"""

import functools
import warnings
from collections.abc import Callable

import torch

from selfattn.integrations._sdpa_kernels import IMPLEMENTATIONS

NAME = "selfattn"


def register() -> None:
    """Makes "selfattn" known to ``torch.nn.attention.activate_flash_attention_impl``, and activates nothing. Calling it
    again changes nothing.

    Raises:
        RuntimeError: this PyTorch has no registry of flash attention implementations.
    """
    try:
        from torch.library import get_kernel  # noqa: F401 -- asked for, so that activation cannot fail half-way
        from torch.nn.attention import register_flash_attention_impl
    except ImportError as error:
        raise RuntimeError(
            "selfattn: torch.nn.attention.register_flash_attention_impl and torch.library.get_kernel must be there, as "
            f"in torch 2.11; got torch {torch.__version__}, without {error.name or error}"
        ) from error
    register_flash_attention_impl(NAME, register_fn=_activate)


class _Activation:
    """What PyTorch's registry keeps while the implementation is active."""

    def __init__(self, library: torch.library.Library) -> None:
        self._library: torch.library.Library | None = library

    def remove(self) -> None:
        """Restores the kernels of before."""
        self._library = None  # its end takes the kernels away


def _activate() -> _Activation:
    if not torch.backends.cuda.is_built():
        raise RuntimeError(
            f"selfattn: torch must be built with CUDA, whose flash attention is replaced; got torch {torch.__version__}"
        )
    return _override("CUDA")


def _override(dispatch_key: str) -> _Activation:
    """Puts the implementations in the place of the kernels of a dispatch key, which they call for the rest."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*\\s*Overriding a previously registered kernel")  # as is meant
        for name, implementation in IMPLEMENTATIONS.items():
            kernel = torch.library.get_kernel(f"aten::{name}", dispatch_key)
            call = functools.partial(_call, implementation, kernel)
            library.impl(name, call, dispatch_key, with_keyset=True, allow_override=True)
    return _Activation(library)


def _call(implementation: Callable, kernel, keyset: torch._C.DispatchKeySet, *args, **kwargs) -> tuple:
    return implementation(functools.partial(kernel.call_boxed, keyset), *args, **kwargs)
