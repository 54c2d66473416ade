"""hs.load: what it takes, what it refuses, and that the hook points are proved."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, BertModel

import headscope as hs
from headscope import lens
from headscope.errors import InputError, ModelLoadError, UnsupportedModelError
from headscope.models import proof
from headscope.models.hf import passes
from headscope.models.loading import admit
from tests.models.families import ALIBI, BRIDGE_FAMILIES, HF_FAMILIES, build, fresh


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_fast_path_is_chosen_and_proved(family: str) -> None:
    assert hs.load(build(family)).path == "hf"


@pytest.mark.parametrize("family", BRIDGE_FAMILIES)
def test_second_path_is_chosen_by_itself(family: str) -> None:
    model = hs.load(build(family))
    assert model.path == "bridge"
    assert model.tokenizer is None


def test_alibi_is_among_them() -> None:
    assert set(ALIBI) <= set(BRIDGE_FAMILIES)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for proofs that is on in this test."""
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "proofs"


def test_a_proof_is_kept_for_later_runs(kept: Path, tmp_path: Path) -> None:
    """Of the same weights, type, config and code; of a folder, never of the caller's module."""
    place, module = tmp_path / "saved", fresh("llama")
    module.save_pretrained(place)
    first = hs.load(place)
    again = hs.load(place)
    assert (first.proof.remembered, again.proof.remembered) == (False, True)
    assert replace(again.proof, remembered=False) == first.proof
    assert again.limits == first.limits
    assert not hs.load(again.module).proof.remembered
    assert not hs.load(fresh("llama")).proof.remembered
    assert not hs.load(place, dtype="bfloat16").proof.remembered
    file = max(kept.iterdir(), key=lambda one: one.stat().st_mtime)
    for damaged in (b"", b"[]", file.read_bytes()[:-9], b'{"tokens": 1}'):
        file.write_bytes(damaged)
        assert not hs.load(place, dtype="bfloat16").proof.remembered
    assert hs.load(place, dtype="bfloat16").proof.remembered
    with torch.no_grad():
        next(iter(module.parameters()))[0, 0] += 1e-3
    module.save_pretrained(place)
    assert not hs.load(place).proof.remembered


def test_replaced_code_is_proved_each_time(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fresh("llama")
    module.save_pretrained(tmp_path / "saved")
    hs.load(tmp_path / "saved")
    kind = type(module.model.layers[0].mlp)
    true = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * true(self, x))
    assert not hs.load(tmp_path / "saved").proof.remembered
    monkeypatch.setattr(kind, "forward", true)
    assert hs.load(tmp_path / "saved").proof.remembered
    # A version of headscope with other code has made no proof.
    monkeypatch.setattr(proof, "_own_code", lambda: "another")
    assert not hs.load(tmp_path / "saved").proof.remembered


