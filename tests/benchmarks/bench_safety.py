"""What the safety costs: the sandbox's start-up, the probe at the start, a scoring: python tests/benchmarks/bench_safety.py

The sandbox: a Python that does nothing, started by the loop's own child() with and without it, by turns. The rest: the
shipped train.py on the built-in data at the cpu preset (prepared in a temporary cache), at most five minutes in all.
"""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import agent  # noqa: E402
from conftest import commit_all, make_checkout  # noqa: E402

STARTS, SCORINGS = 20, 3

PROBE = """
import time, prepare, train
data = prepare.load()
model = train.build_model(data.vocab_size, data.seq_len)
prepare.receive = lambda: print(time.monotonic() - began) or exit()   # where the probe is over
began = time.monotonic()
data.start(model)
"""


def start_up(folder: Path) -> None:
    """Print the milliseconds of a child with and without the sandbox."""
    checkout = make_checkout(folder / "toy", folder / "toy-cache")
    commit_all(checkout)
    sessions = {}
    for sandbox in ("require", "off"):
        s, _ = agent.opened(checkout.config(sandbox=sandbox), agent.Screen())
        with contextlib.redirect_stdout(io.StringIO()):
            agent.read_branch(s)
            began = time.perf_counter()
            agent.find_sandbox(s)
        sessions[sandbox] = s
        if sandbox == "require":
            print(f"self-test at the start of a session: {1000 * (time.perf_counter() - began):.0f} ms")
    seconds = {sandbox: [] for sandbox in sessions}
    for _ in range(STARTS):
        for sandbox, s in sessions.items():
            began = time.perf_counter()
            with agent.child(s, "train", folder, "") as running:
                agent.order(s, running, ["train.py"])
                running.process.wait()
            seconds[sandbox].append(time.perf_counter() - began)
    with_, without = (1000 * statistics.median(seconds[sandbox]) for sandbox in ("require", "off"))
    print(f"a Python that does nothing: {with_:.0f} ms with the sandbox, {without:.0f} ms without")


def scoring(folder: Path) -> None:
    """Print the seconds of the probe at the start and of whole scorings."""
    checkout = make_checkout(folder / "real", folder / "cache", source=ROOT)
    env = checkout.env(AUTORESEARCH_TIME_BUDGET="10")

    def python(*args, **more):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *args], cwd=checkout.root, env={**env, **more}, check=True,
                              capture_output=True, text=True)
        return time.perf_counter() - began, done.stdout

    python("prepare.py", "--preset", "cpu", "--dataset", "builtin")
    python("train.py")
    probe_s = [float(python("-c", PROBE, AUTORESEARCH_HANDOVER_FD="0")[1]) for _ in range(SCORINGS)]
    print(f"probe in data.start(): {statistics.median(probe_s):.2f} s")
    score_s = [python("prepare.py", "score", "runs/by-hand")[0] for _ in range(SCORINGS)]
    inner = json.loads((checkout.root / "runs" / "by-hand" / "score.json").read_text())["seconds"]
    print(f"a scoring: {statistics.median(score_s):.1f} s in all, {statistics.median(score_s) / 3:.1f} % of 300 s; "
          f"{inner:.1f} s of them after the imports")


if __name__ == "__main__":
    os.environ.setdefault("GIT_CONFIG_GLOBAL", os.devnull)
    with tempfile.TemporaryDirectory() as folder:
        start_up(Path(folder))
        scoring(Path(folder))
