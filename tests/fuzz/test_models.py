"""Odd models and odd probes: numbers in their range, NaN where nothing can be said, or a sentence.

Also broken folders: whatever their files hold, they are refused in a sentence and run no code.
"""

import json
import pickle
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import headscope as hs
from headscope.errors import HeadscopeError, ModelLoadError
from headscope.scorers import CATALOGUE
from tests.fuzz.effort import effort
from tests.fuzz.test_cli import run
from tests.fuzz.test_configs import outcome

# NaN and infinity have no sign or size to check; everything else lies in its declared range.
ROUNDING = 1e-3


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.sampled_from([1, 2]))
    heads = kv_heads * draw(st.sampled_from([1, 2]))
    family = draw(st.sampled_from(["gpt2", "llama", "gemma2", "bloom"]))
    common = {"vocab_size": draw(st.sampled_from([5, 11])), "bos_token_id": None,
              "eos_token_id": None, "pad_token_id": None}  # fmt: skip
    layers, width = draw(st.integers(1, 2)), 4 * heads
    length = draw(st.sampled_from([2, 5, 9, 16]))
    if family == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": length}
    elif family == "bloom":
        sizes = {"hidden_size": width, "n_layer": layers, "n_head": heads}
    else:
        sizes = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": layers,
                 "num_attention_heads": heads, "num_key_value_heads": kv_heads,
                 "head_dim": draw(st.sampled_from([2, 4])),
                 "max_position_embeddings": length}  # fmt: skip
    return {"family": family, "config": common | sizes | {"initializer_range": 0.4}}


