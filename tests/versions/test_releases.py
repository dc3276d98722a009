"""Each guard on both sides of its boundary, and what lasts everywhere: in the sources of every release.

    python -m pytest -m versions

About 1 GB is downloaded once, one release at a time, into attncheck's cache. A release that cannot be had
fails, with what pip says.
"""

from __future__ import annotations

import pytest
from test_installed_torch import ENTRIES, name_of
from torch_history import RELEASES, Guard, Lasting, Source
from torch_sources import sources_of

pytestmark = pytest.mark.versions


@pytest.fixture(scope="module", params=RELEASES.values())
def release(request: pytest.FixtureRequest) -> tuple[str, Source]:
    version = str(request.param)
    return version, Source(sources_of(version))


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_each_release_is_on_its_side(entry: Guard | Lasting, release: tuple[str, Source]) -> None:
    version, source = release
    assert entry.holds(source, version)


def test_it_is_the_release_that_it_is_taken_for(release: tuple[str, Source]) -> None:
    version, source = release
    assert f"'{version}" in source.text("version.py").replace('"', "'")
