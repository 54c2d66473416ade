"""``headscope head``: all there is to know of one head."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from headscope.ablation import ablate_heads
from headscope.capture import collect
from headscope.circuits import eigenvalues, head_card, spectra
from headscope.cli.head_terminal import print_card
from headscope.cli.output import console
from headscope.cli.scan import Loading
from headscope.errors import InputError, UnsupportedModelError
from headscope.files import whole_file, writable_folder
from headscope.heads import HeadIndex
from headscope.metrics import loss
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, from_tokens, repeated_tokens
from headscope.probes.encoding import encode
from headscope.probes.vocabulary import bos_prefix, need_tokenizer
from headscope.report.head import Evidence, Example, head_page
from headscope.scoring import score
from headscope.table import HeadCard, HeadEigenvalues, HeadScores, HeadSpectra, HeadTable

_EXAMPLE_LENGTH = 64


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
    text: str | None,
    weights_only: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Load, look at one head, print, write."""
    if weights_only and text is not None:
        raise InputError("--text needs a run of the model, which --weights-only forbids.")
    folder = None if out is None else writable_folder(out)
    model = loading.model()
    head = model.shape.check(HeadIndex.parse(address))
    example = None if weights_only else _example(model, head, text, seed)
    card = head_card(model, head)
    scan = None if weights_only else score(model, seed=seed)
    effects = [] if weights_only else _effects(model, head, seed)
    if as_json:
        print(json.dumps(_as_json(card, head, scan, effects), allow_nan=False))
    else:
        print_card(card, head, scan, effects)
    if folder is None:
        return
    evidence = Evidence(*_pictured(model, seed), scan, example, effects)
    file = folder / f"{card.head}.html"
    with whole_file(file) as page:
        page.write(head_page(card, evidence, _facts(model)).encode())
    console(stderr=True).print(f"Written to {file} (open it in a browser).")


def _example(model: HeadModel, head: HeadIndex, text: str | None, seed: int) -> Example:
    """Attention of the head on the user's text, or on random tokens said twice."""
    if text is None:
        probe = repeated_tokens(model, length=16, batch=1, seed=seed)
        words = "Random tokens said twice."
    else:
        probe, words = _of_text(model, text), "Your text."
    layer = collect(model, probe, layers=[head.layer], heads=[head.head])[head.layer]
    ids = probe.tokens[0].tolist()
    decode = None if model.tokenizer is None else model.tokenizer.decode
    tokens = [str(one) if decode is None else decode([one]) for one in ids]
    return Example(layer.pattern[0, 0].float().cpu().numpy(), tokens, words)


def _of_text(model: HeadModel, text: str) -> Probe:
    tokenizer = need_tokenizer(model, "--text")
    ids = encode(tokenizer, text, bos_prefix(model, None)).ids[:_EXAMPLE_LENGTH]
    if not text.strip():
        raise InputError("--text is empty: give a sentence.")
    return from_tokens(torch.tensor([ids]))


def _effects(model: HeadModel, head: HeadIndex, seed: int) -> list[HeadScores]:
    """What the loss on repeated random tokens becomes without the head."""
    room = model.shape.n_ctx or 1000
    probe = repeated_tokens(model, length=min(50, (room - 1) // 2), batch=8, seed=seed)
    try:
        return [ablate_heads(model, probe, metric=loss, method="mean", heads=[head])]
    except UnsupportedModelError:
        return []


def _pictured(model: HeadModel, seed: int) -> tuple[list[HeadSpectra], list[HeadEigenvalues]]:
    singular, complex_values = [], []
    for circuit in ("OV", "QK"):
        try:
            singular.append(spectra(model, circuit, seed=seed))
            complex_values.append(eigenvalues(model, circuit, "mlp"))
        except UnsupportedModelError:
            continue  # the card's `missing` gives the reason
    return singular, complex_values


def _facts(model: HeadModel) -> list[tuple[str, str]]:
    shape = model.shape
    return [
        ("model", model.name),
        ("layers", str(shape.n_layers)),
        ("heads in a layer", f"{shape.n_heads} ({shape.n_kv_heads} key/value heads)"),
        ("weight digest", model.digest()),
    ]


def _as_json(
    card: HeadCard, head: HeadIndex, scan: HeadTable | None, effects: list[HeadScores]
) -> dict[str, Any]:
    def plain(value: float) -> float | None:
        return value if value == value else None

    def values(scores: Sequence[HeadScores]) -> dict[str, Any]:
        return {
            one.name: {"mean": plain(one[head]), "sem": plain(float(one.sem[head]))}
            for one in scores
        }

    facts = card.to_json()
    facts["scores"] = {name: plain(value) for name, value in card.scores.items()}
    probes = {} if scan is None else values(list(scan.values()))
    return facts | {"probes": probes, "effects": values(effects)}
