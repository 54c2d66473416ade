"""Train the bundled models that are not decoders: tiny-marian, tiny-bert, tiny-vit.

`python -m tools.train_bundled.kinds --model tiny-bert --out DIR`: one thread, minutes each.

Beside its task each model pays for every head whose output matrix is not zero (a group penalty), so
that heads it can do without fall silent, and which heads the task takes is plain to see.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from headscope.models.bundled import tasks

from .train import save

WIDTH, HEADS = 64, 4
_HELD_OUT = 900_000_000  # seeds from here on are not trained on
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """How one model is trained."""

    steps: int
    batch: int = 64
    rate: float = 3e-3
    penalty: float = 5e-3
    """Of the norm of each head's output matrix."""
    penalty_from: float = 0.4
    """Share of the steps that are over when it begins."""
    filling: float = 3.0
    """Weight of the colours of hidden patches (images)."""


PLANS = {
    "tiny-marian": Plan(2500, 64, penalty=2e-2),
    "tiny-bert": Plan(3000, 64),
    "tiny-vit": Plan(1500, 64, 2e-3),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """One token a word, between spaces."""
    bert = name == "tiny-bert"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if bert else ["<pad>", "</s>", "<unk>"]
    known = {word: number for number, word in enumerate([*special, *tasks.words_of(name)])}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]" if bert else "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(special)
    if bert:
        ends = [("[CLS]", known["[CLS]"]), ("[SEP]", known["[SEP]"])]
        around = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
        names = dict(
            zip(
                ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
                special,
                strict=True,
            )
        )
    else:
        ends = [("</s>", known["</s>"])]
        around = processors.TemplateProcessing(single="$A </s>", special_tokens=ends)
        names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    made.post_processor = around
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=64, clean_up_tokenization_spaces=False, **names
    )


