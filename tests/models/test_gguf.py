"""Models from GGUF files equal the same models from folders; broken files give a sentence."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.errors import InputError, ModelLoadError
from headscope.models import loading as loading

gguf = pytest.importorskip("gguf")

_HEADS, _KV_HEADS, _LAYERS = 4, 2, 2


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words()),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=_LAYERS,
            num_attention_heads=_HEADS,
            num_key_value_heads=_KV_HEADS,
            max_position_embeddings=128,
            initializer_range=0.4,
            tie_word_embeddings=False,
            bos_token_id=len(words()) - 2,
            eos_token_id=len(words()) - 1,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ).eval()


def words() -> list[str]:
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "he", "<s>", "</s>"]


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of GGUF: rotary partners side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model: LlamaForCausalLM, leave_out: str = "") -> Path:
    """Write a llama as llama.cpp's converter does, unquantised."""
    config, file = model.config, gguf.GGUFWriter(path, "llama")
    file.add_block_count(_LAYERS)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(_HEADS)
    file.add_head_count_kv(_KV_HEADS)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(500.0)
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list(words())
    file.add_token_types([1] * (config.vocab_size - 2) + [3, 3])
    file.add_token_merges(["t h", "h e"])
    file.add_bos_token_id(config.bos_token_id)
    file.add_eos_token_id(config.eos_token_id)
    for name, value in tensors(model).items():
        if name != leave_out:
            file.add_tensor(name, np.ascontiguousarray(value))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for layer in range(_LAYERS):
        for short, long in names.items():
            value = state[f"model.layers.{layer}.{long}.weight"]
            heads = {"attn_q": _HEADS, "attn_k": _KV_HEADS}.get(short)
            value = value if heads is None else in_pairs(value, heads)
            found[f"blk.{layer}.{short}.weight"] = value
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.GGUF", llama())


def test_equal_to_the_folder(file: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    folder, found = hs.load(tmp_path), hs.load(file)
    assert found.shape == folder.shape
    assert found.dtype == torch.float32
    probe = hs.probes.repeated_tokens(folder, length=12, batch=3)
    names = ["induction", "previous_token", "entropy"]
    here, there = (hs.score(one, probe, names) for one in (folder, found))
    for name in names:
        np.testing.assert_allclose(there[name].mean, here[name].mean, atol=1e-6)
    weights = folder.module.state_dict()
    for name, value in found.module.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_the_tokenizer_comes_from_the_file(file: Path) -> None:
    tokenizer = hs.load(str(file)).tokenizer
    plain = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words())}, [("t", "h"), ("h", "e")])
    )
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids = tokenizer("the fox", add_special_tokens=False)["input_ids"]
    assert ids == plain.encode("the fox").ids
    assert tokenizer.convert_ids_to_tokens([ids[0]]) == ["th"]
    assert tokenizer.bos_token_id == len(words()) - 2


def test_a_dtype_can_be_chosen(file: Path) -> None:
    assert hs.load(file, dtype="bf16").dtype == torch.bfloat16


def test_a_file_without_a_weight_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "less.gguf", llama(), leave_out="blk.1.attn_v.weight")
    with pytest.raises(ModelLoadError, match=r"lacks 1 .*layers\.1\.self_attn\.v_proj"):
        hs.load(path)


def _cut(path: Path, whole: bytes) -> None:
    path.write_bytes(whole[: len(whole) // 2])


def _other(path: Path, _whole: bytes) -> None:
    path.write_bytes(b"PK\x03\x04 no model")


def _no_tensors(path: Path, whole: bytes) -> None:
    path.write_bytes(whole[:64])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut, "could not be read as a GGUF model"),
        (_no_tensors, "could not be read as a GGUF model"),
        (_other, "does not begin with the letters GGUF"),
        (lambda path, _whole: None, "there is no file"),
    ],
)
def test_broken_files_give_a_sentence(spoil: Any, message: str, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    spoil(path, file.read_bytes())
    with pytest.raises(ModelLoadError, match=message):
        hs.load(path)


def test_an_architecture_that_nobody_reads_is_named(tmp_path: Path) -> None:
    path = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(path, "no-such-architecture")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="no-such-architecture"):
        hs.load(path)


def test_what_is_missing_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="files have no revisions"):
        hs.load(file, revision="main")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"pip install 'headscope\[gguf\]'"):
        hs.load(file)


def test_reading_does_not_need_the_package_before(run_python: Any) -> None:
    run_python("import sys, headscope as hs; hs.load; assert 'gguf' not in sys.modules")
    assert "gguf" in sys.modules
