"""``headscope edges``: edge scores, a circuit of the best edges, and its checks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from headscope import edges, metrics, probes
from headscope.base.files import subfolder
from headscope.cli.options import Loading
from headscope.cli.output import ModelCommand, json_rows, print_either, print_written, typed
from headscope.edges.attribute import EdgeMethod
from headscope.errors import InputError, nearest
from headscope.metrics import Metric
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.table import Circuit, EdgeGraph, Faithfulness, HeadTable

if TYPE_CHECKING:
    from headscope.report.folder import RunFolder

_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        metrics.logit_difference,
        metrics.answer_log_prob,
        metrics.answer_probability,
        metrics.loss,
        metrics.kl_divergence,
    )
}


@dataclass(frozen=True)
class EdgeRequest:
    """Arguments of the command.

    Attributes:
        probe: task of pairs, or a JSONL file of pairs.
        examples: number of pairs of a task.
        count: number of edges in the circuit; None: one in fifty, at least ten.
    """

    probe: str
    method: str
    metric: str
    ablation: str | None
    steps: int
    count: int | None
    examples: int
    seed: int
    batch_size: int | None

    def check(self) -> None:
        """Validate what can be validated before a model is loaded.

        Raises:
            InputError: if a method or metric is unknown, or a number is out of range.
        """
        if self.method not in get_args(EdgeMethod):
            raise InputError(nearest(self.method, get_args(EdgeMethod), kind="method"))
        if self.metric not in _METRICS:
            raise InputError(nearest(self.metric, _METRICS, kind="metric"))
        if self.count is not None and self.count < 1:
            raise InputError(f"--count {self.count}: give 1 or more.")

    def settings(self) -> dict[str, Any]:
        """Settings as JSON values, for the run's facts; a file is given by its name."""
        name = Path(self.probe).name if _is_file(self.probe) else self.probe
        return {**vars(self), "probe": name}


@dataclass(frozen=True, eq=False)
class FoundEdges:
    """Everything that the command found."""

    graph: EdgeGraph
    circuit: Circuit
    curve: Faithfulness

    @property
    def table(self) -> HeadTable:
        """Table of values per head."""
        return HeadTable([self.graph.heads])


def run(
    loading: Loading, asked: EdgeRequest, *, out: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Load the model, score edges, find the circuit, then write and print the results."""
    asked.check()
    command = ModelCommand.begin("edges", loading, out, overwrite=overwrite, **asked.settings())
    model, folder = command.model, command.folder
    probe = _probe(model, asked)
    found = _found(model, probe, asked, folder)
    if folder is not None:
        command.took("edge")
        _write(folder.ready(), found, command.settings(**asked.settings()), command.timings)
    print_either(lambda: _as_json(found), lambda: _shown(found), as_json=as_json)
    if folder is not None:
        files = ("edges.parquet", "circuit.safetensors", "faithfulness.safetensors")
        print_written(folder.path, *files, "table.parquet", "pictures/")


def _is_file(probe: str) -> bool:
    return Path(probe).suffix in (".jsonl", ".json") or Path(probe).is_file()


def _probe(model: HeadModel, asked: EdgeRequest) -> Probe:
    """Pairs of a known task, or from a file."""
    if _is_file(asked.probe):
        return probes.from_jsonl(model, asked.probe)
    return probes.pairs(model, asked.probe, batch=asked.examples, seed=asked.seed)


def _found(
    model: HeadModel, probe: Probe, asked: EdgeRequest, folder: "RunFolder | None"
) -> FoundEdges:
    metric = _METRICS[asked.metric]
    kept = None if folder is None else subfolder(folder.path, "scored")
    graph = edges.attribute(
        model, probe, metric, asked.method, asked.steps,
        ablation=asked.ablation, batch_size=asked.batch_size, resume=kept,
    )  # fmt: skip
    total = len(graph.wiring)
    count = asked.count or min(total, max(10, total // 50))
    circuit = edges.circuit(
        model, probe, metric, graph, count, seed=asked.seed, batch_size=asked.batch_size
    )
    curve = edges.faithfulness(
        model, probe, metric, graph, seed=asked.seed, batch_size=asked.batch_size
    )
    return FoundEdges(graph, circuit, curve)


def _as_json(found: FoundEdges) -> dict[str, Any]:
    graph, circuit = found.graph, found.circuit
    assert circuit.checks is not None  # noqa: S101  # edges.circuit makes them
    return {
        "method": graph.method,
        "ablation": graph.ablation,
        "unit": graph.unit,
        "edges": json_rows(graph),
        "heads": [
            {"head": str(head), "score": value}
            for head, value in graph.heads.top(graph.heads.mean.size)
        ],
        "circuit": {
            "edges": [str(edge) for edge in circuit.edges],
            "heads": [str(head) for head in circuit.heads],
            "faithfulness": _number(circuit.faithfulness),
            "verdict": circuit.checks.verdict,
            "checks": dict(circuit.checks.rows()),
        },
        "faithfulness": json_rows(found.curve),
        "areas": {
            name: _number(getattr(found.curve, name))
            for name in ("cpr", "cpr_capped", "cmd", "log_area", "random_cpr", "random_cmd")
        },
    }


def _number(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def _shown(found: FoundEdges) -> Iterator[Any]:
    """Format four small tables: edges, heads, the circuit with its checks, faithfulness by size."""
    from rich.table import Table
    from rich.text import Text

    graph, circuit, curve = found.graph, found.circuit, found.curve
    unit = graph.unit or "metric"
    strongest = Table(
        "edge", f"change ({unit})", "standard error", title=f"edges by {graph.method}"
    )
    for at in graph.rank()[:12].tolist():
        strongest.add_row(str(graph.edges[at]), f"{graph.mean[at]:.4g}", f"{graph.sem[at]:.2g}")
    heads = Table("head", f"sum of edges out ({unit})", title="heads")
    for at in sorted(graph.heads.top(graph.heads.mean.size), key=lambda one: -abs(one[1]))[:8]:
        heads.add_row(str(at[0]), f"{at[1]:.4g}")
    facts = Table("of the circuit", "", title="circuit")
    facts.add_row("edges", f"{len(circuit.edges):,} of {len(graph.wiring):,}")
    facts.add_row("heads", Text(" ".join(map(str, circuit.heads)) or "none"))
    facts.add_row("faithfulness", f"{circuit.faithfulness:.3f}")
    assert circuit.checks is not None  # noqa: S101  # edges.circuit makes them
    for name, said in circuit.checks.rows():
        facts.add_row(name, Text(said))
    sizes = Table("edges kept", "faithfulness", "random edges", title="faithfulness by size")
    for row in curve.to_pandas().itertuples():
        sizes.add_row(
            f"{row.edges:,} ({100 * row.size:g}%)", f"{row.faithfulness:.3f}", f"{row.random:.3f}"
        )
    yield from (strongest, heads, facts, sizes)
    yield (
        f"CPR {curve.cpr:.3f} (random {curve.random_cpr:.3f}), CMD {curve.cmd:.3f} "
        f"(random {curve.random_cmd:.3f}), area over log size {curve.log_area:.3f}."
    )


def _write(
    folder: "RunFolder", found: FoundEdges, settings: dict[str, Any], timings: dict[str, float]
) -> None:
    found.graph.save(folder.path / "edges.parquet")
    found.circuit.save(folder.path / "circuit.safetensors")
    found.curve.save(folder.path / "faithfulness.safetensors")
    folder.write(
        found.table,
        settings,
        timings,
        command=typed(),
        results={"edges": found.graph, "circuit": found.circuit, "faithfulness": found.curve},
    )
