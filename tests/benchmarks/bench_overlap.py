"""What asking ahead saves: python tests/benchmarks/bench_overlap.py [--budget 5] [--rows 8]

agent.py as a process on toy runs, against a real HTTP server that lets each reply wait for a share of the budget; a
cycle is timed from row to row of its output. Every sixth proposal is a keep, every seventh needs a lesson first, hence a
second request. Goal: with --prefetch, a latency of 0.4 of the budget leaves 97 % of the rate that there is without any.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import Server, commit_all, make_checkout, reply  # noqa: E402

GOAL = 0.97
CELLS = (
    (0.0, "--no-prefetch"),
    (0.0, "--prefetch"),
    (0.4, "--no-prefetch"),
    (0.4, "--prefetch"),
)  # latency, of a budget


def answers(server: Server, wait_s: float) -> None:
    """Let every request wait, then have the next of many replies."""
    numbers = itertools.count(1)

    def step(body: dict) -> str:
        time.sleep(wait_s)
        number = next(numbers)
        if number % 7 == 0:
            return reply(f"SET RATEX = {number}")
        better = f"\nSET BPB = {1.05 - number / 1e5}" if number % 6 == 0 else ""
        return reply(f"SET RATE = {(0.1 + 0.01 * number):.2f}{better}", description=f"idea {number}")

    server.script[:], server.requests[:] = [step] * 1000, []


def row_times(command: list[str], **options) -> list[float]:
    """When each row of a session came out of its pipe, by the monotonic clock. Exits where it went otherwise."""
    times, lines = [], []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        for line in process.stdout:
            lines.append(line)
            if re.match(r"\d{4}  (keep|discard) ", line):
                times.append(time.monotonic())
    if process.returncode or any("dropped" in line or "the search makes" in line for line in lines):
        sys.exit("the session did not go as planned:\n" + "".join(lines))
    return times


def cycle_s(folder: Path, server: Server, budget_s: float, rows: int, latency: float, ahead: str) -> float:
    """Seconds from row to row of one session, without the baseline and the first proposal, asked for before it."""
    checkout = make_checkout(folder / f"{latency}{ahead}", folder / "cache")
    commit_all(checkout)
    answers(server, latency * budget_s)
    command = [sys.executable, "agent.py", "--time-budget", str(budget_s), "--experiments", str(rows + 2), ahead]
    command += ["--confirm", "never", "--model", "tiny"]
    times = row_times(command, cwd=checkout.root, env=checkout.env(OPENAI_BASE_URL=server.url))
    found = [after - before for before, after in itertools.pairwise(times[1:])]
    shown = " ".join(f"{one:.2f}" for one in found)
    print(f"latency {latency:g} {ahead:14} {len(server.requests):3} requests, cycles of {shown} s", flush=True)
    return fmean(found)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--budget", type=float, default=5.0, metavar="S", help="seconds of training (5)")
    p.add_argument("--rows", type=int, default=8, metavar="N", help="timed rows of each session (8)")
    args = p.parse_args()
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    server = Server()
    with tempfile.TemporaryDirectory() as folder:
        taken = {cell: cycle_s(Path(folder), server, args.budget, args.rows, *cell) for cell in CELLS}
    none_s = min(taken[cell] for cell in CELLS[:2])  # the better of the two without latency
    print(f"\nbudget {args.budget:g} s{'':26}{'cycle s':>9}{'an hour':>9}{'of the rate without latency':>29}")
    for (latency, ahead), seconds in taken.items():
        print(f"latency {latency:g} of it, {ahead:24}{seconds:9.2f}{3600 / seconds:9.1f}{none_s / seconds:29.1%}")
    share = none_s / taken[CELLS[3]]
    print(f"goal: {GOAL:.0%} with --prefetch; {'met' if share >= GOAL else 'missed'}: {share:.1%}")
    lost_s = max(0.0, taken[CELLS[3]] - none_s)  # what it adds does not grow with the budget
    print(f"with a budget of 300 s and the same {lost_s:.2f} s lost: {1 - lost_s / (300 + none_s - args.budget):.1%}")


if __name__ == "__main__":
    main()
