"""Whether an operator can be called here: the packages it needs, and stand-ins for what the device lacks."""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import Requirement

from attncheck import ownership, standins
from attncheck.errors import UserError
from attncheck.model import Reason
from attncheck.probing import Operator
from attncheck.runner import guard


class Availability:
    """Makes operators callable in this process, once each, and remembers what stands behind them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._refusals: dict[str, tuple[Reason, str] | None] = {}
        self._standins: dict[str, tuple[str, ...]] = {}

    def refusal(self, operator: Operator) -> tuple[Reason, str] | None:
        """Why the operator cannot be called here, or None; its stand-ins and guards are in place then."""
        if operator.name not in self._refusals:
            self._refusals[operator.name] = self._make_available(operator)
        return self._refusals[operator.name]

    def standins(self, operator_name: str) -> tuple[str, ...]:
        """The sentences that name the operator's stand-ins."""
        return self._standins.get(operator_name, ())

    def _make_available(self, operator: Operator) -> tuple[Reason, str] | None:
        if self.device not in operator.devices:
            because = f": {operator.devices_because}" if operator.devices_because else ""
            return Reason.DEVICE_MISSING, f"{operator.name} does not run on {self.device}{because}"
        for text in operator.packages:
            need = Requirement(text)
            try:
                version = importlib.metadata.version(need.name)
            except importlib.metadata.PackageNotFoundError:
                return Reason.PACKAGE_MISSING, _not_installed(need.name)
            if why := ownership.foreign(need.name):
                return Reason.PACKAGE_CLASH, why
            if not need.specifier.contains(version, prereleases=True):
                return Reason.VERSION_UNSUPPORTED, f"{need.name} {version} does not satisfy {text}"
        sentences = []
        try:
            if self.device == "cpu":
                sentences = [standins.provide(name) for name in operator.standins]
            if operator.missing is not None and (why := operator.missing()):
                return Reason.OP_MISSING, why
            for target in operator.bypasses:
                guard.protect(target)
        except UserError as error:
            return Reason.VERSION_UNSUPPORTED, str(error)
        except ModuleNotFoundError as error:
            if error.name in {target.partition(":")[0] for target in operator.bypasses}:
                # What is no dispatcher op is compiled: the packages are here, built without it.
                return Reason.EXTENSION_NOT_LOADABLE, f"{' and '.join(operator.packages)}: {error}"
            return Reason.PACKAGE_MISSING, str(error)
        except (ImportError, OSError) as error:
            return Reason.EXTENSION_NOT_LOADABLE, f"{type(error).__name__}: {error}"
        self._standins[operator.name] = tuple(sentences)
        return None


def _not_installed(distribution: str) -> str:
    module = distribution.replace("-", "_")
    owner = ownership.owner_of_module(module)
    told = f"; the `{module}` that is here belongs to {owner}" if owner else ""
    return f"{distribution} is not installed{told}"
