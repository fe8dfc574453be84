"""What a run, agent.py and the scorer agree on: clock, handover, score, probes: pytest tests/test_scoring.py"""

import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import xml
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prepare

PREPARE = Path(prepare.__file__)
TRAIN = (PREPARE.parent / "tests" / "cheats" / "honest" / "plain.py").read_text()
TRAIN = re.sub(".*optimizer.*\n", "", TRAIN)  # to import one takes seconds


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A small data set; AUTORESEARCH_CACHE names it for the module's tests and their processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(tmp_path_factory.mktemp("scoring")))
        prepare.prepare(str(Path(xml.__file__).parent), "cpu", 10)
        yield


def make_run(folder: Path, forward: str = "logits") -> Path:
    """A run's folder: the table of bigrams with random weights, whose forward returns that expression."""
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(TRAIN.replace("return self", f"logits = self.table(idx); return {forward}  #"))
    vocab_size = prepare.current()[1]["vocab_size"]
    table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(1))
    torch.save({"table.weight": table}, folder / "checkpoint.pt")
    return folder


def run_python(*command, cwd, handed=(), **environment) -> str:
    """What it prints. What it may read besides its folder is handed over, with a message, as agent.py does it."""
    env, (ours, theirs) = {**os.environ, "PYTHONPATH": str(PREPARE.parent), **environment}, socket.socketpair()
    if handed:
        env["AUTORESEARCH_HANDOVER_FD"] = str(theirs.fileno())
        socket.send_fds(ours, [b"a secret"], [os.open(path, os.O_RDONLY) for path in handed])
    with ours, theirs:
        options = {"cwd": cwd, "env": env, "pass_fds": [theirs.fileno()], "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, *map(str, command)], **options)
        assert done.returncode == 0, done.stderr
        assert not handed or ours.recv(100) == b"start\n" and not done.stderr
    return done.stdout


@pytest.fixture
def ended(capsys):
    """(exit code, stdout, stderr) of a function that may end the process."""

    def call(function, *arguments):
        try:
            code = function(*arguments)
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("split, name", [("val", "score.json"), ("test", "score-test.json")])
def test_bits_per_byte_against_float64_by_hand(tmp_path, split, name, ended):
    run_dir, (folder, meta) = make_run(tmp_path / "run"), prepare.current()
    code, output, _ = ended(prepare.score, run_dir, split)
    assert code == 0 and f"{split}_bpb:" in output
    encoding, last = prepare.load_tokenizer(folder), meta["vocab_size"] - 4
    table = torch.load(run_dir / "checkpoint.pt")["table.weight"].double()
    nats = -table.log_softmax(1).numpy()
    rows = np.fromfile(folder / f"{split}.bin", np.uint16).reshape(-1, meta["seq_len"] + 1).astype(int)
    bits = [sum(nats[token, target] for token, target in zip(row, row[1:]) if target < last) for row in rows]
    size = sum(len(encoding.decode_single_token_bytes(token)) for token in rows[:, 1:].ravel() if token < last)
    result = prepare.read_json(run_dir / name)
    assert result.pop("score") == pytest.approx(sum(bits) / math.log(2) / size, rel=1e-6) == sum(result["blocks"])
    by_hand = [sum(block) / math.log(2) / size for block in np.array_split(bits, 20)]
    assert result.pop("blocks") == pytest.approx(by_hand, rel=1e-5)
    about = {"split": split, "rows": len(rows), "bytes": size, "fingerprint": meta["fingerprint"], "secret": ""}
    assert 0 < result.pop("seconds") < 60
    assert result == about and {path.name for path in run_dir.iterdir()} == {"train.py", "checkpoint.pt", name}


def test_a_score_that_means_nothing_is_invalid(tmp_path, ended):
    cases = {"logits + 0.1 * logits.roll(-1, 1)": "looks ahead", "logits * 1e4": "not a plausible score"}
    cases["[logits]"] = "wrong output: forward must return a plain torch.Tensor, not list"
    for forward, words in cases.items():
        run_dir = make_run(tmp_path / "run", forward)
        code, _, errors = ended(prepare.score, run_dir, "val")
        assert code == 3 and errors.startswith(words) and errors.count("\n") == 1
        assert prepare.read_json(run_dir / "score.json") == {"invalid": errors.strip()}


@pytest.mark.parametrize("words", ["score DIR", "sample DIR", "score", "score DIR --split all"])
def test_what_cannot_be_scored_or_sampled_is_said(tmp_path, monkeypatch, ended, words):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words.replace("DIR", str(tmp_path)).split()])
    code, _, errors = ended(prepare.main)
    assert code == 2 and errors.startswith("No run to load: " if words[-3:] == "DIR" else "usage: ")


