"""flash-attn's two functions in plain torch, so that transformers' own way to them runs where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    """(rows, tokens, heads, width) each; of keys and values there may be fewer heads."""
    assert dropout_p == 0
    assert causal
    query, key, value = (states.transpose(1, 2) for states in (q, k, v))
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (softmax_scale or query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    place = torch.arange(q.shape[1])
    apart = place[:, None] - place
    seen = (apart >= 0) & ((apart <= window_size[0]) | (window_size[0] < 0))
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    """(tokens, heads, width) each, of examples behind each other that begin where `cu_seqlens` says."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert (cu_seqlens_q.dtype, int(max_seqlen_q)) == (torch.int32, int(cu_seqlens_q.diff().max()))
    how: dict[str, Any] = {"softmax_scale": softmax_scale, "causal": causal, "softcap": softcap}
    parts = zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False)
    return torch.cat(
        [flash_attn_func(*(x[None, a:b] for x in (q, k, v)), window_size=window_size, **how)[0] for a, b in parts]
    )


def use_flash(patch: pytest.MonkeyPatch) -> None:
    """transformers calls these."""
    from transformers import modeling_flash_attention_utils as utils

    functions = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    processed = (utils._lazy_define_process_function(flash_attn_varlen_func), None)
    patch.setattr(utils, "lazy_import_flash_attention", lambda *_, **__: (functions, processed))
