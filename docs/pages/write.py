"""Small helpers of the page makers."""

import re
from pathlib import Path


def put(path: Path, text: str) -> None:
    """Write a file unless it holds just that, so that Sphinx reads again only what changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def heading(title: str, line: str = "=") -> str:
    """A reStructuredText heading."""
    return f"{title}\n{line * len(title)}\n"


def list_table(head: list[str], rows: list[list[str]], widths: str = "auto") -> str:
    """A reStructuredText table; cells may hold markup but no blank lines."""
    lines = [".. list-table::", f"   :widths: {widths}"]
    lines += ["   :header-rows: 1"] * bool(head) + [""]
    for row in ([head] if head else []) + rows:
        for number, cell in enumerate(row):
            lines.append(f"   {'* -' if number == 0 else '  -'} {' '.join(cell.split())}".rstrip())
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Text in which nothing is markup: ``||W_O||`` would be taken for a substitution."""
    return re.sub(r"([*|`_\\])", r"\\\1", text)