def test_a_model_goes_on_with_the_prompt_wherever_its_folder_is(tmp_path, monkeypatch, capsys):
    run_dir, (folder, meta) = make_run(tmp_path / "run"), prepare.current()
    for name in ("meta.json", "tokenizer.json"):
        shutil.copy(folder / name, run_dir)
    encoding, prompt = prepare.load_tokenizer(folder), "b" * 999 + "a"
    start, end = encoding.encode_ordinary(prompt), meta["vocab_size"] - 4
    letters = [encoding.encode_single_token(bytes([byte])) for byte in "火b".encode()]
    table = torch.full((meta["vocab_size"],) * 2, -1e4)
    table[[start[-1], *letters], [*letters, end]] = 0.0  # no choice
    torch.save({"table.weight": table}, run_dir / "checkpoint.pt")
    monkeypatch.setenv("AUTORESEARCH_CACHE", "/nowhere")
    monkeypatch.setenv("AUTORESEARCH_DATA", "another")
    prepare.sample(run_dir, prompt)
    assert capsys.readouterr().out == f"{prompt}火b\n" and len(start) > meta["seq_len"]


def test_a_failing_model_is_a_traceback_and_leaves_no_older_score(tmp_path):
    run_dir = make_run(tmp_path / "run", "logits + undefined_name")
    (run_dir / "score.json").write_text('{"score": 0.5}')
    with pytest.raises(NameError):
        prepare.score(run_dir, "val")
    assert not (run_dir / "score.json").exists()


VOCAB, LENGTH = 50, 256
ROWS = np.random.default_rng(0).integers(VOCAB - 1, size=(90, LENGTH + 1))  # the last token never occurs


class Small(torch.nn.Module):
    """Logits are a head on an embedding, both random; what `forward` does comes between or after."""

    def __init__(self, forward=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(VOCAB, 16), torch.nn.Linear(16, VOCAB)
        self.register_buffer("distances", torch.full((1,), torch.nan), persistent=False)
        self.calls, self.last, self.change = 0, 0.0, forward or Small.plain

    def plain(self, idx):
        return self.head(self.embed(idx))

    def forward(self, idx):
        self.calls += 1
        return self.change(self, idx)


def examined(model, rows=ROWS, batch_rows=8) -> np.ndarray:
    """As the scorer does it, with a twin that shares nothing."""
    twin = Small(model.change)
    twin.load_state_dict(model.state_dict())
    exam = prepare.make_exam(rows, batch_rows, VOCAB, torch.device("cpu"))
    return prepare.examine(model.eval(), twin.eval(), exam, VOCAB)


def fault_of(model, **more) -> str:
    with pytest.raises(prepare.Invalid) as fault:
        examined(model, **more)
    assert "\n" not in str(fault.value)
    return str(fault.value)


@torch.no_grad()
def by_hand(model, rows=ROWS) -> np.ndarray:
    x, y = torch.from_numpy(rows[:, :-1]).contiguous(), torch.from_numpy(rows[:, 1:])
    return torch.nn.functional.cross_entropy(model(x).double().transpose(1, 2), y, reduction="none").numpy()


def ahead(idx):
    """One-hot of the next token (B, T, VOCAB); at the end of the first."""
    return torch.nn.functional.one_hot(idx.roll(-1, 1), VOCAB)


def at_every_64th(offset):
    return lambda model, idx: model.plain(idx) + ahead(idx) * (torch.arange(LENGTH) % 64 == offset)[:, None]


def carry_over(model, idx):
    x = model.embed(idx).cumsum(1) / LENGTH + model.last
    model.last = x[:, -1:].mean(0, keepdim=True)
    return model.head(x)


def growing_table(model, idx):
    """Attention falls off with distance; the table of distances is made at the first call."""
    if len(model.distances) < idx.shape[1]:
        model.distances = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    mask, x = torch.where(model.distances >= 0, -0.1 * model.distances, -torch.inf), model.embed(idx)
    return model.head(torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask))


