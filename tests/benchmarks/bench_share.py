"""What sharing a record costs and brings: python tests/benchmarks/bench_share.py [--seconds S] [--agents N ...]

Runs that sleep, on the toy task: this measures coordination, not research. First real agents at once, each in a clone of
its own, with one scripted model that draws its ideas from a small pool, so that many are repeats: how many different
experiments an hour, with and without sharing. Then a record of 10,000 rows of ten agents on the remote: seconds of a first
fetch, of a later one, of a push, of a row of the loop, and the size of a request. Goals: 8 agents make 7.5 times the
different experiments of one; the loop's own time stays below 0.5 s a row.
"""

import argparse
import contextlib
import io
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]

from bench_loop import fill, session  # noqa: E402
from conftest import Checkout, Server, commit_all, make_checkout, reply  # noqa: E402

import agent  # noqa: E402

IDEAS, BUDGET_S, FULL_S = 200, 20.0, 3.0


def pool(folder: Path) -> tuple[Path, Checkout]:
    """A bare repository, and the checkout that it was cloned from; the data are prepared."""
    first = make_checkout(folder / "first", folder / "cache")
    commit_all(first)
    subprocess.run([sys.executable, "prepare.py"], cwd=first.root, env=first.env(), check=True)
    first.git("clone", "-q", "--bare", ".", folder / "pool.git")
    return folder / "pool.git", first


def clone(bare: Path, name: str, cache: Path) -> Checkout:
    subprocess.run(["git", "clone", "-q", bare, bare.parent / name], check=True)
    return Checkout(bare.parent / name, cache)


def together(number: int, share: bool, seconds: float) -> tuple[int, int, float, float]:
    """So many agents at once: experiments, different ones, those of an hour by the rows' own times, the best score."""
    server, draw = Server(), random.Random(0)
    idea = lambda body: reply(f"SET RATE = {0.05 + 0.02 * draw.randrange(IDEAS):.2f}")  # noqa: E731
    server.script += [idea] * 100_000
    with tempfile.TemporaryDirectory() as folder:
        bare, first = pool(Path(folder))
        agents = [clone(bare, f"w{i}", first.cache) for i in range(number)]
        more = ["--tag", "t", "--hours", str(seconds / 3600), "--sandbox", "off", "--confirm", "never"]
        processes = []
        for one in agents:
            args = [*more, *(["--share", str(bare), "--agent", one.root.name] if share else [])]
            command = [sys.executable, "agent.py", "--time-budget", str(BUDGET_S), *args]
            env = one.env(OPENAI_BASE_URL=server.url)
            processes.append(subprocess.Popen(command, cwd=one.root, env=env, stdout=subprocess.DEVNULL))
        assert not any(process.wait() for process in processes)
        rows, scores, hourly = {}, [], 0.0
        for one in agents:
            times = []
            own = {ref: commit for ref, commit in one.refs().items() if not share or ref.endswith(f"-{one.root.name}")}
            for commit in own.values():
                message = one.git("log", "-1", "--format=%B", commit)
                program, score = (re.search(f"^{name}: (.*)", message, re.M)[1] for name in ("Program", "Score"))
                scores.append(float(score))
                times.append(datetime.fromisoformat(re.search("^Time: (.*)", message, re.M)[1]))
                if "\nProposer: llm" in message:
                    rows[commit] = program
            hourly += (len(times) - 1) * 3600 / (max(times) - min(times)).total_seconds()
    server.http.shutdown()
    different = len(set(rows.values()))
    return len(rows), different, hourly * different / len(rows), min(scores)


def full(number: int) -> None:
    """Seconds and sizes with so many rows of ten agents on the remote."""
    server = Server()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        bare, first = pool(Path(folder))
        first.session(tag="loop", experiments=2, time_budget=FULL_S)
        fill(first, number + 2, "{0:04d}-p{1}")
        first.git("push", "-q", bare, "refs/autoresearch/loop/*:refs/autoresearch/loop/*")
        mine = clone(bare, "mine", first.cache)
        sharing = {"share": str(bare), "agent": "mine", "time_budget": FULL_S}
        config = mine.config(tag="loop", base_url=server.url, **sharing)
        s = agent.Session(config, agent.read_task(config), agent.Screen(), "")
        took = []
        for step in (agent.fetch_rows, agent.fetch_rows):
            began = time.monotonic()
            step(s)
            took.append(time.monotonic() - began)
        state = agent.recall(s)
        size = len(agent.request(s, state)[1]["content"])
        own = session(mine, server, 1, **sharing, prefetch=True)  # as a model elsewhere is asked
        began = time.monotonic()
        agent.push_rows(s)
        took.append(time.monotonic() - began)
    print(
        f"{len(state.rows)} rows of others: first fetch {took[0]:.1f} s, later {took[1]:.2f} s, push {took[2]:.2f} s;"
    )
    print("a row of the loop {:.2f} s (longest {:.2f}), a start {:.1f} s; a request {} characters".format(*own, size))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seconds", type=float, default=240.0, metavar="S", help="of each session (240)")
    p.add_argument("--agents", type=int, nargs="*", default=[1, 2, 4, 8], metavar="N", help="(1 2 4 8)")
    p.add_argument("--rows", type=int, nargs="*", default=[300, 10_000], metavar="N", help="(300 10000)")
    args = p.parse_args()
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    print(f"runs that sleep {BUDGET_S:g} s, {IDEAS} ideas, {args.seconds:g} s a session", flush=True)
    print("agents  shared  experiments  different  an hour  to one agent's  best", flush=True)
    alone = 0
    for number in args.agents:
        for share in (True, False) if number > 1 else (False,):
            rows, different, hourly, best = together(number, share, args.seconds)
            alone = alone or hourly / number
            cells = number, "yes" if share else "no", rows, different, hourly, hourly / alone, best
            print("{:6}  {:>6}  {:11}  {:9}  {:7.0f}  {:14.1f}  {:.4f}".format(*cells), flush=True)
    for number in args.rows:
        full(number)


if __name__ == "__main__":
    main()
