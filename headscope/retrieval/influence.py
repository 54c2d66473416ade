"""AttentionInfluence: how much retrieval heads help to read each document of a corpus.

A corpus on disk is scored in parts, each written atomically, and ranked when all are finished.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from headscope.ablation.groups import joint
from headscope.ablation.run import Measurement, Placer, present
from headscope.base.arguments import checked
from headscope.base.files import read_part, readable, subfolder, whole_file, writable_folder
from headscope.base.options import RunOptions
from headscope.base.result import Glance, Shown, number
from headscope.edits import Heads
from headscope.errors import InputError
from headscope.metrics import loss
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes.encoding import bos_prefix, encode, need_tokenizer, next_tokens, pad_right
from headscope.probes.probe import Probe
from headscope.retrieval.generation import Masking

if TYPE_CHECKING:
    import pandas


Denominator = Literal["base", "masked"]
_TOKENS_PER_PASS = 8192
_LONGEST = 4096


@dataclass(frozen=True, eq=False, repr=False)
class Influence(Shown):
    """Effect of masking heads on the loss of each document, in the order given.

    Attributes:
        base: mean cross-entropy per token of the whole model, in nats; NaN for documents of fewer
            than two tokens.
        masked: the same with the heads masked.
        tokens: number of tokens read per document, a BOS included.
        denominator: denominator of the score.
    """

    base: Float[np.ndarray, " document"]
    masked: Float[np.ndarray, " document"]
    tokens: Int[np.ndarray, " document"]
    denominator: Denominator = "base"

    def glance(self) -> Glance:
        """The documents that the heads help most with."""
        score = self.score
        known = [int(at) for at in np.argsort(-score, kind="stable") if np.isfinite(score[at])]
        return Glance(
            f"influence of the masked heads on {len(score)} documents",
            [f"mean {number(float(score[known].mean()))}" if known else "", "share of the loss"],
            ("document", "score", "loss", "masked", "tokens"),
            [
                (str(at), *(number(float(one[at])) for one in (score, self.base, self.masked)),
                 f"{self.tokens[at]:,}")
                for at in known
            ],
            hint="found.score, found.base, found.masked",
        )  # fmt: skip

    @property
    def score(self) -> Float[np.ndarray, " document"]:
        """``(masked - base) / base`` (Hua et al. 2025, equation 5), or over ``masked``."""
        below = self.base if self.denominator == "base" else self.masked
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(below > 0, (self.masked - self.base) / below, np.nan)


@checked
@own_types()
def influence(
    model: HeadModel,
    documents: Sequence[str],
    heads: Heads,
    *,
    method: Masking = "uniform",
    denominator: Denominator = "base",
    max_tokens: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Influence:
    """Loss of each document with and without some heads (Hua et al. 2025, arXiv 2505.07293).

    A document whose loss rises strongly when retrieval heads attend uniformly needs long-range
    attention: the source ranks pretraining data by it, within a domain, and keeps the best fifth.
    It masks the 5% of heads with the highest retrieval scores.

    Documents of similar length share a pass without changing the result. Only layers from the first
    masked one on are run twice.

    Args:
        model: from :func:`headscope.load`.
        documents: texts.
        heads: heads to mask, at every position.
        method: how heads are masked; ``uniform`` in the source.
        denominator: ``base``, equation 5 of the source; ``masked``, as in its figure 3.
        max_tokens: tokens to read of each document, from its start; default: the model's context,
            up to 4096.
        batch_size: documents per pass; default: about 8192 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if there is no document, or an argument is invalid.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> found = influence(model, ["The cat slept. The dog slept.", "One day"], ["L2H1"])
        >>> found.score.shape
        (2,)
    """
    options = RunOptions(batch_size, progress=progress)
    chosen = present(model, heads)
    if not documents or denominator not in ("base", "masked"):
        raise InputError("give at least one document, and denominator='base' or 'masked'.")
    one_by_one = replace(options, batch_size=None)
    ids = [document_ids(model, text, max_tokens) for text in documents]
    base, masked = np.full((2, len(ids)), np.nan)
    order = sorted((i for i in range(len(ids)) if len(ids[i]) > 1), key=lambda i: -len(ids[i]))
    while order:
        count = options.per_pass(len(ids[order[0]]), _TOKENS_PER_PASS)
        rows, order = order[:count], order[count:]
        measurement = Measurement.of(model, _probe([ids[i] for i in rows]), loss, one_by_one)
        effects, clean = joint(measurement, Placer(measurement, method), [chosen])
        base[rows], masked[rows] = clean, clean + effects[0]
    return Influence(base, masked, np.array([len(one) for one in ids]), denominator)


def document_ids(model: HeadModel, text: str, max_tokens: int | None) -> list[int]:
    """Tokens of a document, with a BOS if the model uses one, truncated at the end."""
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens={max_tokens}: give 2 or more.")
    room = min(model.shape.n_ctx or _LONGEST, max_tokens or _LONGEST)
    tokenizer = need_tokenizer(model, "a document")
    return encode(tokenizer, text, bos_prefix(model, None)).ids[:room]


def _probe(rows: Sequence[Sequence[int]]) -> Probe:
    tokens, real = pad_right(rows)
    targets = next_tokens(tokens, real)
    return Probe(tokens, real, tokens.where(real, -1), targets, name="documents")


_FORMAT = 1
# Documents of a part: the most that an interruption can lose.
_PART = 256
# Columns of a part with their types.
_COLUMNS = {
    "line": "int64",
    "offset": "int64",
    "tokens": "int64",
    "base": "float64",
    "masked": "float64",
}


class Document(NamedTuple):
    """One document of a corpus: byte offset, line number from 1, and text."""

    offset: int
    line: int
    text: str


@dataclass(frozen=True)
class Corpus:
    """A JSONL file of documents.

    Attributes:
        path: path of the file.
        field: name of the text field in each object.

    Example:
        >>> path = Path("documents.jsonl")
        >>> _ = path.write_text('{"body": "One day"}')
        >>> [document.text for document in Corpus(path, field="body").documents()]
        ['One day']
    """

    path: Path
    field: str = "text"

    def documents(self) -> Iterator[Document]:
        """Iterate over the documents in order; blank lines are skipped.

        Raises:
            InputError: with the first invalid line.
        """
        try:
            with self.path.open("rb") as file:
                yield from self._read(file)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}.") from error

    def check(self) -> int:
        """Read every line, and return the number of documents.

        Raises:
            InputError: with the first invalid line, or if there is no document.
        """
        count = sum(1 for _ in self.documents())
        if not count:
            raise InputError(f"{self.path} holds no document: write one JSON object a line.")
        return count

    def _read(self, file: BinaryIO) -> Iterator[Document]:
        offset = 3 if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(offset)
        for count, line in enumerate(file, 1):
            if line.strip():
                yield Document(offset, count, self._text(line, count))
            offset += len(line)

    def _text(self, line: bytes, count: int) -> str:
        where = f"{self.path}, line {count}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: not a JSON object in UTF-8.") from None
        if not isinstance(fields, dict) or not isinstance(fields.get(self.field), str):
            raise InputError(f'{where}: an object with a text under "{self.field}" is needed.')
        text: str = fields[self.field]
        return text


@checked
@own_types()
def score_corpus(
    model: HeadModel,
    corpus: Corpus | str | Path,
    heads: Heads,
    folder: str | Path,
    *,
    method: Masking = "uniform",
    denominator: Denominator = "base",
    max_tokens: int | None = None,
    batch_size: int | None = None,
    part_size: int = _PART,
    progress: bool | None = None,
) -> "pandas.DataFrame":
    """Rank the documents of a JSONL file by :func:`influence`.

    The file is read in parts of ``part_size`` documents, one at a time. A finished part is a file
    in ``folder/parts``, named by a digest of its content (model, heads, settings, texts): after a
    crash the same call resumes. At the end ``folder`` has ``ranked.parquet`` (numbers) and
    ``ranked.jsonl`` (the documents, best first, with their ``influence`` and ``rank``).

    Args:
        model: from :func:`headscope.load`.
        corpus: a file, or :class:`Corpus` with the name of its text field.
        heads: heads to mask.
        folder: folder for parts and results.
        method: how heads are masked.
        denominator: ``base`` or ``masked``, see :func:`influence`.
        max_tokens: tokens to read of each document.
        batch_size: documents per pass.
        part_size: documents per part.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        One row per document, best first: rank, line, offset, tokens, base, masked, influence.
        Documents of fewer than two tokens come last, without a rank.

    Raises:
        InputError: if a line is not a document, or the folder cannot be written.

    Example:
        >>> import headscope as hs
        >>> with open("corpus.jsonl", "w") as file:
        ...     print('{"text": "The cat slept. The cat slept."}', file=file)
        ...     print('{"text": "One day"}', file=file)
        >>> model = hs.load()
        >>> score_corpus(model, "corpus.jsonl", ["L2H1"], "scored")["rank"].tolist()
        [1, 2]
    """
    options = RunOptions(batch_size, progress=progress)
    given = corpus if isinstance(corpus, Corpus) else Corpus(Path(corpus))
    if part_size < 1:
        raise InputError(f"part_size={part_size}: give 1 or more.")
    chosen = sorted(present(model, heads))
    count = given.check()
    place = writable_folder(Path(folder))
    parts = subfolder(place, "parts")
    key = {
        "format": _FORMAT,
        "model": model.digest(),
        "heads": [str(head) for head in chosen],
        "method": method,
        "max_tokens": max_tokens,
        "context": model.shape.n_ctx,
    }
    names = []
    with options.track(count, f"{model.name} reads {given.path.name}") as advance:
        for part in _parts(given.documents(), part_size):
            name = _name(key, part)
            names.append(name)
            if not (parts / f"{name}.parquet").exists():
                found = influence(
                    model,
                    [one.text for one in part],
                    chosen,
                    method=method,
                    max_tokens=max_tokens,
                    batch_size=batch_size,
                    progress=False,
                )
                columns = {
                    "line": [one.line for one in part],
                    "offset": [one.offset for one in part],
                    "tokens": found.tokens,
                    "base": found.base,
                    "masked": found.masked,
                }
                _write(parts / f"{name}.parquet", columns)
            advance(len(part))
    return _ranked(given, place, names, denominator)


def _parts(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    part: list[Document] = []
    for one in documents:
        part.append(one)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _name(key: dict[str, Any], part: list[Document]) -> str:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
    for one in part:
        digest.update(json.dumps(one).encode())
    return f"{part[0].line:09d}-{digest.hexdigest()[:16]}"


def _write(file: Path, columns: dict[str, Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    with whole_file(file) as target:
        parquet.write_table(pyarrow.table(columns), target, compression="zstd")


def _read(file: Path) -> "pandas.DataFrame":
    """Read a finished part.

    Raises:
        InputError: if it is damaged.
    """
    with readable(file):
        return read_part(file).to_pandas()[list(_COLUMNS)].astype(_COLUMNS)


def _ranked(
    corpus: Corpus, place: Path, names: list[str], denominator: Denominator
) -> "pandas.DataFrame":
    """Join all parts to one table, best first, and the documents in that order."""
    import pandas

    frames = [_read(place / "parts" / f"{name}.parquet") for name in names]
    frame = pandas.concat(frames, ignore_index=True)
    below = frame.base if denominator == "base" else frame.masked
    frame["influence"] = (frame.masked - frame.base) / below.where(below > 0, np.nan)
    frame = frame.sort_values(
        ["influence", "line"], ascending=[False, True], na_position="last", ignore_index=True
    )
    rank = pandas.Series(range(1, len(frame) + 1), dtype="Int64")
    frame.insert(0, "rank", rank.where(frame.influence.notna()))
    with whole_file(place / "ranked.parquet") as file:
        frame.to_parquet(file, index=False)
    with corpus.path.open("rb") as read, whole_file(place / "ranked.jsonl") as file:
        rows = zip(frame["rank"], frame["offset"], frame["influence"], strict=True)
        for number, offset, score in rows:
            read.seek(int(offset))
            fields = json.loads(read.readline())
            known = not pandas.isna(number)
            fields |= {"rank": int(number), "influence": float(score)} if known else {}
            file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
    return frame
