"""hs.load: what it takes, what it refuses, and that the hook points are proved."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import headscope as hs
from headscope import lens
from headscope.errors import InputError, ModelLoadError, UnsupportedModelError
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


def test_a_folder_loads_like_the_model(tmp_path: Path) -> None:
    module = build("llama")
    module.save_pretrained(tmp_path / "saved")
    loaded = hs.load(tmp_path / "saved", device="cpu")
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded.forward(ids), hs.load(module).forward(ids))
    assert loaded.digest() == hs.load(module).digest()
    assert hs.load(tmp_path / "saved", dtype="bf16").dtype == torch.bfloat16


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
        ({"device": "xpu:3"}, "nothing can be put on device 'xpu:3'"),
        ({"device": "meta"}, "no numbers"),
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
