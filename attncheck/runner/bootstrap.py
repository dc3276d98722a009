"""What torchrun starts, one process a rank: `python -m attncheck.runner.bootstrap RUN_DIR`.

Gives the rank its own PYTHONHASHSEED before anything is imported (propagation iterates over sets, so
ranks with different hash seeds can choose differently; real jobs never share one), then starts the
worker. Works the same under a user's own `torchrun --nnodes N`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from attncheck.runner.rundir import RunDir


def main() -> None:
    run = RunDir(Path(sys.argv[1]))
    config = run.config()
    rank = int(os.environ["RANK"])
    wanted = str(config.hash_seeds[rank % len(config.hash_seeds)])
    if os.environ.get("PYTHONHASHSEED") != wanted:
        os.environ["PYTHONHASHSEED"] = wanted
        arguments = [sys.executable, "-m", "attncheck.runner.bootstrap", *sys.argv[1:]]
        os.execv(sys.executable, arguments)
    sys.path[:0] = config.path
    from attncheck.runner.worker import work

    work(run, config, rank)


if __name__ == "__main__":
    main()
