"""Small models under each of the ways that people parallelise one, as targets of an audit.

`build_*(mesh)` and `inputs_*(mesh)`; the same code runs on fake tensors and on real ranks. The models of
transformers and diffusers are made from sizes by the packages' own code: no weights, no network.

- transformers parallelises a model in `from_pretrained(..., distributed_config=...)`, which insists on
  weights. What it calls there are two class methods, which serve a model made from a config, too:
  `prepare_distribute_model` makes the meshes, before weights are read, and `maybe_distribute_model` applies
  the plans, after the model is made on `meta` (transformers/distributed/mixin.py; as here from 5.20 on).
- diffusers has `enable_parallelism(config=ContextParallelConfig(...))` (models/modeling_utils.py; from 0.36
  on, with rings of PyTorch's own flash attention later), and from 0.42 on with `TensorParallelConfig`, which
  it refuses on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import local_map
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

SEED = 8
LAYERS, WIDTH, HEADS, TOKENS, WORDS = 2, 64, 4, 16, 96


@contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- a decoder of our own ----------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_on_local_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, S, D), DTensors that are sharded by heads on the tensor-parallel axis."""
    if not isinstance(q, DTensor):
        return sdpa(q, k, v)
    heads = [Shard(1)]
    local = local_map(
        sdpa,
        out_placements=list(heads),
        in_placements=(heads, heads, heads),
        device_mesh=q.device_mesh,
    )
    out: Tensor = local(q, k, v)
    return out


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.attend = attend

    def forward(self, x_BSW: Tensor) -> Tensor:  # noqa: N803
        q, k, v = (
            part(x_BSW).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        out: Tensor = self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention(attend)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(F.silu(self.up(self.norm2(x))))
        return out


class Decoder(nn.Module):
    """tokens (B, S) -> logits (B, S, words)."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block(attend) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def _decoder(attend: Attend, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    torch.manual_seed(SEED)
    with _dtype(dtype):
        return Decoder(attend)


def _parallelized(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """The plan of PyTorch's own tutorial, with the sequence sharded between the blocks; but attention gets
    DTensors."""
    sequence = Shard(1)
    parallelize_module(
        model,
        mesh,
        {
            "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence),
            "head": ColwiseParallel(input_layouts=sequence, output_layouts=Replicate()),
        },
    )
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "norm1": SequenceParallel(),
                "norm2": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(sequence,), desired_input_layouts=(Replicate(),)
                ),
                **{f"attention.{part}": ColwiseParallel(use_local_output=False) for part in "qkv"},
                "attention.o": RowwiseParallel(output_layouts=sequence),
                "up": ColwiseParallel(input_layouts=sequence),
                "down": RowwiseParallel(output_layouts=sequence),
            },
        )
    return model


def build_parallelized(mesh: DeviceMesh) -> nn.Module:
    """Attention meets DTensors."""
    return _parallelized(_decoder(sdpa), mesh)


def build_local_map(mesh: DeviceMesh) -> nn.Module:
    return _parallelized(_decoder(sdpa_on_local_heads), mesh)


def _fsdp(attend: Attend, mesh: DeviceMesh) -> nn.Module:
    model = _parallelized(_decoder(attend), mesh["tp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model


def build_fsdp_tp(mesh: DeviceMesh) -> nn.Module:
    """FSDP2 over `dp` around tensor parallelism over `tp`."""
    return _fsdp(sdpa, mesh)


def build_fsdp_tp_local(mesh: DeviceMesh) -> nn.Module:
    """The same with attention in `local_map`, which a CPU can run."""
    return _fsdp(sdpa_on_local_heads, mesh)


def build_compiled(mesh: DeviceMesh) -> nn.Module:
    """Block by block, as torchtitan does, and as a whole."""
    model = _parallelized(_decoder(sdpa_on_local_heads), mesh)
    for block in model.blocks:
        block.compile(fullgraph=True)
    compiled: nn.Module = torch.compile(model)
    return compiled


class Emptying(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if out.to_local().isfinite().all() else torch.zeros_like(out)


def build_reading_a_value(mesh: DeviceMesh) -> nn.Module:
    """What it does next depends on a value that it computed."""
    model = _decoder(sdpa_on_local_heads)
    with _dtype(torch.bfloat16):
        model.head = Emptying(WIDTH, WORDS, bias=False)
    return _parallelized(model, mesh)


def inputs(mesh: DeviceMesh) -> tuple[Tensor]:
    torch.manual_seed(SEED + 1)
    return (torch.randint(WORDS, (2, TOKENS)),)


# --- transformers ------------------------------------------------------------------------------------------


def _distributed(cls: Any, config: Any, **sizes: int) -> nn.Module:
    from transformers.distributed import DistributedConfig

    distributed, _, mesh = cls.prepare_distribute_model(DistributedConfig(**sizes))
    torch.manual_seed(SEED)
    with _dtype(torch.bfloat16):
        model = cls(config)
    out: nn.Module = cls.maybe_distribute_model(model, distributed, mesh)
    return out


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attn_implementation": "sdpa",
        **more,
    }


def build_llama(mesh: DeviceMesh) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _distributed(LlamaForCausalLM, LlamaConfig(**_sizes()), tp_size=mesh.size())


def build_qwen3_fsdp(mesh: DeviceMesh) -> nn.Module:
    """Two axes, `dp` and `tp`, by transformers' own FSDP2 and tensor-parallel plans."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**_sizes(head_dim=WIDTH // HEADS))
    return _distributed(
        Qwen3ForCausalLM, config, fsdp_size=mesh["dp"].size(), tp_size=mesh["tp"].size()
    )


def inputs_transformers(mesh: DeviceMesh) -> dict[str, Tensor]:
    return {"input_ids": inputs(mesh)[0]}


# --- diffusers ---------------------------------------------------------------------------------------------


def _wan(mesh: DeviceMesh, backend: str, **degrees: int) -> nn.Module:
    from diffusers import ContextParallelConfig, WanTransformer3DModel

    torch.manual_seed(SEED)
    with _dtype(torch.bfloat16):
        model = WanTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=2 * WIDTH,
            num_layers=LAYERS,
            rope_max_seq_len=32,
        )
    model.set_attention_backend(backend)
    model.enable_parallelism(config=ContextParallelConfig(**degrees))
    out: nn.Module = model
    return out


