"""``headscope influence``: documents ranked by how much retrieval heads help to read them."""

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.base.folders import Claim
from headscope.cli.options import Loading
from headscope.cli.output import asked_of, plain_rows, portable, print_either, print_written, typed
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.probes import needle
from headscope.retrieval import Corpus, score_corpus
from headscope.scoring import score
from headscope.table import HeadTable, versions

if TYPE_CHECKING:
    from rich.table import Table

_DENOMINATORS = ("base", "masked")
_SHOWN = 36  # characters of a document
# Share of all heads that the source masks.
_SHARE = 0.05


def run(
    loading: Loading,
    corpus: Path,
    *,
    heads: str | None,
    out: Path | None,
    overwrite: bool,
    field: str,
    max_tokens: int | None,
    batch_size: int | None,
    denominator: str,
    as_json: bool,
) -> None:
    """Load, find heads, score, write, print."""
    if denominator not in _DENOMINATORS:
        raise InputError(nearest(denominator, _DENOMINATORS, kind="denominator"))
    given = Corpus(corpus, field)
    given.check()
    known = None if heads is None else _named(heads)
    claim = Claim.create(
        out or Path("runs") / f"influence-{corpus.stem}", "influence", overwrite=overwrite
    )
    started = time.perf_counter()
    model = loading.model()
    chosen = _by_needles(model) if known is None else known
    claim = claim.of(
        asked_of(
            model,
            loading,
            corpus=corpus.name,
            field=field,
            heads=[str(head) for head in chosen],
            max_tokens=max_tokens,
            denominator=denominator,
        )
    )
    if overwrite:
        claim = claim.ready()
    folder = claim.path
    frame = score_corpus(
        model,
        given,
        chosen,
        folder,
        denominator="base" if denominator == "base" else "masked",
        max_tokens=max_tokens,
        batch_size=batch_size,
    )
    facts = {
        "command": typed(),
        "settings": {
            "command": "influence",
            "model": model.name,
            "revision": model.revision,
            "weight_digest": model.digest(),
            "corpus": corpus.name,
            "documents": len(frame),
            "heads": [str(head) for head in chosen],
            "heads_from": "needles" if heads is None else portable(heads),
            "denominator": denominator,
            "max_tokens": max_tokens,
        },
        "versions": versions(),
        "timings": {"seconds": time.perf_counter() - started},
    }
    claim.write_facts(facts)
    print_either(
        lambda: plain_rows(frame), lambda: [_shown(frame, given, chosen, model)], as_json=as_json
    )
    print_written(folder, "ranked.parquet", "ranked.jsonl (best first)", page=False)


def _named(heads: str) -> list[HeadIndex]:
    """Heads in words, or the retrieval heads of a finished run."""
    place = Path(heads)
    if place.is_dir() or place.suffix == ".parquet":
        table = HeadTable.load(place / "table.parquet" if place.is_dir() else place)
        name = next((one for one in ("retrieval_set", "retrieval") if one in table), None)
        if name is None:
            raise InputError(f"{heads} has no retrieval score: give a run of headscope retrieval.")
        scores = table[name]
        limit = scores.threshold or 0.0
        found = [head for head, value in scores.top(scores.mean.size) if value > limit]
        if not found:
            raise InputError(f"{heads} has no head above {limit:g}: name heads with --heads.")
        return found
    return [HeadIndex.parse(one.strip()) for one in heads.split(",") if one.strip()]


def _by_needles(model: HeadModel) -> list[HeadIndex]:
    """The source's share of all heads, those that copy most when needles are answered."""
    scores = score(model, needle(model, depths=4), "retrieval")["retrieval"]
    count = math.ceil(_SHARE * len(model.shape.heads))
    found = [head for head, value in scores.top(count) if value > (scores.threshold or 0.0)]
    if not found:
        raise InputError(
            f"no head of {model.name} copies needles (all scores are at most "
            f"{scores.threshold}): name heads with --heads."
        )
    return found


def _shown(frame: object, corpus: Corpus, heads: list[HeadIndex], model: HeadModel) -> "Table":
    """Best and worst documents, in a line each."""
    import pandas
    from rich.table import Table
    from rich.text import Text

    assert isinstance(frame, pandas.DataFrame)  # noqa: S101  # pandas is loaded late
    ranked = frame[frame["rank"].notna()]
    shown = pandas.concat([ranked.head(5), ranked.tail(5)]).drop_duplicates("line")
    named = ", ".join(map(str, heads[:8])) + (" ..." if len(heads) > 8 else "")
    table = Table("rank", title=Text(f"loss of {model.name} without {named}"))
    for name in ("influence", "loss", "masked", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("line", justify="right", no_wrap=True)
    table.add_column("text", no_wrap=True)
    with corpus.path.open("rb") as file:
        for row in shown.itertuples():
            file.seek(int(row.offset))
            text = json.loads(file.readline())[corpus.field]
            numbers = (f"{row.influence:.3f}", f"{row.base:.3f}", f"{row.masked:.3f}")
            cells = (str(row.rank), *numbers, str(row.tokens), str(row.line))
            table.add_row(*cells, Text(" ".join(text.split())[:_SHOWN]))
    return table
