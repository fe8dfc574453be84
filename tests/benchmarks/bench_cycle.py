"""Print what one experiment consists of, in seconds, on this machine's preset: python tests/benchmarks/bench_cycle.py

The repository's train.py runs with a short budget in a temporary clone, in the sandbox: once with no compile cache,
then in turns with and without processes that load their modules ahead. Data: $AUTORESEARCH_CACHE, prepared if need be.
"""
import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import agent
from conftest import commit_all, make_checkout

PARTS = ("start, to the tokens", "training", "checkpoint, end", "scorer, to the rows", "scoring", "all but training")


def opened(folder: Path, budget_s: float) -> agent.Session:
    """A session on a clone, up to where the first run would begin."""
    cache = os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch"
    checkout = make_checkout(folder, Path(cache), source=ROOT)
    commit_all(checkout)
    s, _ = agent.opened(checkout.config(budget_s=budget_s, sandbox="auto", startup_s=900.0), agent.Screen())
    agent.read_branch(s)
    s.runs.mkdir(parents=True)
    agent.find_sandbox(s)
    return s


def cycle(s: agent.Session, id: str) -> list[float]:
    """Run and score the session's train.py, with the caches of best/, once: the seconds of PARTS."""
    asked, plain = [], agent.hand_over

    def timed(*args):
        done = plain(*args)
        asked.append(time.monotonic())
        return done

    agent.hand_over = timed
    try:
        began = time.monotonic()
        run, verdict, folder = agent.attempt_once(s, s.text, id, 0, agent.SEED)
        over = time.monotonic()
    finally:
        agent.hand_over = plain
    if run.status or verdict.status:
        sys.exit(f"{run.status} {run.reason} {verdict.reason}\n{run.log}")
    agent.tidy(s, folder, True)
    trained = asked[0] + s.config.budget_s
    ended = asked[0] + run.train_s
    parts = [asked[0] - began, s.config.budget_s, ended - trained, asked[1] - ended, over - asked[1]]
    return [*parts, sum(parts) - s.config.budget_s]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--budget", type=float, default=10.0, metavar="S", help="seconds of training (10)")
    p.add_argument("--rounds", type=int, default=3, metavar="N", help="measured cycles of each kind (3)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(io.StringIO()):
            s = opened(Path(folder) / "clone", args.budget)
        stack.callback(agent.end_spares, s)
        seconds = {"cold": [cycle(s, "0001")], "warm, nothing loaded ahead": [], "warm": []}
        keep_spare = agent.keep_spare
        for i in range(args.rounds):
            agent.end_spares(s)
            agent.keep_spare = lambda *_: None
            seconds["warm, nothing loaded ahead"].append(cycle(s, f"{4 * i + 2:04d}"))
            agent.keep_spare = keep_spare
            cycle(s, f"{4 * i + 3:04d}")   # leaves a process for the next
            seconds["warm"].append(cycle(s, f"{4 * i + 4:04d}"))
        print(f"preset {s.data.preset}, {s.device}, sandbox {'on' if s.bwrap else 'off'}; medians, in seconds")
        print(f"{'':28}" + "".join(f"{name:>23}" for name in PARTS))
        for name, rows in seconds.items():
            print(f"{name:28}" + "".join(f"{statistics.median(column):23.2f}" for column in zip(*rows)))


if __name__ == "__main__":
    os.environ.setdefault("GIT_CONFIG_GLOBAL", os.devnull)
    main()
