"""Try headscope on the model classes of transformers, and write what came of it.

    python -m tools.families                          # all, and write docs/families.md
    python -m tools.families llama bloom              # some, printed
    python -m tools.families --group masked           # one group, written into the page
    python -m tools.families --group images vit swin  # some of a group, printed

Groups are those of :mod:`tools.tiny_models`: causal language models, masked ones, models of images,
encoder-decoders of text and of speech, models of texts with images. Every class is built tiny and
held against itself by ``hs.testing.check_model``. A family is *supported* if every check passed,
*limited* if some do not apply and the reason is said, *refused* if it is not loaded and the reason
is said; anything else is *wrong*, and the tests fail.
"""

import argparse
import contextlib
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import headscope as hs
from headscope.models.hf.transformers_api import attention_named
from headscope.testing import check_model
from tools.tiny_models import GROUPS, SEEDS, image_inputs, kinds, tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
Verdict = Literal["supported", "limited", "refused", "not built", "wrong"]
Cell = Callable[["Family"], str]
PATHS = {"hf": "fused", "bridge": "transformer-lens"}


@dataclass(frozen=True)
class Family:
    """What came of one model type.

    Attributes:
        kind: the model type, as in a ``config.json``.
        name: of its class; empty where it could not be built.
        path: ``fused`` or ``transformer-lens``; empty where it is not loaded.
        reasons: of what is limited, by check; or one reason, under an empty name.
        images: what came of texts with images in them; empty where none were tried.
    """

    kind: str
    name: str
    verdict: Verdict
    path: str
    reasons: Mapping[str, str]
    images: str = ""


def examine(kind: str, group: str = "causal") -> Family:
    """Build a tiny model of a type, load it, and check it."""
    try:
        model = tiny_model(kind, SEEDS.get(kind, 0), group)
    except Exception as error:  # a class may need packages, another model, or be broken
        return Family(kind, "", "not built", "", {"": _short(error)})
    name = type(model).__name__
    try:
        seen = hs.load(model)
    except hs.HeadscopeError as refusal:
        return Family(kind, name, "refused", "", {"": _without_name(str(refusal), name, kind)})
    except Exception as error:
        return Family(kind, name, "wrong", "", {"load": _short(error)})
    path = PATHS[seen.path]
    found = _without_images(seen) if group == "pictures" else {}
    if not found:
        report = check_model(model, raises=False)
        if report.failed:
            return Family(kind, name, "wrong", path, report.failed)
        found = report.limited
    reasons = {check: _without_name(why, name, kind) for check, why in found.items()}
    images = ""
    if group == "pictures":
        try:
            images = _with_images(model, seen)
        except hs.HeadscopeError as refusal:
            images = f"refused: {_without_name(str(refusal), name, kind)}"
        except Exception as error:
            return Family(kind, name, "wrong", path, {"images": _short(error)})
    return Family(kind, name, "limited" if reasons else "supported", path, reasons, images)


def _without_images(model: Any) -> dict[str, str]:
    """Why texts alone are refused, if they are."""
    try:
        hs.capture.collect(model, hs.probes.from_tokens(torch.arange(3, 9)[None]))
    except hs.HeadscopeError as refusal:
        return {"texts without images": str(refusal)}
    return {}


@torch.no_grad()
def _with_images(module: Any, model: Any) -> str:
    """Hold rows and logits of texts with images against the model's own eager attention.

    The image tower runs as it is, since its rounding grows through layers of random weights.

    Raises:
        ValueError: if they differ.
    """
    inputs = image_inputs(module)
    if inputs is None:
        return "not tried"
    probe = hs.probes.from_batch(inputs)
    acts, logits = hs.capture.collect(model, probe), model.run(probe)
    with attention_named(model.layout.configs, "eager"):
        own = module(**inputs, use_cache=False, output_attentions=True)
    patterns = [one for one in own.attentions or () if isinstance(one, torch.Tensor)]
    rows = [acts[layer].pattern for layer in model.shape.attention_layers]
    if len(patterns) != len(rows):
        return "logits" if _alike(logits, own.logits) else "not tried"
    if not all(_alike(one, other) for one, other in zip(rows, patterns, strict=True)):
        raise ValueError("rows of texts with images are not those of eager attention.")
    if not _alike(logits, own.logits):
        raise ValueError("logits of texts with images are not the model's own.")
    keys = ""
    with contextlib.suppress(hs.HeadscopeError):
        hs.vision.image_keys(model, probe)
        keys = ", places"
    return f"rows{keys}"


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal to 3e-5 of the largest number."""
    size = float(other.abs().max())
    return one.shape == other.shape and float((one - other).abs().max()) <= 3e-5 * max(1.0, size)


def _short(error: Exception) -> str:
    """An error's type and first sentence."""
    text = re.split(r"(?<=\w)\. |\n", str(error).strip())[0]
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"


