"""Finds what lies on the shelves probes/ and reports/, built in or the user's; loads it by path.

A plug-in is a plain file: nothing is installed or registered, and a user's own works exactly as the
built-in ones do. A package can ship probes, too: each entry point of the group `attncheck.probes` names
a module of it, which is loaded as a file like the others. Loading one runs its code. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from attncheck.errors import UserError, unknown
from attncheck.probing import Operator, Probe, Setting

if TYPE_CHECKING:
    from attncheck.cells import Matrix
    from attncheck.inventory import RegisteredOp
    from attncheck.model import Report

Shelf = Literal["probes", "reports", "fixes"]

# Plug-ins are registered in `sys.modules` below this name, so that a json.py shadows nothing.
# Registered they must be: a frozen dataclass looks up its own module while it is defined.
NAMESPACE = "attncheck._shelf"
ENTRY_POINTS = "attncheck.probes"


def builtin_dir(shelf: Shelf) -> Path:
    """The folder of a built-in shelf: inside the package in a wheel, beside it in a checkout.

    Raises UserError where the installation has neither.
    """
    package = Path(__file__).resolve().parent
    if (package / shelf).is_dir():
        return package / shelf
    checkout = package.parent
    # Without the check, a stray site-packages/probes of somebody else's would be taken for ours.
    if (checkout / "pyproject.toml").is_file() and (checkout / shelf).is_dir():
        return checkout / shelf
    raise UserError(
        f"This installation lacks its built-in {shelf}: {package / shelf} does not exist. "
        "Reinstall attncheck."
    )


# --- probes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeShelf:
    """The probes that could be loaded, the file of each (same order), and why others could not."""

    probes: tuple[Probe, ...]
    files: tuple[Path, ...]
    errors: tuple[tuple[Path, str], ...]


def load_probes(
    extra: Iterable[Path] = (), announce: Callable[[Path], None] = lambda file: None
) -> ProbeShelf:
    """Load the built-in probes, those that installed packages ship, and those in `extra` (files, or
    folders of them).

    A file that cannot be loaded becomes one sentence in `errors`; the others are still loaded.
    `announce` is told of each file that a package ships, unasked, before its code is run.
    """
    probes: dict[Path, Probe] = {}
    shipped, unfound = _shipped_probes()
    for file in shipped:
        announce(file)
    errors = list(unfound)
    paths = [
        *_python_files(builtin_dir("probes")),
        *shipped,
        *(p for e in extra for p in _expand(e)),
    ]
    for path in dict.fromkeys(path.resolve() for path in paths):
        try:
            probe = load_probe_file(path)
            _refuse_duplicates(probe, path, probes)
        except UserError as error:
            errors.append((path, str(error)))
        else:
            probes[path] = probe
    return ProbeShelf(tuple(probes.values()), tuple(probes), tuple(errors))


def _shipped_probes() -> tuple[list[Path], list[tuple[Path, str]]]:
    """The files that entry points name, and a sentence for each that is not there.

    The packages themselves are not imported: theirs may load torch, or take seconds.
    """
    found, errors = [], []
    import importlib.metadata  # which takes as long as all of a format

    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        top, *rest = entry.module.split(".")
        spec = importlib.util.find_spec(top)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        files = [Path(folder, *rest).with_suffix(".py") for folder in folders]
        if not rest and spec is not None and spec.origin is not None and not folders:
            files = [Path(spec.origin)]
        file = next((f for f in files if f.is_file()), None)
        if file is not None:
            found.append(file)
            continue
        owner = entry.dist.name if entry.dist else "an installed package"
        sentence = (
            f"Probe file {entry.name} of {owner} is not there: its entry point in {ENTRY_POINTS} names "
            f"the module {entry.module}; expected a module that is one Python file."
        )
        errors.append((Path(f"{entry.name}.py"), sentence))
    return found, errors


def load_probe_file(path: Path) -> Probe:
    """The probe that a file defines. A file is run once per process, however often it is asked for.

    Raises UserError, one sentence, where the file does not load or defines no `PROBE`.
    """
    module = _load(path, "probes")
    if not hasattr(module, "PROBE"):
        raise UserError(f"Probe file {path} defines no PROBE; expected `PROBE = Probe(...)`.")
    probe = module.PROBE
    if not isinstance(probe, Probe):
        raise UserError(
            f"Probe file {path}: PROBE is of type {type(probe).__name__}; "
            "expected an attncheck.probing.Probe."
        )
    _check_operators(probe, path)
    return probe


def with_discovered(probe: Probe, ops: Sequence[RegisteredOp]) -> Probe:
    """The probe with the operators that it makes of registered ops; itself where it makes none."""
    found = probe.discover(ops) if probe.discover is not None and ops else ()
    return dataclasses.replace(probe, operators=(*probe.operators, *found)) if found else probe


def derived(
    operator: str, *settings: Setting, name: str = "", probe: str | Path | None = None
) -> Operator:
    """An operator of another probe with settings of your own: what a regression probe is made of.

    `operator`: its name; `probe`: the file that defines it, None for the built-in ones; `name`: what to
    call the derived one (names are unique: `hunted.` before the other's, where empty). Raises UserError
    where no such operator is defined.
    """
    files = [Path(probe)] if probe is not None else _python_files(builtin_dir("probes"))
    operators = {o.name: o for file in files for o in load_probe_file(file).operators}
    if operator not in operators:
        raise unknown("operator", operator, operators)
    return dataclasses.replace(
        operators[operator], name=name or f"hunted.{operator}", settings=settings
    )


def _check_operators(probe: Probe, path: Path) -> None:
    names: set[str] = set()
    for operator in probe.operators:
        if not isinstance(operator, Operator):
            raise UserError(
                f"Probe file {path}: PROBE.operators holds an object of type "
                f"{type(operator).__name__}; expected attncheck.probing.Operator."
            )
        if operator.name in names:
            raise UserError(f"Probe file {path} defines the operator {operator.name!r} twice.")
        names.add(operator.name)
    if not names and probe.discover is None:
        raise UserError(f"Probe file {path}: PROBE.operators is empty; expected at least one.")


def _refuse_duplicates(probe: Probe, path: Path, loaded: dict[Path, Probe]) -> None:
    """Case ids are made of these names, so two probes must never share one."""
    operators = {operator.name for operator in probe.operators}
    for other_path, other in loaded.items():
        if other.name == probe.name:
            raise UserError(
                f"Probe file {path} was left out: the probe name {probe.name!r} is taken "
                f"by {other_path}."
            )
        if taken := sorted(operators & {operator.name for operator in other.operators}):
            raise UserError(
                f"Probe file {path} was left out: the operator name {taken[0]!r} is taken "
                f"by {other_path}."
            )


# --- fixes ---------------------------------------------------------------------------------------


def register_fix(path: Path) -> dict[str, str]:
    """Run a file that `attncheck fix` wrote (or one's own with a `register()`), and register what it has.

    Returns what became of each op. Ops of packages that are not here are passed over. Raises UserError where
    the file does not load or defines no `register`, and what its `register()` raises.
    """
    module = _load(path, "fixes")
    register = getattr(module, "register", None)
    if not callable(register):
        raise UserError(
            f"Fix file {path} defines no register(); expected one that attncheck wrote."
        )
    import inspect

    takes = inspect.signature(register).parameters
    became = register(required=False) if "required" in takes else register()
    return dict(became) if isinstance(became, dict) else {}


# --- formats -------------------------------------------------------------------------------------


class Render(Protocol):
    def __call__(self, report: Report, *, options: Any) -> str:
        """`options` is an `attncheck.view.RenderOptions`."""


@dataclass(frozen=True)
class Format:
    """A report format, known by its file. Its code runs when it is first used."""

    name: str
    path: Path

    @property
    def summary(self) -> str:
        return str(_load_format_file(self.path).SUMMARY)

    def render(self, report: Report, *, options: Any) -> str:
        """The report as text. Raises UserError where the format's file does not load."""
        render: Render = _load_format_file(self.path).render
        return render(report, options=options)

    @property
    def shows_matrices(self) -> bool:
        return callable(getattr(_load_format_file(self.path), "render_matrix", None))

    def render_matrix(self, matrix: Matrix, *, options: Any) -> str:
        """A matrix as text. Raises UserError where the format shows none."""
        self.check_matrices()
        return str(_load_format_file(self.path).render_matrix(matrix, options=options))

    def check_matrices(self) -> None:
        """Raises UserError where the format shows no matrix: its file defines no `render_matrix`."""
        if not self.shows_matrices:
            able = ", ".join(name for name, form in formats().items() if form.shows_matrices)
            raise UserError(
                f"The format {self.name} shows no matrix: expected one of {able}; or "
                f"`attncheck report FILE --cell NAME --format {self.name}` for one of its combinations."
            )

    def step_summary(self, report: Report, *, options: Any) -> str | None:
        """What the format says in the summary of a CI step, in Markdown; None for most: they have none."""
        summary: Render | None = getattr(_load_format_file(self.path), "step_summary", None)
        return summary(report, options=options) if summary is not None else None


def formats(extra: Iterable[Path] = ()) -> dict[str, Format]:
    """The formats by name (the stem of the file), without running any of their code.

    One in `extra` (files, or folders of them) takes the place of a built-in one of the same name.
    """
    paths = [*_python_files(builtin_dir("reports")), *(p for e in extra for p in _expand(e))]
    return {path.stem: Format(path.stem, path.resolve()) for path in paths}


def load_format(name: str, extra_paths: Iterable[Path] = ()) -> Format:
    """A format that loads. Raises UserError for an unknown name or a file that does not load."""
    known = formats(extra_paths)
    if name not in known:
        raise unknown("format", name, known)
    _load_format_file(known[name].path)
    return known[name]


def _load_format_file(path: Path) -> types.ModuleType:
    module = _load(path, "reports")
    for name, kind in (("NAME", "a str"), ("SUMMARY", "a str"), ("render", "a function")):
        value = getattr(module, name, None)
        if not (callable(value) if name == "render" else isinstance(value, str)):
            raise UserError(f"Format file {path} defines no {name}; expected {kind} of that name.")
    return module


# --- files ---------------------------------------------------------------------------------------


def _expand(path: Path) -> list[Path]:
    return _python_files(path) if path.is_dir() else [path]


def _python_files(folder: Path) -> list[Path]:
    """The plug-ins of a folder, by name. A leading underscore marks a helper that is none."""
    return sorted(p for p in folder.glob("*.py") if not p.name.startswith("_") and p.is_file())


def _load(path: Path, shelf: Shelf) -> types.ModuleType:
    """Run a plug-in file as a module, or return the one that was made of it before."""
    path = path.resolve()
    name = _module_name(path, shelf)
    if name in sys.modules:
        return sys.modules[name]
    kind = {"probes": "Probe", "reports": "Format", "fixes": "Fix"}[shelf]
    if not path.is_file():
        raise UserError(f"{kind} file {path} does not exist.")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{kind} file {path} is no Python file; expected a name that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        # A plug-in that calls sys.exit() must not end the scan; Ctrl-C must.
        if isinstance(error, (Exception, SystemExit)):
            raise UserError(
                f"{kind} file {path} does not load: {_sentence(error, path)}."
            ) from error
        raise
    return module


def _module_name(path: Path, shelf: Shelf) -> str:
    """Unique per file: built-in ones by their stem, the user's with a hash of their path."""
    if path.parent == builtin_dir(shelf):
        return f"{NAMESPACE}.{shelf}.{path.stem}"
    import hashlib

    stem = re.sub(r"\W", "_", path.stem)
    return f"{NAMESPACE}.{shelf}.user_{stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _sentence(error: BaseException, path: Path) -> str:
    """`ModuleNotFoundError: No module named 'x' (line 3)`, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(". :")
    lines = [number for file, number in _frames(error) if file == str(path)]
    return (
        f"{text} (line {lines[-1]})"
        if lines and "(line" not in text and ", line" not in text
        else text
    )


def _frames(error: BaseException) -> Iterator[tuple[str, int]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next
