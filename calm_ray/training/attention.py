"""Attention over packed sequences: each sequence attends only to itself, with no compute spent across sequences.

Registered with transformers as `varlen`, for models that call attention through its interface.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

VARLEN = "varlen"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence.

    query [1, Hq, T, D], key and value [1, Hkv, T, D], `cu_seq_lens_q` [N + 1] int32; returns [1, T, Hq, D].
    Uses torch's variable-length flash kernel on GPUs in half precision, one SDPA call per sequence elsewhere.
    Raises ValueError for models that cap their attention scores; use `train.attention: eager` for those.
    """
    if softcap is not None:
        raise ValueError("this model caps its attention scores (softcap); set train.attention: eager")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    return _per_sequence(query, key, value, cu_seq_lens_q.tolist(), scaling, sliding_window), None


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    output = varlen_attn(
        q, k, v, boundaries, boundaries, longest, longest,
        scale=scaling, window_size=(-1 if window is None else window - 1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


def _per_sequence(
    query: Tensor, key: Tensor, value: Tensor, boundaries: list[int], scaling: float | None, window: int | None
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for start, end in itertools.pairwise(boundaries):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        mask = None
        if window is not None and end - start > window:
            distance = torch.arange(end - start, device=q.device)[:, None] - torch.arange(end - start, device=q.device)
            mask = (distance >= 0) & (distance < window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def register() -> None:
    """Registers `attn_implementation="varlen"` with transformers. It needs no mask."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)
