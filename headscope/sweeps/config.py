"""A sweep written down: which models, probes, edits, heads and metrics, each with each.

Reading the file checks all that can be told of it without any model.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, GetJsonSchemaHandler, model_validator

from headscope import metrics
from headscope.base.arguments import checked
from headscope.base.configs import Strict, parse, read_yaml
from headscope.edges.attribute import STEPPED, Method
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
    """A config that may also be written as one word: its first key's value."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, given: Any) -> Any:
        return {next(iter(cls.model_fields)): given} if isinstance(given, str) else given

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Tell editors about the one word."""
        return {"anyOf": [{"type": "string"}, handler(core)]}


class ModelConfig(Short):
    """A model, or several states of it.

    Attributes:
        model: Hugging Face name, local folder or bundled model.
        revision: branch, tag or commit; of a bundled model a checkpoint.
        checkpoints: several revisions, earliest first; ``all`` those of a bundled model.
        dtype: of the weights; default: as stored.
        name: how results call it; default: the last part of ``model``.
    """

    model: str = Field(min_length=1)
    revision: str | None = None
    checkpoints: Literal["all"] | tuple[str, ...] | None = None
    dtype: str | None = None
    name: str | None = Field(default=None, pattern=_NAME)

    @property
    def label(self) -> str:
        """Its name; of a path or ``owner/name`` the last part."""
        return self.name or re.split(r"[\\/]", self.model.rstrip("\\/"))[-1]

    def revisions(self) -> tuple[str | None, ...]:
        """Every state of it that is to be run.

        Raises:
            InputError: if all are asked for of a model whose checkpoints cannot be listed.
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
    """A probe with a name of its own.

    Attributes:
        name: how results call it; default: its kind.
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
    """What is done to heads.

    Attributes:
        method: of :func:`headscope.ablate_heads` (``mean``, ``zero``, ``mean_pos``, ``resample``,
            ``patch``, ``uniform``, ``attend_to_first``), or ``scale``.
        positions: a mark of the probe; default: everywhere.
        reference: name of the probe that replacement values come from; default: the probe itself.
        factor: of ``scale``.
    """

    method: str
    positions: str | None = None
    reference: str | None = None
    factor: float | None = None

    @property
    def label(self) -> str:
        """How results call it: ``mean``, ``scale0.5``, ``zero@end``, ``mean~text``."""
        parts = [self.method, "" if self.factor is None else f"{self.factor:g}"]
        parts += [f"@{self.positions}" if self.positions else ""]
        return "".join([*parts, f"~{self.reference}" if self.reference else ""])


class EdgeConfig(Short):
    """Edges between heads, scored by one method, and circuits grown from the scores.

    Attributes:
        method: of :func:`headscope.edges.attribute`.
        steps: gradients of integrated methods.
        ablation: what an edge that is taken out carries; default: ``patch`` where the probe has
            pairs, else ``mean``.
        circuits: sizes, in edges, of circuits that are run and checked.
    """

    method: str
    steps: int = Field(default=5, ge=1)
    ablation: str | None = None
    circuits: tuple[Annotated[int, Field(ge=1)], ...] = ()

    @property
    def label(self) -> str:
        """How results call it: ``eap``, ``eap_ig``, ``eap_ig#10``, ``exact~zero``."""
        steps = f"#{self.steps}" if self.method in STEPPED and self.steps != 5 else ""
        return f"{self.method}{steps}" + (f"~{self.ablation}" if self.ablation else "")


class MetricConfig(Short):
    """What is measured.

    Attributes:
        metric: of :mod:`headscope.metrics`.
        at: mark of the probe where it is read; default: where the probe has targets.
    """

    metric: str
    at: str | None = None

    @property
    def label(self) -> str:
        """How results call it: ``loss``, ``answer_rank@end``."""
        return self.metric + (f"@{self.at}" if self.at else "")


class HeadSet(Strict):
    """Which heads, and how they are edited; every head of the model unless a key says less.

    Attributes:
        name: how results call it.
        heads: addresses such as ``L5H1``.
        layers: only these layers.
        score: rank heads by this scorer of the catalogue, measured on each model, or by
            ``attribution`` (size of the first-order estimate on the sweep's own probe and metric);
            or as :mod:`headscope.pruning` does: by ``gradient_importance`` (on these too),
            ``confidence`` or ``output_norm`` (on that probe) or ``weight_norm``.
        table: rank by ``score`` as saved in this file of a scan instead.
        order: of the ranking.
        top: how many heads of the ranking; default: all.
        random: draw this many heads; ``all``: put all in random order.
        draws: how often they are drawn.
        seed: of the draws.
        not_in: do not draw heads of the set with this name.
        arrange: ``each`` head by itself, all ``together``, or ``cumulative``: the first, the first
            two, ... in order, from none on.
        steps: of a cumulative curve, evenly spaced; default: one per head.
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
    """Every model with every probe, edit, metric and set of heads; and edges between heads.

    Attributes:
        name: of the sweep, and of its folder.
        models: what is run.
        probes: on what.
        edits: what is done to heads.
        edges: methods that score edges on every probe and metric; edits, edges, or both.
        metrics: what is measured.
        sets: which heads, and how.
        references: more probes, only for replacement values.
        seeds: of edits that draw (``resample``); the others run once.
        chunk: sets of heads measured and saved at a time.
        batch_size: examples per recorded pass.
        memory: what a stack of variants may take, e.g. ``2GB``.
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
    """Read a sweep's YAML file.

    Raises:
        InputError: naming the first thing that is wrong, and the nearest word that would be right.

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
    """Check what can be told without any model.

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
        _known(edge.method, get_args(Method), "method")
        if edge.ablation is not None:
            _known(edge.ablation, ABLATIONS, "ablation")
        _distinct(map(str, edge.circuits), "circuit")
    for one in config.sets:
        _check_set(one, [other.name for other in config.sets])


# What rows of edges and of circuits have in place of the name of a set of heads.
EDGES = "edges"


def circuit_set(size: int) -> str:
    """Name of the set that a circuit of so many edges stands in: ``circuit100``."""
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
            raise InputError(
                f"there are two {kind}s called {name!r}: each needs a name of its own."
            )
        seen.add(name)