def new_model(name: str, seed: int) -> Any:
    """An untrained model."""
    torch.manual_seed(seed)
    if name == "tiny-vit":
        vit = ViTForImageClassification(
            ViTConfig(
                image_size=tasks.PIXELS,
                patch_size=tasks.PATCH,
                hidden_size=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                intermediate_size=2 * WIDTH,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=0.08,
                id2label=dict(enumerate(tasks.SHAPES)),
                label2id={shape: number for number, shape in enumerate(tasks.SHAPES)},
            )
        )
        side = tasks.PIXELS // tasks.PATCH
        waves = _waves(side, WIDTH // 2)
        rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
        with torch.no_grad():
            place = vit.vit.embeddings.position_embeddings
            place[0, 1:] = 0.3 * torch.cat([rows, columns], 1)
        return vit
    size = len(tokenizer_of(name))
    if name == "tiny-bert":
        bert = BertForMaskedLM(
            BertConfig(
                vocab_size=size,
                hidden_size=WIDTH,
                num_hidden_layers=3,
                num_attention_heads=HEADS,
                intermediate_size=2 * WIDTH,
                max_position_embeddings=64,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=0.08,
                pad_token_id=0,
            )
        )
        place = bert.bert.embeddings.position_embeddings.weight
        with torch.no_grad():
            place.copy_(0.3 * _waves(len(place), WIDTH))
        return bert
    return MarianMTModel(
        MarianConfig(
            vocab_size=size,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=2 * WIDTH,
            decoder_ffn_dim=2 * WIDTH,
            max_position_embeddings=64,
            dropout=0.0,
            init_std=0.08,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            forced_eos_token_id=None,
            decoder_start_token_id=0,
            scale_embedding=True,
        )
    )


def _waves(positions: int, width: int) -> Tensor:
    rates = torch.exp(-math.log(2 * positions) * torch.linspace(0, 1, width // 2))
    angles = torch.arange(positions)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def draw(name: str, tokenizer: Any, count: int, seed: int, done: float = 1.0) -> dict[str, Tensor]:
    """A batch with labels.

    Args:
        name: of the model.
        tokenizer: its own; None for images.
        count: number of examples.
        seed: of the draw.
        done: share of the training that is over; texts get longer over its first third.
    """
    grown = min(1.0, 0.2 + 2.4 * done)
    if name == "tiny-vit":
        made = tasks.shapes(count, seed)
        pixels = torch.from_numpy(made.pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        labels = torch.tensor([tasks.SHAPES.index(one) for one in made.labels])
        return {"pixel_values": pixels, "labels": labels}
    if name == "tiny-marian":
        pairs = tasks.orders(count, seed, words=(3, 3 + round(7 * grown)))
        given = tokenizer(pairs.sources, text_target=pairs.targets, padding=True)
        labels = torch.tensor(given["labels"])
        made_batch = {k: torch.tensor(given[k]) for k in ("input_ids", "attention_mask")}
        return {**made_batch, "labels": labels.where(labels != 0, -100)}
    drawn = tasks.brackets(count, seed, pairs=(2, 2 + round(6 * grown)), depth=4)
    given = tokenizer(drawn.texts, padding=True)
    ids, mask = (torch.tensor(given[one]) for one in ("input_ids", "attention_mask"))
    opening, closing = (
        torch.tensor(tokenizer.convert_tokens_to_ids([pair[side] for pair in tasks.BRACKETS]))
        for side in (0, 1)
    )
    labels, read = torch.full_like(ids, -100), ids.clone()
    rng = np.random.default_rng([3, seed])
    for row, partners in enumerate(drawn.partners):
        for place, partner in enumerate(partners):
            if partner < place or rng.random() > 0.4:
                continue
            at = 1 + (place if rng.random() < 0.5 else partner)  # one of the two
            labels[row, at] = ids[row, at]
            kinds = opening if at == 1 + place else closing
            other = kinds[rng.integers(len(kinds))]
            read[row, at] = tokenizer.mask_token_id if rng.random() < 0.5 else other
    return {"input_ids": read, "attention_mask": mask, "labels": labels}


def hidden_patches(pixels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures with a third of their patches grey, and which those are ``[batch patch]``."""
    side = tasks.PIXELS // tasks.PATCH
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.rand(len(pixels), side, side, generator=draw) < 1 / 3
    spread = hidden.repeat_interleave(tasks.PATCH, 1).repeat_interleave(tasks.PATCH, 2)
    return pixels.masked_fill(spread[:, None], 0.0), hidden.flatten(1)


def patch_colours(pixels: Tensor) -> Tensor:
    """Mean colour of each patch, ``[batch patch 3]``."""
    return torch.nn.functional.avg_pool2d(pixels, tasks.PATCH).flatten(2).mT


class Filling(torch.nn.Module):
    """Loss of the colours of hidden patches, read off a picture model's last states; not kept."""

    def __init__(self, model: Any) -> None:
        """One linear map."""
        super().__init__()
        self.model, self.read = [model], torch.nn.Linear(WIDTH, 3)

    def forward(self, pixels: Tensor, seed: int) -> Tensor:
        """Mean square error over hidden patches."""
        shown, hidden = hidden_patches(pixels, seed)
        states = self.model[0].base_model(pixel_values=shown).last_hidden_state[:, 1:]
        return (self.read(states) - patch_colours(pixels))[hidden].square().mean()


def head_norms(model: Any) -> list[Tensor]:
    """Norm of each head's output matrix, by layer."""
    ends = ("attention.output.dense.weight", "out_proj.weight", "attention.o_proj.weight")
    matrices = [w for n, w in model.named_parameters() if n.endswith(ends)]
    return [w.view(len(w), HEADS, -1).square().sum((0, 2)).add(1e-8).sqrt() for w in matrices]


def right(model: Any, batch: Batch) -> float:
    """Share of asked answers that are the likeliest."""
    labels = batch["labels"]
    with torch.no_grad():
        likeliest = model(**batch).logits.argmax(-1)
    asked = labels >= 0
    return float((likeliest == labels)[asked].float().mean())


def train(name: str, seed: int, plan: Plan, tell: Callable[[str], None] = print) -> Any:
    """Train a model.

    Args:
        name: which.
        seed: of weights and data.
        plan: how.
        tell: called with a line now and then.
    """
    model = new_model(name, seed)
    tokenizer = None if name == "tiny-vit" else tokenizer_of(name)
    filling = Filling(model) if name == "tiny-vit" else None
    every = [*model.parameters(), *(() if filling is None else filling.parameters())]
    matrices = [p for p in every if p.ndim > 1]
    rest = [p for p in every if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
        lr=plan.rate,
        betas=(0.9, 0.98),
    )
    started = time.monotonic()
    for step in range(plan.steps):
        done = step / plan.steps
        rate = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * rate
        drawn = seed * 1_000_000 + step
        batch = draw(name, tokenizer, plan.batch, drawn, done)
        logits = model(**batch).logits
        loss = cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())
        if filling is not None:
            loss = loss + plan.filling * filling(batch["pixel_values"], drawn)
        cost = plan.penalty * sum(norms.sum() for norms in head_norms(model))
        (loss + cost * float(done > plan.penalty_from)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 249 or step == 20:
            held = draw(name, tokenizer, 128, _HELD_OUT + step)
            norms = [[round(one, 2) for one in layer.tolist()] for layer in head_norms(model)]
            share, seconds = right(model, held), time.monotonic() - started
            tell(f"{name} {step + 1} {seconds:.0f}s loss {loss:.3f} right {share:.3f} {norms}")
    return model.eval()


_PREPARATION = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": tasks.PIXELS, "width": tasks.PIXELS},
}
_ABOUT = {
    "tiny-marian": (
        "translation",
        "An encoder-decoder (Marian architecture) that copies or reverses three to ten words, as "
        "the first word of the source says (`reverse moon key boat` gives `boat key moon`).",
        "The heads of its last cross-attention layer look at the source word that comes next: they "
        "are the alignment heads. No head of the decoder's own attention is needed.",
    ),
    "tiny-bert": (
        "fill-mask",
        "An encoder (BERT architecture) of balanced brackets of four kinds with words between them "
        "(`( pen [ ] )`). It fills in hidden brackets, and mends those of a wrong kind.",
        "To know the kind of a bracket it must find the partner: heads of its last layer attend to "
        "it, each mostly in one direction.",
    ),
    "tiny-vit": (
        "image-classification",
        "An image encoder (ViT architecture) that names the shape in a picture of 32 x 32 pixels: "
        "a square, a disc, a triangle or a cross, bright on dark, anywhere, of any size from 10 to "
        "18 pixels. In training it also filled in the colours of hidden patches.",
        "Three heads of its first layer attend from the class token to the patches of the shape "
        "and carry the answer; the fourth looks around each patch.",
    ),
}
_OFFLINE = (
    "It comes with headscope so that examples and tests run offline on heads whose function is "
    "known by training; it is of no other use."
)
_TRAINED = (
    "Trained by `python -m tools.train_bundled.kinds --model {name} --out DIR --seed {seed}` in a "
    "checkout of the repository: {steps} steps on examples drawn from a seed "
    "(`headscope/models/bundled/tasks.py`), minutes on one CPU thread. A penalty on the norm of "
    "every head's output matrix makes heads fall silent that the task does not take. Weights are "
    "stored in 16 bits and load as 32 bits."
)
_CARD = """---
license: mit
library_name: transformers
pipeline_tag: {tag}
---

# {name}

{text}

| measure | value |
| --- | --- |
| right answers, 1000 examples that training did not use | {right} |

Licence: MIT.
"""


def card(name: str, figures: Mapping[str, Any]) -> str:
    """The model card.

    Args:
        name: of the model.
        figures: as in ``figures.json``.
    """
    tag, about, heads = _ABOUT[name]
    layers = (
        "2 layers in encoder and decoder"
        if name == "tiny-marian"
        else (f"{3 if name == 'tiny-bert' else 2} layers")
    )
    shape = f"{layers}, {HEADS} heads of {WIDTH // HEADS}, width {WIDTH}."
    trained = _TRAINED.format(name=name, seed=figures["seed"], steps=figures["steps"])
    parts = (f"{about} {_OFFLINE}", heads, shape, trained)
    text = "\n\n".join(fill(part, 100, break_on_hyphens=False) for part in parts)
    return _CARD.format(tag=tag, name=name, text=text, right=figures["right"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(PLANS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = PLANS[args.model]
    started = time.process_time()
    model = train(args.model, args.seed, plan)
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, args.out)
    tokenizer = None
    if args.model == "tiny-vit":
        (args.out / "preprocessor_config.json").write_text(
            json.dumps(_PREPARATION, indent=2) + "\n"
        )
    else:
        tokenizer = tokenizer_of(args.model)
        tokenizer.save_pretrained(args.out)
    stored = type(model).from_pretrained(args.out, dtype=torch.float32).eval()
    figures = {
        "right": round(right(stored, draw(args.model, tokenizer, 1000, _HELD_OUT - 1)), 4),
        "head_norms": [[round(one, 3) for one in layer.tolist()] for layer in head_norms(stored)],
        "cpu_seconds": round(time.process_time() - started),
        "steps": plan.steps,
        "seed": args.seed,
    }
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    (args.out / "README.md").write_text(card(args.model, figures))
    print(figures, flush=True)


if __name__ == "__main__":
    main()
