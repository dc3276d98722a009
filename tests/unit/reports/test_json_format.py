"""The JSON report: everything, unchanged, in any encoding."""

import json

import pytest
import sample_report

from attncheck import plugins
from attncheck.model import Report, to_json
from attncheck.saved import load_report
from attncheck.view import RenderOptions


def render(report: Report, **options: object) -> str:
    return plugins.load_format("json").render(report, options=RenderOptions(**options))


def test_snapshot() -> None:
    """Two cases of the sample: the shape of the document, not its length."""
    sample = sample_report.sample()
    short = Report(sample.environment, (sample.cases[0], sample.cases[1]), sample.findings[-2:-1])
    sample_report.check_snapshot("report.json", render(short))


@pytest.mark.parametrize("unicode", [True, False])
def test_nothing_is_lost(unicode: bool) -> None:
    report = sample_report.sample()
    assert load_report(render(report, unicode=unicode)) == report


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("text", [sample_report.HOSTILE, "\ud800", "h\u00e4ng \U0001f600"])
def test_hostile_text_survives_and_can_be_written(text: str, unicode: bool) -> None:
    report = sample_report.hostile(text)
    rendered = render(report, unicode=unicode)
    assert json.loads(rendered) == to_json(report)
    rendered.encode("utf-8" if unicode else "ascii")
    assert "\x1b" not in rendered
