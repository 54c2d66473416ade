"""Syntax in attention: heads that predict a treebank's dependencies, and an attention probe.

A treebank is any CoNLL-U file. Attention between word pieces becomes attention between words by
summing over the pieces of a key word and averaging over those of a query word, so rows still sum to
1 (Clark et al. 2019).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import read_text
from headscope.base.specs import ScoreSpec
from headscope.base.statistics import Design
from headscope.capture import chunks, passes, stream
from headscope.errors import InputError, whole
from headscope.heads import HeadIndex, ModelShape
from headscope.models.protocol import HeadModel, need_model
from headscope.models.taps import Reads, TapView, at_layers
from headscope.origin import origin
from headscope.probes.encoding import check_length, encode, frame, need_tokenizer, pad_right
from headscope.probes.probe import Probe
from headscope.table import AttentionProbe, HeadScores, HeadTable, RelationHead, SyntaxHeads

SOURCE = "Clark et al. 2019 (arXiv 1906.04341), dependency heads"
PROBE_SOURCE = "Clark et al. 2019 (arXiv 1906.04341), attention-based probing classifiers"
OFFSETS = (-3, -2, -1, 1, 2, 3)
ALL = "all"
_PUNCTUATION = "punct"
_CHUNK = 1 << 28
_COLUMNS = 10


@dataclass(frozen=True)
class Sentence:
    """One sentence of a treebank.

    Attributes:
        text: the sentence as written.
        spans: character span (start, end) of each word.
        heads: for each word, the index of its head, from 0; -1 for the root.
        relations: relation of each word to its head.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    heads: tuple[int, ...]
    relations: tuple[str, ...]

    @classmethod
    def of_words(
        cls, words: Sequence[str], heads: Sequence[int], relations: Sequence[str]
    ) -> "Sentence":
        """Build a sentence from words, separated by spaces.

        Args:
            words: texts of the words.
            heads: index of each word's head, from 0; -1 for the root.
            relations: relation of each word to its head.

        Raises:
            InputError: if the lengths differ, or a head is not in the sentence.
        """
        spans, start = [], 0
        for word in words:
            spans.append((start, start + len(word)))
            start += len(word) + 1
        made = cls(" ".join(words), tuple(spans), tuple(heads), tuple(relations))
        made.check("the sentence")
        return made

    def check(self, what: str) -> None:
        """Raise InputError if a syntactic head is outside the sentence.

        Args:
            what: name of the sentence in the message.

        Raises:
            InputError: if a head is outside the sentence; the message names the word.
        """
        n = len(self.spans)
        if not n == len(self.heads) == len(self.relations):
            raise InputError(
                f"{what} has {n} words, {len(self.heads)} heads and "
                f"{len(self.relations)} relations: give one of each per word."
            )
        for number, head in enumerate(self.heads):
            if not -1 <= head < n or head == number:
                raise InputError(
                    f"word {number + 1} of {what} has the head {head + 1}, and there are words 1 "
                    f"to {n} (0: the root)."
                )


@dataclass(frozen=True, eq=False)
class Treebank:
    """Tokenized sentences of a treebank.

    Attributes:
        sentences: one sentence per example.
        probe: tokens of the sentences.
        word: for each token, the index of its word, from 0; -1 if it is part of no word.
    """

    sentences: tuple[Sentence, ...]
    probe: Probe
    word: Int[Tensor, "batch pos"]

    @property
    def width(self) -> int:
        """Number of words of the longest sentence."""
        return max(len(one.heads) for one in self.sentences)


