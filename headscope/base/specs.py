"""Declarations of scores and metrics, and provenance of results."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from headscope.base.files import Stored
from headscope.base.statistics import Alternative, Bounds
from headscope.errors import InputError, nearest

_PACKAGES = ("headscope", "torch", "transformers", "transformer-lens", "numpy")
_ABSOLUTE = re.compile(r"^(?:~|/|\\\\|[A-Za-z]:[\\/])")


Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class ScoreSpec(Stored):
    """Declaration of a score or a metric, shared by scorers, metrics and results.

    Attributes:
        name: column name in a table.
        unit: unit of the values, e.g. ``attention`` (probability), ``nats``, ``logits``,
            ``tokens``.
        bounds: smallest and largest possible value; None if there is none.
        direction: which values mean more of what the name says (a score) or a better model (a
            metric): ``higher`` or ``lower``; None if that is not known.
        source: paper and definition.
        threshold: mean from which a significant head has the role of this name; None: no role.
        alternative: what a score is tested against: ``greater`` than its control, or
            ``two-sided``; None: by the bounds, see :attr:`tested`.
        description: what a high value means, in one sentence.

    Example:
        >>> hs.ScoreSpec("margin", unit="logits").tested
        'two-sided'
    """

    name: str
    unit: str = ""
    bounds: Bounds = (None, None)
    direction: Direction | None = None
    source: str = ""
    threshold: float | None = None
    alternative: Alternative | None = None
    description: str = ""

    @property
    def signed(self) -> bool:
        """Whether 0 lies inside the bounds, so that the sign has a meaning."""
        low, high = self.bounds
        return (low is None or low < 0) and (high is None or high > 0)

    @property
    def in_patches(self) -> "ScoreSpec":
        """The declaration for images, with patches in place of tokens."""
        return replace(self, unit="patches") if self.unit == "tokens" else self

    @property
    def tested(self) -> Alternative:
        """Alternative of the p-value: ``alternative``, else ``two-sided`` if the sign matters."""
        return self.alternative or ("two-sided" if self.signed else "greater")

    def to_json(self) -> dict[str, Any]:
        """Return the declaration as a JSON object; what is tested is written out."""
        return {**asdict(self), "bounds": list(self.bounds), "alternative": self.tested}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "ScoreSpec":
        """Rebuild from the output of :meth:`to_json`; other entries are ignored.

        Raises:
            KeyError: if a fact is missing; ``direction`` may be.
        """
        low, high = facts["bounds"]
        rest = ("name", "unit", "source", "threshold", "alternative", "description")
        return cls(
            bounds=(low, high),
            direction=facts.get("direction"),
            **{name: facts[name] for name in rest},
        )


def specified(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of a saved result that holds a :class:`ScoreSpec`, from a file of any age.

    Older files keep what the ``spec`` declares (name, unit, bounds, description, source) as
    parts of their own.
    """
    if "spec" in parts:
        return dict(parts)
    said = {one.name: parts[one.name] for one in fields(ScoreSpec) if one.name in parts}
    if "bounds" in said:
        said["bounds"] = tuple(said["bounds"])
    rest = {name: part for name, part in parts.items() if name not in said}
    return {"spec": ScoreSpec(**said), **rest}


def effect_spec(name: str, metric: "Specified", how: str) -> ScoreSpec:
    """Declaration of the effect of an intervention on a metric, in the metric's unit.

    Args:
        name: name of the intervention.
        metric: what is measured.
        how: what is compared, e.g. ``with the patch minus that without.``
    """
    return ScoreSpec(name, unit=metric.unit, description=f"{metric.name} {how}")


class Specified:
    """Base of objects with a :class:`ScoreSpec`, whose fields become properties."""

    if TYPE_CHECKING:  # a field of the class that holds it

        @property
        def spec(self) -> ScoreSpec:
            """The declaration."""
            ...

    @property
    def name(self) -> str:
        """Name of the score or metric."""
        return self.spec.name

    @property
    def unit(self) -> str:
        """Unit of the values, e.g. ``attention``, ``nats``."""
        return self.spec.unit

    @property
    def bounds(self) -> Bounds:
        """Smallest and largest possible value; None if unbounded."""
        return self.spec.bounds

    @property
    def direction(self) -> Direction | None:
        """Which values mean more of what the name says, or a better model; None: not known."""
        return self.spec.direction

    @property
    def source(self) -> str:
        """Paper and definition."""
        return self.spec.source

    @property
    def threshold(self) -> float | None:
        """Mean from which a significant head has the role of this name; None: no role."""
        return self.spec.threshold

    @property
    def alternative(self) -> Alternative:
        """What a p-value tests: ``greater`` than the control, or ``two-sided``."""
        return self.spec.tested

    @property
    def signed(self) -> bool:
        """Whether 0 lies inside the bounds, so that the sign has a meaning."""
        return self.spec.signed

    @property
    def description(self) -> str:
        """What a high value means, in one sentence."""
        return self.spec.description


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Installed versions, read from package metadata without importing anything."""
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
    """Facts that determine a score. JSON values only; empty means unknown.

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
        control: what the null was: ``flat``, ``unrepeated``; None if there was none.
        seed: seed of the probe; None if it has no random part.
        versions: versions of the packages that computed it.
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
        object.__setattr__(self, "model", portable(self.model))
        object.__setattr__(self, "probe", portable(dict(self.probe)))
        object.__setattr__(self, "versions", dict(self.versions))
        object.__setattr__(self, "checks", dict(self.checks))

    def to_json(self) -> dict[str, Any]:
        """Return the facts as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Provenance":
        """Rebuild from the output of :meth:`to_json`.

        Raises:
            InputError: if a fact has an unknown name.
        """
        known = [one.name for one in fields(cls)]
        for name in facts:
            if name not in known:
                raise InputError(nearest(str(name), known, kind="provenance field"))
        return cls(**facts)


def portable(value: Any) -> Any:
    """Cut absolute paths to their last part, at any depth, so that no local folder is revealed."""
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    if isinstance(value, Mapping):
        return {key: portable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [portable(one) for one in value]
    return value
