"""What is started: `python -m attncheck.audit.numeric.bootstrap rank|unsharded FOLDER`; a rank by torchrun.

Each rank gets its own PYTHONHASHSEED before anything is imported, as in real jobs (see runner.bootstrap).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from attncheck.audit.numeric.folder import Folder


def main() -> None:
    kind, path = sys.argv[1:]
    folder = Folder(Path(path))
    if kind == "unsharded":
        from attncheck.audit.numeric.unsharded import serve

        serve(folder)
        return
    wanted = str(int(os.environ["RANK"]) + 1)
    if os.environ.get("PYTHONHASHSEED") != wanted:
        os.environ["PYTHONHASHSEED"] = wanted
        name = "attncheck.audit.numeric.bootstrap"
        os.execv(sys.executable, [sys.executable, "-m", name, kind, path])
    from attncheck.audit.numeric.rank import work

    work(folder)


if __name__ == "__main__":
    main()
