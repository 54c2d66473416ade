"""Sweep configs: models, probes, edits, heads and metrics, crossed with each other.

Reading the file checks everything that can be checked without a model.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, GetJsonSchemaHandler, model_validator

from headscope import metrics
from headscope.base.arguments import checked
from headscope.base.configs import Strict, parse, read_yaml
from headscope.edges.attribute import STEPPED, EdgeMethod
from headscope.edges.written import ABLATIONS
from headscope.errors import InputError, nearest
from headscope.interventions import NAMED
from headscope.models import bundled
from headscope.probes.config import ProbeConfig
from headscope.scorers import CATALOGUE

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
METRICS = {
    name: value for name, value in vars(metrics).items() if isinstance(value, metrics.Metric)
}
EDITS = (*NAMED, "scale")
# Rankings beside the scorers -> what of the sweep they are measured on; none: the weights alone.
OWN_SCORES: Mapping[str, tuple[str, ...]] = {
    "attribution": ("probe", "metric"),
    "gradient_importance": ("probe", "metric"),
    "confidence": ("probe",),
    "output_norm": ("probe",),
    "weight_norm": (),
}


Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Short(Strict):
    """Config that may be abbreviated to one word: the value of its first key."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, given: Any) -> Any:
        return {next(iter(cls.model_fields)): given} if isinstance(given, str) else given

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Describe the abbreviation in the JSON schema, for editors."""
        return {"anyOf": [{"type": "string"}, handler(core)]}


class ModelConfig(Short):
    """A model, or several checkpoints of it.

    Attributes:
        model: Hugging Face name, local folder or bundled model.
        revision: branch, tag or commit; for a bundled model a checkpoint.
        checkpoints: several revisions, earliest first; ``all``: those of a bundled model.
        dtype: dtype of the weights; default: as stored.
        name: name in results; default: the last part of ``model``.
    """

    model: str = Field(min_length=1)
    revision: str | None = None
    checkpoints: Literal["all"] | tuple[str, ...] | None = None
    dtype: str | None = None
    name: str | None = Field(default=None, pattern=_NAME)

    @property
    def label(self) -> str:
        """Name in results; for a path or ``owner/name`` the last part."""
        return self.name or re.split(r"[\\/]", self.model.rstrip("\\/"))[-1]

    def revisions(self) -> tuple[str | None, ...]:
        """All revisions to run.

        Raises:
            InputError: if all checkpoints are requested of a model that cannot list them.
        """
        if self.checkpoints is None:
            return (self.revision,)
        if self.checkpoints != "all":
            return self.checkpoints
        if self.model not in bundled.names() or not bundled.checkpoints(self.model):
            raise InputError(
                f"{self.model!r} does not come with checkpoints: name its revisions instead of "
                "'all'."
            )
        return bundled.checkpoints(self.model)


class NamedProbe(ProbeConfig):
    """A probe config with a name.

    Attributes:
        name: name in results; default: its kind.
    """

    name: str | None = Field(default=None, pattern=_NAME)

    @property
    def label(self) -> str:
        """Its name, or its kind."""
        return self.name or self.kind

    @property
    def plain(self) -> ProbeConfig:
        """The probe without its name."""
        return ProbeConfig.model_validate(self.model_dump(exclude={"name"}))


class EditConfig(Short):
    """Edit of heads.

    Attributes:
        method: method of :func:`headscope.ablate_heads` (``mean``, ``zero``, ``mean_pos``,
            ``resample``, ``patch``, ``uniform``, ``attend_to_first``), or ``scale``.
        positions: a mark of the probe; default: everywhere.
        reference: name of the probe that replacement values come from; default: the probe itself.
        factor: factor of ``scale``.
    """

    method: str
    positions: str | None = None
    reference: str | None = None
    factor: float | None = None

    @property
    def label(self) -> str:
        """Name in results: ``mean``, ``scale0.5``, ``zero@end``, ``mean~text``."""
        parts = [self.method, "" if self.factor is None else f"{self.factor:g}"]
        parts += [f"@{self.positions}" if self.positions else ""]
        return "".join([*parts, f"~{self.reference}" if self.reference else ""])


class EdgeConfig(Short):
    """Edge scores by one method, and circuits grown from them.

    Attributes:
        method: method of :func:`headscope.edges.attribute`.
        steps: steps of integrated gradients.
        ablation: what a removed edge carries; default: ``patch`` if the probe has pairs, else
            ``mean``.
        circuits: sizes, in edges, of circuits to run and check.
    """

    method: str
    steps: int = Field(default=5, ge=1)
    ablation: str | None = None
    circuits: tuple[Annotated[int, Field(ge=1)], ...] = ()

    @property
    def label(self) -> str:
        """Name in results: ``eap``, ``eap_ig``, ``eap_ig#10``, ``exact~zero``."""
        steps = f"#{self.steps}" if self.method in STEPPED and self.steps != 5 else ""
        return f"{self.method}{steps}" + (f"~{self.ablation}" if self.ablation else "")


