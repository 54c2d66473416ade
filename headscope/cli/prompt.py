"""``headscope lens``, ``flow`` and ``patch``: what happens inside the model on a prompt."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope import flow, lens, metrics, probes
from headscope.ablation import patch_stream
from headscope.ablation.patching import STREAM_SITES
from headscope.base.files import FolderClaim, whole_file
from headscope.base.result import Drawn, Section
from headscope.cli.options import Loading
from headscope.cli.output import (
    ModelCommand,
    asked_of,
    json_rows,
    print_either,
    print_result,
    print_written,
    typed,
)
from headscope.errors import InputError, nearest
from headscope.lens.linear import ResidualLens
from headscope.lens.reading import read_prompt
from headscope.models.protocol import HeadModel
from headscope.plots.figure import visible
from headscope.probes.probe import Probe
from headscope.table import (
    Attribution,
    Contributions,
    EffectGrid,
    HeadTable,
    HeadWords,
    LensGrid,
    Routes,
    TokenFlow,
    versions,
)

if TYPE_CHECKING:
    from headscope.report.folder import RunFolder


@dataclass(frozen=True, eq=False)
class LensReading:
    """Everything that the command found."""

    grids: dict[str, LensGrid]
    split: Attribution
    words: HeadWords

    def sections(self) -> list[Section]:
        """Report layers' predictions, the logit's parts, and single heads' tokens."""
        (layers,) = next(iter(self.grids.values())).sections()
        drawn = [Drawn(f"lens_{site}", grid.name) for site, grid in self.grids.items()]
        return [
            Section(layers.title, [layers.blocks[0], *drawn]),
            *self.split.sections(),
            *self.words.sections(self.split.strongest()),
        ]


def split(names: Sequence[str]) -> tuple[str | None, str]:
    """Split ``[MODEL] PROMPT`` into model and prompt."""
    if len(names) > 2:
        raise InputError(
            f"give a model and one prompt, not {len(names)} words: put the prompt in quotes."
        )
    *model, prompt = names
    if not prompt.strip():
        raise InputError("the prompt is empty: give at least one word.")
    return (model[0] if model else None), prompt


