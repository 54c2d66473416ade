"""The logit lens: each layer's prediction, and the tokens that heads promote."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.capture import check_fits, need_probe, passes
from headscope.errors import InputError, nearest, whole
from headscope.heads import ModelShape
from headscope.lens.linear import ResidualLens
from headscope.lens.reading import (
    SITES,
    Prompt,
    Promptish,
    States,
    Token,
    Top,
    logits_added,
    logits_of,
    rank_of,
    read_prompt,
    read_token,
    row_chunks,
    token_texts,
    top_of,
)
from headscope.models.hf.seq2seq import Seq2SeqModel
from headscope.models.hf.sublayers import (
    encoder_states,
    need_encoder_decoder,
    read_state,
    write_from,
)
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import BlockStates, Reads, TapView, Texts, at_blocks, at_final, at_layers
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table import DecoderLens
from headscope.table.lens import HeadWords, LensGrid


@checked
@own_types()
def logit_lens(
    model: HeadModel,
    prompt: Promptish,
    site: str = "residual",
    *,
    target: Token | Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    k: int = 5,
    lens: ResidualLens | None = None,
) -> LensGrid:
    """Decode one site of every layer in the vocabulary, at every position.

    ``softmax(unembedding(x))`` with the model's own final norm (its scale taken from ``x`` itself),
    unembedding, logit scale and soft cap. ``residual``: x is the input of block 0 (``embedding``)
    or the output of block l (``L0``, ...); the last row is the model itself. ``attention`` and
    ``mlp``: x is their output, read as if it were the stream; for single heads with the run's scale
    held, use :func:`head_lens` and :func:`attribute`.

    Takes one forward pass; logits exist for a few positions at a time.

    Args:
        model: from :func:`headscope.load`.
        prompt: text, or token ids.
        site: ``residual``, ``attention`` or ``mlp``.
        target: token whose rank and probability are tracked: one for all positions, or one id per
            position; default: the model's own most likely next token at each position.
        positions: positions to use. Default: all.
        k: number of likely tokens to keep per cell.
        lens: a learned lens for ``residual``; default: the identity, the plain logit lens.

    Raises:
        InputError: if the prompt is empty or too long, or an argument does not fit it.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens". Known weakness: early layers
    may use another basis; the tuned lens corrects for that.

    Example:
        >>> import headscope as hs
        >>> grid = logit_lens(hs.load(), [5, 9, 5, 9])
        >>> grid.rows[0], grid.kl.shape[1], float(grid.kl[-1].max()) < 1e-5
        ('embedding', 4, True)
    """
    return logit_lenses(model, prompt, (site,), target=target, positions=positions, k=k, lens=lens)[
        site
    ]


@checked
@own_types()
@torch.no_grad()
def logit_lenses(
    model: HeadModel,
    prompt: Promptish,
    sites: Sequence[str] = SITES,
    *,
    target: Token | Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    k: int = 5,
    lens: ResidualLens | None = None,
) -> dict[str, LensGrid]:
    """Read several sites in one forward pass; arguments as for :func:`logit_lens`.

    Args:
        model: model to run.
        prompt: text or token ids.
        sites: sites to read: ``residual``, ``attention`` or ``mlp``.
        target: token whose rank and probability are followed; see :func:`logit_lens`.
        positions: positions to read. Default: all.
        k: number of top tokens per cell.
        lens: learned lens, only for the site ``residual``.

    Returns:
        A grid per site.

    Raises:
        InputError: if a site is unknown, k is below 1, a lens does not fit, or positions is empty.

    Example:
        >>> grids = hs.lens.logit_lenses(model, [5, 9, 5, 9], ["attention", "mlp"])
        >>> [(site, grid.rows[0], grid.kl.shape[1]) for site, grid in grids.items()]
        [('attention', 'L0', 4), ('mlp', 'L0', 4)]
    """
    for site in sites:
        if site not in SITES:
            raise InputError(nearest(str(site), SITES, kind="site"))
    if k < 1:
        raise InputError(f"k={k}: give 1 or more.")
    if lens is not None:
        if tuple(sites) != ("residual",):
            raise InputError("a learned lens reads the residual stream: site='residual'.")
        lens.check(model)
    text = read_prompt(model, prompt)
    places = range(len(text)) if positions is None else [text.at(one) for one in positions]
    at = torch.tensor(list(places), device=model.device)
    if not len(at):
        raise InputError("positions is empty: name at least one, or leave it out for all.")
    follow = _targets(model, target, len(at))
    states = States(torch.zeros_like(at), at, tuple(sites))
    nothing = torch.empty(0, dtype=torch.long)
    model.run(text.ids[None], reads=states.reads(model.shape), logits_at=nothing)
    return {
        site: _grid(model, text, at, states.rows[site], states.final, site, follow, k, lens)
        for site in sites
    }


def _targets(
    model: HeadModel, target: Token | Sequence[int] | None, count: int
) -> Int[Tensor, " pos"] | None:
    if target is None:
        return None
    if isinstance(target, str | int):
        ids = [read_token(model, target)] * count
    else:
        ids = [read_token(model, int(one)) for one in target]
    if len(ids) != count:
        raise InputError(f"{len(ids)} targets were given for {count} positions.")
    return torch.tensor(ids, device=model.device)


@dataclass(frozen=True, eq=False)
class _Cells:
    """Facts about some cells of a grid."""

    top: Top
    log_probs: Float[Tensor, "row k"]
    entropy: Float[Tensor, " row"]
    kl: Float[Tensor, " row"]
    rank: Int[Tensor, " row"]
    target_log_prob: Float[Tensor, " row"]


def cells_of(
    logits: Float[Tensor, "row d_vocab"],
    final: Float[Tensor, "row d_vocab"],
    targets: Int[Tensor, " row"],
    k: int,
) -> _Cells:
    """Facts to keep about some rows of logits.

    Args:
        logits: logits of the lens.
        final: log-probabilities of the model at the same positions.
        targets: tokens to track.
        k: number of tokens to keep.
    """
    log_probs = logits.log_softmax(1)
    top = top_of(logits, k)
    kl: Tensor = (final.exp() * (final - log_probs)).sum(1)
    entropy: Tensor = -(log_probs.exp() * log_probs).sum(1)
    return _Cells(
        top,
        log_probs.gather(1, top.ids),
        entropy,
        kl.clamp_min(0),
        rank_of(logits, targets),
        log_probs.gather(1, targets[:, None])[:, 0],
    )


def _grid(
    model: HeadModel,
    text: Prompt,
    at: Int[Tensor, " pos"],
    rows: dict[str, Float[Tensor, "pos d_model"]],
    final: Float[Tensor, "pos d_model"],
    site: str,
    targets: Int[Tensor, " pos"] | None,
    k: int,
    lens: ResidualLens | None,
) -> LensGrid:
    unembedding, names = model.unembedding, tuple(rows)
    parts: list[list[_Cells]] = [[] for _ in names]
    followed = []
    for chosen in row_chunks(len(at), unembedding):
        last = logits_of(unembedding, final[chosen])
        wanted = top_of(last, 1).ids[:, 0] if targets is None else targets[chosen]
        followed.append(wanted)
        last = last.log_softmax(1)
        for place, name in enumerate(names):
            x = rows[name][chosen]
            x = x if lens is None else lens.translate(x, place)
            parts[place].append(cells_of(logits_of(unembedding, x), last, wanted, k))

    def whole(name: str) -> np.ndarray:
        columns = [torch.cat([getattr(cells, name) for cells in row]) for row in parts]
        return torch.stack(columns).cpu().numpy()

    ids = np.stack([torch.cat([cells.top.ids for cells in row]).cpu().numpy() for row in parts])
    logits = np.stack(
        [torch.cat([cells.top.values for cells in row]).cpu().numpy() for row in parts]
    )
    follow = torch.cat(followed).tolist()
    texts = np.array(token_texts(model.tokenizer, ids.ravel().tolist()), dtype=object)
    return LensGrid(
        name=f"{'logit lens' if lens is None else lens.title}, {site}",
        rows=names,
        positions=at.cpu().numpy(),
        tokens=tuple(text.texts[one] for one in at.tolist()),
        ids=ids,
        texts=texts.reshape(ids.shape),
        logits=logits.astype(np.float64),
        probabilities=np.exp(whole("log_probs").astype(np.float64)),
        entropy=whole("entropy").astype(np.float64),
        kl=whole("kl").astype(np.float64),
        targets=np.array(follow),
        target_texts=tuple(token_texts(model.tokenizer, follow)),
        target_rank=whole("rank"),
        target_log_prob=whole("target_log_prob").astype(np.float64),
        provenance=origin(model, reading="lens", tokens=len(text), site=site),
    )


@checked
@own_types()
@torch.no_grad()
def head_lens(model: HeadModel, prompt: Promptish, position: int = -1, *, k: int = 10) -> HeadWords:
    """Tokens that each head's output at one position promotes and suppresses most.

    ``(write_h . d_v) / s`` minus its mean over the vocabulary v (a shift of all logits changes no
    prediction), in logits: d_v is the residual direction of token v's logit, s the final norm's
    denominator in this run, held fixed like that of a norm after attention. Up to that mean, the
    value of token v is the head's part in :func:`attribute` of v. Pruned heads have no values, and
    requesting them is an error.

    Args:
        model: from :func:`headscope.load`.
        prompt: text, or token ids.
        position: position of the head's output.
        k: number of tokens on each side.

    Raises:
        InputError: if the prompt or position does not fit the model.

    Source: nostalgebraist 2020; Elhage et al. 2021, section on the direct path. Known weakness:
    early heads write for later layers, not for the vocabulary.

    Example:
        >>> import headscope as hs
        >>> words = head_lens(hs.load(), [5, 9, 5, 9], k=3)
        >>> len(words.promoted("L0H0")), len(words.suppressed("L0H0"))
        (3, 3)
    """
    if k < 1:
        raise InputError(f"k={k}: give 1 or more.")
    text = read_prompt(model, prompt)
    at = text.at(position)
    writes = HeadWrites(model, at)
    nothing = torch.empty(0, dtype=torch.long)
    model.run(text.ids[None], reads=writes.reads(model.shape), logits_at=nothing)
    vectors = torch.cat(list(writes.vectors.values())) / model.unembedding.scale(writes.final)
    chunks = row_chunks(len(vectors), model.unembedding)
    logits = (logits_added(model.unembedding, vectors[chosen]) for chosen in chunks)
    return head_words(model, text, at, tuple(writes.vectors), logits, k)


def head_words(
    model: HeadModel,
    text: Prompt,
    at: int,
    layers: tuple[int, ...],
    logits: Iterable[Float[Tensor, "row d_vocab"]],
    k: int,
) -> HeadWords:
    """Largest and smallest logits of every head, relative to their mean over the vocabulary.

    Args:
        model: the model.
        text: the prompt.
        at: position of the heads' outputs.
        layers: layers of the heads.
        logits: contributions of heads, layer by layer, head by head, in pieces of any size.
        k: number of tokens on each side.
    """
    best: tuple[list[Top], list[Top]] = ([], [])
    for piece in logits:
        centred = piece - piece.mean(1, keepdim=True)
        best[0].append(top_of(centred, k))
        best[1].append(top_of(-centred, k))
    shape = (len(layers), model.shape.n_heads, -1)
    ids = np.stack([_joined(side, "ids").reshape(shape) for side in best], 2)
    values = np.stack([_joined(side, "values").reshape(shape) for side in best], 2)
    values[:, :, 1] *= -1
    texts = np.array(token_texts(model.tokenizer, ids.ravel().tolist()), dtype=object)
    return HeadWords(
        token=text.texts[at],
        position=at,
        layers=layers,
        ids=ids,
        texts=texts.reshape(ids.shape),
        values=values.astype(np.float64),
        removed=frozenset(model.shape.removed),
        provenance=origin(model, reading="head lens", tokens=len(text), position=at),
    )


def _joined(tops: list[Top], name: str) -> np.ndarray:
    return np.concatenate([getattr(one, name).cpu().numpy() for one in tops])


@dataclass
class HeadWrites:
    """Reader that keeps every head's write to the residual stream at one position.

    Attributes:
        at: the position.
        vectors: writes by layer, with the scale of a norm after attention held.
        final: last residual stream at the position.
    """

    model: HeadModel
    at: int
    vectors: dict[int, Float[Tensor, "head d_model"]] = field(default_factory=dict)
    final: Float[Tensor, " d_model"] = field(default_factory=lambda: torch.empty(0))

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to read: head outputs, the norms after them, and the input of the final norm."""
        layers = at_layers(shape, self._on_layer)
        return layers | at_blocks(shape, self._on_block) | at_final(self._on_final)

    def _on_layer(self, view: TapView) -> None:
        """Store each head's write, before a norm that may follow attention."""
        weights = self.model.output_weights(view.layer).float()
        z = view.z[0, self.at].float()
        self.vectors[view.layer] = einsum(
            z, weights, "head d_head, head d_head d_model -> head d_model"
        )

    def _on_block(self, states: BlockStates) -> None:
        """Apply the norm after attention to the stored writes."""
        if states.head_sum is not None:
            write = self.model.parts.attention_write(states.layer)
            vectors = self.vectors[states.layer]
            scale = write.scale(states.head_sum[0, self.at]).expand(len(vectors))
            self.vectors[states.layer] = write.vectors(vectors, scale)

    def _on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Store the position's last residual stream."""
        self.final = residual[0, self.at].float()


