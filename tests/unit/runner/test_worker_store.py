"""What ranks hand each other through the store may be larger than what the store takes at once."""

from __future__ import annotations

from types import SimpleNamespace

import torch.distributed as dist

from attncheck.runner.worker import STORE_BYTES, Worker


def test_more_than_the_store_takes_arrives_and_is_cleared() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    worker = Worker.__new__(Worker)
    worker.store = store
    worker.config = SimpleNamespace(case_timeout=10)  # type: ignore[assignment]
    data = bytes(range(256)) * (2 * STORE_BYTES // 256) + b"rest"  # above TCPStore's own 8 MiB
    before = store.num_keys()
    worker._send("record/0/1", data)
    assert worker._receive("record/0/1") == data
    assert store.num_keys() == before
    worker._send("record/1/1", b"")
    assert worker._receive("record/1/1") == b""
