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
from pathlib import Path

import numpy as np
import pytest
import torch

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
    prepare.score(run_dir, split)
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
    with pytest.raises(SystemExit) as stopped:
        prepare.score(run_dir, "val")
    message = capsys.readouterr().err
    assert stopped.value.code == 3 and message.startswith(words) and message.count("\n") == 1
    assert read(run_dir / "score.json") == {"invalid": message.strip()} and not (run_dir / "val_rows.npy").exists()


def test_a_nan_on_a_row_that_no_probe_saw_is_invalid(tmp_path, capsys):
    folder, meta = prepare.current()
    rows = np.fromfile(folder / "val.bin", np.uint16).reshape(-1, meta["seq_len"] + 1).astype(int)
    key = rows[:, 1] * 4096 + rows[:, 2]
    rare = next(k for k in key[::-1] if (key == k).sum() == 1)  # the probe takes one row in a hundred
    run_dir = make_run(tmp_path / "run", "logits + torch.where((idx[:, 1] * 4096 + idx[:, 2] == "
                       f"{rare})[:, None, None], torch.nan, 0.0)")
    with pytest.raises(SystemExit) as stopped:
        prepare.score(run_dir, "val")
    assert stopped.value.code == 3 and read(run_dir / "score.json")["invalid"].startswith("not ")


def test_logits_in_another_memory_order_are_scored(tmp_path):
    plain, strange = make_run(tmp_path / "a", "logits"), make_run(
        tmp_path / "b", "logits.transpose(0, 1).contiguous().transpose(0, 1)")
    shutil.copy(plain / "checkpoint.pt", strange)
    for run_dir in (plain, strange):
        prepare.score(run_dir, "val")
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
    assert stopped.value.code == 2 and message.startswith("Nothing to score") and message.count("\n") == 1


def test_the_scored_file_imports_the_scorer_itself(tmp_path):
    run_dir = make_run(tmp_path / "run")
    with open(run_dir / "train.py", "a") as file:
        file.write("import sys\nassert __name__ == 'train' and prepare is sys.modules['__main__']\n")
        file.write("assert prepare.active_preset() == 'cpu'\n")
    done = run_python(PREPARE, "score", run_dir)
    assert done.returncode == 0, done.stderr


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
    prepare.finish(torch.compile(model), steps=1, tokens=1)
    plain = Model(data.vocab_size, "causal")
    plain.load_state_dict(torch.load("checkpoint.pt", weights_only=True))
    assert torch.equal(plain.embed.weight, model.embed.weight)
