"""Runs a script as if it were alone, with CPU stand-ins in the place of what needs a GPU.

    torchrun ... -m attncheck.runner.stage PROBE_FILE OPERATOR SCRIPT

The script itself knows nothing of attncheck: on a machine with the real kernels it runs as it is. Ranks get
the hash seeds of a scan: one that asks for these starts itself again where it lacks them, and would do so
without the stand-ins.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import types
from contextlib import nullcontext
from pathlib import Path

from attncheck import plugins, standins
from attncheck.runner.scan import FIRST_HASH_SEED

# Stand-ins that register ops without the module that does so elsewhere; a script imports it for that alone.
EMPTY = {"flash_attn_3": "flash_attn_interface"}


def main() -> None:
    seed = str(FIRST_HASH_SEED + int(os.environ["RANK"]))
    if os.environ.get("PYTHONHASHSEED") != seed:
        os.environ["PYTHONHASHSEED"] = seed
        os.execv(sys.executable, [sys.executable, "-m", "attncheck.runner.stage", *sys.argv[1:]])
    file, name, script = sys.argv[1:]
    probe = plugins.load_probe_file(Path(file))
    operator = next(o for o in probe.operators if o.name == name)
    for each in operator.standins:
        standins.provide(each)
        if each in EMPTY and importlib.util.find_spec(EMPTY[each]) is None:
            sys.modules[EMPTY[each]] = types.ModuleType(EMPTY[each])
    sys.argv[:] = [script]
    with (operator.around or nullcontext)():
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
