"""Attention over packed batches: blocks do not see each other, nor do the branches of a shared prompt.

Registered with transformers as `varlen`, for models that call attention through its interface.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from calm_ray.packing.batch import PackedBatch

VARLEN = "varlen"
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers, as configurations name them, that see other tokens by attention alone."""
STATE_SIZES = (
    "mamba_d_state",
    "mamba_state_dim",
    "ssm_state_size",
    "state_size",
    "linear_num_value_heads",
    "conv_L_cache",
)
"""Fields of configurations of models whose layers carry a state."""


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
    blocks: Blocks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each block of a packed batch.

    query [1, Hq, T, D], key and value [1, Hkv, T, D], the rest from `arguments`; returns [1, T, Hq, D].
    Uses torch's variable-length flash kernel on GPUs in half precision, one SDPA call per block elsewhere.
    Raises ValueError for models that cap their attention scores; use `train.attention: eager` for those.
    """
    if softcap is not None:
        raise ValueError("this model caps its attention scores (softcap); set train.attention: eager")
    if blocks is None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    if blocks is None:
        blocks = Blocks(cu_seq_lens_q.tolist())
    return _per_block(query, key, value, blocks, scaling, sliding_window), None


def arguments(batch: PackedBatch) -> dict[str, Any]:
    """What a model with this attention needs to know about a batch, besides its tokens and positions."""
    lengths = {"cu_seq_lens": batch.boundaries, "max_length": batch.longest}
    found: dict[str, Any] = {f"{name}_{side}": value for name, value in lengths.items() for side in ("q", "k")}
    if batch.segments is not None:
        found["blocks"] = Blocks(batch.boundaries.tolist(), batch.segments, batch.position_ids[0])
    return found


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


class Blocks:
    """The blocks of a batch, with their masks, which all layers share."""

    def __init__(self, boundaries: list[int], segments: Tensor | None = None, places: Tensor | None = None) -> None:
        """`segments` and `places` [T] are those of a batch with shared prompts, and its positions."""
        self._bounds = list(itertools.pairwise(boundaries))
        self._segments, self._places = segments, places
        self._masks: dict[int | None, list[Tensor | None]] = {}

    def masked(self, window: int | None) -> Iterator[tuple[int, int, Tensor | None]]:
        """Yields each block's start, end and mask (`_mask`)."""
        if window not in self._masks:
            self._masks[window] = [self._mask(start, end, window) for start, end in self._bounds]
        for (start, end), mask in zip(self._bounds, self._masks[window], strict=True):
            yield start, end, mask

    def _mask(self, start: int, end: int, window: int | None) -> Tensor | None:
        if self._segments is None or self._places is None or self._segments[start] < 0:
            return _mask(torch.arange(end - start), None, window)
        return _mask(self._places[start:end], self._segments[start:end], window)


def _per_block(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scaling: float | None, window: int | None
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for start, end, mask in blocks.masked(window):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        mask = mask if mask is None else mask.to(q.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _mask(places: Tensor, segments: Tensor | None, window: int | None) -> Tensor | None:
    """Which token sees which [T, T] in a block; None if each sees all before it. `places` [T] are positions,
    `segments` [T] those of a shared prompt (0) and its branches."""
    if segments is None and (window is None or len(places) <= window):
        return None
    distance = places[:, None] - places
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if segments is not None:
        mask &= (segments == 0) | (segments[:, None] == segments)
    return mask


def keeps_branches_apart(config: Any) -> bool:
    """Whether this attention, on CPUs, keeps the branches of a shared prompt apart in a model of this configuration.

    Not where attention scores are capped, or where layers carry a state from token to token.
    """
    kinds = set(getattr(config, "layer_types", None) or [])
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return not capped and kinds <= ATTENTION_LAYERS and not any(hasattr(config, name) for name in STATE_SIZES)


def register() -> None:
    """Registers `attn_implementation="varlen"` with transformers. It needs no mask."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)
