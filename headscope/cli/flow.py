"""``headscope flow``: who gives what to one position of a prompt, through which heads."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope import flow
from headscope.base.files import whole_file
from headscope.cli.options import Loading
from headscope.cli.output import asked_of, print_either, print_written, rows_of, run_folder, typed
from headscope.lens.prompt import read_prompt
from headscope.models.protocol import HeadModel
from headscope.plots.style import visible
from headscope.table import Contributions, HeadTable, Routes, TokenFlow

if TYPE_CHECKING:
    from headscope.report.folder import RunFolder


@dataclass(frozen=True, eq=False)
class FoundFlow:
    """All that the command found."""

    routes: Routes
    flows: tuple[TokenFlow, ...]
    norms: Contributions

    @property
    def table(self) -> HeadTable:
        """Numbers per head."""
        return HeadTable([self.routes.head_scores(), self.norms.norm_share])


def run(
    loading: Loading,
    prompt: str,
    *,
    position: int,
    part_threshold: float,
    edge_threshold: float,
    memory: str | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Load, trace, write, print."""
    folder = run_folder(out, "flow", overwrite=overwrite)
    started = time.perf_counter()
    model = loading.model()
    loaded = time.perf_counter()
    asked: dict[str, Any] = {
        "prompt": prompt,
        "position": position,
        "part_threshold": part_threshold,
        "edge_threshold": edge_threshold,
    }
    if folder is not None:
        folder = folder.of(asked_of(model, loading, **asked))
    routes = flow.routes(
        model,
        prompt,
        part_threshold=part_threshold,
        edge_threshold=edge_threshold,
        position=position,
        memory=memory,
    )
    if folder is not None:
        found = _more(model, prompt, routes, memory)
        timings = {"load_seconds": loaded - started, "trace_seconds": time.perf_counter() - loaded}
        settings = {"command": "flow", "model": model.name, "revision": model.revision, **asked}
        _write(folder.ready(), found, settings, timings)
    print_either(lambda: _as_json(routes), lambda: _shown(routes), as_json=as_json)
    if folder is not None:
        files = ("edges.parquet", "table.parquet", "routes.safetensors", "pictures/")
        print_written(folder.path, *files)


def _more(model: HeadModel, prompt: str, routes: Routes, memory: str | None) -> FoundFlow:
    """Matrices and norms of the same prompt."""
    probe = read_prompt(model, prompt).probe
    flows = (
        flow.rollout(model, probe, memory=memory),
        flow.alti(model, probe, memory=memory),
    )
    return FoundFlow(routes, flows, flow.norms(model, probe, memory=memory))


def _as_json(routes: Routes) -> dict[str, Any]:
    return {
        "position": routes.position,
        "tokens": list(routes.tokens),
        "token_flow": routes.token_flow.tolist(),
        "heads": [
            {"head": str(head), "flow": value, "on_route": bool(routes.on_route[head])}
            for head, value in routes.top(routes.head_flow.size)
        ],
        "mlp_flow": routes.mlp.sum(1).tolist(),
        "bias_flow": routes.bias.sum(1).tolist(),
        "edges": rows_of(routes),
    }


def _shown(routes: Routes) -> Iterator[Any]:
    """Three small tables: heads, input tokens, edges between positions."""
    from rich.table import Table
    from rich.text import Text

    where = f"position {routes.position}, {visible(routes.tokens[-1])}"
    heads = Table("head", "flow", "on the route", title=Text(f"heads on the way to {where}"))
    for head, value in routes.top(8):
        heads.add_row(str(head), f"{value:.3f}", "yes" if routes.on_route[head] else "")
    order = sorted(range(len(routes.tokens)), key=lambda at: -routes.token_flow[at])
    tokens = Table("token", "flow", title="what it goes back to")
    for at in order[:8]:
        tokens.add_row(Text(f"{at} {visible(routes.tokens[at])}"), f"{routes.token_flow[at]:.3f}")
    moves = Table("layer", "from", "to", "share", "flow", "heads", title="strongest moves")
    between = [edge for edge in routes.edges if edge.kind == "attention"]
    for edge in sorted(between, key=lambda edge: -edge.importance)[:10]:
        ends = [Text(f"{node.pos} {visible(routes.tokens[node.pos])}")
                for node in (edge.source, edge.target)]  # fmt: skip
        strongest = sorted(edge.heads.items(), key=lambda item: -item[1])[:3]
        shares = "  ".join(f"{head} {share:.2f}" for head, share in strongest)
        moves.add_row(
            str(edge.target.layer), *ends, f"{edge.weight:.3f}", f"{edge.importance:.3f}", shares
        )
    yield from (heads, tokens, moves)
    yield (
        f"{routes.bias.sum():.1%} ended in biases of attention; {routes.mlp.sum(1).max():.1%} at "
        "most passed through the MLPs of a layer."
    )


def _write(
    folder: "RunFolder", found: FoundFlow, settings: dict[str, Any], timings: dict[str, float]
) -> None:
    with whole_file(folder.path / "edges.parquet") as file:
        found.routes.to_pandas().to_parquet(file, index=False)
    found.routes.save(folder.path / "routes.safetensors")
    folder.write(
        found.table,
        settings,
        timings,
        command=typed(),
        results={
            "routes": found.routes,
            "flow_by_head": found.routes.head_scores(),
            **{flow.name: flow for flow in found.flows},
            "mixing": found.norms,
            "norm_share": found.norms.norm_share,
        },
    )
