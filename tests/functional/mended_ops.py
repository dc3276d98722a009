"""Two ops that DTensor knows nothing of, an attention and its backward, with grouped kv heads.

q (batch, heads, sequence, head_dim), k and v (batch, kv_heads, kv_sequence, head_dim), log-sum-exp (batch,
heads, sequence). No `from __future__ import annotations`: `custom_op` reads the schema off these.
"""

import torch

aten = torch.ops.aten


def grouped(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def summed(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    b, h, s, d = x.shape
    return x.reshape(b, like.shape[1], h // like.shape[1], s, d).sum(2)


@torch.library.custom_op("mended::attention_forward", mutates_args=())
def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, grouped(q, k), grouped(q, v), 0.0, causal
    )
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("mended::attention_backward", mutates_args=())
def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, grouped(q, k), grouped(q, v), out, lse, 0.0, causal
    )
    return dq.contiguous(), summed(dk, k).contiguous(), summed(dv, v).contiguous()


@forward.register_fake
def _(q, k, v, causal):
    return torch.empty_like(q), q.new_empty(q.shape[:3])


@backward.register_fake
def _(dout, q, k, v, out, lse, causal):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.causal = inputs[3]
    ctx.set_materialize_grads(False)


def gradients(ctx, dout, _):
    return (*backward(dout, *ctx.saved_tensors, ctx.causal), None)


forward.register_autograd(gradients, setup_context=keep)