def run_lens(
    loading: Loading,
    prompt: str,
    *,
    target: str | None,
    foil: str | None,
    position: int,
    k: int,
    learned: Path | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Load the model, decode its layers, then write and print the results."""
    fitted = None if learned is None else lens.load(learned)
    if fitted is not None and not isinstance(fitted, ResidualLens):
        raise InputError(f"{learned} reads heads, not layers: use it from Python.")
    command = ModelCommand.begin(
        "lens",
        loading,
        out,
        overwrite=overwrite,
        prompt=prompt,
        target=target,
        foil=foil,
        position=position,
        lens=None if learned is None else learned.resolve().name,
    )
    found = _read(command.model, prompt, target, foil, position, k, fitted)
    command.took("read")
    if command.folder is not None:
        settings = command.settings(
            prompt=prompt,
            target=found.split.target,
            foil=found.split.foil,
            position=found.split.position,
            lens=found.grids["residual"].name,
        )
        _write_reading(command.folder.ready(), found, settings, command.timings)
    print_either(lambda: _reading_as_json(found), lambda: _shown_reading(found), as_json=as_json)
    if command.folder is not None:
        files = ("lens.parquet", "attribution.parquet", "heads.parquet", "table.parquet")
        print_written(command.folder.path, *files, "pictures/")


def _read(
    model: HeadModel,
    prompt: str,
    target: str | None,
    foil: str | None,
    position: int,
    k: int,
    fitted: ResidualLens | None,
) -> LensReading:
    sources = "values" not in model.limits
    made = lens.attribute(model, prompt, target, foil, position=position, sources=sources)
    if fitted is None:
        grids = lens.logit_lenses(model, prompt, target=target, k=k)
    else:
        grids = {"residual": lens.logit_lens(model, prompt, target=target, k=k, lens=fitted)}
    return LensReading(grids, made, lens.head_lens(model, prompt, position, k=k))


def _reading_as_json(found: LensReading) -> dict[str, Any]:
    return {
        "lens": {site: json_rows(grid) for site, grid in found.grids.items()},
        "attribution": json_rows(found.split),
        "logit": found.split.whole,
        "moves": [list(one) for one in found.split.top_sources(20)],
        "heads": json_rows(found.words),
    }


def _shown_reading(found: LensReading) -> Iterator[Any]:
    """Format three small tables: layers at the position read, parts of the logit, heads."""
    from rich.table import Table
    from rich.text import Text

    grid, made = found.grids["residual"], found.split
    at = grid.positions.tolist().index(made.position)
    where = f"position {made.position}, {visible(made.tokens[-1])}"
    layers = Table(
        "read after", "most likely next tokens", "KL", title=Text(f"{grid.name}: {where}")
    )
    layers.add_column(Text(f"rank of {visible(grid.target_texts[at])}"), justify="right")
    for row in reversed(range(len(grid.rows))):
        likely = [
            f"{visible(str(text))} {probability:.2f}"
            for text, probability in zip(
                grid.texts[row, at], grid.probabilities[row, at], strict=True
            )
        ]
        place = str(int(grid.target_rank[row, at]) + 1)
        layers.add_row(grid.rows[row], Text("  ".join(likely)), f"{grid.kl[row, at]:.3g}", place)
    parts = Table("part", "logits", title=Text(f"logit of {made.name}: {made.whole:.4g}"))
    for part in made.top(12):
        parts.add_row(part.name, Text(f"{part.value:+.3g}"))
    heads = Table(
        "head", "logits", "promotes", "suppresses", title="what the strongest heads write"
    )
    values = {part.name: part.value for part in made}
    for head in made.strongest(6):
        sides = (found.words.promoted(head), found.words.suppressed(head))
        texts = [Text(" ".join(visible(text) for text, _ in side[:5])) for side in sides]
        heads.add_row(head, f"{values[head]:+.3g}", *texts)
    yield from (layers, parts, heads)
    for head, token, value in made.top_sources(5):
        moved = f"{head} moved {value:+.3g} from {token} {visible(made.tokens[token])}"
        yield Text(moved)


def _write_reading(
    folder: "RunFolder", found: LensReading, settings: dict[str, Any], timings: dict[str, float]
) -> None:
    import pandas

    grids = [grid.to_pandas().assign(lens=site) for site, grid in found.grids.items()]
    frames = {
        "lens": pandas.concat(grids),
        "attribution": found.split.to_pandas(),
        "heads": found.words.to_pandas(),
    }
    for name, frame in frames.items():
        with whole_file(folder.path / f"{name}.parquet") as file:
            frame.to_parquet(file, index=False)
    folder.write(
        HeadTable([found.split.head_scores()]),
        settings,
        timings,
        command=typed(),
        results={f"lens_{site}": grid for site, grid in found.grids.items()}
        | {"attribution": found.split},
        sections=found.sections(),
    )


@dataclass(frozen=True, eq=False)
class FoundFlow:
    """Everything that the command found."""

    routes: Routes
    flows: tuple[TokenFlow, ...]
    norms: Contributions

    @property
    def table(self) -> HeadTable:
        """Table of values per head."""
        return HeadTable([self.routes.head_scores(), self.norms.norm_share])


def run_flow(
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
    """Load the model, trace the routes, then write and print them."""
    asked: dict[str, Any] = {
        "prompt": prompt,
        "position": position,
        "part_threshold": part_threshold,
        "edge_threshold": edge_threshold,
    }
    command = ModelCommand.begin("flow", loading, out, overwrite=overwrite, **asked)
    model, folder = command.model, command.folder
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
        command.took("trace")
        _write_flow(folder.ready(), found, command.settings(**asked), command.timings)
    print_either(lambda: _flow_as_json(routes), lambda: _shown_flow(routes), as_json=as_json)
    if folder is not None:
        files = ("edges.parquet", "table.parquet", "routes.safetensors", "pictures/")
        print_written(folder.path, *files)


def _more(model: HeadModel, prompt: str, routes: Routes, memory: str | None) -> FoundFlow:
    """Flow matrices and norms of the same prompt."""
    probe = read_prompt(model, prompt).probe
    flows = (
        flow.rollout(model, probe, memory=memory),
        flow.alti(model, probe, memory=memory),
    )
    return FoundFlow(routes, flows, flow.norms(model, probe, memory=memory))


def _flow_as_json(routes: Routes) -> dict[str, Any]:
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
        "edges": json_rows(routes),
    }


def _shown_flow(routes: Routes) -> Iterator[Any]:
    """Format three small tables: heads, input tokens, edges between positions."""
    from rich.table import Table
    from rich.text import Text

    where = f"position {routes.position}, {visible(routes.tokens[-1])}"
    heads = Table("head", "flow", "on the route", title=Text(f"heads on the way to {where}"))
    for head, value in routes.top(8):
        heads.add_row(str(head), f"{value:.3f}", "yes" if routes.on_route[head] else "")
    order = sorted(range(len(routes.tokens)), key=lambda at: -routes.token_flow[at])
    tokens = Table("token", "flow", title="source tokens")
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
        f"{routes.bias.sum():.1%} ended in attention biases; {routes.mlp.sum(1).max():.1%} at most "
        "passed through the MLPs of one layer."
    )


def _write_flow(
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


_DIRECTIONS = ("noise", "denoise")


def run_patch(
    loading: Loading,
    *,
    site: str,
    task: str,
    pairs: Path | None,
    examples: int,
    seed: int,
    direction: str,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Load the model, patch, then write and print the effects."""
    if site not in STREAM_SITES:
        raise InputError(nearest(site, STREAM_SITES, kind="site of the residual stream"))
    if direction not in _DIRECTIONS:
        raise InputError(nearest(direction, _DIRECTIONS, kind="direction"))
    if overwrite and out is None:
        raise InputError("--overwrite needs --out: without it nothing is written.")
    claim = None if out is None else FolderClaim.create(out, "patch", overwrite=overwrite)
    started = time.perf_counter()
    model = loading.model()
    asked: dict[str, Any] = {"site": site, "direction": direction}
    asked |= {"task": task, "examples": examples, "seed": seed} if pairs is None else {}
    asked |= {} if pairs is None else {"pairs": pairs.name}
    if claim is not None:
        claim = claim.of(asked_of(model, loading, **asked))
    probe = _probe(model, task, pairs, examples, seed)
    grid = patch_stream(model, probe, metrics.logit_difference, site, direction=direction)
    if claim is not None:
        settings = {"command": "patch", "model": model.name, "revision": model.revision, **asked}
        _write_grid(claim.ready(), grid, settings, time.perf_counter() - started)
    print_result(grid, as_json=as_json)
    if claim is not None:
        files = ("effects.safetensors", "effects.parquet", "pictures/")
        print_written(claim.path, *files, page=False)


def _probe(model: HeadModel, task: str, pairs: Path | None, examples: int, seed: int) -> Probe:
    """Pairs of a known task, or from a file.

    Raises:
        InputError: if the file has no pairs with an answer and a foil.
    """
    if pairs is None:
        return probes.pairs(model, task, batch=examples, seed=seed)
    probe = probes.from_jsonl(model, pairs)
    if probe.corrupt is None or probe.foils is None:
        raise InputError(
            f"{pairs} has no pairs: give clean, corrupt, answer and foil on every line (see "
            "hs.probes.from_jsonl)."
        )
    return probe


def _write_grid(
    claim: FolderClaim, grid: EffectGrid, settings: dict[str, Any], seconds: float
) -> None:
    """Write the grid as numbers, as a table, and as pictures of raw and normalised effects."""
    from importlib.util import find_spec

    from headscope.base.files import subfolder, whole_file
    from headscope.plots import heatmap, save

    grid.save(claim.path / "effects.safetensors")
    with whole_file(claim.path / "effects.parquet") as file:
        grid.to_pandas().to_parquet(file, index=False)
    kind = "png" if find_spec("matplotlib") else "html"
    save(heatmap(grid), subfolder(claim.path, "pictures") / f"effects.{kind}")
    claim.write_facts(
        {
            "command": typed(),
            "settings": settings,
            "versions": versions(),
            "timings": {"seconds": seconds},
        }
    )
