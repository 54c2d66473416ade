"""The engine under the scorers: memory, halving, whole patterns on request."""

import pytest
import torch

import headscope as hs
from headscope import capture
from headscope.base.options import chunk_bytes, is_out_of_memory, parse_memory
from headscope.errors import HeadscopeError, InputError
from headscope.models.taps import TapView
from tests.models.families import build, fresh, tokens


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("512 MiB", 512 * 2**20), ("1.5KB", 1500), (7, 7)]
)
def test_memory_is_read(text: str | int, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "1 potato", 0])
def test_senseless_memory_is_told(text: str | int) -> None:
    with pytest.raises(InputError):
        parse_memory(text)


def test_a_limit_is_kept() -> None:
    assert chunk_bytes(torch.device("cpu"), 123) == 123


def test_collect_equals_eager() -> None:
    module = fresh("llama")
    model = hs.load(module)
    got = capture.collect(model, hs.probes.from_tokens(tokens()), layers=[2, 0], batch_size=3)
    with torch.no_grad():
        expected = module(tokens(), output_attentions=True, use_cache=False).attentions
    assert list(got) == [0, 2]
    for layer, kept in got.items():
        torch.testing.assert_close(kept.pattern, expected[layer], atol=1e-5, rtol=1e-5)
        assert kept.z.shape == (4, tokens().shape[1], 4, 12)


def test_collect_takes_named_heads() -> None:
    model = hs.load(build("llama"))
    probe = hs.probes.from_tokens(tokens())
    every = capture.collect(model, probe, layers=[1])[1]
    some = capture.collect(model, probe, layers=[1], heads=[3, 1])[1]
    assert some.heads == (3, 1)
    torch.testing.assert_close(some.pattern, every.pattern[:, [3, 1]])
    torch.testing.assert_close(some.z, every.z[:, :, [3, 1]])


@pytest.mark.parametrize(("what", "value"), [("layers", [3]), ("heads", [4]), ("heads", [-1])])
def test_collect_refuses_what_is_not_there(what: str, value: list[int]) -> None:
    model = hs.load(build("llama"))
    with pytest.raises(InputError):
        capture.collect(model, hs.probes.from_tokens(tokens()), **{what: value})


def test_out_of_memory_halves_the_batch_and_then_the_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = hs.load(fresh("llama"))
    probe = hs.probes.from_tokens(tokens(5))
    whole = hs.score(model, probe, ["entropy"], progress=False)["entropy"].per_example
    tried: list[int] = []
    run = type(model).run

    def scarce(self: object, batch: hs.probes.Probe, **options: object) -> torch.Tensor | None:
        tried.append(len(batch))
        if len(batch) > 1 or len(tried) < 6:
            raise torch.OutOfMemoryError("no room")
        return run(self, batch, **options)

    monkeypatch.setattr(type(model), "run", scarce)
    halved = hs.score(model, probe, ["entropy"], progress=False)["entropy"].per_example
    assert tried[:3] == [5, 2, 1]
    assert abs(halved - whole).max() < 1e-5


def test_out_of_memory_for_good_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hs.load(fresh("llama"))

    def never(*_args: object, **_options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(type(model), "run", never)
    with pytest.raises(HeadscopeError, match="does not fit in memory"):
        hs.score(model, hs.probes.from_tokens(tokens(2)), ["entropy"], progress=False)


def test_other_errors_pass() -> None:
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert is_out_of_memory(MemoryError())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_losses_of_positions_need_no_logits_of_all(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hs.load(fresh(family))
    ids = tokens()
    targets = torch.where(torch.rand(ids.shape) < 0.7, ids.roll(-1, 1), -1)
    probe = hs.probes.from_tokens(ids)
    widths: list[int] = []
    whole = type(model.unembedding).logits

    def counted(self: object, residual: torch.Tensor) -> torch.Tensor:
        widths.append(residual.shape[:-1].numel())
        return whole(self, residual)

    held: dict[str, torch.Tensor] = {}

    def keep(view: TapView) -> None:
        held["z"] = view.value

    reads = {hs.Tap("z", 1): keep}
    with torch.enable_grad():
        logits = model.run(probe, reads=reads, grad=True).float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
        )
        (expected,) = torch.autograd.grad(loss, [held["z"]])
        monkeypatch.setattr("headscope.views._ENTRIES", 3 * model.shape.d_vocab)
        monkeypatch.setattr(type(model.unembedding), "logits", counted)
        total = capture.loss_sum(model, probe, targets, reads=reads)
        (found,) = torch.autograd.grad(total, [held["z"]])
    assert max(widths) == 3
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    rows, unembedding = capture.final_rows(model, probe, targets >= 0)
    assert unembedding is not None
    assert unembedding.best(rows).equal(logits.detach()[targets >= 0].argmax(-1))
    monkeypatch.undo()
    some = capture.logits_where(model, probe, targets >= 0)
    torch.testing.assert_close(some, logits.detach()[targets >= 0], rtol=1e-4, atol=1e-4)