@checked
def read_conllu(path: str | Path) -> tuple[Sentence, ...]:
    r"""Read a CoNLL-U file: words, heads and relations of its sentences.

    Texts are joined from the forms, with a space after each unless it is marked ``SpaceAfter=No``.
    All words of a multiword token (``2-3``) share its characters. Empty nodes (``2.1``) and
    enhanced dependencies are skipped; subtypes such as ``nsubj:pass`` are kept.

    Args:
        path: path of a UTF-8 file.

    Raises:
        InputError: if a line is not CoNLL-U; the message gives its number.

    Example:
        >>> import tempfile, pathlib
        >>> first = "1\tDogs\t_\t_\t_\t_\t2\tnsubj\t_\t_"
        >>> second = "2\tbark\t_\t_\t_\t_\t0\troot\t_\tSpaceAfter=No"
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "two.conllu"
        >>> _ = file.write_text(first + "\n" + second + "\n\n")
        >>> hs.syntax.read_conllu(file)[0].heads
        (1, -1)
    """
    name = Path(path).name
    found: list[Sentence] = []
    rows: list[tuple[int, list[str]]] = []
    for number, line in enumerate([*read_text(Path(path)).splitlines(), ""], 1):
        if line.startswith("#"):
            continue
        if line.strip():
            columns = line.split("\t")
            if len(columns) != _COLUMNS:
                raise InputError(
                    f"line {number} of {name} has {len(columns)} columns between tabs, and CoNLL-U "
                    f"has {_COLUMNS}."
                )
            rows.append((number, columns))
        elif rows:
            found.append(_sentence(rows, name))
            rows = []
    if not found:
        raise InputError(f"{name} holds no sentence in CoNLL-U.")
    return tuple(found)


def _sentence(rows: list[tuple[int, list[str]]], name: str) -> Sentence:
    """Parse one block of lines."""
    text, spans = "", list[tuple[int, int]]()
    heads, relations = list[int](), list[str]()
    within: tuple[int, tuple[int, int]] = (
        0,
        (0, 0),
    )  # last word of the multiword token, and its span
    for number, (identity, form, *_, head, relation, _deps, misc) in rows:
        space = "" if "SpaceAfter=No" in misc.split("|") else " "
        if "." in identity:
            continue
        try:
            ends = [int(one) for one in identity.split("-")]
            governor = None if len(ends) > 1 else int(head)
        except ValueError:
            raise InputError(
                f"line {number} of {name} has the number {identity!r} and the head {head!r}: both "
                "must be whole numbers."
            ) from None
        if governor is not None and ends[0] != len(heads) + 1:
            raise InputError(f"line {number} of {name}: word {len(heads) + 1} was expected.")
        span = (len(text), len(text) + len(form))
        if governor is None or ends[0] > within[0]:
            text += form + space
        if governor is None:
            within = (ends[-1], span)
            continue
        spans.append(within[1] if ends[0] <= within[0] else span)
        heads.append(governor - 1)
        relations.append(relation)
    made = Sentence(text.rstrip(), tuple(spans), tuple(heads), tuple(relations))
    made.check(f"the sentence in line {rows[0][0]} of {name}")
    return made


@checked
def treebank(
    model: HeadModel, source: str | Path | Sequence[Sentence], *, most: int | None = None
) -> Treebank:
    """Tokenize the sentences of a treebank for a model.

    Args:
        model: model with a fast tokenizer, which reports character offsets.
        source: CoNLL-U file, or sentences.
        most: keep only the first sentences, as many as this.

    Raises:
        InputError: if a sentence is too long, or one of its words shares all its pieces with
            another.

    Example:
        >>> one = hs.syntax.Sentence.of_words(["Dogs", "bark"], [1, -1], ["nsubj", "root"])
        >>> hs.syntax.treebank(model, [one]).word.tolist()[0][-1]
        1
    """
    need_model(model)
    tokenizer = need_tokenizer(model, "a treebank")
    sentences = read_conllu(source) if isinstance(source, str | Path) else tuple(source)
    if most is not None:
        sentences = sentences[: whole(most, "most", 1)]
    if not sentences:
        raise InputError("there is no sentence: give one or more.")
    prefix, suffix = frame(model, None)
    rows, words = [], []
    for number, sentence in enumerate(sentences, 1):
        encoded = encode(tokenizer, sentence.text, prefix, suffix)
        what = f"sentence {number} of the treebank"
        check_length(model, len(encoded.ids), what=what, fix="leave it out")
        owner = [-1] * len(encoded.ids)
        for word, (start, end) in enumerate(sentence.spans):
            pieces = [at for at in encoded.covering(start, end) if owner[at] == -1]
            shared = [one for one in sentence.spans if one == (start, end)]
            if not pieces and len(shared) < 2:
                raise InputError(
                    f"the tokenizer of {model.name} gives the word "
                    f"{sentence.text[start:end]!r} of {what} no piece of its own: leave the "
                    "sentence out, or join the words."
                )
            for at in pieces:
                owner[at] = word
        rows.append(encoded.ids)
        words.append(owner)
    tokens, real = pad_right(rows)
    owners = pad_right(words)[0].where(real, -1)
    made = Probe(
        tokens=tokens,
        real=real,
        structure=tokens.where(real, -1),
        targets=torch.full_like(tokens, -1),
        next_token=False,
        facts={"example": torch.arange(len(rows), dtype=torch.float32)},
        name="treebank",
        settings={"source": Path(source).name if isinstance(source, str | Path) else "given"},
    )
    return Treebank(tuple(sentences), made, owners)


