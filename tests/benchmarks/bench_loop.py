"""Seconds of a row of the loop outside of training and scoring: python tests/benchmarks/bench_loop.py

A real session on a temporary repository, with a scripted model behind HTTP and a torch-free train.py. Its record is filled
up by git fast-import with copies of one of its own rows, then the session goes on: from one request to the next is a turn,
less the seconds that its row took to train and score. Goal: at most 0.5 s, at the 5,000th row as at the first.
"""

import contextlib
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import Server, commit_all, make_checkout, reply  # noqa: E402

STAGES, TURNS, TAG = (1, 500, 5000), 12, "loop"


def fill(checkout, upto: int, name: str = "{0:04d}") -> None:
    """Record copies of row 0002, a discard, each of a text and a name of its own, until there are so many rows."""
    ref = f"refs/autoresearch/{TAG}/0002"
    text, parent = checkout.git("show", f"{ref}:train.py"), checkout.git("rev-parse", f"{ref}^")
    form = subprocess.run(["git", "log", "-1", "--format=%B", ref], cwd=checkout.root, capture_output=True, text=True)
    stream = []
    for number in range(len(checkout.refs()) + 1, upto + 1):
        own = text.replace('"plain"', f'"filler {number}"').encode()
        blob = hashlib.sha1(b"blob %d\0" % len(own) + own).hexdigest()
        id = name.format(number, number % 10)
        values = {"Id": id, "Program": f"{number:016x}", "Text": blob}
        message = form.stdout.strip()
        for key, value in values.items():
            message = re.sub(rf"^{key}: .*", f"{key}: {value}", message, flags=re.M)
        head = f"commit refs/autoresearch/{TAG}/{id}\ncommitter a <a@a> 1760000000 +0000\n"
        message = f"{message}\n"
        stream.append(
            f"{head}data {len(message.encode())}\n{message}from {parent}\nM 100644 inline train.py\n".encode()
        )
        stream.append(b"data %d\n%s\n" % (len(own), own))
    subprocess.run(["git", "fast-import", "--quiet"], cwd=checkout.root, input=b"".join(stream), check=True)


def session(checkout, server, stage: int, **sharing: str) -> tuple[float, float, float]:
    """Some turns: the median and the longest of their own seconds, and those of the start, to the first request."""
    asked, ideas = [], iter(range(TURNS))

    def answer(body):
        if "Write the notes" in body["messages"][-1]["content"]:
            return "## Works\nnothing yet"
        asked.append(time.monotonic())
        return reply(f"SET RATE = {0.1 + (STAGES.index(stage) * TURNS + next(ideas)) / 100:.2f}")

    server.script[:] = [answer] * (2 * TURNS + 1)
    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        more = {"tag": TAG, "proposer": "llm", "base_url": server.url, "experiments": TURNS, **sharing}
        assert checkout.session(**more, confirm="never") == 0
    last = [ref for ref in checkout.refs() if not sharing or ref.endswith(sharing["agent"])][1 - len(asked) :]
    took = [float(checkout.trailers(ref.rpartition("/")[2], TAG)["Wall-S"]) for ref in last]
    own = [b - a - wall for a, b, wall in zip(asked, asked[1:], took)][1:]  # the first may hold the baseline too
    return median(own), max(own), asked[0] - began


def main() -> None:
    server = Server()
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    with tempfile.TemporaryDirectory() as folder:
        checkout = make_checkout(Path(folder) / "checkout", Path(folder) / "cache")
        commit_all(checkout)
        print("rows before   own seconds of a row: median, longest   of a start, to the first request")
        for stage in STAGES:
            fill(checkout, stage) if stage > 1 else None
            before = len(checkout.refs())
            print("{:11}   {:30.3f} {:8.3f}   {:.1f}".format(before, *session(checkout, server, stage)), flush=True)


if __name__ == "__main__":
    main()
