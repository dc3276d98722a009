"""`attncheck new probe`: a probe file that runs as it is, to be changed into one's own. Torch-free."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from attncheck.errors import UserError

TEMPLATE = Path(__file__).parent / "templates" / "probe.py"
TEMPLATE_NAME = "my_attention"  # stands in the template wherever the new name shall


def new_probe(name: str, folder: Path) -> Path:
    """Write NAME.py into `folder`; its path. Raises UserError for a name that is no Python name, a
    file that exists, and a folder that cannot be written to."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or keyword.iskeyword(name):
        raise UserError(
            f"{name!r} cannot name a probe: expected letters, digits and underscores, as in my_kernel."
        )
    path = folder / f"{name}.py"
    text = TEMPLATE.read_text(encoding="utf-8").replace(TEMPLATE_NAME, name)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text.replace("FILE", path.name))
    except FileExistsError:
        raise UserError(f"{path} exists already; name another probe, or remove it first.") from None
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from None
    return path
