"""Where the rows of a KV cache lie: a cache row of its own for each sequence, or pages.

Both are (blocks, rows of a block, kv_heads, head_dim). Without pages a sequence has one block, its
row of the cache; with pages `block_table` names its blocks in order. `blocks` below is the 1-D
int32 tensor of one sequence's block numbers.
"""

from __future__ import annotations

import torch

from attncheck.standins import flash_checks as checks

PAGE_MULTIPLE = 256
PAGED_SHAPE = "num_blocks, page_block_size, num_heads_k, head_size"
NO_LEFTPAD = "We don't support Paged KV and leftpad_k running at the same time yet"


def check_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    batch: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    """RuntimeError where the extension's own checks fail, and for pages that do not exist."""
    checks.check(block_table.dtype == torch.int32, "block_table must have dtype torch.int32")
    checks.check(block_table.stride(-1) == 1, "block_table must have contiguous last dimension")
    checks.check(
        k.ndim == 4 and k.shape[1] % PAGE_MULTIPLE == 0,
        f"Paged KV cache block size must be divisible by {PAGE_MULTIPLE}",
    )
    for name, pages in (("k", k), ("v", v)):
        checks.check_shape(name, pages, PAGED_SHAPE, (*k.shape[:2], kv_heads, head_dim))
    names = "batch_size, max_num_blocks_per_seq"
    checks.check_shape("block_table", block_table, names, (batch, block_table.shape[-1]))
    outside = bool(((block_table < 0) | (block_table >= k.shape[0])).any())
    # The kernel takes the number as it is, and reads wherever that leads.
    checks.check(not outside, f"block_table names blocks that the cache of {k.shape[0]} lacks")


def read(cache: torch.Tensor, blocks: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Rows `first` to `last` (exclusive) of a sequence, (rows, kv_heads, head_dim)."""
    return cache[_places(cache, blocks, first, last)]


def write(cache: torch.Tensor, blocks: torch.Tensor, first: int, rows: torch.Tensor) -> None:
    """Put `rows` (rows, kv_heads, head_dim) into the cache, in place, from row `first` on."""
    cache[_places(cache, blocks, first, first + rows.shape[0])] = rows


def _places(
    cache: torch.Tensor, blocks: torch.Tensor, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(first, last, device=cache.device)
    size = cache.shape[1]
    return blocks.long()[rows // size], rows % size
