"""Whatever stands in a config or a prompt file: a probe, or one sentence."""

import json
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import headscope as hs
from headscope.base.configs import parse, read_yaml
from headscope.errors import HeadscopeError
from headscope.models.protocol import HeadModel
from headscope.probes.config import ProbeConfig, build_probe
from tests.fuzz.effort import effort

KEYS = ("kind", "length", "batch", "seed", "copies", "bos", "file", "texts")
KINDS = ("repeated_tokens", "random_tokens", "text", "ioi", "jsonl")
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(KINDS),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
keys = st.sampled_from(KEYS) | st.text(string.ascii_lowercase, max_size=6)
small = st.integers(1, 40)
likely = st.fixed_dictionaries(
    {"kind": st.sampled_from(KINDS)},
    optional={"length": small, "batch": small, "copies": st.integers(2, 4), "bos": st.booleans(),
              "seed": st.integers(0, 9), "texts": st.lists(st.text(max_size=30), max_size=3)},
)  # fmt: skip
# YAML that loads as something other than it looks like, or as nothing.
NASTY = (
    "!!python/object/apply:os.system ['touch evil']",
    "!!python/name:os.system",
    "kind: &a [*a]",
    "a: &a {b: 1}\n<<: *a\n? [1, 2]\n: 3",
    "kind: 2001-01-01\nlength: 1_000\nbatch: 0x10\nseed: .nan",
    "kind: |\n  text\n---\nkind: ioi",
    "%YAML 9.9\n---\nkind: ioi",
    "kind: ioi\nkind: text",
    "\ufeffkind: ioi",
    "{" * 500,
    "- " * 500,
    "? " * 200,
    "kind: ioi\n\t seed: 1",
    "seed: 1e400\nkind: ioi",
    "seed: 9" + "9" * 5000 + "\nkind: ioi",
)


@cache
def model() -> HeadModel:
    return hs.load()


def outcome(attempt: Callable[[], Any], *, lines: bool = False) -> Any:
    """The result, or the sentence; anything else fails the test."""
    try:
        return attempt()
    except HeadscopeError as error:
        sentence = str(error)
        assert sentence.strip()
        assert lines or "\n" not in sentence, sentence
        return sentence


def build(path: Path) -> hs.Probe:
    return build_probe(parse(ProbeConfig, read_yaml(path), "probe.yaml"), model())


@effort(60)
@given(st.dictionaries(keys, values, max_size=6) | likely)
def test_probe_configs(tmp_path_factory: Any, config: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    probe = outcome(lambda: build(path), lines=config.get("kind") == "jsonl")
    if isinstance(probe, hs.Probe):
        assert probe.length <= (model().shape.n_ctx or probe.length)
        assert len(probe) == config.get("batch", len(probe))


@effort(80)
@given(st.sampled_from(NASTY) | st.text(max_size=60) | st.binary(max_size=60))
def test_any_bytes_as_yaml(tmp_path_factory: Any, written: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    raw = written if isinstance(written, bytes) else written.encode("utf-8", "surrogatepass")
    path.write_bytes(raw)
    outcome(lambda: build(path), lines=True)
    assert not Path("evil").exists()


@effort(60)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=30),
            st.fixed_dictionaries(
                {"text": st.text(max_size=40) | values},
                optional={"answer": st.text(max_size=6) | values, "foil": st.text(max_size=6),
                          "marks": st.dictionaries(st.text(max_size=5), values, max_size=2)
                          | values, "other": values},
            ).map(lambda fields: json.dumps(fields, default=str)),
        ),
        max_size=3,
    )
)  # fmt: skip
def test_prompt_files(tmp_path_factory: Any, lines: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "prompts.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    probe = outcome(lambda: hs.probes.from_jsonl(model(), path), lines=True)
    if isinstance(probe, hs.Probe):
        assert bool(probe.real.any(1).all())


@effort(60)
@given(st.text(max_size=12))
def test_amounts_of_memory_and_heads(text: str) -> None:
    from headscope.base.options import parse_memory

    amount = outcome(lambda: parse_memory(text))
    assert isinstance(amount, str) or amount > 0
    head = outcome(lambda: hs.HeadIndex.parse(text))
    assert isinstance(head, hs.HeadIndex | str)


def test_the_harness_itself_sees_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        outcome(lambda: 1 / 0)
