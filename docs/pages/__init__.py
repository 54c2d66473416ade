"""Pages made from the code itself: scorers, studies, reference, notebooks, benchmarks."""

import shutil
from pathlib import Path

from docs.pages.benchmarks import benchmarks_page
from docs.pages.gallery import gallery_pages
from docs.pages.reference import reference_pages
from docs.pages.scorers import scorer_pages
from docs.pages.studies import study_pages
from docs.pages.write import put

__all__ = ["generate"]


def generate(docs: Path, *, pictures: bool = True) -> None:
    """Write every generated page below ``docs/generated``; unchanged files keep their dates.

    Args:
        docs: folder of the documentation.
        pictures: score the bundled model and draw it; without, pages only (for quick checks).
    """
    home = docs / "generated"
    pages: dict[str, str] = {}
    pages |= scorer_pages(home / "pictures" if pictures else None)
    pages |= reference_pages()
    pages |= study_pages()
    pages |= gallery_pages(docs.parent / "notebooks", docs / "_static" if pictures else None)
    pages |= benchmarks_page(docs.parent / "benchmarks" / "results")
    for name, text in pages.items():
        put(home / name, text)
    for old in home.rglob("*.*"):
        if old.suffix in {".md", ".rst"} and old.relative_to(home).as_posix() not in pages:
            old.unlink()
    for empty in [one for one in home.iterdir() if one.is_dir() and not any(one.iterdir())]:
        shutil.rmtree(empty)