class MetricConfig(Short):
    """Metric, and where it is read.

    Attributes:
        metric: metric from :mod:`headscope.metrics`.
        at: mark of the probe at which it is read; default: positions with targets.
    """

    metric: str
    at: str | None = None

    @property
    def label(self) -> str:
        """Name in results: ``loss``, ``answer_rank@end``."""
        return self.metric + (f"@{self.at}" if self.at else "")


class HeadSet(Strict):
    """Selection of heads, and how they are combined; default: every head on its own.

    Attributes:
        name: name in results.
        heads: addresses such as ``L5H1``.
        layers: only these layers.
        score: rank heads by this scorer of the catalogue, measured on each model, or by
            ``attribution`` (size of the first-order estimate on the sweep's own probe and metric);
            or as :mod:`headscope.pruning` does: by ``gradient_importance`` (on these too),
            ``confidence`` or ``output_norm`` (on that probe) or ``weight_norm``.
        table: rank by ``score`` as saved in this file of a scan instead.
        order: order of the ranking.
        top: number of heads from the ranking; default: all.
        random: draw this many heads; ``all``: put all in random order.
        draws: number of draws.
        seed: seed of the draws.
        not_in: exclude heads of the set with this name from the draw.
        arrange: ``each`` head alone, all ``together``, or ``cumulative``: none, the first, the
            first two, ... in order.
        steps: number of evenly spaced points of a cumulative curve; default: one per head.
    """

    name: str = Field(pattern=_NAME)
    heads: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    score: str | None = None
    table: Path | None = None
    order: Literal["largest", "smallest"] = "largest"
    top: int | None = Field(default=None, ge=1)
    random: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    draws: int = Field(default=1, ge=1, le=10_000)
    seed: Seed = 0
    not_in: str | None = None
    arrange: Literal["each", "together", "cumulative"] = "each"
    steps: int | None = Field(default=None, ge=1)


class SweepConfig(Strict):
    """Sweep over models, probes, edits, metrics and sets of heads; and over edges.

    Attributes:
        name: name of the sweep and of its folder.
        models: models to run.
        probes: probes to run them on.
        edits: edits of heads.
        edges: methods that score edges on every probe and metric; edits, edges, or both.
        metrics: metrics to measure.
        sets: sets of heads, and how they are combined.
        references: additional probes, only for replacement values.
        seeds: seeds of edits with random draws (``resample``); other edits run once.
        chunk: number of sets measured and saved at a time.
        batch_size: examples per recorded pass.
        memory: limit for a stack of variants, e.g. ``2GB``.
        device: default: a GPU if there is one.
    """

    name: str = Field(pattern=_NAME)
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    probes: tuple[NamedProbe, ...] = Field(min_length=1)
    edits: tuple[EditConfig, ...] = ()
    edges: tuple[EdgeConfig, ...] = ()
    metrics: tuple[MetricConfig, ...] = Field(min_length=1)
    sets: tuple[HeadSet, ...] = Field(default=(HeadSet(name="all"),), min_length=1)
    references: tuple[NamedProbe, ...] = ()
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    chunk: int = Field(default=64, ge=1, le=100_000)
    batch_size: int | None = Field(default=None, ge=1)
    memory: str | int | None = None
    device: str | None = None


# Keys that say how a sweep is run, not what comes out; they may change from run to run.
RUNTIME_KEYS = frozenset({"batch_size", "memory", "device"})


