"""``headscope head``: all there is to know of one head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headscope.base.files import check_page, whole_page, writable_folder
from headscope.cli.options import Loading
from headscope.cli.output import asked_of, check_overwrite, console, print_either
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.interactive import Explanation, explain
from headscope.table import HeadScores


def split(names: Sequence[str]) -> tuple[str | None, str]:
    """``[MODEL] HEAD`` as model and head; the head is checked before anything is loaded."""
    if len(names) > 2:
        raise InputError(f"give a model and one head, not {len(names)} names.")
    *model, head = names
    return (model[0] if model else None), str(HeadIndex.parse(head))


def run(
    loading: Loading,
    address: str,
    *,
    out: Path | None,
    overwrite: bool,
    text: str | None,
    weights_only: bool,
    ranks: bool | None,
    seed: int,
    as_json: bool,
) -> None:
    """Load, look at one head, write, print."""
    if weights_only and text is not None:
        raise InputError("--text needs a run of the model, which --weights-only forbids.")
    if text is not None and not text.strip():
        raise InputError("--text is empty: give a sentence.")
    check_overwrite(out, overwrite=overwrite)
    file = None if out is None else writable_folder(out) / f"{address}.html"
    model = loading.model()
    what = {"text": text, "weights_only": weights_only, "seed": seed}
    asked = asked_of(model, loading, head=address, ranks=ranks, **what)
    if file is not None:
        check_page(file, asked, overwrite=overwrite)
    found = explain(address, model, text=text, weights_only=weights_only, ranks=ranks, seed=seed)
    if file is not None:
        whole_page(file, found.page(), asked)
    print_either(lambda: _as_json(found), lambda: [found], as_json=as_json)
    if file is not None:
        console(stderr=True).print(f"Written to {file} (open it in a browser).", soft_wrap=True)


def _as_json(found: Explanation) -> dict[str, Any]:
    card, head = found.card, found.head

    def plain(value: float) -> float | None:
        return value if value == value else None

    def values(scores: Sequence[HeadScores]) -> dict[str, Any]:
        return {
            one.name: {"mean": plain(one[head]), "sem": plain(float(one.sem[head]))}
            for one in scores
        }

    facts = card.to_json()
    facts["scores"] = {name: plain(value) for name, value in card.scores.items()}
    probes = {} if found.scan is None else values(list(found.scan.values()))
    return facts | {"probes": probes, "effects": values(found.effects)}