# Heads by relation.


@checked
def heads(
    model: HeadModel,
    bank: Treebank,
    *,
    least: int = 20,
    seed: int = 0,
    batch_size: int | None = None,
) -> SyntaxHeads:
    """Find the attention head that best predicts syntactic heads, relation by relation.

    For each word, an attention head predicts the word that it attends to most (``to_head``; the
    first on ties, excluding itself) or the word that attends most to it (``from_head``). Its
    accuracy on a relation is the share of words with that relation whose predicted word is their
    syntactic head; ``all`` covers every word except roots and punctuation. Roots and words that
    share their pieces (multiword tokens) are left out.

    The best of ``2 x heads`` predictors is chosen on one half of the sentences and evaluated on the
    other, in both directions, averaged over words. So is its baseline, the best fixed offset (-3 to
    3): the word at that distance, clipped to the sentence.

    Args:
        model: encoder, or decoder (which can only find heads to the left).
        bank: treebank from :func:`treebank`.
        least: smallest number of words for a relation to be included.
        seed: seed for splitting into halves.
        batch_size: examples per pass.

    Returns:
        ``.best``: the best head for each relation; ``.table``: accuracy of every head, per
        sentence, with the offset as control.

    Raises:
        InputError: if there are fewer than two sentences, or no relation has enough words.

    Source: Clark et al. 2019; they choose and evaluate on the same words.

    Example:
        >>> words = ["the", "red", "door", "of", "the", "house"]
        >>> tree = [2, 2, -1, 5, 5, 2], ["det", "amod", "root", "case", "det", "nmod"]
        >>> bank = hs.syntax.treebank(model, [hs.syntax.Sentence.of_words(words, *tree)] * 2)
        >>> [one.relation for one in hs.syntax.heads(model, bank, least=2).best]
        ['all', 'det', 'amod', 'case', 'nmod']
    """
    if len(bank.sentences) < 2:
        raise InputError(
            "heads are chosen on one half and evaluated on the other: give at least two sentences."
        )
    asked = _asked(bank, whole(least, "least", 1))
    gold = _padded([one.heads for one in bank.sentences], bank.width)
    named = [
        reader.named
        for _, reader in stream(
            model,
            bank.probe,
            lambda batch, _: _Namer(*_of_batch(batch, bank), bank.width),
            batch_size=batch_size,
        )
    ]
    # [direction layer head example word]
    hits = {
        direction: torch.stack(
            [
                torch.cat([part[direction][layer] for part in named], 1)
                for layer in model.shape.attention_layers
            ]
        ).cpu()
        == gold
        for direction in ("to_head", "from_head")
    }
    half = _halves(len(bank.sentences), seed)
    offsets = {one: _offset(bank, one) == gold for one in OFFSETS}
    best = tuple(
        _best(model.shape, relation, words, hits, offsets, half)
        for relation, words in asked.items()
    )
    table = HeadTable(
        [
            _scores(model, bank, f"{relation}{suffix}", words, hits[direction], offsets, seed)
            for relation, words in asked.items()
            for direction, suffix in (("to_head", ""), ("from_head", "_from_head"))
        ]
    )
    return SyntaxHeads(best, table, table[ALL].provenance)


def _asked(bank: Treebank, least: int) -> dict[str, Bool[Tensor, "batch word"]]:
    """Words to test, by relation, with the most frequent relation first."""
    names = [one.relations for one in bank.sentences]
    can = torch.zeros(len(names), bank.width, dtype=torch.bool)
    for number, one in enumerate(bank.sentences):
        own = set(bank.word[number].tolist())
        for word, head in enumerate(one.heads):
            can[number, word] = head >= 0 and word in own and head in own
    count: dict[str, Tensor] = {ALL: can.clone()}
    for relation in dict.fromkeys(name for some in names for name in some):
        rows = [[name == relation for name in some] for some in names]
        count[relation] = (
            torch.tensor([row + [False] * (bank.width - len(row)) for row in rows]) & can
        )
    count[ALL] = can & ~count.get(_PUNCTUATION, torch.zeros_like(can))
    kept = {name: words for name, words in count.items() if int(words.sum()) >= least}
    if ALL not in kept or len(kept) < 2:
        raise InputError(f"no relation has {least} words or more: give more sentences, or least=.")
    return kept