def _without_name(reason: str, name: str, kind: str) -> str:
    """A reason without the model's own name, so that equal reasons are equal."""
    text = reason.replace(f"{name} ({kind})", "it").replace(name, "it").replace(f"({kind})", "")
    return text.removeprefix("it is not supported: ").split(". Decoder")[0].rstrip(".")


def page(families: Iterable[Family]) -> str:
    """The page of the documentation, as far as causal language models go."""
    listed = sorted(families, key=lambda family: family.kind)
    counts = Counter(family.verdict for family in listed)
    good = counts["supported"] + counts["limited"]
    lines = [
        "# Families",
        "",
        "Every causal language model class of transformers "
        f"{_transformers()}, built tiny with random weights, and held against itself by "
        "[`hs.testing.check_model`](howto/your-model.md): attention rows, head outputs, ablation, "
        "attribution, circuits, pruning, padding. Written by `python -m tools.families`; the tests "
        "fail when it is out of date.",
        "",
        f"**{good} of {len(listed)} model types run**: {counts['supported']} without a limit, "
        f"{counts['limited']} with some questions refused. {counts['refused']} are refused at "
        f"load, in one sentence, and {counts['not built']} cannot be built here.",
        "",
        "`fused` is transformers' own attention interface, with exact rows on demand; "
        "`transformer-lens` is a `TransformerBridge`, one layer's pattern at a time. Both give the "
        "same numbers.",
        "",
        "One family of transformers routes tokens to heads (jetmoe, a mixture of attention heads). "
        "It is refused, as its heads are not the same at every token. No other has routed heads.",
        "",
    ]
    lines += _table(
        "Supported", ("model type", "class", "path"), _rows(listed, "supported", lambda f: f.path)
    )
    lines += _limited([family for family in listed if family.verdict == "limited"])
    lines += _table(
        "Refused",
        ("model type", "class", "reason"),
        _rows(listed, "refused", lambda f: f.reasons[""]),
    )
    lines += _table(
        "Not built",
        ("model type", "what transformers says"),
        [(f"`{f.kind}`", f.reasons[""]) for f in listed if f.verdict == "not built"],
    )
    lines += _table(
        "Wrong",
        ("model type", "class", "check and difference"),
        _rows(listed, "wrong", lambda f: "; ".join(f"{k}: {v}" for k, v in f.reasons.items())),
    )
    return "\n".join(lines).rstrip() + "\n"


def _other(group: str, listed: list[Family]) -> list[str]:
    """Section of another group: what runs and with which limits, and what does not."""
    about, counts = GROUPS[group], Counter(family.verdict for family in listed)
    runs = [family for family in listed if family.verdict in ("supported", "limited")]
    numbers: dict[str, int] = {}
    seen = group == "pictures"
    rows = [
        (
            f"`{f.kind}`",
            f"`{f.name}`",
            *([_images(f, numbers)] if seen else []),
            _numbered(f, numbers) or "nothing",
        )
        for f in runs
    ]
    head = ("model type", "class", *(["with images"] if seen else []), "refused")
    lines = _table(about.title, head, rows)
    intro = (
        f"{len(runs)} of {len(listed)} model types run, {about.said}; {counts['refused']} are "
        f"refused at load and {counts['not built']} cannot be built here."
    )
    if seen:
        intro += (
            " *rows*: attention rows and logits of texts with images equal those of eager "
            "attention; *places*: `hs.vision.image_keys` also tells where in the picture a token "
            "stands; *not tried*: no inputs with images were built for the family here."
        )
    lines[2:2] = [intro, ""]
    lines += [*(f"{number}. {reason}." for reason, number in numbers.items()), ""]
    rest = [
        (f"`{f.kind}`", f.verdict, f.reasons.get("") or "; ".join(f.reasons.values()))
        for f in listed
        if f not in runs
    ]
    below = _table(f"{about.title} that do not run", ("model type", "what", "reason"), rest)
    return lines + [line.replace("## ", "### ", 1) for line in below]