def built(drawn: dict[str, Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(drawn["family"], **drawn["config"])
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def probes(model: Any, length: int, batch: int) -> list[hs.Probe]:
    """Those probes that fit the model, of the sizes that were drawn."""
    ids = torch.arange(length * batch).reshape(batch, length) % model.shape.d_vocab
    real = torch.ones_like(ids, dtype=torch.bool)
    real[-1, : length // 2] = False
    attempts = [
        lambda: hs.probes.from_tokens(ids),
        lambda: hs.probes.from_tokens(ids, real=real),
        lambda: hs.probes.random_tokens(model, length=length, batch=batch),
        lambda: hs.probes.repeated_tokens(model, length=length, batch=batch),
    ]
    return [probe for one in attempts if isinstance(probe := outcome(one), hs.Probe)]


def assert_in_bounds(scores: hs.HeadScores, model: Any) -> None:
    assert scores.mean.shape == (model.shape.n_layers, model.shape.n_heads)
    known = scores.mean[np.isfinite(scores.mean)]
    low, high = scores.bounds
    slack = ROUNDING * (1 + (np.abs(known).max() if known.size else 0))
    assert low is None or (known >= low - slack).all(), (scores.name, known)
    assert high is None or (known <= high + slack).all(), (scores.name, known)
    chances = scores.p_value[np.isfinite(scores.p_value)]
    assert ((chances >= 0) & (chances <= 1)).all()


@effort(8)
@given(shapes(), st.integers(0, 3), st.sampled_from([1, 2, 5]), st.sampled_from([1, 2]),
       st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_small_shapes(
    drawn: dict[str, Any], kind: int, length: int, batch: int, dtype: torch.dtype
) -> None:
    model = outcome(lambda: hs.load(built(drawn, dtype)))
    assume(not isinstance(model, str))
    names = [name for name, one in CATALOGUE.items() if not set(one.needs) & set(model.limits)]
    for probe in probes(model, length, batch)[kind : kind + 1]:
        for name in names:
            table = outcome(lambda name=name, probe=probe: hs.score(model, probe, name))
            if not isinstance(table, str):
                assert_in_bounds(table[name], model)
        effect = outcome(lambda probe=probe: hs.ablate_heads(model, probe, hs.metrics.loss, "zero"))
        if not isinstance(effect, str):
            assert_in_bounds(effect, model)
    table = outcome(lambda: hs.circuits.score(model, tokens=4, k=2))
    if not isinstance(table, str):
        for scores in table.values():
            assert_in_bounds(scores, model)


@effort(10)
@given(shapes(), st.integers(0, 10**6), st.sampled_from([float("nan"), float("inf"), 3e38]))
@pytest.mark.filterwarnings("ignore")
def test_broken_weights(drawn: dict[str, Any], place: int, value: float) -> None:
    module = built(drawn, torch.float32)
    parameters = list(module.parameters())
    with torch.no_grad():
        chosen = parameters[place % len(parameters)]
        chosen.view(-1)[place % chosen.numel()] = value
    model = outcome(lambda: hs.load(module))
    if isinstance(model, str):  # most are told at load
        return
    tokens = torch.tensor([[0, 1], [2, 3]])
    probe = hs.probes.from_tokens(tokens)
    for name in ("previous_token", "entropy", "first_token"):
        table = outcome(lambda name=name: hs.score(model, probe, name))
        if not isinstance(table, str):
            assert_in_bounds(table[name], model)


@cache
def good() -> Path:
    """Folder of the bundled model, to copy and break."""
    from headscope.models import bundled

    return bundled.folder("tiny-llama")


config_keys = st.sampled_from(sorted(json.loads((good() / "config.json").read_text())))
odd = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=2), st.dictionaries(st.text(max_size=3), st.none()),
    st.sampled_from([2**40, "llama", "mamba", "t5", "../x"]),
)  # fmt: skip


@effort(15)
@given(st.dictionaries(config_keys, odd, min_size=1, max_size=2))
@pytest.mark.filterwarnings("ignore")
def test_broken_configs(tmp_path_factory: Any, changes: dict[str, Any]) -> None:
    # Sizes of 2**40 are refused by transformers' own checks or by the missing memory; huge layer
    # counts would only take time.
    assume(not any(isinstance(v, int) and v > 2**20 for v in changes.values()))
    home = tmp_path_factory.mktemp("model")
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(good() / file, home)
    config = json.loads((good() / "config.json").read_text()) | changes
    (home / "config.json").write_text(json.dumps(config))
    model = outcome(lambda: hs.load(home, device="cpu"))
    if not isinstance(model, str):
        table = outcome(lambda: hs.score(model, scorers="entropy"))
        if not isinstance(table, str):
            assert_in_bounds(table["entropy"], model)
    shutil.rmtree(home)


@effort(15)
@given(st.sampled_from(["model.safetensors", "config.json", "tokenizer.json"]),
       st.binary(max_size=40), st.integers(0, 5000), st.booleans())  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_broken_files(tmp_path_factory: Any, file: str, junk: bytes, at: int, cut: bool) -> None:
    home = tmp_path_factory.mktemp("model")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(good() / name, home)
    whole = (home / file).read_bytes()
    at = min(at, len(whole))
    rest = b"" if cut else whole[at + len(junk) :]
    (home / file).write_bytes(whole[:at] + junk + rest)
    found = outcome(lambda: hs.load(home, device="cpu"))
    if not isinstance(found, str) and file != "config.json":  # which may ask for another model
        assert found.shape == hs.load("tiny-llama").shape
    shutil.rmtree(home)


class Poison:
    """Runs code when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return (Path.touch, (self.flag,))


@pytest.mark.filterwarnings("ignore")
def test_poisoned_weights_do_nothing(tmp_path: Path) -> None:
    flag, home = tmp_path / "ran", tmp_path / "model"
    home.mkdir()
    shutil.copy(good() / "config.json", home)
    (home / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Poison(flag)}))
    for extra in ([], ["--allow-pickle"]):
        code, out, err = run(["scan", str(home), *extra], tmp_path)
        assert code == 2
        assert err.startswith("headscope: ")
        assert "Traceback" not in err + out
    with pytest.raises(ModelLoadError):
        hs.load(home, allow_pickle=True)
    assert not flag.exists()


@pytest.mark.filterwarnings("ignore")
def test_poisoned_yaml_does_nothing(tmp_path: Path) -> None:
    flag, evil = tmp_path / "ran", tmp_path / "evil.yaml"
    for text in (f"!!python/object/apply:os.system ['touch {flag}']",
                 f"kind: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib."
                 f"Path ['{flag}']]"):  # fmt: skip
        evil.write_text(text)
        code, _, err = run(["scan", "--probe", str(evil)], tmp_path)
        assert (code, err.count("\n")) == (2, 1)
    assert not flag.exists()


@pytest.mark.filterwarnings("ignore")
def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    home, flag = tmp_path / "model", tmp_path / "ran"
    home.mkdir()
    (home / "evil.py").write_text(f"open({str(flag)!r}, 'w')\n")
    (home / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig",
                                                       "AutoModelForCausalLM": "evil.Evil"}})
    )  # fmt: skip
    for options in ({}, {"allow_pickle": True}):
        with pytest.raises(HeadscopeError):
            hs.load(home, **options)
    code, _, err = run(["scan", str(home), "--trust-remote-code"], tmp_path)
    assert code == 2
    assert "pin it" in err
    assert not flag.exists()
