"""selfattn behind PyTorch's own attention: ``F.scaled_dot_product_attention`` and ``varlen_attn`` on CUDA.

    import selfattn.integrations.sdpa
    selfattn.integrations.sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("selfattn")

docs/integrations.md says which calls arrive here, and which of them are served.
"""

import torch

NAME = "selfattn"


def register() -> None:
    """Makes "selfattn" known to ``torch.nn.attention.activate_flash_attention_impl``, and activates nothing. Calling it
    again changes nothing.

    Raises:
        RuntimeError: this PyTorch has no registry of flash attention implementations.
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError as error:
        raise RuntimeError(
            "selfattn: torch.nn.attention.register_flash_attention_impl must be there, as in torch 2.11; got torch "
            f"{torch.__version__}, without {error.name or error}"
        ) from error
    register_flash_attention_impl(NAME, register_fn=_activate)


def _activate() -> torch.ScriptObject:
    """A handle for PyTorch's registry, whose ``remove()`` restores the kernels of before."""
    if not torch.backends.cuda.is_built():
        raise RuntimeError(
            f"selfattn: torch must be built with CUDA, whose flash attention is replaced; got torch {torch.__version__}"
        )
    return _override("CUDA")


def _override(dispatch_key: str, operators: str = "aten") -> torch.ScriptObject:
    """Puts selfattn in the place of the kernels of a dispatch key, for the operators of that namespace."""
    return torch.classes.selfattn.SdpaOverride(dispatch_key, operators)
