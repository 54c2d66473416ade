"""Where a score came from: enough to compute it again, and nothing about who did or where."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from headscope.base.saved import Stored
from headscope.errors import InputError, nearest

_PACKAGES = ("headscope", "torch", "transformers", "transformer-lens", "numpy")
_ABSOLUTE = re.compile(r"^(?:~|/|\\\\|[A-Za-z]:[\\/])")


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Installed versions, read from package metadata: nothing is imported."""
    found = {package: _version(package) for package in packages}
    return {package: one for package, one in found.items() if one is not None}


@cache  # metadata are files of some size, and every chunk of a sweep says its versions
def _version(package: str) -> str | None:
    """Version of one package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Provenance(Stored):
    """Facts that decide what a score is. JSON values only; empty means unknown.

    Absolute paths are cut to their last part when they enter: a result that is passed on should
    not tell where its author's home is. The digests, not the paths, say what was read.

    Attributes:
        model: name or folder name.
        revision: commit of the model's repository.
        weight_digest: SHA-256 over the weights.
        path: how the model was run, ``hf`` or ``bridge``.
        dtype: type of the weights, e.g. ``float32``.
        device: kind of device, e.g. ``cpu``.
        probe: kind of probe and the settings that made it.
        control: what the null was: ``flat``, ``unrepeated``; None where there was none.
        seed: of the probe; None where nothing was drawn.
        versions: of the packages that computed it.
        attention: how the rows were computed.
        checks: what was measured to prove that an intervention did what it says.
    """

    model: str = ""
    revision: str | None = None
    weight_digest: str = ""
    path: str = ""
    dtype: str = ""
    device: str = ""
    probe: Mapping[str, Any] = field(default_factory=dict)
    control: str | None = None
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    attention: str = "streamed rows, fp32"
    checks: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Cut absolute paths."""
        object.__setattr__(self, "model", _portable(self.model))
        object.__setattr__(self, "probe", _portable(dict(self.probe)))
        object.__setattr__(self, "versions", dict(self.versions))
        object.__setattr__(self, "checks", dict(self.checks))

    def to_json(self) -> dict[str, Any]:
        """Return the facts as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Provenance":
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: if a fact has an unknown name.
        """
        known = [one.name for one in fields(cls)]
        for name in facts:
            if name not in known:
                raise InputError(nearest(str(name), known, kind="provenance field"))
        return cls(**facts)


def _portable(value: object) -> object:
    """The value with absolute paths cut to their last part, at any depth."""
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    if isinstance(value, Mapping):
        return {key: _portable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(one) for one in value]
    return value
