"""The whole of it: real data, real training, real scoring, a few seconds each: pytest tests/test_end_to_end.py"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, commit_all, make_checkout, reply
from test_loop import slow

import agent


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A small data set made of this project's own files and some of Python's."""
    folder = tmp_path_factory.mktemp("data")
    texts = folder / "texts"
    texts.mkdir()
    for path in [
        *sorted(Path(json.__file__).parent.parent.glob("[c-d]*.py")),
        ROOT / "agent.py",
        ROOT / "prepare.py",
    ]:
        shutil.copy(path, texts)
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "prepare.py"),
            "--dataset",
            str(texts),
            "--preset",
            "cpu",
            "--cache",
            str(folder / "cache"),
        ],
        check=True,
        capture_output=True,
    )
    return folder / "cache"


@pytest.fixture
def real(tmp_path, cache):
    """A checkout of the real files; no compiler on the path, so that nothing waits for it."""
    checkout = make_checkout(tmp_path / "checkout", cache, source=ROOT)
    commit_all(checkout)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "git").symlink_to(shutil.which("git"))
    checkout.path = str(tools)
    return checkout


def score_again(real, folder):
    """val_bpb of a folder by the command line."""
    shutil.copytree(folder, real.root / "again")
    done = subprocess.run(
        [sys.executable, "prepare.py", "score", "again"],
        cwd=real.root,
        env=real.env(),
        check=True,
        capture_output=True,
        text=True,
    )
    assert "val_bpb:" in done.stdout
    return json.loads((real.root / "again" / "score.json").read_text())["val_bpb"]


SUMMARY = (
    "--- val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth"
)


@pytest.mark.parametrize("preset", ["cpu", slow("mac"), slow("consumer"), slow("datacenter")])
def test_search_steps_apply_to_the_real_file(preset):
    text = (ROOT / "train.py").read_text()
    for i in range(6):
        proposal, edited = agent.search_proposal(text, preset, str(i), {})
        before, after = agent.knobs(text, preset), agent.knobs(edited, preset)
        moved = {name for name in before if before[name].value != after[name].value}
        assert moved == {edit.old for edit in proposal.edits} and all(before[name].low is not None for name in moved)


def test_a_session_on_real_training(real, server):
    """Baseline, a SET of a size with a block of code, and a leak that the probe at the start finds."""
    text = real.text()
    line = next(line for line in text.splitlines() if "data.start(model)" in line)
    block = f"<<<<<<< SEARCH\n{line}\n=======\n    print('hello from the edit')\n{line}\n>>>>>>> REPLACE"
    leak = (
        "<<<<<<< SEARCH\n    return GPT(vocab_size, seq_len, sizes())\n=======\n    class Leak(GPT):\n"
        "        def forward(self, idx):\n"
        "            return super().forward(idx) + 20.0 * F.one_hot(idx.roll(-1, 1), vocab_size)\n"
        "    return Leak(vocab_size, seq_len, sizes())\n>>>>>>> REPLACE"
    )
    server.script += [reply(f"SET DEPTH = 3\n{block}", description="three blocks"), reply(leak, description="peek")]
    done = real.run("--experiments", "3", "--time-budget", "2", PATH=real.path, OPENAI_BASE_URL=server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    base, small, *_, peek = real.record()   # a gain of over 5 % is run once more
    assert base.status == "keep" and base.preset == "cpu" and 1 < base.val_bpb < 8 and "%:" in base.curve
    assert base.steps > 0 and base.tokens_M > 0 and base.memory_gb > 0.1 and 2 <= base.train_s < 7
    runs = real.root / "runs" / base.tag
    summary = (runs / "0001" / "score.log").read_text()
    assert " ".join(line.split(":")[0] for line in summary.splitlines()[:10]) == SUMMARY
    assert f"{base.val_bpb:.6f}" in summary and not (runs / "0001" / "checkpoint.pt").exists()
    best = min((base, small), key=lambda r: r.val_bpb)
    assert score_again(real, runs / "best") == pytest.approx(best.val_bpb, abs=1e-6)
    words = [sys.executable, "prepare.py", "sample", f"runs/{base.tag}/best", "--prompt", "def f", "--tokens", "5"]
    done = subprocess.run(words, cwd=real.root, env=real.env(AUTORESEARCH_CACHE="/nowhere"), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("def f"), done.stderr
    log = (real.root / "runs" / base.tag / "0002" / "run.log").read_text()
    assert small.status in ("keep", "discard") and "hello from the edit" in log and "3 blocks" in log
    assert peek.status == "invalid" and "looks ahead" in peek.reason and peek.train_s is None
