"""Why some calls have no right strategy, where several files say it."""

from __future__ import annotations

SHARED_MASKS = (
    "shards that draw from equal seeds share a dropout mask, and replicas that do not differ"
)
