"""The saved file: loads, plans exactly its case, and says how it is run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from attncheck import plugins
from attncheck.errors import UserError
from attncheck.hunt import regression
from attncheck.hunt.finds import Find, Kind
from attncheck.model import Case, Outcome, Status, case_id
from attncheck.plan import Selection, plan
from attncheck.plugins import derived
from attncheck.probing import Operator, Probe, Setting
from attncheck.runner.rundir import Asked

SIZES = {"batch": 1, "heads": 4, "kv_heads": 2, "sequence": 3, "kv_sequence": 5, "head_dim": 8}


def math_operator() -> Operator:
    return derived("sdpa[MATH]", name="sdpa[MATH]")


def find(
    setting: Setting, mesh: dict[str, int], placement: str, placements: dict[str, tuple[str, ...]]
) -> Find:
    case = Case(
        id=case_id("sdpa", "sdpa[MATH]", setting.name, "dtensor", mesh, placement, "backward"),
        probe="sdpa",
        operator="sdpa[MATH]",
        route="dtensor",
        setting=setting.to_dict(),
        mesh=mesh,
        placement=placement,
        placements=placements,
        direction="backward",
    )
    outcome = Outcome(Status.WRONG, 'says "no" and a back\\slash', kernel_op="aten.bmm.default")
    kind = Kind("wrong", "ATN202", "aten.bmm.default")
    return Find(Asked(case, setting), outcome, kind, frozenset({"grouped queries"}))


def save(folder: Path, found: Find) -> regression.Saved:
    operator = math_operator()
    found = regression.plannable(found, operator)
    return regression.save(folder, found, operator, None, 7, "torch 2.13.0", ("xformers",))


def planned(saved: regression.Saved, mesh: dict[str, int]) -> list[Case]:
    """As the command line selects."""
    probe = plugins.load_probe_file(saved.file)
    words = shlex.split(saved.command)
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--seed"] == "7"
    assert options["--with"] == "xformers"
    selection = Selection(
        operators=(options["--operator"],),
        placements=(options["--placement"],),
        directions=(options["--direction"],),
    )
    return list(plan([probe], mesh, selection))


def test_a_pattern_is_planned_by_its_name(tmp_path: Path) -> None:
    setting = Setting("hunted", SIZES, "bfloat16", {"scale": 0.3}, level="quick", memory="sliced")
    placements = {"q": ("S(1)",), "k": ("S(1)",), "v": ("S(1)",)}
    saved = save(tmp_path, find(setting, {"tp": 3}, "heads", placements))
    assert saved.file.name == "sdpa_math_wrong_1.py"
    (case,) = planned(saved, {"tp": 3})
    assert case.placements == placements
    assert case.setting == setting.to_dict()
    assert "--mesh tp=3 --placement heads --direction backward" in saved.command


def test_placements_of_its_own_are_planned_on_meshes_of_as_many_axes(tmp_path: Path) -> None:
    placements = {"q": ("S(1)",), "k": ("R",), "v": ("P(sum)",)}
    setting = Setting("hunted", SIZES, level="quick", explicit=placements)
    saved = save(tmp_path, find(setting, {"tp": 2}, "explicit", placements))
    (case,) = planned(saved, {"tp": 2})
    assert case.placements == placements
    assert case.placement == "explicit"
    with pytest.raises(UserError, match="explicit"):
        planned(saved, {"dp": 2, "tp": 2})


def test_patterns_that_no_scan_puts_together_become_placements_of_its_own(tmp_path: Path) -> None:
    placements = dict.fromkeys("qkv", ("S(1)", "S(2)"))
    setting = Setting("hunted", SIZES, level="quick")
    saved = save(tmp_path, find(setting, {"dp": 2, "tp": 2}, "heads,sequence", placements))
    (case,) = planned(saved, {"dp": 2, "tp": 2})
    assert case.placement == "explicit"
    assert case.placements == placements


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    found = find(Setting("hunted", SIZES), {"tp": 2}, "replicate", dict.fromkeys("qkv", ("R",)))
    names = [save(tmp_path, found).file.name for _ in range(2)]
    assert names == ["sdpa_math_wrong_1.py", "sdpa_math_wrong_2.py"]


def test_a_name_is_not_given_twice_even_if_the_file_is_gone(tmp_path: Path) -> None:
    """A process that has loaded a probe file does not load another one of that name."""
    found = find(Setting("hunted", SIZES), {"tp": 2}, "replicate", dict.fromkeys("qkv", ("R",)))
    first = save(tmp_path, found).file
    first.unlink()
    operator = math_operator()
    again = regression.save(tmp_path, found, operator, None, 7, "torch 2.13.0", taken=[first])
    assert again.file.name == "sdpa_math_wrong_2.py"


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = find(Setting("hunted", SIZES), {"tp": 2}, "replicate", dict.fromkeys("qkv", ("R",)))
    with pytest.raises(UserError, match="Cannot write"):
        save(tmp_path / "file" / "folder", found)


def test_of_a_users_own_probe(tmp_path: Path) -> None:
    own = tmp_path / "probes" / "own.py"
    own.parent.mkdir()
    own.write_text(
        "from attncheck.plugins import derived\n"
        "from attncheck.probing import Probe, Setting\n"
        f"SETTING = Setting('plain', {SIZES!r})\n"
        "PROBE = Probe('own', 'mine', (derived('sdpa[MATH]', SETTING, name='own.sdpa'),))\n"
    )
    operator = plugins.load_probe_file(own).operators[0]
    found = find(Setting("hunted", SIZES), {"tp": 2}, "replicate", dict.fromkeys("qkv", ("R",)))
    found = replace(
        found, asked=replace(found.asked, case=replace(found.asked.case, operator="own.sdpa"))
    )
    saved = regression.save(tmp_path / "found", found, operator, own, 7, "torch 2.13.0")
    probe = plugins.load_probe_file(saved.file)
    assert probe.operators[0].name == "hunted.own.sdpa.wrong_1"
    assert '"../probes/own.py"' in saved.file.read_text()


def test_explicit_placements_that_cannot_be_are_refused() -> None:
    for explicit, words in (
        ({"x": ("R",)}, "places 'x'; its tensors are q, k, v"),
        ({"q": ("S(4)",)}, r"places q as 'S\(4\)'"),
        ({"q": ("P(avg)",)}, r"places q as 'P\(avg\)'"),
    ):
        operator = derived("sdpa[MATH]", Setting("own", SIZES, explicit=explicit))
        with pytest.raises(UserError, match=words):
            plan([Probe("own", "", (operator,))], {"tp": 2}, Selection())


def test_an_operator_that_nobody_defines_is_unknown() -> None:
    with pytest.raises(UserError, match="sdpa"):
        derived("sdpa[MAHT]", Setting("own", SIZES))
