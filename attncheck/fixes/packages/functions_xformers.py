"""xformers' attention as users call it. Its cutlass backward gets two random states that are ordinary
tensors, which no strategy takes beside DTensors; called on local shards it never meets one."""

from __future__ import annotations

from attncheck.fixes.notation import Signature

# What a bias object holds is the same on every rank: positions in whole sequences, which is right for some
# of the heads as for all. One with a bias for each head is not.
POSITIONS = (
    *("NoneType", "Tensor", "DTensor", "LowerTriangularMask", "LowerTriangularFromBottomRightMask"),
    *("BlockDiagonalMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalFromBottomRightMask"),
    *("BlockDiagonalCausalLocalAttentionMask", "LocalAttentionFromBottomRightMask"),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
)

FUNCTIONS = (
    Signature(
        "xformers.ops.memory_efficient_attention",
        # With five dims it is the groups of heads that are sharded, not what a group has.
        takes={
            "query": "b sq d | b sq h d | b sq h in_group d",
            "key": "b sk d | b sk h d | b sk h in_group d",
            "value": "b sk dv | b sk h dv | b sk h in_group dv",
            "attn_bias": "b sq sk | b h sq sk | b h in_group sq sk",
        },
        gives={"out": "b sq h dv | b sq dv | b sq h in_group dv"},
        needs={"p": 0.0, "type(attn_bias)": POSITIONS},
        queries={"type(attn_bias)": ("NoneType", "Tensor", "DTensor")},
        because=(
            "shards that draw from equal seeds share a dropout mask, and a bias object that holds "
            "one bias for each head cannot be sharded"
        ),
    ),
)
