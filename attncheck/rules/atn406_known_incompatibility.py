"""ATN406: two installed versions are known not to go together, whatever their metadata declares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attncheck.model import Finding, Severity
from attncheck.rules import installs
from attncheck.rules.base import Rule, no_case

if TYPE_CHECKING:
    from attncheck.static.installed import Installation

DOCS = """\
## What it does
Fires where a package asks for another version of a package than the one installed, in its code and not in
its metadata. What is known stands in the package `attncheck.knowledge`, each line with its source; the
finding names it. A warning where the package copes, by going another way than the one asked for.

## Why is this bad?
`pip check` calls the environment consistent. The import fails in the job, or, worse, does not: the attention
that was asked for is left out in favour of another one, and the log has one line about it.

## Example
```python
# diffusers 0.36.0 states flash-attn>=2.6.3, and imports what flash-attn has from 2.7.0 on
import diffusers.models.attention_dispatch
# ImportError: cannot import name '_wrapped_flash_attn_forward'
```

## What to do
Install a version that fits: the finding has the commands. Where the knowledge is wrong or too old, report
it: it is a line in a TOML file, and its source is beside it.
"""


def examine(installation: Installation) -> Iterator[Finding]:
    from attncheck import knowledge

    for distribution in installation.distributions.values():
        package = knowledge.of(distribution.name)
        # Of a version newer than all that are written down nothing is known; `attncheck.envcheck` says so.
        if package is None or not package.knows(distribution.version):
            continue
        for need in package.needs:
            other = installation.get(need.package)
            # What is installed says itself what it declares (ATN405).
            if other is None or (need.declared and distribution.folder is not None):
                continue
            if not need.applies_to(distribution.version) or need.met_by(other.version):
                continue
            yield RULE.about(
                f"{distribution.name} {other.name}",
                f"{distribution} does not go with {other}: it takes {other.name}{need.requires}",
                message=[
                    f"What happens: {need.why}.",
                    f"Source: {need.source} (as of {package.as_of})",
                ],
                remedies=installs.either_way(
                    installation, distribution.name, other.name, need.requires
                ),
                severity=Severity(need.severity),
            )


RULE = Rule(
    id="ATN406",
    name="known-incompatibility",
    since="0.1.0",
    severity=Severity.ERROR,
    docs=DOCS,
    judge=no_case,
    examine=examine,
)
