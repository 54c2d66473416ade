"""Find and check a circuit for indirect objects in a real language model, and write its page.

    python -m tools.circuit_study MODEL build/circuit-study

goes on where it stopped: every step is kept in the folder. Some fifteen minutes on one core for
SmolLM2-135M. Writes docs/circuit_study.md with its pictures. ``--page`` writes the page of what is
finished.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import headscope as hs
from headscope.base.statistics import rank_correlation
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.probes import Probe

ROOT = Path(__file__).parents[1]
PAGE, PICTURES = ROOT / "docs" / "circuit_study.md", ROOT / "docs" / "circuit_study"
METRIC = hs.metrics.logit_difference
PROMPTS, FEW, FEWER = 100, 16, 4
EDGES, SAMPLE = 300, 60
SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0)
METHODS = ("eap", "eap_ig", "relp")
Result = TypeVar("Result")


@dataclass
class Folder:
    """Results of finished steps, and what each took."""

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what is there."""
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "seconds.json").exists():
            self.seconds = json.loads((self.path / "seconds.json").read_text())

    def result(self, name: str, kind: Any, find: Callable[[], Any]) -> Any:
        """A result that is kept, or that is found now and kept."""
        suffix = "parquet" if kind in (hs.HeadScores, hs.edges.EdgeGraph) else "safetensors"
        file = self.path / f"{name}.{suffix}"
        if file.exists():
            return self._read(file, kind)
        found = self._timed(name, find)
        if kind is hs.HeadScores:
            hs.HeadTable([found]).save(file)
        else:
            found.save(file)
        return found

    def facts(self, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The same of JSON values."""
        file = self.path / f"{name}.json"
        if not file.exists():
            found = self._timed(name, find)
            file.write_text(json.dumps(found, indent=1))
        read: dict[str, Any] = json.loads(file.read_text())
        return read

    @staticmethod
    def _read(file: Path, kind: Any) -> Any:
        if kind is hs.HeadScores:
            table = hs.HeadTable.load(file)
            return table[next(iter(table))]
        return kind.load(file)

    def _timed(self, name: str, find: Callable[[], Result]) -> Result:
        started = time.process_time()
        found = find()
        self.seconds[name] = time.process_time() - started
        (self.path / "seconds.json").write_text(json.dumps(self.seconds, indent=1))
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)
        return found


@dataclass(frozen=True, eq=False)
class Found:
    """All that the study found."""

    about: dict[str, Any]
    ablated: hs.HeadScores
    direct: hs.HeadScores
    to_movers: hs.HeadScores
    to_middle: hs.HeadScores
    graphs: dict[str, hs.edges.EdgeGraph]
    exact: hs.edges.EdgeGraph
    methods: hs.edges.MethodComparison
    circuit: hs.edges.Circuit
    curve: hs.edges.Faithfulness
    gaps: hs.edges.Completeness | None
    needed: dict[str, float]
    looks: dict[str, dict[str, float]]
    seconds: dict[str, float]


def strongest(scores: hs.HeadScores, count: int, sign: int = 0) -> list[HeadIndex]:
    """Heads of the largest effects, of one sign if asked for."""
    values = np.nan_to_num(scores.mean)
    values = np.abs(values) if sign == 0 else sign * values
    order = np.argsort(-values, axis=None, kind="stable")[:count]
    return [HeadIndex(*divmod(int(at), values.shape[1])) for at in order]


def study(source: str, out: Path) -> Found:
    """Run every step that is not finished."""
    model, folder = hs.load(source), Folder(out)
    probe = hs.probes.pairs(model, "ioi", batch=PROMPTS, seed=0)
    few, fewer = probe.examples(slice(0, FEW)), probe.examples(slice(0, FEWER))
    keep = folder.result
    about = folder.facts("about", lambda: facts_of(model, probe))
    ablated = keep("ablated", hs.HeadScores, lambda: hs.ablate_heads(model, few, METRIC))
    direct = keep("direct", hs.HeadScores, lambda: hs.path_patch(model, few, METRIC))
    movers = strongest(direct, 3, -1)
    to_movers = keep(
        "to_movers", hs.HeadScores, lambda: hs.path_patch(model, few, METRIC, movers, "query")
    )
    middle = strongest(to_movers, 3, -1)
    to_middle = keep(
        "to_middle", hs.HeadScores, lambda: hs.path_patch(model, few, METRIC, middle, "value")
    )
    graph_of = {
        name: lambda name=name: hs.edges.attribute(
            model, probe if name == "eap_ig" else few, METRIC, name, batch_size=FEW
        )
        for name in METHODS
    }
    graphs = {name: keep(name, hs.edges.EdgeGraph, find) for name, find in graph_of.items()}
    graph = graphs["eap_ig"]
    circuit = keep(
        "circuit",
        hs.edges.Circuit,
        lambda: hs.edges.circuit(model, few, METRIC, graph, EDGES),
    )
    looks = folder.facts("looks", lambda: looks_of(model, probe))
    curve = keep(
        "curve",
        hs.edges.Faithfulness,
        lambda: hs.edges.faithfulness(model, fewer, METRIC, graph, SIZES, controls=2),
    )
    drawn = np.random.default_rng(0).choice(len(graph.edges), SAMPLE, replace=False).tolist()
    exact = keep("exact", hs.edges.EdgeGraph, lambda: exact_of(model, fewer, graph, drawn))
    mine = [some_examples(one, FEWER) for one in graphs.values()]
    methods = keep(
        "methods",
        hs.edges.MethodComparison,
        lambda: hs.edges.compare_methods(model, fewer, METRIC, mine, exact=exact),
    )
    needed = folder.facts("needed", lambda: named(model, fewer, circuit))
    gaps = keep(
        "gaps",
        hs.edges.Completeness,
        lambda: hs.edges.completeness(model, fewer, METRIC, circuit, draws=5),
    )
    return Found(
        about, ablated, direct, to_movers, to_middle, graphs, exact, methods, circuit, curve, gaps,
        needed, looks, folder.seconds,
    )  # fmt: skip


def facts_of(model: HeadModel, probe: Probe) -> dict[str, Any]:
    """The probe in numbers, and the texts of one pair."""
    assert model.tokenizer is not None  # noqa: S101  # the probe needs it
    assert probe.corrupt is not None  # noqa: S101  # of pairs
    clean, corrupt = (
        model.tokenizer.decode(one.tokens[0].tolist()) for one in (probe, probe.corrupt)
    )
    settings = {name: probe.settings[name] for name in ("templates", "accuracy")}
    heads = {"layers": model.shape.n_layers, "heads": model.shape.n_heads}
    return {**settings, **heads, "length": probe.length, "clean": clean, "corrupt": corrupt}


def named(model: HeadModel, probe: Probe, circuit: hs.edges.Circuit) -> dict[str, float]:
    """How much each head of the circuit can matter."""
    found = hs.edges.minimality(model, probe, METRIC, circuit, draws=0)
    return {str(head): value for head, value in found.items()}


def exact_of(
    model: HeadModel, probe: Probe, graph: hs.edges.EdgeGraph, drawn: list[int]
) -> hs.edges.EdgeGraph:
    """Exact scores of edges that were drawn at random, and of the strongest."""
    places = sorted({*drawn, *graph.rank()[:SAMPLE].tolist()})
    some = [graph.edges[at] for at in places]
    return hs.edges.attribute(model, probe, METRIC, "exact", edges=some)


def some_examples(graph: hs.edges.EdgeGraph, count: int) -> hs.edges.EdgeGraph:
    """The same scores of the first examples alone."""
    clusters = None if graph.clusters is None else graph.clusters[:count]
    return replace(graph, per_example=graph.per_example[:, :count], clusters=clusters)


_PLACES = {
    "end to io": ("end", "io"),
    "end to s1": ("end", "s1"),
    "end to s2": ("end", "s2"),
    "s2 to s1": ("s2", "s1"),
    "s2 to after s1": ("s2", "s1_next"),
    "after s1 to s1": ("s1_next", "s1"),
}


def looks_of(model: HeadModel, probe: Probe) -> dict[str, dict[str, float]]:
    """Mean attention of every head between marked positions."""
    at = {name: mark.long().argmax(1) for name, mark in probe.marks.items()}
    rows = np.arange(len(probe))
    found: dict[str, dict[str, float]] = {}
    layers = list(range(model.shape.n_layers))
    seen = hs.capture.collect(model, probe, layers=layers)
    for layer in layers:
        pattern = seen[layer].pattern
        for head in range(model.shape.n_heads):
            found[str(HeadIndex(layer, head))] = {
                name: float(pattern[rows, head, at[query], at[key]].mean())
                for name, (query, key) in _PLACES.items()
            }
    return found


def role_of(found: Found, head: HeadIndex) -> str:
    """Role of a head by where it looks and by what it does, in the words of Wang et al. 2022."""
    looks, at = found.looks[str(head)], (head.layer, head.head)
    direct = float(found.direct.mean[at])
    if abs(direct) > _DIRECT and max(looks["end to io"], looks["end to s1"]) > _LOOKS:
        return "name mover" if direct < 0 else "negative name mover"
    if direct < -_DIRECT and looks["end to s2"] > _LOOKS:
        return "giver suppression"
    if found.to_movers.mean[at] < -_PASSED and looks["end to s2"] > _LOOKS:
        return "S-inhibition"
    if looks["s2 to s1"] > _LOOKS:
        return "duplicate token"
    if looks["s2 to after s1"] > _LOOKS:
        return "induction"
    if looks["after s1 to s1"] > _LOOKS:
        return "previous token"
    return "none of these"


_DIRECT, _PASSED, _LOOKS = 0.3, 0.1, 0.25
_SHOWN = 8


def page(found: Found) -> str:
    """The page of the documentation."""
    circuit, checks, curve = found.circuit, found.circuit.checks, found.curve
    assert checks is not None  # noqa: S101  # hs.edges.circuit makes them
    effect = abs(circuit.full - circuit.empty)
    minutes = sum(found.seconds.values()) / 60
    lines = [
        "# A circuit in a real language model",
        "",
        "<!-- Written by `python -m tools.circuit_study`. -->",
        "",
        "This page runs the indirect-object study of Wang et al. 2022 (arXiv 2211.00593) from "
        "start "
        "to finish on SmolLM2-135M-Instruct (30 layers, 9 query heads and 3 key/value heads each, "
        "4-bit weights). [Notebook 06](generated/gallery/index.md) does the same on the bundled "
        f"model. The study took {minutes:.0f} minutes on one core. "
        "`python -m tools.circuit_study MODEL FOLDER` reruns it, and resumes after an "
        "interruption.",
        "",
        *_verdict(found),
        "## The task",
        "",
        f"`{found.about['clean']}` against `{found.about['corrupt']}`: the two texts differ only "
        "in "
        "the second mention of the giver. The probe uses names that are one token in this "
        "tokenizer, "
        f"and the {found.about['templates']} templates that are {found.about['length']} tokens "
        "long. "
        f"The model prefers the right name in {100 * found.about['accuracy']:.0f}% of {PROMPTS} "
        f"prompts, by {circuit.full:.2f} logits on the {FEW} prompts used for heads and circuits. "
        f"With every edge patched from the other text, the difference is {circuit.empty:.2f}.",
        "",
        "## Heads",
        "",
        "*Ablated*: change of the logit difference when the head is mean-ablated. *Direct*: path "
        "patching of the head's output along the direct path to the logits. *Via movers*: path "
        "patching into the queries of the three strongest name movers. The last four columns are "
        f"attention, averaged over {PROMPTS} prompts: from the last token (END) or the second "
        "mention "
        "of the giver (S2) to the answer (IO) or the mentions of the giver (S1, S2).",
        "",
        "| head | role | ablated | direct | via movers | END to IO | END to S2 | S2 to S1 | S2 to "
        "S1 + 1 |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        *[_head_row(found, head) for head in shown_heads(found)],
        "",
        f"Roles are assigned by rule: a direct effect above {_DIRECT} logits (or above {_PASSED} "
        "via "
        f"the movers), and attention above {_LOOKS} where the role requires it.",
        "",
        "![Direct effect of every head on the logit difference.](circuit_study/direct.png)",
        "",
        "## Edges, by three methods",
        "",
        f"The model has {len(circuit.wiring):,} edges. Exact patching needs one pass per edge, so "
        "we "
        f"patched {found.methods.compared} edges ({SAMPLE} drawn at random and the {SAMPLE} "
        "strongest "
        "by `eap_ig`) and every head. The table gives rank correlations of magnitudes with exact "
        f"patching on the same {FEWER} prompts. Parentheses are 95% intervals over prompts.",
        "",
        "| method | patched edges | random ones | strongest ones | heads | gradients |",
        "|---|---|--:|--:|---|--:|",
        *_method_rows(found),
        "",
        "The strongest edges by each method:",
        "",
        *[
            f"- `{name}`: " + ", ".join(f"{edge} ({score:+.2f})" for edge, score in graph.top(6))
            for name, graph in found.graphs.items()
        ],
        "",
        "## The circuit",
        "",
        f"The circuit consists of the {len(circuit.edges)} connected edges with the largest "
        "`eap_ig` "
        f"scores over {PROMPTS} prompts. These are {100 * circuit.kept.mean():.2g}% of all edges, "
        "and "
        f"involve {len(circuit.heads)} of "
        f"{found.about['layers'] * found.about['heads']} heads.",
        "",
        "![The circuit: layers upwards, heads to the right.](circuit_study/circuit.png)",
        "",
        "| | |",
        "|---|---|",
        f"| faithfulness | {circuit.faithfulness:.3f} |",
        *[f"| {name} | {said} |" for name, said in checks.rows()],
        *_complete(found, effect),
        "",
        f"Faithfulness by circuit size, on {FEWER} prompts, with {len(curve.random)} draws of "
        "random "
        "edges for comparison:",
        "",
        "![Faithfulness of circuits by size.](circuit_study/curve.png)",
        "",
        f"The area over log size is {curve.log_area:.2f} ({curve.random_log_area:.2f} for random "
        "edges). CPR and CMD are not given: they weight circuits by nominal size, so half of their "
        "weight is on circuits with 50% to 100% of all edges, which this study does not run. "
        "`hs.edges.faithfulness` computes them at MIB's ten sizes.",
        "",
        *_doubts(found),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _verdict(found: Found) -> list[str]:
    """What the study found; written after the run, with its numbers."""
    circuit, at = found.circuit, {
        name: found.direct.mean[hs.HeadIndex.parse(name)] for name in ("L23H3", "L24H4")
    }  # fmt: skip
    value = float(found.to_middle.mean[hs.HeadIndex.parse("L17H4")])
    return [
        "**Result.** SmolLM2 has the components that the paper found in GPT-2 small, but its "
        "strongest head is not one of them. At the second mention of the giver, the induction head "
        "`L17H4` attends to the token after the first mention. Its output reaches the values of "
        f"`L20H0`, `L19H2` and `L21H8` ({value:+.2f} logits along that path). `L20H0` and `L19H2` "
        "attend from the last token to the second mention and, through their queries, tell the "
        "heads "
        "of layer 23 which name to avoid (S-inhibition). Four of those heads (`L23H0`, `L23H1`, "
        "`L23H2`, `L23H7`) attend to the other name and write it (name movers). The largest direct "
        f"effect is that of `L23H3` ({at['L23H3']:+.2f} logits when its output is patched from the "
        "other text): it attends to the giver and suppresses that name. `L24H4` attends to the "
        "answer "
        f"and suppresses it ({at['L24H4']:+.2f}), like the paper's negative name movers.",
        "",
        f"A circuit of {len(circuit.edges)} edges, {100 * circuit.kept.mean():.2g}% of all, "
        f"reproduces {100 * circuit.faithfulness:.0f}% of the model's behaviour. With random heads "
        "of "
        f"the same layers it reproduces {100 * _matched(found):.0f}%.",
        "",
    ]


def _matched(found: Found) -> float:
    checks = found.circuit.checks
    assert checks is not None  # noqa: S101  # hs.edges.circuit makes them
    return float(checks.matched.mean())


def _doubts(found: Found) -> list[str]:
    """What the numbers do not say."""
    return [
        "## Limitations",
        "",
        f"- The {PROMPTS} prompts come from {found.about['templates']} templates with the names in "
        "two orders, and prompts that share both form one cluster. That is too few clusters to "
        "call "
        "the circuit stable, however much the circuits of resampled prompts overlap.",
        "- `patch` swaps the second mention of the giver. Information that both texts share, such "
        "as "
        "positions or the fact that there are two names, is not changed and does not appear in any "
        "edge.",
        f"- Exact patching uses {FEWER} prompts, and heads and the circuit {FEW}. With so few "
        "prompts "
        "and templates the intervals are unreliable. The roles in the table are rules with "
        "thresholds, not tests.",
        "- Among randomly drawn edges, almost all effects are close to zero, so rank correlations "
        "over them say little. Use the column of the strongest edges to choose a method.",
        "- The weights are quantised to four bits. The rounding is part of the model studied here.",
        "",
    ]


def shown_heads(found: Found) -> list[HeadIndex]:
    """Heads with the largest effects by any of the four measures, by layer."""
    chosen: set[HeadIndex] = set()
    for scores in (found.ablated, found.direct, found.to_movers, found.to_middle):
        chosen |= set(strongest(scores, _SHOWN))
    return sorted(chosen)


def _head_row(found: Found, head: HeadIndex) -> str:
    at, looks = (head.layer, head.head), found.looks[str(head)]
    effects = [
        f"{value:+.2f}" if np.isfinite(value) else ""
        for value in (float(one.mean[at]) for one in (found.ablated, found.direct, found.to_movers))
    ]
    names = ("end to io", "end to s2", "s2 to s1", "s2 to after s1")
    cells = [str(head), role_of(found, head), *effects, *(f"{looks[name]:.2f}" for name in names)]
    return "| " + " | ".join(cells) + " |"


def _method_rows(found: Found) -> list[str]:
    of, graph = found.methods, found.graphs["eap_ig"]
    known = np.flatnonzero(~np.isnan(found.exact.mean))
    strong = np.isin(known, graph.rank()[:SAMPLE])
    rows = []
    for name in METHODS:
        at = of.methods.index(name)
        mine = some_examples(found.graphs[name], FEWER).mean[known]
        exact = found.exact.mean[known]
        parts = [
            rank_correlation(np.abs(mine[some]), np.abs(exact[some])) for some in (~strong, strong)
        ]
        cells = [
            _ranged(of.edges[at], of.edges_low[at], of.edges_high[at]),
            *(f"{part:.2f}" for part in parts),
            _ranged(of.heads[at], of.heads_low[at], of.heads_high[at]),
            str(of.gradients[at]),
        ]
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return rows


def _ranged(value: float, low: float, high: float) -> str:
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _complete(found: Found, effect: float) -> list[str]:
    """Rows of completeness and minimality, of what is finished."""
    rows = []
    if found.gaps is not None:
        gaps = found.gaps.gap
        worst = " ".join(map(str, found.gaps.subsets[int(gaps[: len(found.needed)].argmax())]))
        rows.append(
            f"| completeness | difference from the full model when both lose the same heads: mean "
            f"{gaps.mean():.2f} logits, largest {gaps.max():.2f}, for a total effect of "
            f"{effect:.2f}; of "
            f"single heads, largest for {worst} |"
        )
    if found.needed:
        least = sum(value < 0.01 * effect for value in found.needed.values())
        most = sorted(found.needed.items(), key=lambda item: -item[1])[:6]
        said = ", ".join(f"{name} {value:.2f}" for name, value in most)
        rows.append(
            "| minimality | effect of removing one head from the circuit, in logits, largest "
            "first: "
            f"{said}; {least} of {len(found.needed)} heads change it by less than 1% of the total |"
        )
    missing = {"completeness": found.gaps is None, "minimality": not found.needed}
    if any(missing.values()):
        names = ", ".join(name for name, one in missing.items() if one)
        rows.append(f"| {names} | not finished when this page was written |")
    return rows


def draw(found: Found) -> None:
    """Write the pictures of the page."""
    PICTURES.mkdir(exist_ok=True)
    drawn = {
        "direct": hs.plots.heatmap(found.direct.renamed("direct effect")),
        "circuit": hs.plots.circuit_graph(found.circuit, most=120),
        "curve": hs.plots.faithfulness_curves(found.curve),
    }
    for name, figure in drawn.items():
        hs.plots.save(figure, PICTURES / f"{name}.png", scale=1)


def finished(out: Path) -> Found:
    """Results of a folder; completeness and minimality may be missing."""
    folder = Folder(out)

    def missing() -> Any:
        raise SystemExit("run the study first: a step before completeness is not finished.")

    keep = {
        name: folder.result(name, kind, missing)
        for name, kind in {
            **dict.fromkeys(("ablated", "direct", "to_movers", "to_middle"), hs.HeadScores),
            "exact": hs.edges.EdgeGraph,
            "methods": hs.edges.MethodComparison,
            "circuit": hs.edges.Circuit,
            "curve": hs.edges.Faithfulness,
        }.items()
    }
    graphs = {name: folder.result(name, hs.edges.EdgeGraph, missing) for name in METHODS}
    gaps = out / "gaps.safetensors"
    return Found(
        about=folder.facts("about", missing),
        graphs=graphs,
        gaps=hs.edges.Completeness.load(gaps) if gaps.exists() else None,
        needed=folder.facts("needed", missing) if (out / "needed.json").exists() else {},
        looks=folder.facts("looks", missing),
        seconds=folder.seconds,
        **keep,
    )


def write(found: Found) -> None:
    """Write the page and its pictures."""
    draw(found)
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] != "--page":
        study(sys.argv[1], Path(sys.argv[2]))
    write(finished(Path(sys.argv[2])))