def test_a_cache_may_be_off_or_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models load as ever, and nothing is written elsewhere."""
    fresh("llama").save_pretrained(tmp_path / "saved")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    blocked = tmp_path / "file"
    blocked.touch()
    for setting in ("off", "", "0", str(blocked / "below")):
        monkeypatch.setenv("HEADSCOPE_CACHE", setting)
        assert not hs.load(tmp_path / "saved").proof.remembered
    assert not (tmp_path / "xdg").exists()
    monkeypatch.delenv("HEADSCOPE_CACHE")
    hs.load(tmp_path / "saved")
    assert [one.name for one in (tmp_path / "xdg" / "headscope").iterdir()] == ["proofs"]


def test_a_folder_without_all_weights_is_refused(tmp_path: Path) -> None:
    """transformers would put random numbers in their place, and only log it."""
    fresh("llama").save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    del weights["model.layers.1.self_attn.o_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 of the model's weights, e\.g\. .*o_proj"):
        hs.load(tmp_path)


def test_a_pooler_that_was_never_saved_is_taken_off(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    model = hs.load(tmp_path)
    assert model.module.pooler is None
    assert model.proof.checks


def test_layers_on_disk_give_the_same_numbers(tmp_path: Path) -> None:
    """Read from a folder with a device map, as a model that does not fit would be."""
    fresh("llama").save_pretrained(tmp_path)
    n_layers = hs.load(tmp_path, check=False).shape.n_layers
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    places = dict.fromkeys(parts, "cpu")
    places |= {f"model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(n_layers)}
    away, here = hs.load(tmp_path, device_map=places), hs.load(tmp_path)
    assert any(one.is_meta for one in away.module.parameters())
    assert away.proof.checks
    assert away.digest() == here.digest()
    probe = hs.probes.repeated_tokens(here, length=6, batch=2)
    for measure in (
        lambda model: hs.score(model, probe, ["induction"], progress=False)["induction"].mean,
        lambda model: hs.ablate_heads(model, probe, hs.metrics.loss, progress=False).mean,
    ):
        np.testing.assert_allclose(measure(away), measure(here), atol=1e-6)
    with pytest.raises(InputError, match="has no data"):
        hs.load(tmp_path, device_map="meta")


def test_a_folder_loads_like_the_model(tmp_path: Path) -> None:
    module = build("llama")
    module.save_pretrained(tmp_path / "saved")
    loaded = hs.load(tmp_path / "saved", device="cpu")
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded.forward(ids), hs.load(module).forward(ids))
    assert loaded.digest() == hs.load(module).digest()
    assert hs.load(tmp_path / "saved", dtype="bf16").dtype == torch.bfloat16
    assert loaded.name == "saved"  # no word of where the folder is


def test_a_broken_tokenizer_is_warned_of(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    assert hs.load(tmp_path).tokenizer is None  # none is no reason to warn: warnings are errors
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BP')
    with pytest.warns(UserWarning, match="tokenizer in .* could not be read"):
        assert hs.load(tmp_path).tokenizer is None


def test_one_changed_weight_changes_the_digest() -> None:
    module = fresh("llama")
    before = hs.load(module).digest()
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[7, 3] += 1e-3
    assert hs.load(module).digest() != before


@pytest.mark.parametrize(
    ("family", "word"),
    [
        ("mamba", "state-space"),
        ("rwkv", "recurrent"),
        ("deepseek_v3", "MLA"),
        ("llama4_text", "chunked"),
    ],
)
def test_other_kinds_are_refused_from_the_config(family: str, word: str) -> None:
    config = AutoConfig.for_model(family)
    with pytest.raises(UnsupportedModelError, match=word):
        admit(config, f"some/{family}")


def test_missing_models_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="neither a folder here"):
        hs.load("no-such-model-anywhere")
    with pytest.raises(ModelLoadError, match="could not be read"):
        hs.load(tmp_path)


class Poison:
    """Runs code when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return (Path.touch, (self.flag,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # torch, of our fixture
def test_pickled_weights_are_refused_and_never_run(tmp_path: Path) -> None:
    flag, folder = tmp_path / "ran", tmp_path / "model"
    build("llama").config.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Poison(flag)}))
    with pytest.raises(ModelLoadError, match="safetensors"):
        hs.load(folder)
    with pytest.raises(ModelLoadError, match="other than tensors"):
        hs.load(folder, allow_pickle=True)
    assert not flag.exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"trust_remote_code": True}, "pin it"),
        ({"trust_remote_code": True, "revision": "main"}, "pin it"),
        ({"device": "cpu", "device_map": "auto"}, "either"),
        ({"dtype": "int3"}, "unknown dtype"),
        ({"device": "toaster"}, "unknown device 'toaster'"),
        ({"device": "xpu:3"}, "device 'xpu:3' is unusable"),
        ({"device": "meta"}, "no data"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        hs.load("anything", **options)


def test_only_models_are_taken() -> None:
    with pytest.raises(InputError, match="dict"):
        hs.load({})


def test_nan_weights_are_told() -> None:
    module = fresh("llama")
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelLoadError, match="NaN"):
        hs.load(module)


def test_a_wrong_hook_point_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that is not what the model computes must not pass the proof."""
    fused = passes.fused

    def other(call: Any) -> torch.Tensor:
        return fused(call).flip(2)  # heads in another order

    monkeypatch.setattr(passes, "fused", other)
    with pytest.raises(UnsupportedModelError, match="every layer attends as without headscope"):
        hs.load(fresh("llama"))


def test_heads_that_write_nothing_are_said() -> None:
    module = fresh("gpt2")
    with torch.no_grad():
        for block in module.transformer.h:
            block.attn.c_proj.weight.zero_()
    assert "L0H0, L0H1" in hs.load(module).proof.facts[0]


def test_loading_leaves_the_model_as_it_was() -> None:
    module = fresh("gemma2")
    before = copy.deepcopy(module.state_dict())

    def hooks() -> int:  # transformers leaves some of its own
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())

    had = hooks()
    hs.load(module)
    assert module.config._attn_implementation == "eager"
    assert hooks() == had
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_device_map_of_one_device_is_that_device() -> None:
    mapped, plain = (hs.load("tiny-llama", device_map=one) for one in ("cpu", None))
    probe = hs.probes.needle(plain, lengths=64, depths=1, per_cell=1)
    for model in (mapped, plain):
        assert model.device == torch.device("cpu")
    found, expected = (
        hs.score(model, probe, "retrieval", progress=False)["retrieval"].mean
        for model in (mapped, plain)
    )
    assert found.tolist() == expected.tolist()
    split = lens.attribute(mapped, [5, 9, 5, 9])
    assert split.heads.tolist() == lens.attribute(plain, [5, 9, 5, 9]).heads.tolist()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_a_model_in_double_precision_is_accepted(family: str) -> None:
    model = hs.load(fresh(family).double())
    assert model.dtype == torch.float64
    assert model.forward(torch.tensor([[3, 4, 5]])).dtype == torch.float64
