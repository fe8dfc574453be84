"""
The contract between a run, agent.py and the scorer: handover, clock, checkpoint, bits per byte, verdicts.

    pytest tests/test_scoring.py
"""

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from test_loop import slow
from torch.utils._python_dispatch import TorchDispatchMode

import prepare

PREPARE = Path(prepare.__file__)
TRAIN = '''
import prepare
import torch


class Model(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx):
        logits = self.table(idx)
        return FORWARD


def build_model(vocab_size, seq_len):
    return Model(vocab_size)


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len).to(data.device)
    data.start(model)
    steps = 0
    while not data.expired():
        x, y = data.gather(data.doc_starts[:4], 64)
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        steps += 1
    prepare.finish(model, steps=steps, tokens=steps * x.numel(), depth=1, mfu_percent=12.5)


if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A prepared data set of 200 kB; AUTORESEARCH_CACHE names it for the module's tests and their processes."""
    root, rng = tmp_path_factory.mktemp("scoring"), random.Random(0)
    words = ["".join(rng.choices("abcdefghij äö火\n", k=rng.randrange(2, 9))) for _ in range(500)]
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(600)]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(root / "cache"))
        prepare.prepare(str(root / "texts.jsonl"), "cpu", 10)
        yield root / "cache"


def make_run(folder: Path, forward: str = "logits", weights: float = 1.0) -> Path:
    """A run's folder: the lookup-table model with random weights, whose forward returns that expression."""
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(TRAIN.replace("FORWARD", forward))
    vocab_size = prepare.current()[1]["vocab_size"]
    table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(1)) * weights
    torch.save({"table.weight": table}, folder / "checkpoint.pt")
    return folder


def run_python(*arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(PREPARE.parent), **environment}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


class Model(torch.nn.Module):
    """Mixes with a matrix over positions behind a projection that starts at zero, as transformers do."""

    def __init__(self, vocab_size: int, mask: str):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(vocab_size, 16), torch.nn.Linear(16, vocab_size)
        self.project = torch.nn.Parameter(torch.zeros(16, 16))
        self.dropout, self.norm, self.mask = torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(16), mask

    def forward(self, idx):
        x = self.dropout(self.embed(idx)) + 0.0 * torch.rand(16)  # moves the random stream, even in eval mode
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        length = idx.shape[1]
        mix = {"causal": torch.ones(length, length).tril(), "all": torch.ones(length, length),
               "one ahead": torch.ones(length, length).tril(1)}[self.mask]
        return self.head(x + (mix / length) @ x @ self.project)


# ---------------------------------------------------------------------------
# Bits per byte
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("split", prepare.SPLITS)
def test_bits_per_byte_against_float64_by_hand(tmp_path, split, capsys):
    run_dir = make_run(tmp_path / "run")
    assert prepare.score(run_dir, split) == 0
    folder, meta = prepare.current()
    encoding = prepare.load_tokenizer(folder)
    table = torch.load(run_dir / "checkpoint.pt")["table.weight"].double().numpy()
    rows = np.fromfile(folder / f"{split}.bin", np.uint16).reshape(-1, meta["seq_len"] + 1).astype(int)
    nats, size = np.zeros(len(rows)), 0
    for index, row in enumerate(rows):
        for token, target in zip(row, row[1:]):
            if target < meta["vocab_size"] - 4:
                nats[index] += math.log(np.exp(table[token]).sum()) - table[token, target]
                size += len(encoding.decode_single_token_bytes(target))
    result = read(run_dir / {"val": "score.json", "test": "score-test.json"}[split])
    assert result[f"{split}_bpb"] == pytest.approx(nats.sum() / math.log(2) / size, rel=1e-6)
    assert np.load(run_dir / f"{split}_rows.npy") == pytest.approx(nats, rel=1e-5)
    assert result["nats"] == pytest.approx(nats.sum(), rel=1e-6)
    assert (result["bytes"], result["rows"], result["split"]) == (size, len(rows), split)
    assert result["fingerprint"] == meta["fingerprint"]
    assert f"{split}_bpb:" in capsys.readouterr().out


@pytest.mark.slow
def test_a_causal_model_is_scored_and_the_summary_has_the_original_lines(tmp_path):
    run_dir = make_run(tmp_path / "run", "logits.cumsum(1) / idx.shape[1]")
    (run_dir / "facts.json").write_text('{"steps": 953, "tokens": 499600000, "depth": "eight", "total_seconds": 300.0}')
    done = run_python(PREPARE, "score", run_dir)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    result = read(run_dir / "score.json")
    assert lines[0] == "---" and lines[1] == f"val_bpb:          {result['val_bpb']:.6f}"
    values = dict(line.split(": ") for line in lines[1:])
    assert " ".join(values) == ("val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M "
                                "num_steps num_params_M depth")
    assert [float(values[name]) for name in ("num_steps", "total_tokens_M", "depth")] == [953, 499.6, 0]
    assert float(values["total_seconds"]) == pytest.approx(300 + result["seconds"], abs=0.1)


@pytest.mark.parametrize("forward, words", [
    ("logits.flip(1).cumsum(1).flip(1) / idx.shape[1]", "looks ahead: log probabilities at"),
    ("logits + 0.1 * logits.roll(-1, 1)", "looks ahead"),
    ("torch.where(idx[..., None] > 99, torch.nan, logits)", "not finite"),
    ("logits[:, :-1]", "wrong output"),
    ("logits.mean(1)", "wrong output"),
    ("[logits]", "wrong output"),
    ("logits * 1e4", "not a plausible score"),
])
def test_a_score_that_means_nothing_is_invalid(tmp_path, capsys, forward, words):
    run_dir = make_run(tmp_path / "run", forward)
    assert prepare.score(run_dir, "val") == 3
    message = capsys.readouterr().err
    assert message.startswith(words) and message.count("\n") == 1
    assert read(run_dir / "score.json") == {"invalid": message.strip()} and not (run_dir / "val_rows.npy").exists()


def test_a_nan_on_one_row_alone_is_invalid(tmp_path):
    folder, meta = prepare.current()
    rows = np.fromfile(folder / "val.bin", np.uint16).reshape(-1, meta["seq_len"] + 1).astype(int)
    key = rows[:, 1] * 4096 + rows[:, 2]
    rare = next(k for k in key[::-1] if (key == k).sum() == 1)
    run_dir = make_run(tmp_path / "run", "logits + torch.where((idx[:, 1] * 4096 + idx[:, 2] == "
                       f"{rare})[:, None, None], torch.nan, 0.0)")
    assert prepare.score(run_dir, "val") == 3 and read(run_dir / "score.json")["invalid"].startswith("not finite")


def test_logits_in_another_memory_order_are_scored(tmp_path):
    plain, strange = make_run(tmp_path / "a", "logits"), make_run(
        tmp_path / "b", "logits.transpose(0, 1).contiguous().transpose(0, 1)")
    shutil.copy(plain / "checkpoint.pt", strange)
    for run_dir in (plain, strange):
        assert prepare.score(run_dir, "val") == 0
    assert read(plain / "score.json")["val_bpb"] == pytest.approx(read(strange / "score.json")["val_bpb"], abs=1e-9)


def test_a_failing_model_is_a_traceback_and_leaves_no_older_score(tmp_path):
    run_dir = make_run(tmp_path / "run", "logits + undefined_name")
    (run_dir / "score.json").write_text('{"val_bpb": 0.5}')
    done = run_python(PREPARE, "score", run_dir)
    assert done.returncode == 1 and "NameError" in done.stderr and not (run_dir / "score.json").exists()


@pytest.mark.parametrize("missing", ["train.py", "checkpoint.pt", "."])
def test_nothing_to_score_is_one_line(tmp_path, capsys, missing):
    run_dir = make_run(tmp_path / "run")
    shutil.rmtree(run_dir) if missing == "." else (run_dir / missing).unlink()
    with pytest.raises(SystemExit) as stopped:
        prepare.score(run_dir, "val")
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("No run to load") and message.count("\n") == 1


@pytest.mark.parametrize("forward, code", [("logits", 0), slow("logits[:, 1:]", 3)])
def test_the_scored_file_imports_the_scorer_itself_and_leaves_it_nothing_to_do_at_the_exit(tmp_path, forward, code):
    run_dir = make_run(tmp_path / "run", forward)
    score = run_dir / "score.json"
    with open(run_dir / "train.py", "a") as file:
        file.write(f"import atexit, pathlib\natexit.register(pathlib.Path({str(score)!r}).write_text, 'mine')\n")
        file.write("import sys\nassert __name__ == 'train' and prepare is sys.modules['__main__']\n")
        file.write("assert prepare.active_preset() == 'cpu'\n")
    done = run_python(PREPARE, "score", run_dir)
    assert done.returncode == code and bool(done.stdout) == (code == 0) and bool(done.stderr) == (code == 3)
    assert ("val_bpb" if code == 0 else "invalid") in read(score)


# ---------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------


def sure_of(run_dir: Path, next_token: dict[int, int]) -> None:
    """Give a run weights that leave no choice after those tokens."""
    table = torch.load(run_dir / "checkpoint.pt")["table.weight"]
    for token, following in next_token.items():
        table[token] = -1e4
        table[token, following] = 0.0
    torch.save({"table.weight": table}, run_dir / "checkpoint.pt")


def test_a_model_goes_on_with_the_prompt_wherever_its_folder_is(tmp_path):
    run_dir, (folder, meta) = make_run(tmp_path / "run"), prepare.current()
    for name in ("meta.json", "tokenizer.json"):
        shutil.copy(folder / name, run_dir)
    encoding, last = prepare.load_tokenizer(folder), meta["vocab_size"] - 4
    chain = [encoding.encode_single_token(bytes([byte])) for byte in "a火b".encode()]   # a letter of three tokens
    prompt = "b" * 5 + "a"
    sure_of(run_dir, {**dict(zip(chain, chain[1:])), chain[-1]: last})
    sure_of(run_dir, {encoding.encode_ordinary(prompt)[-1]: chain[1]})
    command = PREPARE, "sample", run_dir, "--prompt", prompt
    done = run_python(*command, cwd=tmp_path, AUTORESEARCH_CACHE="/nowhere")
    assert (done.returncode, done.stdout) == (0, f"{prompt}火b\n"), done.stderr
    assert run_python(*command, "--tokens", "2").stdout == f"{prompt}\ufffd\n"   # in the middle of the letter


def test_a_long_text_is_continued_from_its_end(tmp_path):
    run_dir, encoding = make_run(tmp_path / "run"), prepare.load_tokenizer(prepare.current()[0])
    a, b = (encoding.encode_single_token(letter) for letter in (b"a", b"b"))
    sure_of(run_dir, {a: b, b: a})
    done = run_python(PREPARE, "sample", run_dir, "--prompt", "a", "--tokens", "600")
    assert done.stdout == "a" + "ba" * 300 + "\n"


@pytest.mark.parametrize(
    "words", [["--temperature", "0"], slow(["--temperature", "nan"]), slow(["--tokens", "many"]), slow([])])
def test_what_cannot_be_sampled_is_said(tmp_path, words):
    done = run_python(PREPARE, "sample", tmp_path / "none", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""


# ---------------------------------------------------------------------------
# Probes
# ---------------------------------------------------------------------------

VOCAB, LENGTH = 50, 256
ROWS = np.random.default_rng(0).integers(VOCAB - 1, size=(90, LENGTH + 1))  # the last token never occurs


class Small(torch.nn.Module):
    """Logits are a head on an embedding, both random; what a subclass or `forward` does comes between or after."""

    def __init__(self, forward=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(VOCAB, 16), torch.nn.Linear(16, VOCAB)
        self.norm = torch.nn.BatchNorm1d(16)
        self.register_buffer("counter", torch.zeros(()))
        self.calls, self.last = 0, 0.0
        self.change = forward or Small.plain

    def plain(self, idx):
        return self.head(self.embed(idx))

    def forward(self, idx):
        self.calls += 1
        return self.change(self, idx)


def examined(model, rows=ROWS, batch_rows=8) -> np.ndarray:
    rounds = prepare.make_rounds(rows, batch_rows, VOCAB, torch.device("cpu"))
    return prepare.examine(model.eval(), model, rounds, VOCAB)


def fault_of(model, **more) -> str:
    with pytest.raises(prepare.Invalid) as fault:
        examined(model, **more)
    assert "\n" not in str(fault.value)
    return str(fault.value)


def by_hand(model, rows=ROWS) -> np.ndarray:
    x, y = torch.from_numpy(rows[:, :-1]).contiguous(), torch.from_numpy(rows[:, 1:])
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(x).double().transpose(1, 2), y, reduction="none").numpy()


@pytest.fixture
def moved(monkeypatch):
    """Filled by every examination: the largest change of a log probability, the mean fall of the next token's."""
    figures, check = {}, prepare.check_changes

    def spy(ask, rounds, moved, falls, allowed):
        figures.update(most=float(moved.max()), fall=float(falls.mean()))
        check(ask, rounds, moved, falls, allowed)

    monkeypatch.setattr(prepare, "check_changes", spy)
    return figures


def ahead(idx):
    """One-hot of the next token (B, T, VOCAB); at the end of the first."""
    return torch.nn.functional.one_hot(idx.roll(-1, 1), VOCAB)


def at_every_64th(offset):
    def forward(model, idx):
        return model.plain(idx) + ahead(idx) * (torch.arange(LENGTH) % 64 == offset)[:, None]
    return forward


def carry_over(model, idx):
    x = model.embed(idx).cumsum(1) / LENGTH + model.last
    model.last = x[:, -1:].mean(0, keepdim=True)
    return model.head(x)


def train_mode(model, idx):
    model.norm.train()
    return model.head(model.norm(model.embed(idx).transpose(1, 2)).transpose(1, 2))


def count(model, idx):
    model.counter += 1
    return model.plain(idx)


class Subclass(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return torch.zeros(())


class Forgery:
    """As a function mode or a dispatch mode: a log softmax is zero."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.__torch_dispatch__(func, types, args, kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 0 if "softmax" in str(func) or "entropy" in str(func) else result


class FunctionForgery(Forgery, torch.overrides.TorchFunctionMode):
    pass


class DispatchForgery(Forgery, TorchDispatchMode):
    pass


LEAKS = {
    "the mean of all": lambda model, idx: model.head(model.embed(idx) + 4 * model.embed(idx).mean(1, keepdim=True)),
    "one ahead": lambda model, idx: model.plain(idx) + 2 * ahead(idx),
    "one ahead, at 0, 64, 128, 192": at_every_64th(0),
    "one ahead, at 17, 81, 145, 209": at_every_64th(17),
    "one ahead, at 63, 127, 191": at_every_64th(63),
}
FAULTS = {
    "looks ahead: log probabilities at ": {
        **LEAKS,
        "only text": lambda model, idx: model.plain(idx) + ahead(idx) * (idx[:, -1:] % 2 == 0)[..., None],
        "a little": lambda model, idx: model.plain(idx) + 0.02 * ahead(idx),
    },
    "mixes rows: the output of a row changes with the other rows of its batch": {
        "mean of the batch": lambda model, idx: model.head(model.embed(idx) + model.embed(idx).mean(0)),
        "the first token of another row": lambda model, idx: model.plain(idx) + model.plain(idx[:, :1].roll(1, 0)),
        "batch norm in train mode": train_mode,
        "the mean of the first tokens": lambda model, idx: model.plain(idx) + model.plain(idx)[:, :1].mean(0),
        "place in the batch": lambda model, idx: model.plain(idx) * (1 + torch.arange(len(idx)))[:, None, None],
    },
    "not repeatable: the same tokens give other log probabilities the second time (by ": {
        "dropout": lambda model, idx: model.head(torch.nn.functional.dropout(model.embed(idx), 0.5, training=True)),
        "leaks in the first call": lambda model, idx: model.plain(idx) + ahead(idx) * (model.calls == 1),
        "leaks in the ninth call": lambda model, idx: model.plain(idx) + ahead(idx) * (model.calls == 9),
        "state from batch to batch": carry_over,
    },
    "changes itself: parameters or buffers": {"counter": count},
    "not finite": {
        "a masked token": lambda model, idx: model.plain(idx) + torch.where(torch.arange(VOCAB) == 49, -torch.inf, 0),
        "the last": lambda model, idx: model.plain(idx) / (torch.arange(LENGTH) < 255)[:, None],
    },
    "wrong output: forward must return a plain torch.Tensor, not Subclass": {
        "subclass": lambda model, idx: model.plain(idx).as_subclass(Subclass)},
    "wrong output: forward must return a plain torch.Tensor, not tuple": {
        "tuple": lambda model, idx: (model.plain(idx), None)},
    "wrong output: forward must return logits of shape (B, T, vocab) = (8, 256, 50)": {
        "fewer": lambda model, idx: model.plain(idx)[..., :-1]},
}


@pytest.mark.parametrize("words, name", [(words, name) for words, cases in FAULTS.items() for name in cases])
def test_a_fault_is_met_and_named(words, name):
    assert fault_of(Small(FAULTS[words][name])).startswith(words)
    start = prepare.START_BATCHES * prepare.START_BATCH_ROWS
    fault = fault_of(Small(FAULTS[words][name]), rows=ROWS[:start], batch_rows=prepare.START_BATCH_ROWS)
    assert fault.startswith(words.replace("(8,", f"({prepare.START_BATCH_ROWS},"))


def test_a_leak_too_small_for_the_tolerance_of_a_gpu_is_met_by_its_mean(monkeypatch, moved):
    monkeypatch.setattr(prepare, "TOLERANCE", prepare.GPU_TOLERANCE)
    words = "looks ahead: the next token's log probability falls by 0.02 when the tokens after it change"
    assert fault_of(Small(FAULTS["looks ahead: log probabilities at "]["a little"])) == words
    print(f"leak of 0.02 nats: largest change {moved['most']:.1e}, mean fall {moved['fall']:.1e}")
    assert moved["most"] < prepare.GPU_TOLERANCE / 10
    examined(Small(lambda model, idx: model.plain(idx) + 0.01 * torch.rand(*idx.shape, VOCAB)))  # noise, as of bf16
    assert abs(moved["fall"]) < prepare.MEAN_TOLERANCE / 2


def test_a_gpu_is_allowed_rounding_only():
    spreads = np.array([0.02, 4.0, 12.8, 40.0, 1e9])
    assert prepare.tolerances("cuda", spreads).tolist() == pytest.approx([1e-3, 1 / 16, 0.2, 0.25, 0.25])
    assert (prepare.tolerances("cpu", spreads) == 1e-3).all()


@pytest.mark.parametrize("count, length", [(64, 256), (67, 256), (640, 2048), (64, 65), (64, 66), (64, 30), (8, 512)])
def test_cuts_meet_every_64th_position(count, length):
    rng = np.random.default_rng(0)
    drawn = [prepare.spread_cuts(rng, count, length) for _ in range(40)]
    stride = min(64, length - 1)
    for cuts in drawn:
        assert len(cuts) == count and 0 <= cuts.min() and cuts.max() <= length - 2
        assert len(set((cuts % stride).tolist())) == min(count, stride)
    assert length > 256 or set(np.concatenate(drawn).tolist()) == set(range(length - 1))
    assert not (drawn[0] == drawn[1]).all()


@pytest.mark.parametrize("rows, batch_rows", [(1, 8), (5, 8), (8, 8), (67, 8), (90, 1), (90, 64), (90, 200), (73, 4)])
def test_a_round_asks_every_row_and_lends_from_every_batch(rows, batch_rows):
    table = ROWS[:rows]
    make = partial(prepare.make_rounds, table, batch_rows, VOCAB, torch.device("cpu"))
    rounds, size = make(), min(rows, batch_rows)
    order, another = (np.concatenate([r.order.ravel() for r in make()]).tolist() for _ in range(2))
    assert set(order) == set(range(rows)) and (order != another or rows < 8)
    assert sum(len(r.first) for r in rounds) >= 64 and {r.first.shape for r in rounds} == {(size, LENGTH)}
    for r in rounds:
        assert {x.shape for x in r.x} == {(size, LENGTH)} and min(map(len, r.lent)) > 0 == (r.y[..., 0] < 0).sum()
        lent = torch.cat([x[which] for x, which in zip(r.x, r.lent)])
        assert torch.equal(lent, r.first) and sum(len(set(which.tolist())) for which in r.lent) == size
        same = torch.arange(LENGTH) <= r.cuts[:, 0]
        assert torch.equal(r.changed == r.first, same) and torch.equal(~same, r.after)
        assert r.changed.min() >= 0 and r.changed.max() < VOCAB
    assert np.allclose(examined(Small(), table, batch_rows), by_hand(Small(), table), 1e-5, 1e-6)


def test_a_model_sees_its_own_copy_of_plain_tokens():
    def greedy(model, idx):
        assert idx.dtype == torch.int64 and idx.shape == (8, LENGTH) and idx.is_contiguous()
        assert idx.untyped_storage().nbytes() == idx.numel() * 8 and idx._base is None
        logits = model.plain(idx)
        idx.zero_()
        return logits
    assert np.allclose(examined(Small(greedy)), by_hand(Small()), 1e-5, 1e-6)


def test_arithmetic_that_the_model_bends_does_not_count(monkeypatch):
    expected = examined(Small())
    with FunctionForgery():
        assert (by_hand(Small()) == 0).all() and (abs(examined(Small()) - expected) < 1e-6).all()
    with DispatchForgery():
        assert (by_hand(Small()) == 0).all()
        assert fault_of(Small()) == "wrong output: a torch dispatch mode is active"
    for module in (torch, torch.nn.functional, torch.Tensor, torch._C._nn, torch.special):
        for name in ("log_softmax", "_log_softmax", "cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd",
                     "gather", "logsumexp", "float", "cpu", "numpy", "amax", "abs", "sub"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *args, **more: torch.zeros(8, LENGTH, 1), raising=False)
    assert (abs(examined(Small()) - expected) < 1e-6).all()
    assert fault_of(Small(LEAKS["one ahead"])).startswith("looks ahead")


class Honest:
    """Models that keep the rules, in the ways that might look as if they did not."""

    class Recurrent(Small):
        def __init__(self):
            super().__init__()
            self.gru = torch.nn.GRU(16, 16, batch_first=True)

        def plain(self, idx):
            return self.head(self.gru(self.embed(idx))[0])

    class Convolution(Small):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(16, 16, 5)

        def plain(self, idx):
            return self.head(self.conv(torch.nn.functional.pad(self.embed(idx).mT, (4, 0))).mT)

    class Fourier(Small):
        """A convolution as long as the row, by FFT: rounding of the tokens to come reaches the past."""

        def __init__(self):
            super().__init__()
            self.kernel = torch.nn.Parameter(torch.randn(LENGTH, 16) * torch.arange(1, LENGTH + 1)[:, None] ** -0.5)

        def plain(self, idx):
            spectra = [torch.fft.rfft(t, 2 * LENGTH, dim=-2) for t in (self.embed(idx), self.kernel)]
            return self.head(torch.fft.irfft(spectra[0] * spectra[1], dim=-2)[:, :LENGTH])

    class Tied(Small):
        def __init__(self):
            super().__init__()
            self.embed.weight.data *= 0.25
            self.head.weight = self.embed.weight

    class Distance(Small):
        """Attention falls off with distance: a buffer that is not saved grows at the first call, a mask is cached."""

        def __init__(self):
            super().__init__()
            self.register_buffer("distances", torch.zeros(0), persistent=False)
            self.masks = {}

        def plain(self, idx):
            length, x = idx.shape[1], self.embed(idx)
            if len(self.distances) < length:
                self.distances = torch.arange(length)[:, None] - torch.arange(length)
            if length not in self.masks:
                self.masks[length] = torch.where(self.distances >= 0, -0.1 * self.distances, -torch.inf)
            x = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=self.masks[length])
            return self.head(x)

    class Half(Small):
        """Weights, activations and logits are bf16."""

        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
            self.head.weight.data *= 12
            self.bfloat16()

        def plain(self, idx):
            x = self.embed(idx)
            x = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
            return self.head(x + self.blocks(x))

    class Autocast(Recurrent):
        def plain(self, idx):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.embed(idx)
                x = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
                return 15 * torch.tanh(self.head(x + self.gru(x)[0]).float() / 15)


HONEST = [Small, Honest.Recurrent, Honest.Convolution, Honest.Fourier, Honest.Tied, Honest.Distance, Honest.Half,
          Honest.Autocast]


def test_honest_models_and_leaks_are_orders_of_magnitude_apart(moved):
    """Prints by how much; pytest -s shows it."""
    for kind in HONEST:
        model = kind()
        model.change = kind.plain
        nats = examined(model)
        print(f"{kind.__name__:<12} largest change {moved['most']:.1e}, mean fall {moved['fall']:+.1e}, "
              f"nats per token {nats.mean():.3f}")
        assert np.allclose(nats, by_hand(model), 1e-4, 1e-4) and moved["most"] <= prepare.TOLERANCE / 10
        assert abs(moved["fall"]) <= prepare.MEAN_TOLERANCE / 100
    for name, forward in LEAKS.items():
        fault_of(Small(forward))
        print(f"{name}: largest change {moved['most']:.1e}, mean fall {moved['fall']:+.1e}")
        assert moved["most"] >= 100 * prepare.TOLERANCE


# ---------------------------------------------------------------------------
# start, gather, the clock
# ---------------------------------------------------------------------------


def test_windows_of_the_stream(monkeypatch):
    monkeypatch.delenv("AUTORESEARCH_HANDOVER_FD", raising=False)
    data = prepare.load()
    assert not hasattr(data, "num_tokens") and data.elapsed() == 0.0 and not data.expired()
    data.start(Model(data.vocab_size, "causal"))
    folder, meta = prepare.current()
    stream = np.fromfile(folder / "train.bin", np.uint16).astype(np.int64)
    assert data.num_tokens == len(stream) == meta["train_tokens"] and (stream[data.doc_starts] == data.bos).all()
    for starts, length in (([0, 5, 9], 7), (data.doc_starts[-2:], 3), (np.array([len(stream) - 101]), 100)):
        x, y = data.gather(starts, length)
        assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
        for row, first in enumerate(np.asarray(starts)):
            assert x[row].tolist() == stream[first:first + length].tolist()
            assert y[row].tolist() == stream[first + 1:first + length + 1].tolist()
    for starts in ([len(stream) - 100], [-1], [0, 10**9]):
        with pytest.raises(ValueError, match="windows of 100 tokens start between 0 and"):
            data.gather(starts, 100)


def test_the_clock_runs_from_start_to_the_budget(monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", "0.2")
    data = prepare.load()
    data.start(Model(data.vocab_size, "causal"))
    assert 0 < data.elapsed() < 0.2 and 0 < data.progress() < 1 and not data.expired()
    while not data.expired():
        pass
    assert 0.2 <= data.elapsed() < 0.3 and data.progress() == 1.0


def test_start_leaves_the_model_and_the_random_streams_as_they_were(monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_SEED", "7")
    data = prepare.load()
    expected = torch.rand(3), np.random.rand(), random.random()
    data = prepare.load()
    model = Model(data.vocab_size, "causal").train()
    model.norm.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    data.dummy_batch(3)
    data.start(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and not model.norm.training and model.head.weight.grad.sum() == model.head.weight.numel()
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(), random.random()) == expected[1:]


@pytest.mark.parametrize("mask", ["all", "one ahead"])
def test_start_refuses_a_model_that_looks_ahead_even_behind_zeros(capsys, mask):
    data = prepare.load()
    with pytest.raises(SystemExit) as stopped:
        data.start(Model(data.vocab_size, mask))
    assert stopped.value.code == 3 and not hasattr(data, "num_tokens")
    assert capsys.readouterr().err.startswith("looks ahead: log probabilities at ")


@pytest.mark.parametrize("edit, words", [
    ("x.dropout.eval = x.dropout.train; x.dropout.train = lambda mode: None", "not repeatable: the same tokens give"),
    ("x.norm.train = lambda mode: None", "mixes rows: the output of a row changes with the other rows of its batch"),
    ("x.head.forward = lambda h: h", "wrong output: forward must return logits of shape (B, T, vocab) = (4, 256, "),
    ("x.embed.register_forward_hook(lambda *_: x.norm.num_batches_tracked.add_(1) and None)", "changes itself"),
    ("x.head.register_forward_hook(lambda m, i, o: o.log())", "not finite: forward returns NaN or infinite logits"),
    ("x.register_forward_hook(lambda m, i, o: (o, None))", "wrong output: forward must return a plain torch.Tensor"),
])
def test_start_names_every_fault_and_puts_the_model_back(capsys, edit, words):
    data = prepare.load()
    model = Model(data.vocab_size, "causal")
    exec(edit, {"x": model})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SystemExit) as stopped:
        data.start(model)
    message = capsys.readouterr().err
    assert stopped.value.code == 3 and message.startswith(words) and message.count("\n") == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_not_prepared_or_no_such_device_is_one_line(tmp_path, monkeypatch, capsys, cache):
    folder, meta = prepare.current()
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    (copy / "meta.json").write_text(json.dumps(meta | {"preset": {"mps": "mac", "cuda": "consumer"}[missing]}))
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    for words in ("run `python prepare.py` first", f"torch finds no {missing} device"):
        with pytest.raises(SystemExit) as stopped:
            prepare.load()
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and words in message and message.count("\n") == 1
        (tmp_path / "current").write_text(folder.name)


# ---------------------------------------------------------------------------
# A whole run
# ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_under_the_agent_gets_its_tokens_over_the_socket(tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "checkpoint.pt").unlink()
    folder, meta = prepare.current()
    agent, run = socket.socketpair()
    hidden = folder.rename(folder.with_name("elsewhere"))  # only what is handed over can be read
    shutil.copytree(hidden, folder, ignore=shutil.ignore_patterns("*.bin", "*.npy"))
    try:
        env = {**os.environ, "PYTHONPATH": str(PREPARE.parent), "AUTORESEARCH_HANDOVER_FD": str(run.fileno()),
               "AUTORESEARCH_TIME_BUDGET": "0.5"}
        process = subprocess.Popen([sys.executable, "train.py"], cwd=run_dir, env=env, pass_fds=[run.fileno()])
        run.close()
        assert agent.recv(100) == b"start\n"
        with open(hidden / "train.bin", "rb") as stream, open(hidden / "train_docs.npy", "rb") as starts:
            socket.send_fds(agent, [b"x"], [stream.fileno(), starts.fileno()])
        assert process.wait(60) == 0
    finally:
        shutil.rmtree(folder)
        hidden.rename(folder)
    facts = read(run_dir / "facts.json")
    assert facts["steps"] > 0 and facts["tokens"] == facts["steps"] * 256 and facts["mfu_percent"] == 12.5
    assert 0.5 <= facts["training_seconds"] < 5 and facts["training_seconds"] < facts["total_seconds"]
    assert facts["num_params"] == meta["vocab_size"] ** 2 and facts["peak_vram_mb"] > 50 and facts["device"] == "cpu"
    assert {path.name for path in run_dir.iterdir()} == {"train.py", "checkpoint.pt", "facts.json"}
    prepare.score(run_dir, "val")
    assert read(run_dir / "score.json")["val_bpb"] > 0


@pytest.mark.slow
def test_a_run_whose_agent_is_gone_ends(tmp_path):
    run_dir = make_run(tmp_path / "run")
    agent, run = socket.socketpair()
    env = {**os.environ, "PYTHONPATH": str(PREPARE.parent), "AUTORESEARCH_HANDOVER_FD": str(run.fileno())}
    process = subprocess.Popen([sys.executable, "train.py"], cwd=run_dir, env=env, pass_fds=[run.fileno()],
                               stderr=subprocess.PIPE, text=True)
    assert agent.recv(64) == b"start\n"
    agent.shutdown(socket.SHUT_RDWR)
    agent.close()
    run.close()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and "ended before it handed over" in errors


@pytest.mark.slow
def test_by_hand_a_run_scores_itself(tmp_path):
    run_dir = make_run(tmp_path / "checkout")
    shutil.copy(PREPARE, run_dir)
    done = run_python("train.py", cwd=run_dir, PYTHONPATH="", AUTORESEARCH_TIME_BUDGET="0.3")
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (run_dir / "runs" / "by-hand").iterdir()}
    assert "\nval_bpb:" in done.stdout
    assert written == {"train.py", "checkpoint.pt", "facts.json", "score.json", "val_rows.npy"}
    (run_dir / "train.py").write_text(TRAIN.replace("FORWARD", "logits if torch.is_grad_enabled() else logits * 1e4"))
    done = run_python("train.py", cwd=run_dir, PYTHONPATH="", AUTORESEARCH_TIME_BUDGET="0.3")
    assert done.returncode == 3 and "not a plausible score" in done.stderr


def test_a_compiled_model_leaves_a_plain_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTORESEARCH_HANDOVER_FD", "0")
    data = prepare.load()
    model = Model(data.vocab_size, "causal")
    model.head = torch.compile(model.head)
    if not (child := os.fork()):  # it ends the process
        prepare.finish(torch.compile(model), steps=1, tokens=1)
    assert os.waitpid(child, 0)[1] == 0
    plain = Model(data.vocab_size, "causal")
    plain.load_state_dict(torch.load("checkpoint.pt", weights_only=True))
    assert torch.equal(plain.embed.weight, model.embed.weight)