def build_wan_ulysses(mesh: DeviceMesh) -> nn.Module:
    return _wan(mesh, "native", ulysses_degree=mesh.size())


def build_wan_ring(mesh: DeviceMesh) -> nn.Module:
    return _wan(mesh, "_native_flash", ring_degree=mesh.size())


def build_wan_ring_native(mesh: DeviceMesh) -> nn.Module:
    """Refused by diffusers itself, and not before the first call: F.scaled_dot_product_attention returns no
    log-sum-exp, by which a ring adds up its parts."""
    return _wan(mesh, "native", ring_degree=mesh.size())


def inputs_wan(mesh: DeviceMesh) -> dict[str, Any]:
    """Latents of 1 x 8 x 8: 16 tokens after patches of 1 x 2 x 2."""
    torch.manual_seed(SEED + 1)
    return {
        "hidden_states": torch.randn(1, 4, 1, 8, 8, dtype=torch.bfloat16),
        "timestep": torch.full((1,), 500),
        "encoder_hidden_states": torch.randn(1, 8, 32, dtype=torch.bfloat16),
        "return_dict": False,
    }


def build_flux_tp(mesh: DeviceMesh) -> nn.Module:
    """By the `_tp_plan` of its class. Nothing there is for a GPU alone, so a CPU is let in."""
    from diffusers import FluxTransformer2DModel, TensorParallelConfig
    from diffusers.hooks import tensor_parallel

    torch.manual_seed(SEED)
    with _dtype(torch.bfloat16):
        model = FluxTransformer2DModel(
            in_channels=16,
            num_layers=LAYERS,
            num_single_layers=LAYERS,
            attention_head_dim=16,
            num_attention_heads=HEADS,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 6, 6),
        )
    before = tensor_parallel._SUPPORTED_TP_DEVICES
    tensor_parallel._SUPPORTED_TP_DEVICES = (*before, "cpu")
    try:
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=mesh.size()))
    finally:
        tensor_parallel._SUPPORTED_TP_DEVICES = before
    out: nn.Module = model
    return out


def inputs_flux(mesh: DeviceMesh) -> dict[str, Any]:
    """16 tokens of an image, 8 of text."""
    torch.manual_seed(SEED + 1)
    dtype = torch.bfloat16
    return {
        "hidden_states": torch.randn(1, 16, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 8, 32, dtype=dtype),
        "pooled_projections": torch.randn(1, 32, dtype=dtype),
        "timestep": torch.ones(1, dtype=dtype),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }
