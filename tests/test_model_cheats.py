"""Models that lower the number by a trick, and honest ones that must be scored: pytest tests/test_model_cheats.py

The files of tests/cheats/model/ and honest/, as test_cheats.py describes them. Each is asked three times: by the guard, at
data.start() and by the scorer, the latter two in a process of its own that is forked from one with torch in it. A line
`prepares:` is what main() does to the model after the start. That a trick pays where nobody looks is shown by scoring
its rows without probes; `lowers: no` marks those that would only break the number.
"""

import json
import math
import multiprocessing
import os
import random
import runpy
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, commit_all, make_checkout
from test_cheats import about, cheats, guarded

import agent
import prepare


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A prepared data set of 300 kB."""
    root, rng = tmp_path_factory.mktemp("models"), random.Random(0)
    words = ["".join(rng.choices("abcdefghij äö火\n", k=rng.randrange(2, 9))) for _ in range(12)]   # few to merge
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(900)]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(root / "cache"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))   # the fork server starts with it
        prepare.prepare(str(root / "texts.jsonl"), "cpu", 10)
        yield root / "cache"


def as_main(folder, cache, task):
    """Run a stage of the contract in this process: its exit status is the verdict, its output goes to a file."""
    os.chdir(folder)
    os.environ["AUTORESEARCH_CACHE"] = cache
    torch.set_num_threads(2)
    output = os.open("output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if task == "score":
        os._exit(prepare.score(Path("."), "val"))
    ours, theirs = socket.socketpair()
    os.environ |= {"AUTORESEARCH_HANDOVER_FD": str(theirs.fileno()), "AUTORESEARCH_TIME_BUDGET": "0.3"}
    if task == "train":
        files = [os.open(prepare.current()[0] / name, os.O_RDONLY) for name in ("train.bin", "train_docs.npy")]
        socket.send_fds(ours, [b"tokens"], files)
    else:
        ours.shutdown(socket.SHUT_WR)   # whoever asks for the tokens has passed the start, and ends with 2
    runpy.run_path("train.py", run_name="__main__")


def stage(folder, cache, task):
    """(exit status, output) of one stage."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prepare", "test_model_cheats"])
    process = context.Process(target=as_main, args=(folder, str(cache), task))
    process.start()
    process.join(60)
    return process.exitcode, (folder / "output").read_text().strip()


def make_run(folder, path):
    """A run's folder with the text and a checkpoint of its untrained model; returns that model."""
    (folder / "train.py").write_text(path.read_text())
    meta = prepare.current()[1]
    torch.manual_seed(1)
    originals = {(place, name): getattr(place, name) for place in (torch, torch.nn.functional, torch.Tensor)
                 for name in ("cross_entropy", "log_softmax", "logsumexp", "gather", "sum") if hasattr(place, name)}
    try:
        model = runpy.run_path(str(folder / "train.py"))["build_model"](meta["vocab_size"], meta["seq_len"])
    finally:
        for (place, name), function in originals.items():
            setattr(place, name, function)
    with torch.no_grad():
        exec(about(path).get("prepares", "pass"), {"model": model})
    torch.save(model.state_dict(), folder / "checkpoint.pt")
    return model.eval()


@torch.no_grad()
def unchecked_bpb(model):
    """Bits per byte by the plain formula, where nobody probes."""
    folder, meta = prepare.current()
    rows = np.fromfile(folder / "val.bin", np.int16).reshape(-1, meta["seq_len"] + 1)[:24].astype(np.int64)
    inputs, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
    logits = torch.cat([model(part).float() for part in inputs.split(4)]).flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
    has_bytes = targets.flatten() < meta["vocab_size"] - 4
    return float((nats * has_bytes).sum()) / math.log(2) / (meta["bytes"]["val"] * len(rows) / meta["rows"]["val"])


def tricks():
    """All, the most of them for the long run: one of each kind is what matters every day."""
    daily = ("bag_of_row", "learns_while_scored", "peek_in_eval", "plays_back")   # test_scoring.py has more kinds
    marks = {path: () if path.stem in daily else pytest.mark.slow for path in cheats("model")}
    return [pytest.param(path, marks=mark, id=path.stem) for path, mark in marks.items()]


