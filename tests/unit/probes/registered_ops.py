"""A module whose import registers attention ops, as packages do. The names of other projects stand for
theirs: the real ones need their hardware; here they have small kernels on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return probabilities(q, k, causal) @ v


def probabilities(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1)


# --- (batch, sequence, heads, head_dim), with autograd ----------------------------------------------


@torch.library.custom_op("mine::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, is_causal: bool
) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return attend(q, k, v, is_causal).transpose(1, 2).contiguous()


@torch.library.custom_op("mine::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    g, q, k, v = (t.transpose(1, 2) for t in (dout, query, key, value))
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    p = probabilities(q, k, is_causal)
    dp = g @ v.transpose(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dk = (ds.transpose(-1, -2) @ q).unflatten(1, (kv_heads, groups)).sum(2)
    dv = (p.transpose(-1, -2) @ g).unflatten(1, (kv_heads, groups)).sum(2)
    dq, dk, dv = (t.transpose(1, 2).contiguous() for t in (ds @ k, dk, dv))
    return dq, dk, dv


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, is_causal: bool) -> Tensor:
    return torch.empty_like(query)


@attention_backward.register_fake
def _(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _remember(ctx, inputs, output) -> None:
    query, key, value, _, ctx.causal = inputs
    ctx.save_for_backward(query, key, value)


def _gradients(ctx, dout: Tensor):
    return (*attention_backward(dout, *ctx.saved_tensors, ctx.causal), None, None)


attention.register_autograd(_gradients, setup_context=_remember)

# --- others, which keep their library alive --------------------------------------------------------

hub = torch.library.Library("_flash_attn_9e27194", "DEF")
hub.define(
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(a!) out, float softmax_scale, bool causal) -> ()"
)


def _fwd(q, k, v, out, softmax_scale, causal) -> None:
    out.copy_(attend(q, k, v, causal))


hub.impl("fwd", _fwd, "CPU")

npu = torch.library.Library("npu", "DEF")
npu.define(
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, *, "
    "Tensor? pse=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1.) -> "
    "(Tensor, Tensor, Tensor, Tensor, int, int, int)"
)


def _npu_fusion_attention(query, key, value, head_num, input_layout, *, scale=1.0, **unused):
    if input_layout != "BSND":
        raise RuntimeError(f"input_layout {input_layout} is not supported")
    assert head_num == query.shape[2]
    # Its default scale is 1: whoever leaves it out gets another attention.
    scaled = query.transpose(1, 2) * (scale * query.shape[-1] ** 0.5)
    out = attend(scaled, key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2).contiguous()
    nothing = query.new_empty(0)
    return out, nothing, nothing, nothing, 0, 0, 0


npu.impl("npu_fusion_attention", _npu_fusion_attention, "CPU")

sage = torch.library.Library("sageattention_sm80", "DEF")
sage.define(
    "qk_int8_sv_f16(Tensor query, Tensor key, Tensor value, Tensor(a!) output, Tensor query_scale, "
    "Tensor key_scale) -> Tensor"
)
sage.impl("qk_int8_sv_f16", lambda q, *rest: q, "CPU")

aiter = torch.library.Library("aiter", "DEF")
aiter.define("fmha_fwd(Tensor q, Tensor k, Tensor v) -> Tensor")
aiter.impl("fmha_fwd", lambda q, k, v: attend(q, k, v) * 1.5, "CPU")  # not what it says it is

natten = torch.library.Library("natten", "DEF")
natten.define("na1d(Tensor query, Tensor key, Tensor value) -> Tensor")
natten.impl("na1d", lambda q, k, v: q, "CUDA")  # as most are: nothing for this machine

other = torch.library.Library(
    "flash_attn", "DEF"
)  # the name of flash-attn's op, and not its schema
other.define("_flash_attn_forward(Tensor q, Tensor k, Tensor v, int mode) -> Tensor")
other.impl("_flash_attn_forward", lambda q, k, v, mode: q, "CPU")