def _images(family: Family, numbers: dict[str, int]) -> str:
    """What came of texts with images, with the number of a reason."""
    refused, found = family.images.removeprefix("refused: "), family.images
    if refused == found:
        return found
    return f"refused ({numbers.setdefault(refused, len(numbers) + 1)})"


def _transformers() -> str:
    from transformers import __version__

    return ".".join(__version__.split(".")[:2])


def _rows(families: list[Family], verdict: Verdict, last: Cell) -> list[tuple[str, ...]]:
    return [(f"`{f.kind}`", f"`{f.name}`", last(f)) for f in families if f.verdict == verdict]


def _limited(families: list[Family]) -> list[str]:
    """What is refused, with a number for each reason, since many families share one."""
    numbers: dict[str, int] = {}
    rows = []
    for family in families:
        told = _numbered(family, numbers)
        rows.append((f"`{family.kind}`", f"`{family.name}`", family.path, told))
    lines = _table("Supported, with limits", ("model type", "class", "path", "refused"), rows)
    return lines + [f"{number}. {reason}." for reason, number in numbers.items()] + [""]


def _numbered(family: Family, numbers: dict[str, int]) -> str:
    """Checks that are refused, with the number of each one's reason; new reasons get one."""
    for reason in family.reasons.values():
        numbers.setdefault(reason, len(numbers) + 1)
    by_reason: dict[int, list[str]] = {}
    for check, reason in family.reasons.items():
        by_reason.setdefault(numbers[reason], []).append(check)
    return "; ".join(f"{', '.join(checks)} ({n})" for n, checks in sorted(by_reason.items()))


def _table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [
        f"## {title}",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in cells),
        "",
    ]


def main() -> None:
    """Examine what was named and print it, or whole groups and write the page."""
    parser = argparse.ArgumentParser(description="Try headscope on families of transformers.")
    parser.add_argument("kinds", nargs="*", help="model types; none: all, and write the page")
    parser.add_argument("--group", choices=list(GROUPS), help="what they are built for")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if given.kinds:
        found = [_told(examine(kind, given.group or "causal")) for kind in given.kinds]
        sys.exit(any(family.verdict == "wrong" for family in found))
    groups = [given.group] if given.group else list(GROUPS)
    sections = {}
    for group in groups:
        sections[group] = [_told(examine(kind, group)) for kind in kinds(group)]
        _write(group, sections[group])
    sys.exit(any(one.verdict == "wrong" for some in sections.values() for one in some))


def _told(family: Family) -> Family:
    """Print what came of a family."""
    told = "; ".join(f"{k}: {v}" if k else v for k, v in family.reasons.items())
    images = f"[{family.images}] " if family.images else ""
    print(f"{family.kind:28} {family.verdict:10} {family.path:16} {images}{told}", flush=True)
    return family


def _write(group: str, families: Sequence[Family]) -> None:
    """Put one group into the page; the others stay as they were."""
    text = PAGE.read_text(encoding="utf-8")
    titles = {one: f"## {GROUPS[one].title}\n" for one in GROUPS}
    found = sorted((text.find(title), one) for one, title in titles.items() if title in text)
    first = found[0][0] if found else len(text)
    parts = {"causal": text[:first]}
    for number, (start, one) in enumerate(found):
        end = found[number + 1][0] if number + 1 < len(found) else len(text)
        parts[one] = text[start:end]
    listed = sorted(families, key=lambda family: family.kind)
    parts[group] = page(listed) if group == "causal" else "\n".join(_other(group, listed))
    written = "\n\n".join(parts[one].strip() for one in GROUPS if one in parts)
    PAGE.write_text(f"{written}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