@checked
def read_config(path: str | Path) -> SweepConfig:
    """Read a sweep config from YAML.

    Args:
        path: path of the YAML file.

    Returns:
        The validated config.

    Raises:
        InputError: with the first error, and the closest valid word.

    Example:
        >>> hs.sweeps.read_config("configs/sweeps/ioi-all-heads.yaml").name
        'ioi-all-heads'
    """
    written = read_yaml(path)
    config = parse(SweepConfig, written, str(path))
    try:
        check_config(config)
    except InputError as error:
        word = re.search(r"'([^']*)'", str(error))
        line = word and written.line_of(word[1])
        raise InputError(f"{path}{f', line {line}' if line else ''}: {error}") from error
    return config


@checked
def schema() -> dict[str, Any]:
    """JSON schema of the YAML file, for editors.

    Example:
        >>> sorted(hs.sweeps.schema()["required"])
        ['metrics', 'models', 'name', 'probes']
    """
    return SweepConfig.model_json_schema()


def check_config(config: SweepConfig) -> None:
    """Check everything that can be checked without a model.

    Raises:
        InputError: if a word is unknown, a name is used twice, or keys exclude each other.
    """
    probes = [probe.label for probe in (*config.probes, *config.references)]
    _distinct(probes, "probe")
    if not (config.edits or config.edges):
        raise InputError("the sweep does nothing: give it 'edits' of heads, 'edges', or both.")
    methods = [one.label for one in config.edges]
    _distinct([*(one.label for one in config.edits), *methods], "edit")
    _distinct([one.label for one in config.metrics], "metric")
    own = [one.name for one in config.sets] if config.edits else []
    sizes = sorted({size for one in config.edges for size in one.circuits})
    _distinct([*own, *([EDGES] if config.edges else []), *map(circuit_set, sizes)], "set")
    _distinct(map(str, config.seeds), "seed")
    for model in config.models:
        if model.revision is not None and model.checkpoints is not None:
            raise InputError(f"{model.label} has a revision and checkpoints: give one of them.")
        if model.checkpoints == ():
            raise InputError(f"{model.label} has an empty list of checkpoints.")
    states = [(model.label, one) for model in config.models for one in model.revisions()]
    _distinct((f"{label}@{one}" if one else label for label, one in states), "model")
    for edit in config.edits:
        _known(edit.method, EDITS, "edit")
        if edit.reference is not None:
            _known(edit.reference, probes, "probe")
        if (edit.method == "scale") != (edit.factor is not None):
            raise InputError("the edit 'scale', and no other, takes a factor.")
        if edit.method == "scale" and edit.reference is not None:
            raise InputError("the edit 'scale' replaces nothing, so it takes no reference.")
    for metric in config.metrics:
        _known(metric.metric, METRICS, "metric")
    for edge in config.edges:
        _known(edge.method, get_args(EdgeMethod), "method")
        if edge.ablation is not None:
            _known(edge.ablation, ABLATIONS, "ablation")
        _distinct(map(str, edge.circuits), "circuit")
    for one in config.sets:
        _check_set(one, [other.name for other in config.sets])


# What rows of edges and of circuits have in place of the name of a set of heads.
EDGES = "edges"


def circuit_set(size: int) -> str:
    """Name of the set of a circuit with so many edges: ``circuit100``."""
    return f"circuit{size}"


def _check_set(one: HeadSet, names: list[str]) -> None:
    if one.random is not None and one.score is not None:
        raise InputError(f"the set {one.name!r} is either ranked by a score or random, not both.")
    if one.score is None and (one.top is not None or one.table is not None):
        raise InputError(f"the set {one.name!r} has 'top' or 'table': say by which 'score'.")
    if one.random is None and (one.draws > 1 or one.not_in is not None):
        raise InputError(f"the set {one.name!r} draws heads: say how many with 'random'.")
    if one.steps is not None and one.arrange != "cumulative":
        raise InputError(f"the set {one.name!r} has 'steps', which are of cumulative curves only.")
    if one.score is not None and one.table is None:
        _known(one.score, [*CATALOGUE, *OWN_SCORES], "score")
    if one.not_in is not None:
        _known(one.not_in, [name for name in names if name != one.name], "set")


def _known(word: str, options: Iterable[str], kind: str) -> None:
    known = list(options)
    if word not in known:
        raise InputError(nearest(word, known, kind=kind))


def _distinct(names: Iterable[str], kind: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"there are two {kind}s called {name!r}: each needs a unique name.")
        seen.add(name)
