"""The benchmarks page, from what the scripts in benchmarks/ printed."""

import json
import math
import re
from html import escape
from pathlib import Path
from typing import Any

from docs.pages.write import heading, list_table


def benchmarks_page(results: Path) -> dict[str, str]:
    """The page by its path below ``generated/``; one section for every JSON file there is."""
    text = heading("Benchmarks") + (
        "\nEvery figure was printed by a script in ``benchmarks/`` (``make bench`` runs them all) "
        "and is shown as it was, with the machine that it was measured on. Seconds are medians "
        "over rounds in which the contenders take turns, so that drift hits all alike; models "
        "have random weights, since speed does not depend on them.\n\n"
    )
    files = sorted(results.glob("*.json")) if results.is_dir() else []
    if not files:
        text += "There are no results in this copy: run ``make bench``.\n"
    for file in files:
        text += _section(json.loads(file.read_text(encoding="utf-8")), file.stem)
    return {"benchmarks.rst": text}


def _section(found: dict[str, Any], stem: str) -> str:
    machine = found.get("machine", {})
    versions = ", ".join(f"{name} {one}" for name, one in machine.get("versions", {}).items())
    where = machine.get("gpu") or machine.get("processor") or "an unknown machine"
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    name = found.get("benchmark", stem)
    text = heading(name if name == stem else f"{name} ({stem})", "-")
    text += f"\nMeasured on {where}{threads}; {versions or 'versions unknown'}.\n\n"
    values = {k: v for k, v in found.items() if k not in ("benchmark", "machine")}
    return text + _chart(_ratios(values, "")) + _told(values, "")


def _ratios(values: dict[str, Any], path: str) -> dict[str, float]:
    """Ratios of one run by what they are of, as their names say."""
    found: dict[str, float] = {}
    for key, value in values.items():
        name = f"{path}{key}".replace("_", " ")
        if isinstance(value, dict):
            found |= _ratios(value, f"{path}{key}: ")
        elif isinstance(value, int | float) and value > 0 and _RATIO.search(name):
            found[name] = float(value)
    return found


_RATIO = re.compile(r"\btimes\b|over plain")
_ROW, _LEFT, _WIDTH = 22, 520, 280  # pixels


def _chart(ratios: dict[str, float]) -> str:
    """Bars of ratios on a logarithmic scale, from 1: as fast as what it is compared with."""
    if not ratios:
        return ""
    most = max(1.0, *(abs(math.log10(one)) for one in ratios.values()))
    middle = _LEFT + _WIDTH // 2
    bars = []
    for number, (name, ratio) in enumerate(ratios.items()):
        length = math.log10(ratio) / most * _WIDTH / 2
        top = number * _ROW
        bars.append(
            f'<text x="{_LEFT - 8}" y="{top + 15}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{middle + min(length, 0):.1f}" y="{top + 4}" width="{abs(length):.1f}" '
            f'height="{_ROW - 8}"/>'
            f'<text x="{_LEFT + _WIDTH + 8}" y="{top + 15}">{_number(ratio)}</text>'
        )
    height = len(ratios) * _ROW + 4
    return (
        ".. raw:: html\n\n"
        f'   <svg viewBox="0 0 {_LEFT + _WIDTH + 70} {height}" role="img" '
        'style="max-width:100%;font-size:14px;fill:currentColor">'
        f'<line x1="{middle}" x2="{middle}" y1="0" y2="{height}" stroke="currentColor"/>'
        f"{''.join(bars)}</svg>\n\n"
        "Ratios on a logarithmic scale; the line is 1.\n\n"
    )


def _told(values: dict[str, Any], path: str) -> str:
    """Numbers in one table, and every list or mapping of mappings in a table of its own."""
    text, plain = "", []
    for key, value in values.items():
        name = f"{path}{key}".replace("_", " ")
        rows = _rows(value)
        if rows is not None:
            text += f"**{name}**\n\n" + list_table(*rows) + "\n"
        elif isinstance(value, dict):
            text += _told(value, f"{path}{key}: ")
        else:
            plain.append([name, _number(value)])
    return (list_table(["", "value"], plain) + "\n" if plain else "") + text


def _rows(value: Any) -> tuple[list[str], list[list[str]]] | None:
    """Head and rows where the value is a list or mapping of flat mappings."""
    named = isinstance(value, dict)
    inner = list(value.values()) if named else value
    if not isinstance(inner, list) or not inner or not all(_is_flat(one) for one in inner):
        return None
    keys = list(dict.fromkeys(key for one in inner for key in one))
    head = ([""] if named else []) + [key.replace("_", " ") for key in keys]
    names = [[str(key).replace("_", " ")] for key in value] if named else [[] for _ in inner]
    rows = [
        name + [_number(one.get(key, "")) for key in keys]
        for name, one in zip(names, inner, strict=True)
    ]
    return head, rows


def _is_flat(one: Any) -> bool:
    return isinstance(one, dict) and not any(isinstance(v, dict | list) for v in one.values())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
