"""Run folders: the table, facts, pictures and page that a run writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from headscope.base.files import FolderClaim, subfolder, whole_file, whole_page
from headscope.base.result import Section
from headscope.base.specs import versions
from headscope.plots import figures_of, heatmap, heatmaps, save
from headscope.plots.figures import Drawing
from headscope.report.page import index_page, stacks_page
from headscope.report.sections import laid, sections_json, with_pictures
from headscope.table import HeadTable


@dataclass(frozen=True)
class RunFolder:
    """Results of one run on disk.

    ``table.parquet`` (one row per layer, head and score; provenance in its metadata),
    ``run.json`` (command, settings, versions, timings), ``index.html`` (self-contained page),
    ``pictures/`` (one heatmap per score, and the scores with roles side by side) and, where the
    page shows more than the table, ``sections.json``, from which reports are joined.

    Attributes:
        claim: exclusive claim on the folder.
    """

    claim: FolderClaim

    @property
    def path(self) -> Path:
        """Path of the folder."""
        return self.claim.path

    @classmethod
    def create(cls, path: Path, kind: str, *, overwrite: bool = False) -> "RunFolder":
        """Create the folder before the work starts, so that a bad path fails at once.

        Args:
            path: path of the folder.
            kind: kind of run, such as ``scan``.
            overwrite: replace what another run left there.

        Raises:
            InputError: if the folder is not writable, or holds another kind of run.
        """
        return cls(FolderClaim.create(path, kind, overwrite=overwrite))

    def of(self, asked: Mapping[str, Any]) -> "RunFolder":
        """Like :meth:`create`, for a run whose settings are known before its work starts.

        Raises:
            InputError: if the folder holds a run with other settings.
        """
        return replace(self, claim=self.claim.of(asked))

    def ready(self) -> "RunFolder":
        """Prepare the folder for writing after the work is done; see :meth:`FolderClaim.ready`."""
        return replace(self, claim=self.claim.ready())

    def write(
        self,
        table: HeadTable,
        settings: Mapping[str, Any],
        timings: Mapping[str, float],
        *,
        command: str | None = None,
        examples: bool = False,
        results: Mapping[str, object] | None = None,
        sections: Sequence[Section] | None = None,
        pictures: Mapping[str, Drawing] | None = None,
    ) -> None:
        """Write all files, each atomically.

        Args:
            table: the scores.
            settings: requested settings, as JSON values.
            timings: seconds by phase.
            command: command line that reproduces the run, shown on the page.
            examples: store the values per example in the table.
            results: results of any kind by figure name: their sections are shown on the page before
                the table of all heads, and their figures drawn.
            sections: shown instead of those of the results.
            pictures: further figures, by name; without results and pictures, a heatmap per score
                and the roles are drawn.
        """
        drawings = figures_of(results or {}) | dict(pictures or {})
        if sections is None:
            sections = [section for one in (results or {}).values() for section in laid(one)]
        sections = with_pictures(sections, drawings)
        table.save(self.path / "table.parquet", examples=examples)
        drawn = {name: draw("light") for name, draw in drawings.items()}
        self._pictures(drawn or _heatmaps(table))
        several = len(table.stacks) > 1
        page = (
            stacks_page(table, settings, sections=sections, command=command)
            if several
            else index_page(table, settings, sections=sections, command=command)
        )
        whole_page(self.path / "index.html", page)
        if sections:
            with whole_file(self.path / "sections.json") as file:
                file.write(sections_json(sections))
        self.claim.write_facts(
            {
                "command": command,
                "settings": dict(settings),
                "versions": versions(),
                "timings": dict(timings),
            }
        )

    def _pictures(self, pictures: Mapping[str, go.Figure]) -> None:
        """Save figures: PNG if the extra ``paper`` is installed, otherwise interactive HTML."""
        folder = subfolder(self.path, "pictures")
        kind = "png" if find_spec("matplotlib") else "html"
        for name, figure in pictures.items():
            save(figure, folder / f"{_file_name(name)}.{kind}")


def _heatmaps(table: HeadTable) -> dict[str, go.Figure]:
    """One heatmap per score, and the scores with roles side by side."""
    pictures = {name: heatmap(scores) for name, scores in table.items()}
    if len(table.stacks) > 1:
        return pictures
    roles = [name for name, scores in table.items() if scores.threshold is not None]
    if len(roles) > 1:
        pictures["roles"] = heatmaps(table, roles)
    return pictures


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