SOURCE = "Langedijk et al. 2024 (arXiv 2310.03686), DecoderLens"


@checked
@own_types()
@torch.no_grad()
def decoder_lens(
    model: HeadModel,
    probe: Probe,
    layers: Sequence[int] | None = None,
    *,
    norm: bool = True,
    length: int = 0,
    batch_size: int | None = None,
) -> DecoderLens:
    """Run the decoder on an intermediate layer of the encoder instead of the last one.

    Layer l is the output of the first l encoder layers, 0 the input of the first; the encoder's
    final norm is applied, if there is one. The last layer is the model itself. Loss is the mean
    teacher-forced cross-entropy of the target's tokens.

    Args:
        model: an encoder-decoder.
        probe: sources and targets, from :func:`headscope.probes.translation`.
        layers: encoder layers; default: all from 0 on.
        norm: apply the encoder's final norm.
        length: also generate this many tokens greedily for every example; 0: none.
        batch_size: examples per pass.

    Raises:
        InputError: if the model is not an encoder-decoder or lacks a layer, or the probe has no
            targets.
        UnsupportedModelError: if something other than a norm follows the encoder's last layer.

    Source: Langedijk et al. 2024, "DecoderLens: Layerwise Interpretation of Encoder-Decoder
    Transformers".

    Example:
        >>> model = hs.load("tiny-marian")
        >>> probe = hs.probes.translation(model, ["reverse moon key boat"], ["boat key moon"])
        >>> lens = hs.lens.decoder_lens(model, probe, length=4)
        >>> lens.layers, lens.texts[-1][0]
        ((0, 1, 2), 'boat key moon')
    """
    seq2seq = need_encoder_decoder(model)
    need_probe(probe)
    probe.of_source  # noqa: B018  # refuses a probe without one
    view = seq2seq.stack("cross")
    check_fits(view, probe)
    if not bool((probe.targets >= 0).any()):
        raise InputError("the probe has no targets: make it with hs.probes.translation.")
    depth = seq2seq.stack("encoder").shape.n_layers
    chosen = tuple(range(depth + 1)) if layers is None else tuple(layers)
    for layer in chosen:
        if not 0 <= whole(layer, "layers") <= depth:
            raise InputError(f"the encoder of {seq2seq.name} has layers 0 to {depth}, not {layer}.")
    whole(length, "length", 0)

    def run(batch: Probe, _halvings: int) -> list[tuple[Tensor, Tensor, list[str]]]:
        texts = Texts.of(batch)
        states = encoder_states(seq2seq, texts)
        asked = batch.targets.where(batch.real, -1)
        found = []
        for layer in chosen:
            state = states.at(layer, norm)
            loss, right = _held(read_state(seq2seq, state, texts), asked.to(state.device))
            said = write_from(seq2seq, state, texts, length) if length else None
            found.append((loss, right, [] if said is None else _words(seq2seq, said)))
        return found

    parts = [found for _, found in passes(view, probe, run, batch_size=batch_size)]
    columns = list(zip(*parts, strict=True))
    loss, right = (
        torch.stack([torch.cat([part[at] for part in column]) for column in columns]).numpy()
        for at in (0, 1)
    )
    return DecoderLens(
        layers=chosen,
        texts=tuple(tuple(text for part in column for text in part[2]) for column in columns),
        loss=loss,
        right=right,
        normed=norm,
        provenance=origin(view, probe, reading="decoder_lens", source=SOURCE, length=length),
    )


def _held(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of every example's targets, and share of those that are the most likely token."""
    asked = targets >= 0
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.clamp_min(0).flatten(), reduction="none"
    ).view_as(targets)
    right = (logits.argmax(-1) == targets).to(loss)
    count = asked.sum(1).clamp_min(1)
    kept = [(one * asked).sum(1) / count for one in (loss, right)]
    return kept[0].cpu(), kept[1].cpu()


def _words(model: Seq2SeqModel, written: Tensor) -> list[str]:
    """Generated texts, each cut at its end."""
    tokenizer, ends = model.tokenizer, model.module.generation_config.eos_token_id
    known = {ends} if isinstance(ends, int) else set(ends or ())
    texts = []
    for row in written.tolist():
        stop = next((at for at, one in enumerate(row) if one in known), len(row))
        kept = row[:stop]
        said = " ".join(map(str, kept)) if tokenizer is None else tokenizer.decode(kept)
        texts.append(str(said))
    return texts
