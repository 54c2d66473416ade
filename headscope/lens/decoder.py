"""What a decoder makes of each layer of its encoder (DecoderLens)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headscope.capture import check_fits, need_probe, passes
from headscope.errors import InputError, whole
from headscope.models.hf.seq2seq import Seq2SeqModel
from headscope.models.hf.sublayers import (
    encoder_states,
    need_encoder_decoder,
    read_state,
    write_from,
)
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Texts
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table import DecoderLens

SOURCE = "Langedijk et al. 2024 (arXiv 2310.03686), DecoderLens"


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
    """Let the whole decoder read an intermediate layer of the encoder in place of the last one.

    Layer l is what leaves the first l layers of the encoder, 0 what enters them; it goes through
    the encoder's final norm, where there is one. The last layer is the model itself. Loss is the
    mean cross entropy of the target's tokens, teacher-forced.

    Args:
        model: an encoder-decoder.
        probe: sources and targets, of :func:`headscope.probes.translation`.
        layers: of the encoder; default: all from 0 on.
        norm: apply the encoder's final norm.
        length: also write so many tokens greedily for every example; 0: write nothing.
        batch_size: examples per pass.

    Raises:
        InputError: if the model is not an encoder-decoder, has no such layer, or the probe asks for
            no target.
        UnsupportedModelError: if something else than a norm follows the encoder's last layer.

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
        raise InputError("the probe asks for no target token: make it with hs.probes.translation.")
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
    """Mean loss of every example's targets, and share of those that are the likeliest."""
    asked = targets >= 0
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.clamp_min(0).flatten(), reduction="none"
    ).view_as(targets)
    right = (logits.argmax(-1) == targets).to(loss)
    count = asked.sum(1).clamp_min(1)
    kept = [(one * asked).sum(1) / count for one in (loss, right)]
    return kept[0].cpu(), kept[1].cpu()


def _words(model: Seq2SeqModel, written: Tensor) -> list[str]:
    """Texts up to the end of each."""
    tokenizer, ends = model.tokenizer, model.module.generation_config.eos_token_id
    known = {ends} if isinstance(ends, int) else set(ends or ())
    texts = []
    for row in written.tolist():
        stop = next((at for at, one in enumerate(row) if one in known), len(row))
        kept = row[:stop]
        said = " ".join(map(str, kept)) if tokenizer is None else tokenizer.decode(kept)
        texts.append(str(said))
    return texts
