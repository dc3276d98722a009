"""Only a hunt imports hypothesis; the rest works where it is slow to import, or broken."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("arguments", [["--help"], ["hunt", "--help"], ["list"], ["env"]])
def test_is_not_imported(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from attncheck.cli import main\n"
        f"try:\n    main({arguments!r})\n"
        "except SystemExit:\n    pass\n"
        "loaded = [m for m in ('hypothesis', 'torch') if m in sys.modules]\n"
        "sys.exit(f'{loaded} loaded' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
