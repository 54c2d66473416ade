"""Run studies on a model, claim by claim, resumably, and build their page."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from math import isnan, nan
from pathlib import Path
from types import MappingProxyType
from typing import Any

from headscope.base.arguments import checked
from headscope.base.files import FolderClaim, subfolder, whole_file, whole_page
from headscope.base.options import Advance, RunOptions, track
from headscope.base.result import Drawn, Listed, Rows, Section, Words, counted, number
from headscope.base.specs import Provenance
from headscope.diffusion import Diffusion
from headscope.errors import HeadscopeError, InputError, UnsupportedModelError, nearest
from headscope.models.protocol import HeadModel
from headscope.models.running import Digest, all_weights
from headscope.origin import origin
from headscope.plots import figures_of
from headscope.probes import random_tokens
from headscope.report import sections_page
from headscope.report.sections import read_sections, sections_json, with_pictures
from headscope.studies import attention, causes, forms, long_context, readings, tokens
from headscope.studies.study import (
    ANSWER_COLUMNS,
    Answer,
    Claim,
    Evidence,
    Study,
    StudyResult,
    StudySetting,
    answered,
    row_of,
    unasked,
)
from headscope.table import versions
from headscope.vision import Clip

# Built-in studies by name; add those of a new file here.
STUDIES: Mapping[str, Study] = MappingProxyType(
    {
        one.name: one
        for field in (attention, long_context, causes, readings, tokens, forms)
        for one in field.ALL
    }
)
_FOLDER = "studies"
Subject = HeadModel | Clip | Diffusion
# By what a study is asked of: what it takes.
_TAKES = {
    "model": "a model of texts or images: give what hs.load returns",
    "clip": "a model of images beside one of texts: give what hs.vision.clip returns",
    "diffusion": "a denoiser of images: give what hs.diffusion.load returns (pip install "
    "'headscope[diffusion]')",
}


@dataclass(frozen=True, repr=False)
class StudyCost(Listed):
    """Estimated cost of studies.

    Attributes:
        claims: number of claims still to be tested.
        forwards: their cost, in forward passes over 64 tokens.
        seconds: the same on this machine, from one timed pass.
        unknown: claims of unknown cost, which are not counted.
    """

    claims: int
    forwards: float
    seconds: float
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One sentence."""
        minutes = self.seconds / 60
        span = f"{minutes:.0f} min" if minutes >= 2 else f"{max(1.0, self.seconds):.0f} s"
        more = f"; the cost of {len(self.unknown)} of them is unknown" if self.unknown else ""
        return f"{self.claims} claims, about {self.forwards:,.0f} forward passes: {span}{more}."


@checked
def list_studies() -> dict[str, str]:
    """List the built-in studies: one-line descriptions by name.

    Example:
        >>> "induction-heads" in hs.studies.list()
        True
    """
    return {name: one.title for name, one in STUDIES.items()}


@checked
def show(name: "str | Path | Study") -> Study:
    """Look up a study, with its paper, its claims and what is measured for each.

    Args:
        name: name of a built-in study, a Python file that defines ``STUDY``, or a study itself.

    Raises:
        InputError: if there is no such study.

    Example:
        >>> [claim.name for claim in hs.studies.show("induction-heads").claims]
        ['pattern', 'needed', 'in-context']
    """
    if isinstance(name, Study):
        return name
    if str(name) in STUDIES:
        return STUDIES[str(name)]
    if Path(name).suffix == ".py":
        return _from_file(Path(name))
    raise InputError(nearest(str(name), STUDIES, kind="study"))