def _padded(rows: Sequence[Sequence[int]], width: int) -> Int[Tensor, "batch word"]:
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])


def _offset(bank: Treebank, distance: int) -> Int[Tensor, "batch word"]:
    """Index of the word at a fixed distance from each, clipped to the sentence."""
    rows = [
        [min(max(at + distance, 0), len(one.heads) - 1) for at in range(len(one.heads))]
        for one in bank.sentences
    ]
    return _padded(rows, bank.width)


def _halves(count: int, seed: int) -> Bool[Tensor, " batch"]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first = torch.zeros(count, dtype=torch.bool)
    first[order[: count // 2]] = True
    return first


def _best(
    shape: ModelShape,
    relation: str,
    words: Bool[Tensor, "batch word"],
    hits: Mapping[str, Bool[Tensor, "layer head batch word"]],
    offsets: Mapping[int, Bool[Tensor, "batch word"]],
    half: Bool[Tensor, " batch"],
) -> RelationHead:
    """Choose the best head and offset on one half, evaluate them on the other, and vice versa."""
    right = fixed = 0.0
    found: list[tuple[HeadIndex, str]] = []
    for chosen in (half, ~half):
        dev, test = words & chosen[:, None], words & ~chosen[:, None]
        if not bool(test.any()):
            continue
        every = [(direction, (one & dev).sum((2, 3))) for direction, one in hits.items()]
        direction, count = max(every, key=lambda pair: int(pair[1].max()))
        row, head = divmod(int(count.argmax()), count.shape[1])
        found.append((HeadIndex(shape.attention_layers[row], head, shape.stack), direction))
        right += float((hits[direction][row, head] & test).sum())
        offset = max(OFFSETS, key=lambda one: int((offsets[one] & dev).sum()))
        fixed += float((offsets[offset] & test).sum())
    total = float(words.sum())
    whole_count = [(direction, (one & words).sum((2, 3))) for direction, one in hits.items()]
    direction, count = max(whole_count, key=lambda pair: int(pair[1].max()))
    row, head = divmod(int(count.argmax()), count.shape[1])
    overall = (HeadIndex(shape.attention_layers[row], head, shape.stack), direction)
    return RelationHead(
        relation,
        *overall,
        accuracy=right / total,
        baseline=fixed / total,
        offset=max(OFFSETS, key=lambda one: int((offsets[one] & words).sum())),
        words=int(total),
        stable=all(one == overall for one in found),
    )


def _scores(
    model: HeadModel,
    bank: Treebank,
    name: str,
    words: Bool[Tensor, "batch word"],
    hits: Bool[Tensor, "layer head batch word"],
    offsets: Mapping[int, Bool[Tensor, "batch word"]],
    seed: int,
) -> HeadScores:
    """Accuracy of every head per sentence, with the best offset as its control."""
    shape = model.shape
    asked = words.sum(1).double()
    of_heads = torch.full((shape.n_layers, shape.n_heads, len(asked)), torch.nan).double()
    for row, layer in enumerate(shape.attention_layers):
        of_heads[layer] = (hits[row] & words).sum(-1).double() / asked
    offset = max(OFFSETS, key=lambda one: int((offsets[one] & words).sum()))
    fixed = ((offsets[offset] & words).sum(-1).double() / asked).expand_as(of_heads)
    return HeadScores.from_examples(
        ScoreSpec(
            name,
            unit="share",
            bounds=(0.0, 1.0),
            source=SOURCE,
            threshold=0.5,
            description="Share of words with this relation whose syntactic head it predicts.",
        ),
        of_heads.numpy(),
        kv_heads=shape.n_kv_heads,
        control_per_example=fixed.numpy(),
        design=Design(paired=True, clusters=bank.probe.cluster_labels),
        provenance=origin(model, bank.probe, control=f"the word {offset:+d} away", seed=seed),
    ).of_stack(shape.stack)


# Attention between words.


def _of_batch(batch: Probe, bank: Treebank) -> tuple[Int[Tensor, "batch pos"], list[int]]:
    """Word indices of a batch's tokens, and the indices of its examples."""
    numbers = [int(one) for one in batch.host.facts["example"].tolist()]
    return bank.word[numbers], numbers


@checked
def word_rows(
    view: TapView, word: Int[Tensor, "batch pos"], width: int
) -> Float[Tensor, "batch head word word"]:
    """Word-level attention of one layer: summed over key pieces, averaged over query pieces.

    Attention to tokens outside words (``[CLS]``, ``[SEP]``) is missing from a row's sum. For short
    texts only: it holds ``heads x words x words`` numbers for one layer.

    Args:
        view: view of an attention layer during the pass.
        word: index of each token's word; -1 for none.
        width: number of words in the result.

    Example:
        >>> kept = []
        >>> word = torch.arange(probe.length).expand(len(probe), -1)
        >>> by_word = lambda view: kept.append(hs.syntax.word_rows(view, word, probe.length))
        >>> _ = model.run(probe, reads={("z", 0): by_word})
        >>> kept[0].shape == (len(probe), model.shape.n_heads, probe.length, probe.length)
        True
    """
    device = view.z.device
    member = torch.nn.functional.one_hot(word + 1, width + 1)[..., 1:].to(device, torch.float32)
    mean = member / member.sum(1, keepdim=True).clamp_min(1)
    found: Tensor | None = None
    bytes_per_query = 4 * len(word) * view.z.shape[2] * word.shape[1]
    for part in chunks(torch.arange(view.n_queries), bytes_per_query, _CHUNK):
        rows = view.rows(part).pattern
        summed = torch.matmul(rows, member[:, None, : rows.shape[-1]])
        own = mean[:, part.to(device)].mT[:, None]
        found = torch.matmul(own, summed) if found is None else found + torch.matmul(own, summed)
    assert found is not None  # noqa: S101  # there is a query
    return found


@dataclass(eq=False)
class _Namer:
    """Reader of each head's predicted word for every word, in both directions."""

    word: Int[Tensor, "batch pos"]
    numbers: list[int]
    width: int
    named: dict[str, dict[int, Int[Tensor, "head batch word"]]] = field(
        default_factory=lambda: {"to_head": {}, "from_head": {}}
    )

    def reads(self, shape: ModelShape) -> Reads:
        """Read every attention layer."""
        return at_layers(shape, self._name)

    def _name(self, view: TapView) -> None:
        rows = word_rows(view, self.word, self.width)
        present = torch.nn.functional.one_hot(self.word + 1, self.width + 1)[..., 1:].any(1)
        itself = torch.eye(self.width, dtype=torch.bool)
        hidden = (itself | ~present[:, None]).to(rows.device)[:, None]
        for direction, weights in (("to_head", rows), ("from_head", rows.mT)):
            most = weights.masked_fill(hidden, -1.0).argmax(-1)
            self.named[direction][view.layer] = most.transpose(0, 1)


# A probe on the attention of all heads.


@checked
def attention_probe(
    model: HeadModel,
    bank: Treebank,
    *,
    vectors: Mapping[str, Sequence[float]] | None = None,
    epochs: int = 4,
    rate: float = 0.002,
    seed: int = 0,
    batch_size: int | None = None,
) -> AttentionProbe:
    """Train a small probe that predicts every word's syntactic head from all heads' attention.

    The score of word j as head of word i is ``sum_k w_k A_k[i, j] + u_k A_k[j, i]`` over heads k;
    that of the root is ``a A[i, before] + b A[i, behind]``, with the mean attention to the tokens
    before and after the words. With word vectors, w and u are linear in the vectors of i and j.
    Adam minimises the cross-entropy on one half of the sentences, one sentence per step; the
    unlabelled attachment score (UAS) is measured on the other half, without punctuation.

    Reported with it are the best fixed offset and the UAS of the same probe on a control task, in
    which every word type is randomly assigned the first word, the last word or the root as its head
    (Hewitt & Liang 2019): what the probe reaches there reflects its own capacity.

    Args:
        model: model to run.
        bank: treebank from :func:`treebank`.
        vectors: word vectors by lower-case text, all of one length; words without a vector get
            zeros.
        epochs: passes over the training sentences.
        rate: learning rate of Adam.
        seed: seed for the halves, the order of training and the control task.
        batch_size: examples per pass.

    Raises:
        InputError: if there are fewer than four sentences, or vectors differ in length.

    Source: Clark et al. 2019, section 5, who use one pass; Hewitt & Liang 2019 (arXiv 1909.03368).

    Example:
        >>> words = ["the", "red", "door", "of", "the", "house"]
        >>> tree = [2, 2, -1, 5, 5, 2], ["det", "amod", "root", "case", "det", "nmod"]
        >>> bank = hs.syntax.treebank(model, [hs.syntax.Sentence.of_words(words, *tree)] * 8)
        >>> found = hs.syntax.attention_probe(model, bank, epochs=1)
        >>> 0 <= found.uas <= 1
        True
    """
    if len(bank.sentences) < 4:
        raise InputError(
            "the probe is trained on one half and evaluated on the other: give at least four "
            "sentences."
        )
    whole(epochs, "epochs", 1)
    table = _vectors(bank, vectors)
    maps = [one for _, some in _sentence_maps(model, bank, batch_size) for one in some]
    half = _halves(len(bank.sentences), seed)
    gold = [torch.tensor(one.heads) for one in bank.sentences]
    gold = [heads.where(heads >= 0, len(heads)) for heads in gold]
    control = _control(bank, seed)
    scored = {}
    for name, answers in (("gold", gold), ("control", control)):
        probe = _Probe(maps[0].shape[0], table[0].shape[1], seed)
        probe.fit(maps, table, answers, half.nonzero()[:, 0].tolist(), epochs, rate, seed)
        scored[name] = probe, _uas(probe, maps, table, answers, bank, ~half)
    fixed = {
        one: _offset(bank, one) == _padded([s.heads for s in bank.sentences], bank.width)
        for one in OFFSETS
    }
    counted = torch.zeros_like(fixed[1])
    for number, sentence in enumerate(bank.sentences):
        counted[number, : len(sentence.heads)] = _counted(sentence)
    dev, test = counted & half[:, None], counted & ~half[:, None]
    offset = max(OFFSETS, key=lambda one: int((fixed[one] & dev).sum()))
    weights = scored["gold"][0].shares(model.shape)
    return AttentionProbe(
        uas=scored["gold"][1],
        control=scored["control"][1],
        baseline=float((fixed[offset] & test).sum() / test.sum().clamp_min(1)),
        offset=offset,
        words=int(test.sum()),
        weights=weights,
        provenance=origin(
            model,
            bank.probe,
            seed=seed,
            epochs=epochs,
            rate=rate,
            vectors=vectors is not None,
            source_of_method=PROBE_SOURCE,
        ),
    )


def _counted(sentence: Sentence) -> Bool[Tensor, " word"]:
    return torch.tensor([name != _PUNCTUATION for name in sentence.relations])


def _vectors(
    bank: Treebank, vectors: Mapping[str, Sequence[float]] | None
) -> list[Float[Tensor, "word width"]]:
    """Vectors of each sentence's words; zero-width if none are given."""
    if vectors is None:
        return [torch.zeros(len(one.heads), 0) for one in bank.sentences]
    sizes = {len(one) for one in vectors.values()}
    if len(sizes) != 1:
        raise InputError(
            f"word vectors have the lengths {sorted(sizes)}: give vectors of one length."
        )
    nothing = [0.0] * sizes.pop()
    return [
        torch.tensor(
            [list(vectors.get(one.text[a:b].lower(), nothing)) for a, b in one.spans],
            dtype=torch.float32,
        )
        for one in bank.sentences
    ]


def _control(bank: Treebank, seed: int) -> list[Int[Tensor, " word"]]:
    """Control-task head of every word, determined by its text: first word, last word, or root."""
    found = []
    for one in bank.sentences:
        n, answers = len(one.heads), []
        for at, (start, end) in enumerate(one.spans):
            word = one.text[start:end].lower()
            pick = Random(f"{seed} {word}").choice((0, n - 1, n))  # noqa: S311  # seeded
            answers.append(n if pick == at else pick)
        found.append(torch.tensor(answers))
    return found


def _sentence_maps(
    model: HeadModel, bank: Treebank, batch_size: int | None
) -> "Sequence[tuple[slice, list[Float[Tensor, 'head word column']]]]":
    """Word-level attention of all heads, including the tokens before and after the sentence.

    The last two columns are the mean attention to tokens before the first and after the last word.
    """

    def run(batch: Probe, _halvings: int) -> list[Tensor]:
        word, numbers = _of_batch(batch, bank)
        kept: list[Tensor] = []
        width = bank.width
        outer = _with_ends(word, batch.host.real, width)

        def read(view: TapView) -> None:
            kept.append(word_rows(view, outer, width + 2).cpu())

        model.run(
            batch,
            reads=at_layers(model.shape, read),
            logits_at=torch.empty(0, dtype=torch.long),
        )
        every = torch.cat(kept, 1)
        found = []
        for place, number in enumerate(numbers):
            n = len(bank.sentences[number].heads)
            columns = [*range(n), width, width + 1]
            found.append(every[place][:, :n][:, :, columns].clone())
        return found

    return list(passes(model, bank.probe, run, batch_size=batch_size or 8))


def _with_ends(
    word: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"], width: int
) -> Int[Tensor, "batch pos"]:
    """Word indices of tokens, with two extra words for tokens before and after the sentence."""
    owned = word >= 0
    before = owned.int().cumsum(1) == 0
    behind = owned.flip(1).int().cumsum(1).flip(1) == 0
    made = word.where(owned, torch.where(before, width, -1))
    return torch.where(behind & real & ~before, width + 1, made)


class _Probe(torch.nn.Module):
    """Probe, linear in all heads' attention, with weights that may depend on word vectors."""

    def __init__(self, heads: int, width: int, seed: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, heads))
        self.root = torch.nn.Parameter(torch.zeros(2))
        # one map of query-word and key-word vectors per direction
        self.words = torch.nn.Parameter(torch.zeros(2, 2, width, heads)) if width else None

    def forward(
        self, maps: Float[Tensor, "head word column"], vectors: Float[Tensor, "word width"]
    ) -> Float[Tensor, "word answer"]:
        """Scores for each word's head; the last class is the root."""
        n = maps.shape[1]
        between = maps[:, :, :n]
        scores = torch.einsum("hij,h->ij", between, self.weight[0])
        scores = scores + torch.einsum("hji,h->ij", between, self.weight[1])
        if self.words is not None:
            for direction, seen in enumerate((between, between.mT)):
                own, other = (vectors @ self.words[direction, side] for side in (0, 1))
                scores = scores + torch.einsum("hij,ih->ij", seen, own)
                scores = scores + torch.einsum("hij,jh->ij", seen, other)
        root = maps[:, :, n:].mean(0) @ self.root
        scores = scores.masked_fill(torch.eye(n, dtype=torch.bool), float("-inf"))
        return torch.cat([scores, root[:, None]], 1)

    def train_on(self, maps: Tensor, vectors: Tensor, answers: Tensor) -> Tensor:
        """Cross-entropy of one sentence."""
        return torch.nn.functional.cross_entropy(self(maps, vectors), answers)

    def fit(
        self,
        maps: Sequence[Tensor],
        vectors: Sequence[Tensor],
        answers: Sequence[Tensor],
        chosen: list[int],
        epochs: int,
        rate: float,
        seed: int,
    ) -> None:
        """Train on the chosen sentences, in a new random order each epoch."""
        adam = torch.optim.Adam(self.parameters(), lr=rate)
        rng = Random(seed)  # noqa: S311  # seeded
        with torch.enable_grad():
            for _ in range(epochs):
                rng.shuffle(chosen)
                for number in chosen:
                    adam.zero_grad()
                    loss = self.train_on(maps[number], vectors[number], answers[number])
                    torch.autograd.backward(loss)
                    adam.step()

    def shares(self, shape: ModelShape) -> Float[np.ndarray, "direction layer head"]:
        """Weight of each head in each direction; NaN in layers without attention."""
        found = np.full((2, shape.n_layers, shape.n_heads), np.nan)
        own = self.weight.detach().numpy().reshape(2, -1, shape.n_heads)
        found[:, list(shape.attention_layers)] = own
        return found


@torch.no_grad()
def _uas(
    probe: _Probe,
    maps: Sequence[Tensor],
    vectors: Sequence[Tensor],
    answers: Sequence[Tensor],
    bank: Treebank,
    chosen: Bool[Tensor, " batch"],
) -> float:
    """Unlabelled attachment score on the chosen sentences."""
    right = total = 0
    for number in chosen.nonzero()[:, 0].tolist():
        counted = _counted(bank.sentences[number])
        named = probe(maps[number], vectors[number]).argmax(-1)
        right += int(((named == answers[number]) & counted).sum())
        total += int(counted.sum())
    return right / max(total, 1)