@pytest.mark.parametrize("path", tricks())
def test_a_trick_of_the_model_does_not_pay(tmp_path, cache, path, table):
    expected = about(path)
    refusal = guarded(path.read_text())
    assert expected["guard"] in refusal if expected["guard"] != "passes" else not refusal, refusal
    model = make_run(tmp_path, path)
    status, output = stage(tmp_path, cache, "start")
    where = "start" if status == 3 else "passed"
    if status == 2:
        assert "before it handed over" in output
        status, output = stage(tmp_path, cache, "score")
        where = "scoring" if status == 3 else "nowhere"
    verdict = {0: "discard", 3: "invalid"}.get(status, output)
    assert (verdict, where) == (expected["verdict"], expected["where"]) and expected["words"] in output, output
    if where == "start" and "peek" in path.stem:   # and the scorer would have found it too
        status, again = stage(tmp_path, cache, "score")
        assert status == 3, again
    honest = make_run(tmp_path, ROOT / "tests" / "cheats" / "honest" / "plain.py")
    if expected.get("lowers") != "no":
        assert unchecked_bpb(model) < unchecked_bpb(honest) - 0.001
    elif verdict == "discard":   # what the trick would bend is not bent
        assert json.loads((tmp_path / "score.json").read_text())["val_bpb"] == pytest.approx(unchecked_bpb(honest), rel=0.1)
    table.append((path.stem, expected["property"], "guard" if refusal else where, where, shown(output)))


def shown(output):
    """The end of an output, or its score."""
    return next((line for line in output.splitlines() if line.startswith("val_bpb")), output.splitlines()[-1])[:60]


def twins():
    """Honest models; the plain ones, and those whose kind test_scoring.py has, for the long run only."""
    rest = ("plain", "tied", "own_gradient", "fft_convolution", "recurrent", "bf16", "cached_mask",
            "curriculum")
    marks = {path: pytest.mark.slow if path.stem in rest else () for path in cheats("honest")}
    return [pytest.param(path, marks=mark, id=path.stem) for path, mark in marks.items()]


@pytest.mark.parametrize("path", twins())
def test_an_honest_model_keeps_its_right_to_be_scored(tmp_path, cache, path, table):
    assert not guarded(path.read_text())
    model = make_run(tmp_path, path)
    (tmp_path / "checkpoint.pt").unlink()
    status, output = stage(tmp_path, cache, "train")
    assert status == 0, output
    model.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    status, output = stage(tmp_path, cache, "score")
    assert status == 0, output
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["val_bpb"] == pytest.approx(unchecked_bpb(model), rel=0.05)   # of some of the rows
    table.append((path.stem, "honest", "-", "-", f"scored {score['val_bpb']:.4f}"))


@pytest.fixture(scope="module")
def session(tmp_path_factory, cache):
    """A session on the real files."""
    checkout = make_checkout(tmp_path_factory.mktemp("scorer") / "checkout", cache, source=ROOT)
    commit_all(checkout)
    s, _ = agent.opened(checkout.config(rules=False, sandbox="auto"), agent.Screen())
    agent.read_branch(s)
    s.runs.mkdir(parents=True)
    agent.find_sandbox(s)
    yield s
    agent.end_spares(s)


@pytest.mark.slow
@pytest.mark.parametrize("path", cheats("scorer"), ids=lambda path: path.stem)
def test_a_trick_on_the_scorer_does_not_pay(session, path, table):
    """The loop's own score() on a checkpoint of the trick's model, in the sandbox."""
    expected, text = about(path), path.read_text()
    refusal = guarded(text)
    assert expected["guard"] in refusal, refusal
    folder = agent.fresh_folder(session, path.stem, 0, text)
    make_run(folder, path)
    score = agent.score(session, folder, text)
    status, reason = agent.decide(agent.Run("", "", 1.0, {}, "", "-"), score, 1.0)
    where = "nowhere" if status == "discard" else "scoring"
    assert (status, where) == (expected["verdict"], expected["where"]) and expected["words"] in reason, reason
    assert score.bpb is None or score.bpb > 2
    assert not list(folder.rglob("harm"))
    table.append((path.stem, expected["property"], "guard", where, (reason or f"val_bpb {score.bpb:.4f}")[:60]))