@checked
def run(
    study: "str | Path | Study",
    model: HeadModel | Clip | Diffusion,
    out: "str | Path | None" = None,
    fast: bool = False,
    *,
    seed: int = 0,
    given: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> StudyResult:
    """Test the claims of a study on a model.

    Args:
        study: name of a built-in study (see ``hs.studies.list()``), a Python file that defines
            ``STUDY``, or a :class:`~headscope.studies.Study`.
        model: from :func:`headscope.load`, or what ``study.of`` names. Of a model of images and
            texts, the image half is asked the studies of models.
        out: output folder. Each answer is written as soon as it is measured, and a later run with
            the same model and settings resumes there. Studies of one model can share a folder; its
            ``index.html`` shows all of them.
        fast: use fewer and shorter examples.
        seed: seed for all sampling.
        given: what a study needs beside the model, by name, such as ``{"processor": processor}``.
            A claim that lacks it says so.
        overwrite: replace studies of another model or with other settings in the folder.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        One answer per claim: a number, its control, the interval of their difference and a verdict.

    Raises:
        InputError: if there is no such study, or the folder holds another run.

    Example:
        >>> result = hs.studies.run("low-rank", model, fast=True)
        >>> sorted(result.verdicts)
        ['ov', 'qk']
    """
    setting = StudySetting(fast, RunOptions(seed=seed).seed, given or {})
    return _run(show(study), model, out, setting, overwrite, progress)


@checked
def run_all(
    model: HeadModel | Clip | Diffusion,
    out: "str | Path | None" = None,
    fast: bool = False,
    *,
    studies: "Sequence[str | Path | Study] | None" = None,
    seed: int = 0,
    given: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> dict[str, StudyResult]:
    """Test the claims of several studies on a model, sharing probes and passes.

    Args:
        model: as in :func:`run`.
        out: output folder for all studies; see :func:`run`.
        fast: use fewer and shorter examples.
        studies: studies to run, each as in :func:`run`. Default: all built-in studies.
        seed: seed for all sampling.
        given: as in :func:`run`.
        overwrite: replace the contents of the folder.
        progress: show progress bars. Default: only in a terminal or notebook, after 2 s.

    Returns:
        Results by study name.

    Raises:
        InputError: if there is no such study, or the folder holds another run.

    Example:
        >>> found = hs.studies.run_all(model, fast=True, studies=["low-rank", "attention-sinks"])
        >>> list(found)
        ['low-rank', 'attention-sinks']
    """
    found = [show(one) for one in (STUDIES if studies is None else studies)]
    setting = StudySetting(fast, RunOptions(seed=seed).seed, given or {})
    results = {}
    for place, study in enumerate(found):
        again = overwrite and place == 0  # later ones join the first's folder
        results[study.name] = _run(study, model, out, setting, again, progress)
    return results


@checked
def cost(
    model: HeadModel | Clip | Diffusion,
    studies: "Sequence[str | Path | Study] | None" = None,
    fast: bool = False,
    *,
    out: "str | Path | None" = None,
) -> StudyCost:
    """Estimate the cost of studies before running them, from a timed forward pass.

    The number of passes per claim was measured once, on a model with 30 layers and 270 heads (for
    the fast form, on a model with 3 layers), including the time for everything else. Claims that go
    through all heads cost less on models with fewer heads. Treat the estimate as an order of
    magnitude.

    Args:
        model: as in :func:`run`.
        studies: studies to run, each as in :func:`run`. Default: all built-in studies.
        fast: estimate the fast form.
        out: output folder; claims already answered there are not counted.

    Returns:
        Forward passes over 64 tokens, and seconds. Your own studies are not counted.

    Raises:
        InputError: if there is no such study.
        UnsupportedModelError: if the model does not read tokens.

    Example:
        >>> cost = hs.studies.cost(model, ["low-rank"], fast=True)
        >>> cost.forwards > 0 and cost.seconds > 0
        True
    """
    found = [show(one) for one in (STUDIES if studies is None else studies)]
    known = json.loads((Path(__file__).parent / "costs.json").read_text("utf-8"))
    form = known["fast" if fast else "whole"]
    done = Path("" if out is None else out) / _FOLDER
    left = [
        f"{study.name}/{claim.name}"
        for study in found
        for claim in study.claims
        if out is None or not (done / study.name / f"{claim.name}.json").exists()
    ]
    forwards = float(sum(form.get(name, 0.0) for name in left))
    unknown = tuple(name for name in left if name not in form)
    return StudyCost(len(left), forwards, forwards * _seconds_of_a_pass(model), unknown)


def _seconds_of_a_pass(model: Subject) -> float:
    """Seconds per pass over 64 tokens, timed on the second of two."""
    if isinstance(model, Clip | Diffusion):
        raise UnsupportedModelError("costs are estimated for models that read tokens only.")
    probe = random_tokens(model, length=min(64, (model.shape.n_ctx or 64) - 2), batch=1)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        model.run(probe.tokens)
        seconds = time.perf_counter() - started
    return seconds


def _run(
    found: Study,
    model: Subject,
    out: "str | Path | None",
    setting: StudySetting,
    overwrite: bool,
    progress: bool | None,
) -> StudyResult:
    """Run one study; its claims share cached probes and results."""
    about = _origin(model, seed=setting.seed, study=found.name, fast=setting.fast)
    asked = {
        "model": about.model,
        "revision": about.revision,
        "weights": about.weight_digest,
        "dtype": about.dtype,
        "seed": setting.seed,
        "fast": setting.fast,
        "headscope": versions().get("headscope"),
    }
    place = None if out is None else _claimed(Path(out), found, asked, overwrite)
    with track(len(found.claims), f"study {found.name}", show=progress) as advance:
        answers = [_ask(found, claim, model, setting, place, advance) for claim in found.claims]
    result = StudyResult(
        found.name,
        found.title,
        found.paper,
        tuple(answers),
        about,
        setting.fast,
    )
    if place is not None:
        result.save(place / "result.safetensors")
        whole_page(Path(str(out)) / "index.html", page_of(Path(str(out))))
    return result


def _origin(model: Subject, *, seed: int, **facts: Any) -> Provenance:
    """Where answers come from, whatever they were asked of."""
    if isinstance(model, Clip):
        seen = origin(model.vision, seed=seed, **facts)
        both = sha256(f"{seen.weight_digest} {model.text.digest()}".encode()).hexdigest()
        return replace(seen, model=seen.model.removesuffix(" (vision)"), weight_digest=both)
    if not isinstance(model, Diffusion):
        return origin(model, seed=seed, **facts)
    weight = next(model.module.parameters())
    return Provenance(
        model=model.name,
        weight_digest=Digest().of(all_weights(model.module)),
        path="diffusers",
        dtype=str(weight.dtype).removeprefix("torch."),
        device=weight.device.type,
        probe=facts,
        seed=seed,
        versions=versions(),
    )


def _suited(study: Study, model: Subject) -> Any:
    """What a study is asked of.

    Raises:
        UnsupportedModelError: if the model is of another kind.
    """
    if isinstance(model, Clip) and study.of == "model":
        return model.vision
    kinds = {Clip: "clip", Diffusion: "diffusion"}
    if kinds.get(type(model), "model") != study.of:
        raise UnsupportedModelError(f"this study needs {_TAKES[study.of]}.")
    return model


@checked
def page_of(out: Path) -> str:
    """Build one self-contained HTML page of all studies in a folder.

    Args:
        out: folder written by :func:`run`.

    Raises:
        InputError: if it holds no finished study.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     found = hs.studies.run("low-rank", hs.load(), out=folder, fast=True, progress=False)
        ...     page = hs.studies.page_of(Path(folder))
        >>> page.startswith("<!doctype html>")
        True
    """
    results = [
        (StudyResult.load(file), file.parent)
        for file in sorted((out / _FOLDER).glob("*/result.safetensors"))
    ]
    if not results:
        raise InputError(f"{out} holds no finished study: run one with --out {out.name}.")
    shipped = list(STUDIES)  # in their order, then those of users
    results.sort(key=lambda one: (*map(one[0].study.__ne__, shipped), one[0].study))
    sections = [_verdicts([result for result, _ in results])]
    for result, place in results:
        sections += result.sections()
        for one in result.answers:
            figures = place / f"{one.claim}.sections.json"
            sections += read_sections(figures) if figures.exists() else []
    about = results[0][0].provenance
    facts = {
        "model": about.model,
        "revision": about.revision or "-",
        "weights": about.weight_digest,
        "seed": about.seed,
        "headscope": about.versions.get("headscope", "-"),
    }
    return sections_page(
        f"What is known about {about.model}",
        "studies",
        "Claims from papers, tested on this model: a number, its control and a verdict for each.",
        sections,
        [(name, str(value)) for name, value in facts.items()],
    )


def _verdicts(results: Sequence[StudyResult]) -> Section:
    """Every claim with its numbers: those that hold, those that do not, those not asked."""
    order = ("holds", "does not hold", "cannot be asked")
    found = [(result.study, one) for result in results for one in result.answers]
    found.sort(key=lambda each: order.index(each[1].verdict))
    hold, fail, unknown = (sum(one.verdict == word for _, one in found) for word in order)
    return Section(
        "Verdicts",
        [
            Words(
                f"Of {counted(len(found), 'claim')}, {hold} hold, {fail} do not hold, and "
                f"{unknown} cannot be asked of this model."
            ),
            Rows(("study", *ANSWER_COLUMNS), [(study, *row_of(one)) for study, one in found]),
        ],
    )


def _claimed(out: Path, study: Study, asked: Mapping[str, Any], overwrite: bool) -> Path:
    """Claim a study's output folder."""
    folder = FolderClaim.create(out, "study", overwrite=overwrite).of(asked)
    old = out / _FOLDER
    if overwrite and old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    folder.write_facts({"versions": versions()})
    return subfolder(subfolder(out, _FOLDER), study.name)


def _ask(
    study: Study,
    claim: Claim,
    model: Subject,
    setting: StudySetting,
    place: Path | None,
    advance: Advance,
) -> Answer:
    """Load an answer, or measure and write it."""
    file = None if place is None else place / f"{claim.name}.json"
    if file is not None and file.exists():
        answer = _read(file)
    else:
        answer = _measured(study, claim, model, setting, place)
        if file is not None:
            with whole_file(file) as written:
                written.write(_json(answer))
    advance()
    return answer


def _json(answer: Answer) -> bytes:
    """An answer as JSON; missing numbers become null."""
    plain = {
        name: None if isinstance(value, float) and isnan(value) else value
        for name, value in asdict(answer).items()
    }
    return json.dumps(plain, indent=2, allow_nan=False).encode() + b"\n"


def _read(file: Path) -> Answer:
    """Rebuild an answer from :func:`_json`."""
    try:
        plain = json.loads(file.read_text("utf-8"))
        filled: dict[str, Any] = {key: nan if one is None else one for key, one in plain.items()}
        return Answer(**filled)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file.name} holds no answer of a study: {error!r}; delete it to measure the claim "
            "again."
        ) from None


