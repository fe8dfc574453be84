"""The loop's own seconds an experiment, without model, training and drawing: python tests/benchmarks/bench_loop.py

A real session on a temporary repository, with a scripted model behind HTTP and a torch-free train.py; its record is
filled up with copies of its own rows, then the session goes on. Goal: at most 0.5 s, the same at the 1st and 500th row.
"""

import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import agent  # noqa: E402
from conftest import Server, commit_all, make_checkout, reply  # noqa: E402

OUTSIDE = ("ask_once", "train", "score", "draw")
ROWS_EACH = 12


def timed(own: list[float]):
    """Wrap experiment and candidate so that their time goes to `own`, and the outside's does not."""
    spent = {"outside": 0.0}

    def wrap(function, count):
        def wrapped(*args, **kwargs):
            before, start = spent["outside"], time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                count(time.perf_counter() - start, before)

        return wrapped

    def outside(seconds, before):
        spent["outside"] += seconds

    def inside(seconds, before):
        own.append(seconds - (spent["outside"] - before))

    for name in OUTSIDE:
        setattr(agent, name, wrap(getattr(agent, name), outside))
    for name in ("candidate", "experiment"):
        setattr(agent, name, wrap(getattr(agent, name), inside))


def fill(checkout, upto: int) -> None:
    """Copy the last discard until the record has so many rows."""
    s, _ = agent.opened(checkout.config(), agent.Screen())
    record = agent.read_record(s.config)
    model = next(r for r in reversed(record) if r.status == "discard")
    for number in range(len(record) + 1, upto + 1):
        row = replace(model, id=f"{number:04d}", text_key=f"{number:016x}")
        rows = agent.write_refs(s, [row], [agent.write_tree(s, row.parent, checkout.text(), "brief")])
        agent.append_rows(s.config, rows)


def session(checkout, server, own: list[float]) -> float:
    """A few more experiments; seconds of the loop's own time for each."""
    own.clear()
    first = len(agent.read_record(checkout.config()))
    server.script += [reply(f"SET RATE = {0.5 - (first + i) / 10_000}") for i in range(ROWS_EACH)]
    with contextlib.redirect_stdout(io.StringIO()):
        checkout.session(proposer="llm", base_url=server.url, experiments=ROWS_EACH)
    rows = len(agent.read_record(checkout.config())) - first
    return sum(own) / rows


def main() -> None:
    own: list[float] = []
    timed(own)
    server = Server()
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    with tempfile.TemporaryDirectory() as folder:
        checkout = make_checkout(Path(folder) / "checkout", Path(folder) / "cache")
        commit_all(checkout)
        print("rows before   loop's own seconds per experiment")
        figures = []
        for rows in (0, 100, 500):
            if rows:
                fill(checkout, rows)
            before = len(agent.read_record(checkout.config()))
            figures.append(session(checkout, server, own))
            print(f"{before:11}   {figures[-1]:.3f}", flush=True)
        print(f"last / first: {figures[-1] / figures[0]:.2f}   mean {statistics.mean(figures):.3f} s   goal 0.5 s")


if __name__ == "__main__":
    main()
