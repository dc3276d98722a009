"""What a pass says of each of these files, as JSON on stdout: {name: sentence}.

    python audit_passes.py NAME...

`NAME.py` has `build` and `inputs`. torch is imported once; each pass is a process of its own, as in use.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from attncheck.audit import fakepass
from attncheck.audit.asked import Answer, Pass
from attncheck.model import from_json, to_json


def one(name: str, folder: Path) -> str:
    asked, answer = folder / f"{name}.asked.json", folder / f"{name}.answer.json"
    request = Pass(f"{name}.py:build", f"{name}.py:inputs", {"tp": 2}, probe_files=("-",))
    asked.write_text(json.dumps(to_json(request)))
    child = os.fork()
    if child == 0:
        fakepass.put_in_place = lambda *_: None  # these models have no packages
        sys.argv = ["fakepass", str(asked), str(answer)]
        code = 1
        try:
            fakepass.main()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status):
        return f"exit code {os.waitstatus_to_exitcode(status)}"
    return from_json(Answer, json.loads(answer.read_text()), "answer").error


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({name: one(name, Path(folder)) for name in sys.argv[1:]}))