def _measured(
    study: Study, claim: Claim, model: Subject, setting: StudySetting, place: Path | None
) -> Answer:
    try:
        found = claim.ask(_suited(study, model), setting)
    except HeadscopeError as error:
        return unasked(claim, error)
    if place is not None and found.results:
        drawings = figures_of(found.results)
        blocks = [Drawn(name, _caption(claim, found)) for name in drawings]
        sections = with_pictures([Section(claim.statement, blocks)], drawings)
        with whole_file(place / f"{claim.name}.sections.json") as file:
            file.write(sections_json(sections))
    return answered(claim, found)


def _caption(claim: Claim, found: Evidence) -> str:
    """What was claimed and measured, with the number of observations and the interval."""
    note = f" {found.note.rstrip('.')}." if found.note else ""
    return (
        f"{claim.statement}{note} {number(found.value)} {claim.unit}".rstrip()
        + f" against {number(found.control)}; n = {found.n}, interval of the difference at 99 %: "
        f"{number(found.low)} to {number(found.high)}."
    )


def _from_file(file: Path) -> Study:
    """Load the ``STUDY`` that a user's file defines; this executes the file."""
    spec = spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise InputError(f"there is no file {str(file)!r}: give a Python file that defines STUDY.")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise InputError(f"{file.name} defines no STUDY: assign a headscope.studies.Study to it.")
    return study