LEAKS = {
    "the mean of all": lambda model, idx: model.head(model.embed(idx) + 4 * model.embed(idx).mean(1, keepdim=True)),
    "one ahead": lambda model, idx: model.plain(idx) + 2 * ahead(idx),
    "one ahead, at 0, 64, 128, 192": at_every_64th(0),
    "one ahead, at 63, 127, 191": at_every_64th(63),
    "the last token, at 0": lambda model, idx: model.plain(torch.cat([idx[:, -1:], idx[:, 1:]], 1)),
}
AHEAD, MIXES = "looks ahead: log probabilities at ", "mixes rows: the output of a row changes with the other rows"
AGAIN = "not repeatable: the same tokens give other log probabilities the second time (by "
FAULTS = {
    **{name: (AHEAD, forward) for name, forward in LEAKS.items()},
    "a little": (AHEAD, lambda model, idx: model.plain(idx) + 0.02 * ahead(idx)),
    "some rows": (AHEAD, lambda model, idx: model.plain(idx) + ahead(idx) * (idx[:, :1] % 2 == 0)[..., None]),
    "mean of the batch": (MIXES, lambda model, idx: model.head(model.embed(idx) + model.embed(idx).mean(0))),
    "dropout": (AGAIN, lambda model, idx: torch.nn.functional.dropout(model.plain(idx), 0.5, training=True)),
    "leaks in the ninth call": (AGAIN, lambda model, idx: model.plain(idx) + ahead(idx) * (model.calls == 9)),
    "place": (AGAIN, lambda model, idx: model.plain(idx) * (1 + torch.arange(len(idx)))[:, None, None]),
    "state from batch to batch": (AGAIN, carry_over),
    "a masked token": ("not finite", lambda model, idx: model.plain(idx).index_fill(2, torch.tensor(49), -torch.inf)),
    "fewer": ("wrong output: forward must return logits of shape (", lambda model, idx: model.plain(idx)[..., :-1]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_met_and_named(name):
    words, forward = FAULTS[name]
    assert fault_of(Small(forward)).startswith(words)
    assert fault_of(Small(forward), rows=ROWS[:64], batch_rows=4).startswith(words)  # as at the start


def test_honest_models_and_leaks_are_orders_of_magnitude_apart(monkeypatch):
    monkeypatch.setattr(prepare, "TOLERANCE", prepare.TOLERANCE / 10)
    monkeypatch.setattr(prepare, "MEAN_TOLERANCE", prepare.MEAN_TOLERANCE / 100)
    for forward in (Small.plain, growing_table):
        assert np.allclose(examined(Small(forward)), by_hand(Small(forward)), 1e-4, 1e-4)
    monkeypatch.setattr(prepare, "TOLERANCE", prepare.TOLERANCE * 1000)
    for forward in LEAKS.values():
        assert fault_of(Small(forward)).startswith("looks ahead: log probabilities at ")


def test_a_leak_too_small_for_the_tolerance_of_a_gpu_is_met_by_its_mean(monkeypatch):
    monkeypatch.setattr(prepare, "TOLERANCE", prepare.GPU_TOLERANCE)
    words = "looks ahead: the next token's log p falls by 0.02 when the tokens after it change"
    assert fault_of(Small(FAULTS["a little"][1])) == words
    examined(Small(lambda model, idx: model.plain(idx) + 0.01 * torch.rand(*idx.shape, VOCAB)))  # noise, as of bf16
    monkeypatch.undo()
    allowed = prepare.tolerances("cuda", np.array([0.02, 4.0, 12.8, 40.0, 1e9]))
    assert allowed.tolist() == pytest.approx([1e-3, 1 / 16, 0.2, 0.25, 0.25])
    assert prepare.tolerances("cpu", np.array([0.02, 1e9])).tolist() == [1e-3, 1e-3]


@pytest.mark.parametrize("rows, batch_rows", [(1, 8), (5, 8), (8, 8), (67, 8), (90, 1), (90, 64), (90, 200), (73, 4)])
def test_an_exam_asks_every_row_lends_from_every_batch_and_cuts_at_every_64th_position(rows, batch_rows):
    exam, another = (prepare.make_exam(ROWS[:rows], batch_rows, VOCAB, torch.device("cpu")) for _ in range(2))
    size, order, lent = min(rows, batch_rows), exam.order.ravel(), exam.lent.ravel()
    assert set(order) == set(range(rows)) and (rows < 8 or (exam.order != another.order).any())
    assert len(lent) >= 64 and set(lent // size) == set(range(len(exam.order)))
    assert set(exam.cuts.ravel() % 64) == set(range(64)) and 0 <= exam.cuts.min() <= exam.cuts.max() <= LENGTH - 2
    assert not np.array_equal(exam.cuts, another.cuts)
    x, y = torch.cat(exam.x).numpy(), torch.cat(exam.y).numpy()
    same = np.arange(LENGTH) <= np.r_[np.full(len(order), LENGTH), exam.cuts.ravel()][:, None]
    assert (x[:, 1:] == np.where(same[:, 1:], y[:, :-1, 0], y[:, :-1, 1])).all() and (y[..., 0] != y[..., 1]).all()
    assert {batch.shape for batch in exam.x} == {(size, LENGTH)}
    assert np.allclose(examined(Small(), ROWS[:rows], batch_rows), by_hand(Small(), ROWS[:rows]), 1e-5, 1e-6)


class Forgery(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 0 if "softmax" in str(func) else result


def test_arithmetic_that_the_model_bends_does_not_count(monkeypatch):
    expected = examined(Small())
    with Forgery():
        assert (by_hand(Small()) == 0).all()
        assert fault_of(Small()) == "wrong output: a torch dispatch mode is active"
    for name in "log_softmax gather cpu numpy amax amin abs sub stack clone".split():
        for module in (torch, torch.nn.functional, torch.Tensor):
            monkeypatch.setattr(module, name, lambda *args, **more: torch.zeros(8, LENGTH, 1), raising=False)
    assert (abs(examined(Small()) - expected) < 1e-6).all()


class Model(torch.nn.Module):
    """Mixes with a matrix over positions behind a projection that starts at zero, as transformers do."""

    def __init__(self, vocab_size: int, reach: int = 0):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(vocab_size, 16), torch.nn.Linear(16, vocab_size)
        self.project = torch.nn.Parameter(torch.zeros(16, 16))
        self.dropout, self.norm, self.reach = torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(16), reach
        self.noisy = lambda x: torch.nn.functional.dropout(x, 0.1, self.training)  # holds on to the original

    def forward(self, idx):
        x = self.noisy(self.dropout(self.embed(idx))) + 0.0 * torch.rand(16)  # moves the random stream in eval mode too
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        mix = torch.ones(idx.shape[1], idx.shape[1]).tril(self.reach) / idx.shape[1]
        return self.head(x + mix @ x @ self.project)


def test_the_clock_and_windows_of_the_stream(monkeypatch):
    assert prepare.load().budget_s == prepare.TASK["budget_s"] == 300
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", "30")
    data = prepare.load()
    assert not hasattr(data, "num_tokens") and data.elapsed() == 0.0 and not data.expired()
    data.start(Model(data.vocab_size))
    assert 0 < data.elapsed() < 30 and 0 < data.progress() < 1 and not data.expired()
    data._started -= 30
    assert 30 < data.elapsed() < 60 and data.progress() == 1.0 and data.expired()
    folder, meta = prepare.current()
    stream = np.fromfile(folder / "train.bin", np.uint16).astype(np.int64)
    assert data.num_tokens == len(stream) == meta["train_tokens"] and (stream[data.doc_starts] == data.bos).all()
    for starts, length in (([0, 5, 9], 7), (data.doc_starts[-2:], 3), (np.array([len(stream) - 101]), 100)):
        x, y = data.gather(starts, length)
        assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
        expected = stream[np.asarray(starts)[:, None] + np.arange(length + 1)]
        assert (x.numpy() == expected[:, :-1]).all() and (y.numpy() == expected[:, 1:]).all()
    for starts in ([len(stream) - 100], [-1], [0, 10**9]):
        with pytest.raises(ValueError, match="windows of 100 tokens start between 0 and"):
            data.gather(starts, 100)


def test_start_leaves_the_model_and_the_random_streams_as_they_were(monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_SEED", "7")
    data = prepare.load()
    expected = torch.rand(3), np.random.rand(), random.random()
    data = prepare.load()
    model = Model(data.vocab_size).train()
    model.norm.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    data.dummy_batch(3)
    data.start(compiled := torch.compile(model))
    assert {name.removeprefix("_orig_mod.") for name in compiled.state_dict()} == {*before} != {*compiled.state_dict()}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and not model.norm.training and model.head.weight.grad.sum() == model.head.weight.numel()
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(), random.random()) == expected[1:]


def test_a_model_that_cannot_be_copied_trains_unprobed(capsys):
    data = prepare.load()
    model = Model(data.vocab_size, reach=10**6).train()
    model.names = (name for name in "ab")  # a generator
    data.start(model)
    assert data.num_tokens and model.training and capsys.readouterr().out.startswith("The model cannot be copied (")


@pytest.mark.parametrize(
    "edit, words",
    [
        ("x.reach = 1", "looks ahead: log probabilities at "),  # even behind zeros
        ("x.dropout.eval = x.dropout.train; x.dropout.train = lambda mode: None", "not repeatable: the same tokens"),
        ("x.norm.train = lambda mode: None", "mixes rows: the output of a row changes with the other rows"),
        ("x.norm.register_forward_hook(lambda m, i, o: m.num_batches_tracked.add_(1) and None)", "changes itself"),
        ("x.head.register_forward_hook(lambda m, i, o: o.log())", "not finite: forward returns NaN or infinite logits"),
    ],
)
def test_start_names_every_fault_and_hands_over_nothing(ended, edit, words):
    data = prepare.load()
    exec(edit, {"x": (model := Model(data.vocab_size))})
    code, _, errors = ended(data.start, model)
    assert code == 3 and errors.startswith(words) and errors.count("\n") == 1
    assert not hasattr(data, "num_tokens")


def test_a_device_that_is_missing_is_one_line(monkeypatch, ended):
    device = "cuda" if torch.backends.mps.is_available() else "mps"
    monkeypatch.setitem(prepare.PRESETS, "cpu", prepare.PRESETS["cpu"]._replace(device=device))
    code, _, errors = ended(prepare.load)
    assert code == 2 and f"torch finds no {device} device" in errors and errors.count("\n") == 1


def test_under_the_agent_a_run_gets_its_tokens_and_the_scorer_its_rows_over_the_socket(tmp_path, monkeypatch):
    run_dir, (folder, meta) = make_run(tmp_path / "run"), prepare.current()
    shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("*.bin", "*.npy"))
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    monkeypatch.setenv("AUTORESEARCH_DATA", folder.name)
    (run_dir / "checkpoint.pt").unlink()
    handed = [folder / name for name in meta["handed"]]
    run_python("train.py", cwd=run_dir, handed=handed, AUTORESEARCH_TIME_BUDGET="0.2")
    facts = prepare.read_json(run_dir / "facts.json")
    assert facts["steps"] > 0 and facts["tokens"] == facts["steps"] * 128 and facts["device"] == "cpu"
    assert 0.2 <= facts["training_seconds"] < 5 and facts["training_seconds"] < facts["total_seconds"] < 60
    assert facts["num_params"] == meta["vocab_size"] ** 2 and 50 < facts["peak_vram_mb"] < 10_000
    assert {path.name for path in run_dir.iterdir()} == {"train.py", "checkpoint.pt", "facts.json"}
    run_python(PREPARE, "score", ".", cwd=run_dir, handed=[folder / "val.bin"])
    result = prepare.read_json(run_dir / "score.json")
    assert result["secret"] == "a secret" and result["score"] > 0


def test_a_run_whose_agent_is_gone_ends(monkeypatch, ended):
    ours, theirs = socket.socketpair()
    ours.shutdown(socket.SHUT_WR)
    monkeypatch.setenv("AUTORESEARCH_HANDOVER_FD", str(theirs.detach()))
    code, _, errors = ended(prepare.receive, [Path("train.bin")])
    assert code == 2 and "ended before it handed over" in errors


def test_by_hand_a_run_scores_itself_with_the_original_lines_and_the_scored_file_has_no_say(tmp_path):
    checkout = make_run(tmp_path / "checkout", "logits.cumsum(1) / idx.shape[1]")
    shutil.copy(PREPARE, checkout)
    compiled = "finish(torch.nn.ModuleDict({'_orig_mod': model}), mfu_percent=12.5, depth='eight'"  # named so
    text = (checkout / "train.py").read_text().replace("finish(model", compiled)
    text += "import atexit, pathlib, sys\nassert __name__ == 'train' and prepare is sys.modules['__main__']\n"
    text += "atexit.register(pathlib.Path(__file__).with_name('score.json').write_text, 'mine')\n"
    (checkout / "train.py").write_text(text)
    output = run_python("train.py", cwd=checkout, PYTHONPATH="", AUTORESEARCH_TIME_BUDGET="0.2")
    run_dir, (separator, *lines) = checkout / "runs" / "by-hand", output.splitlines()
    assert {path.name for path in run_dir.iterdir()} == {"train.py", "checkpoint.pt", "facts.json", "score.json"}
    result, facts = (prepare.read_json(run_dir / name) for name in ("score.json", "facts.json"))
    values = [line.split() for line in lines]
    names = "training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth"
    assert separator == "---" and lines[0] == f"val_bpb:          {result['score']:.6f}"
    assert [name for name, _ in values[1:]] == [f"{name}:" for name in names.split()]
    expected = [facts["training_seconds"], facts["total_seconds"] + result["seconds"], facts["peak_vram_mb"], 12.5]
    expected += [facts["tokens"] / 1e6, facts["steps"], facts["num_params"] / 1e6, 0]
    assert [float(value) for _, value in values[1:]] == pytest.approx(expected, abs=0.051)
