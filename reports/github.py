"""For GitHub Actions: workflow commands, which become annotations at lines of the project, and a summary.

GitHub shows ten errors, ten warnings and ten notices of a step: the worst come first, one a finding, and the
last notice says what is not shown. Held against a baseline, only what the gate fails for is annotated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attncheck import pinned, plugins
from attncheck.changes import word
from attncheck.locations import Location
from attncheck.model import Report, Severity
from attncheck.pinned import Annotation, Regression
from attncheck.text import count, listing, one_line
from attncheck.view import FindingView, RenderOptions, View, build

NAME = "github"
SUMMARY = "for GitHub Actions: annotations worst first, and a step summary"

SHOWN = 10  # of each level, by GitHub, of one step
MESSAGE = 1500
NAMED = 3  # operators, cases

LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}

# GitHub refuses a step's summary that is longer.
SUMMARY_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Command:
    """One annotation. `lines`: of its text."""

    level: str
    title: str
    lines: tuple[str, ...]
    location: Location | None = None


def render(report: Report, *, options: RenderOptions) -> str:
    """One command a line, and nothing else: the runner reads what is printed."""
    view = build(report)
    if view.comparison is not None and view.comparison.verdict:
        found = pinned.regressions(report, view, options.folder)
        commands = [_of_regression(regression) for regression in found]
    else:
        every = pinned.build(report, view, options.folder)
        commands = [_of_finding(annotation) for annotation in every]
    text = "".join(
        _written(command) + "\n" for command in [*_first(commands), _last(view, commands)]
    )
    return text if options.unicode else text.encode("ascii", "backslashreplace").decode("ascii")


def step_summary(report: Report, *, options: RenderOptions) -> str:
    """Markdown for the file that $GITHUB_STEP_SUMMARY names, at most `SUMMARY_BYTES` long in UTF-8."""
    text = plugins.load_format("markdown").render(report, options=options)
    if len(text.encode()) <= SUMMARY_BYTES:
        return text
    return f"# attncheck report\n\nThe report takes more than GitHub's {SUMMARY_BYTES} bytes.\n"


# --- what is annotated ---------------------------------------------------------------------------


def _of_finding(annotation: Annotation) -> Command:
    finding = annotation.finding
    return Command(
        LEVELS[finding.severity],
        f"{finding.rule} {finding.name}",
        (finding.title, finding.where, *_way_out(finding)),
        annotation.location,
    )


def _of_regression(regression: Regression) -> Command:
    finding = regression.finding
    name = f"{finding.rule} {finding.name}" if finding else regression.change
    cases = f"{count(len(regression.cases), 'case')} of {listing(regression.operators, NAMED)}"
    lines = [
        finding.title if finding else "",
        f"{regression.change}: {cases}",
        regression.detail,
        listing(regression.cases, 1),
        *(_way_out(finding) if finding else ()),
    ]
    return Command("error", f"{word(regression.kind)}: {name}", (*lines,), regression.location)


def _way_out(finding: FindingView) -> Iterable[str]:
    if finding.first_remedy is not None:
        remedy = finding.remedies[finding.first_remedy]
        yield f"What to do: {remedy.text} [{remedy.proof}]"
    yield f"More: attncheck explain {finding.rule}"


def _first(commands: Sequence[Command]) -> Iterable[Command]:
    """What GitHub shows. One notice is kept for the last line."""
    room = {"error": SHOWN, "warning": SHOWN, "notice": SHOWN - 1}
    for command in commands:
        room[command.level] -= 1
        if room[command.level] >= 0:
            yield command


def _last(view: View, commands: Sequence[Command]) -> Command:
    """The verdict, what is not shown, and where it is."""
    compared = view.comparison
    hidden = len(commands) - len(list(_first(commands)))
    lines = [compared.headline if compared else view.exit_line]
    if compared is not None and compared.environment:
        changed = [
            f"{d.name} {d.before or 'none'} -> {d.after or 'none'}" for d in compared.environment
        ]
        lines.append(f"Changed since {compared.against}: {listing(changed, 8)}")
    if hidden:
        lines.append(f"{hidden} more in the step's summary: GitHub shows {SHOWN} of a kind.")
    # A gate can fail for what has no line: nothing could be run, or a baseline is stale.
    failed = compared is not None and compared.exit_code != 0 and not commands
    return Command("error" if failed else "notice", "attncheck", (*lines,))


# --- workflow commands ---------------------------------------------------------------------------


def _written(command: Command) -> str:
    """`::error file=pyproject.toml,line=12,title=ATN101 ...::message`, all of it on one line."""
    properties = {}
    if command.location is not None:
        properties = {"file": command.location.path, "line": str(command.location.line)}
    properties["title"] = one_line(command.title, 120)
    listed = ",".join(f"{name}={_property(value)}" for name, value in properties.items() if value)
    message = "\n".join(one_line(line, MESSAGE) for line in command.lines if line)
    return f"::{command.level} {listed}::{_data(message)}"


# As the runner's own toolkit escapes: github.com/actions/toolkit, packages/core/src/command.ts.
def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
