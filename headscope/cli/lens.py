"""``headscope lens``: what each layer says of a prompt, and what makes the next token's logit."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope import lens
from headscope.base.files import whole_file
from headscope.base.sections import Drawn, Section
from headscope.cli.options import Loading
from headscope.cli.output import asked_of, print_either, print_written, rows_of, run_folder, typed
from headscope.errors import InputError
from headscope.lens.linear import ResidualLens
from headscope.models.protocol import HeadModel
from headscope.plots.style import visible
from headscope.table import Attribution, HeadTable, HeadWords, LensGrid

if TYPE_CHECKING:
    from headscope.report.folder import RunFolder


@dataclass(frozen=True, eq=False)
class LensReading:
    """All that the command found."""

    grids: dict[str, LensGrid]
    split: Attribution
    words: HeadWords

    def sections(self) -> list[Section]:
        """What each layer says, what makes the logit, what single heads say."""
        (layers,) = next(iter(self.grids.values())).sections()
        drawn = [Drawn(f"lens_{site}", grid.name) for site, grid in self.grids.items()]
        return [
            Section(layers.title, [layers.blocks[0], *drawn]),
            *self.split.sections(),
            *self.words.sections(self.split.strongest()),
        ]


def split(names: Sequence[str]) -> tuple[str | None, str]:
    """``[MODEL] PROMPT`` as model and prompt."""
    if len(names) > 2:
        raise InputError(
            f"give a model and one prompt, not {len(names)} words: put the prompt in quotes."
        )
    *model, prompt = names
    if not prompt.strip():
        raise InputError("the prompt is empty: give at least one word.")
    return (model[0] if model else None), prompt


def run(
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
    """Load, read, write, print."""
    fitted = None if learned is None else lens.load(learned)
    if fitted is not None and not isinstance(fitted, ResidualLens):
        raise InputError(f"{learned} reads heads, not layers: use it from Python.")
    folder = run_folder(out, "lens", overwrite=overwrite)
    started = time.perf_counter()
    model = loading.model()
    loaded = time.perf_counter()
    if folder is not None:
        asked = asked_of(
            model,
            loading,
            prompt=prompt,
            target=target,
            foil=foil,
            position=position,
            lens=None if learned is None else learned.resolve().name,
        )
        folder = folder.of(asked)
    found = _read(model, prompt, target, foil, position, k, fitted)
    timings = {"load_seconds": loaded - started, "read_seconds": time.perf_counter() - loaded}
    if folder is None:
        print_either(lambda: _as_json(found), lambda: _shown(found), as_json=as_json)
        return
    folder = folder.ready()
    settings = {
        "command": "lens",
        "model": model.name,
        "revision": model.revision,
        "prompt": prompt,
        "target": found.split.target,
        "foil": found.split.foil,
        "position": found.split.position,
        "lens": found.grids["residual"].name,
    }
    _write(folder, found, settings, timings)
    print_either(lambda: _as_json(found), lambda: _shown(found), as_json=as_json)
    files = ("lens.parquet", "attribution.parquet", "heads.parquet", "table.parquet", "pictures/")
    print_written(folder.path, *files)


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


def _as_json(found: LensReading) -> dict[str, Any]:
    return {
        "lens": {site: rows_of(grid) for site, grid in found.grids.items()},
        "attribution": rows_of(found.split),
        "logit": found.split.whole,
        "moves": [list(one) for one in found.split.top_sources(20)],
        "heads": rows_of(found.words),
    }


def _shown(found: LensReading) -> Iterator[Any]:
    """Three small tables: layers at the position read, parts of the logit, heads."""
    from rich.table import Table
    from rich.text import Text

    grid, made = found.grids["residual"], found.split
    at = grid.positions.tolist().index(made.position)
    where = f"position {made.position}, {visible(made.tokens[-1])}"
    layers = Table(
        "read after", "most likely next tokens", "KL", title=Text(f"{grid.name}: {where}")
    )
    layers.add_column(Text(f"place of {visible(grid.target_texts[at])}"), justify="right")
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
    heads = Table("head", "logits", "promotes", "suppresses", title="what the strongest heads say")
    values = {part.name: part.value for part in made}
    for head in made.strongest(6):
        sides = (found.words.promoted(head), found.words.suppressed(head))
        texts = [Text(" ".join(visible(text) for text, _ in side[:5])) for side in sides]
        heads.add_row(head, f"{values[head]:+.3g}", *texts)
    yield from (layers, parts, heads)
    for head, token, value in made.top_sources(5):
        moved = f"{head} moved {value:+.3g} from {token} {visible(made.tokens[token])}"
        yield Text(moved)


def _write(
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
