"""Tiny encoders with wide random weights, a tokenizer, and what plain transformers says of them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

VOCAB, WIDTH, HEADS, D_HEAD, LAYERS, CONTEXT = 61, 32, 4, 8, 3, 130
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_TEXT = (
    "the cat sat on mat dog ran fast to house and saw a big red bird in sky . , ! when mary john "
    "went store gave drink"
)
WORDS = _TEXT.split()
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
}
_DISTILBERT = {
    "vocab_size": VOCAB, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 48,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**_SIZES),
    "roberta": lambda: transformers.RobertaConfig(**_SIZES),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**_SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(**_DISTILBERT),
    "electra": lambda: transformers.ElectraConfig(**_SIZES, embedding_size=16),
    "modernbert": lambda: transformers.ModernBertConfig(
        **_SIZES, local_attention=10, pad_token_id=0, cls_token_id=2, sep_token_id=3,
        bos_token_id=2, eos_token_id=3,
    ),
    "albert": lambda: transformers.AlbertConfig(
        **_SIZES, embedding_size=16, num_hidden_groups=2, inner_group_num=1
    ),
    "mpnet": lambda: transformers.MPNetConfig(**_SIZES),
    "megatron-bert": lambda: transformers.MegatronBertConfig(**_SIZES),
    "esm": lambda: transformers.EsmConfig(
        **_SIZES, pad_token_id=0, mask_token_id=4, position_embedding_type="rotary"
    ),
}  # fmt: skip


def encoder(name: str, seed: int = 0) -> Any:
    """A masked language model whose attention is far from flat."""
    torch.manual_seed(seed)
    return widened(transformers.AutoModelForMaskedLM.from_config(CONFIGS[name]()))


def widened(module: Any) -> Any:
    """The same module with weights drawn wide, and gains and biases moved off 1 and 0."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
            else:
                gain = "norm" in name.lower() or ".ln." in name
                weight.normal_(std=0.3).add_(gain and name.endswith("weight"))
    return module.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, between ``[CLS]`` and ``[SEP]``."""
    special = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIALS, strict=True))
    vocabulary = {word: number for number, word in enumerate([*SPECIALS, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIALS[1]))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def text_of(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    """Ids that are no special tokens."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (batch, length), generator=draw)


def eager_rows(module: Any, **inputs: Tensor) -> list[Tensor]:
    """Patterns ``[batch head query key]`` of every layer, by the model's own eager attention."""
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return list(module(**inputs, output_attentions=True).attentions)
    finally:
        module.set_attn_implementation(before)


PROJECTIONS = (
    "attention.output.dense", "attention.out_lin", "attn.Wo", "attention.dense", "attn.o",
)  # fmt: skip


def projections(module: Any) -> list[torch.nn.Module]:
    """Output projection of attention, by layer."""
    found = [part for name, part in module.named_modules() if name.endswith(PROJECTIONS)]
    assert len(found) == LAYERS
    return found


def plain(
    module: Any, zeroed: Sequence[tuple[int, int]] = (), **inputs: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The model's own answer, with some heads set to zero by plain hooks, and what heads gave."""
    seen: list[Tensor] = []

    def hook(layer: int) -> Callable[..., Any]:
        def before(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].unflatten(-1, (HEADS, D_HEAD)).clone()
            for at, head in zeroed:
                if at == layer:
                    z[:, :, head] = 0
            seen.append(z)
            return (z.flatten(-2), *args[1:])

        return before

    with ExitStack() as stack, torch.no_grad():
        for layer, part in enumerate(projections(module)):
            stack.callback(part.register_forward_pre_hook(hook(layer)).remove)
        output = module(**inputs)
    answer: Tensor = output["logits"] if "logits" in output else output[0]
    return answer, seen
