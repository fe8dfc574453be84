"""What asking ahead saves, and that it changes no score: python tests/benchmarks/bench_overlap.py [--same]

Without --same: agent.py as a process on toy runs, against a server that lets each reply wait for a share of the budget;
the cycle is timed from row to row of its output. Goal: with the next proposal asked ahead, a latency up to 0.4 of the
budget leaves at least 97 % of the rate without any. About 7 minutes.

--same: the shipped train.py, one seed, the cpu preset, with and without a request in the background, by turns; the data
come from $AUTORESEARCH_CACHE. With --steps N each run does N steps, however fast: the scores must then be identical.
"""

import argparse
import contextlib
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import agent  # noqa: E402
from conftest import Server, commit_all, make_checkout, reply  # noqa: E402

LATENCIES = (0.0, 0.2, 0.4)   # of the budget
FULL_S = agent.BUDGET_S
GOAL = 0.97
T_95 = (12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)   # Student's t, two-sided 95 %, from one degree on

# The rate


class Cell(NamedTuple):
    """One session: latency as a share of the budget, whether it asks ahead, its cycles in seconds, requests a row."""

    latency: float
    ahead: bool
    cycles: list[float]
    requests: float

    @property
    def cycle_s(self):
        return statistics.mean(self.cycles)


def answer(number: int, first: bool) -> str:
    """The reply for an experiment: every sixth is a keep, every seventh cannot be applied until a lesson was sent."""
    if first and number % 7 == 4:
        return reply(f"SET RATEX = {number}")
    edit = f"BPB = {1.05 - number / 1e5}" if number % 6 == 5 else f"RATE = {0.5 - number / 1e5}"
    return reply(f"SET {edit}", description=edit)


def answering(server: Server, wait_s: float) -> None:
    """Let every request wait, then have an answer that depends on the request alone."""

    def step(body: dict):
        time.sleep(wait_s)
        messages = body["messages"]
        return answer(int(re.findall(r"Propose experiment (\d+)", messages[1]["content"])[-1]), len(messages) == 2)

    server.script[:] = [step] * 1000
    server.requests.clear()


def row_times(checkout, args: list[str], url: str) -> list[float]:
    """When each row of a session came out of its pipe, by the monotonic clock."""
    command = [sys.executable, str(checkout.root / "agent.py"), "--model", "tiny", *args]
    env, found, lines = checkout.env(OPENAI_BASE_URL=url), [], []
    with subprocess.Popen(command, cwd=checkout.root, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            lines.append(line)
            if re.match(r"\d{4}  (keep|discard) ", line):
                found.append(time.monotonic())
    if process.returncode or any("dropped" in line or "the search" in line for line in lines):
        sys.exit("the session did not go as planned:\n" + "".join(lines))
    return found


def measure(folder: Path, server: Server, budget_s: float, rows: int, latency: float, ahead: bool) -> Cell:
    """One session of a new checkout. Not counted: the baseline, and the first proposal's row, which is asked before."""
    checkout = make_checkout(folder / f"{latency}{ahead}", folder / "cache")
    commit_all(checkout)
    answering(server, latency * budget_s)
    args = ["--time-budget", str(budget_s), "--experiments", str(rows + 2)]
    times = row_times(checkout, [*args, "--prefetch" if ahead else "--no-prefetch"], server.url)
    cycles = [after - before for before, after in zip(times[1:], times[2:])]
    return Cell(latency, ahead, cycles, len(server.requests) / (rows + 1))


def line(name: str, budget_s: float, cycle_s: float) -> str:
    return f"{name:48}{cycle_s:9.2f}{budget_s / cycle_s:10.1%}{3600 / cycle_s:10.2f}"


HEAD = f"{'':48}{'cycle s':>9}{'training':>10}{'an hour':>10}"


def show_measured(cells: dict, budget_s: float) -> None:
    """What came out beside what a serial loop's arithmetic gives."""
    overhead_s = cells[0.0, False].cycle_s - budget_s
    print(f"\nMeasured, budget {budget_s:g} s; outside it, without latency: {overhead_s:.2f} s\n{HEAD}")
    for latency in LATENCIES:
        off, on = cells[latency, False], cells[latency, True]
        serial_s = budget_s + overhead_s + off.requests * latency * budget_s
        name = f"latency {latency:g}: "
        print(line(f"{name}serial arithmetic, {off.requests:.2f} requests", budget_s, serial_s))
        print(line(f"{name}asked when it is its turn", budget_s, off.cycle_s))
        print(line(f"{name}asked ahead", budget_s, on.cycle_s))


def show_computed(cells: dict, budget_s: float, overhead_s: float, whose: str) -> dict[float, float]:
    """The same at the full budget: cycle by latency, asked ahead.

    Serial: budget + overhead + requests x latency. Ahead: the reply has a whole cycle to come in, so what it adds is
    only what the toy runs were seen to add, in seconds, to their cycle without latency.
    """
    print(f"\nComputed for {FULL_S:g} s; {overhead_s:.2f} s outside it, {whose}\n{HEAD}")
    found = {}
    for latency in LATENCIES:
        off, on = cells[latency, False], cells[latency, True]
        late_s = max(0.0, on.requests * latency - 1) * FULL_S
        found[latency] = FULL_S + overhead_s + late_s + max(0.0, on.cycle_s - cells[0.0, True].cycle_s)
        serial_s = FULL_S + overhead_s + off.requests * latency * FULL_S
        print(line(f"latency {latency:g}: serial arithmetic", FULL_S, serial_s))
        print(line(f"latency {latency:g}: asked ahead", FULL_S, found[latency]))
    return found


def rates(budget_s: float, rows: int, overhead_s: float | None) -> None:
    """Measure every cell and print all of it."""
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    server, cells = Server(), {}
    with tempfile.TemporaryDirectory() as folder:
        for latency in LATENCIES:
            for ahead in (False, True):
                cell = cells[latency, ahead] = measure(Path(folder), server, budget_s, rows, latency, ahead)
                print(f"latency {latency:g} of {budget_s:g} s, {'asked ahead' if ahead else 'in turn':12} cycles of "
                      f"{' '.join(f'{cycle:.2f}' for cycle in cell.cycles)} s", flush=True)
    show_measured(cells, budget_s)
    toy_s = cells[0.0, True].cycle_s - budget_s
    computed = [show_computed(cells, budget_s, toy_s, "as of the toy runs")]
    if overhead_s is not None:
        computed.append(show_computed(cells, budget_s, overhead_s, "as given"))
    print()
    for latency in LATENCIES[1:]:
        share = cells[0.0, True].cycle_s / cells[latency, True].cycle_s
        of_full = min(found[0.0] / found[latency] for found in computed)
        print(f"asked ahead, latency {latency:g} of the budget: {share:.1%} of the rate without latency, measured; "
              f"{of_full:.1%} computed for {FULL_S:g} s (goal {GOAL:.0%}: "
              f"{'met' if min(share, of_full) >= GOAL else 'missed'})")


# The same score


class Sample(NamedTuple):
    """One run of the unchanged train.py; replies: that came while it trained."""

    val_bpb: float
    steps: int
    tokens_s: float
    replies: int


BY_STEPS = (("while not data.expired():", "while log.step < {0}:"), ("data.progress())", "log.step / {0})"))


def session_of(folder: Path, server: Server, budget_s: float, steps: int | None = None) -> agent.Session:
    """A session on a clone of this checkout's files whose best is the shipped train.py, its compile cache warm.

    steps: that a run does, whatever the time.
    """
    cache = Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")
    checkout = make_checkout(folder / "real", cache.resolve(), source=ROOT)
    text = checkout.text()
    for old, new in BY_STEPS if steps else ():
        assert text.count(old) == 1, old
        text = text.replace(old, new.format(steps))
    (checkout.root / "train.py").write_text(text)
    commit_all(checkout)
    more = {"sandbox": "auto", "startup_s": agent.STARTUP_S, "outage_s": agent.REPLY_S}
    config = checkout.config(proposer="llm", base_url=server.url, model="tiny", budget_s=budget_s, **more)
    s, _ = agent.opened(config, agent.Screen())
    if s.data.preset != "cpu":
        sys.exit(f"the data prepared in {cache} are for the preset {s.data.preset}, not for cpu")
    s.llm.model, s.llm.starting = "tiny", False
    s.runs.mkdir(parents=True)
    agent.read_branch(s)
    agent.find_sandbox(s)
    agent.make_branch(s)
    agent.measure_baseline(s)
    return s


def in_training(s: agent.Session, folder: Path, wait_s: float, answered: list[bool]):
    """A step of the server: each reply comes so long after the first step of the run; the first one is of no use.

    answered: of each reply, whether the run still trained.
    """
    def step(body: dict):
        limit = time.monotonic() + agent.STARTUP_S
        while not agent.STEP.search(agent.log_tail(folder / "run.log")) and time.monotonic() < limit:
            time.sleep(0.1)
        time.sleep(wait_s)
        answered.append(not (folder / "score.log").exists())
        value = 0.002 + int(folder.name) / 1e5
        return reply("SET NO_SUCH_NAME = 1" if len(answered) == 1 else f"SET EMBED_DECAY = {value}")

    return step


def sample(s: agent.Session, server: Server, number: int, ahead: bool) -> Sample:
    """Train and score the best's text again; with `ahead`, while a proposal is asked for, refused and asked again."""
    id, answered = f"{s.next_id + number:04d}", []
    server.script[:] = [in_training(s, s.runs / id, 0.3 * s.config.budget_s, answered)] * 2
    s.prefetch = ahead
    agent.prefetch(s, agent.Proposal("a twin of the best"), s.text + "\nTWIN = 1\n")
    run, score, folder = agent.attempt_once(s, s.text, id, 0, agent.SEED)
    found = agent.arrived(s)
    if run.status or score.status or ahead != (found is not None):
        sys.exit(f"a run did not go as planned: {run.reason or score.reason or 'no proposal came'}")
    agent.remove(folder)
    return Sample(score.bpb, run.facts["steps"], run.facts["tokens"] / run.facts["training_seconds"], sum(answered))


def show(name: str, values: list[float], form: str) -> None:
    sd = statistics.stdev(values) if len(values) > 1 else float("nan")
    print(f"  {name:12} mean {statistics.mean(values):{form}}  sd {sd:{form}}")


def compare(name: str, off: list[float], on: list[float], form: str) -> None:
    """The mean of the paired differences, and whether it is more than the repeats differ among themselves."""
    pairs = [b - a for a, b in zip(off, on)]
    mean = statistics.mean(pairs)
    if len(pairs) < 2:
        return print(f"{name}: on - off {mean:+{form}}; one pair says nothing about the noise")
    error = statistics.stdev(pairs) / len(pairs) ** 0.5
    limit = T_95[min(len(pairs) - 2, len(T_95) - 1)] * error
    verdict = "differ by more than" if abs(mean) > limit else "do not differ by more than"
    print(f"{name}: mean of on - off over {len(pairs)} pairs {mean:+{form}}, standard error {error:{form}}: on and off "
          f"{verdict} the repeat noise (95 %: {limit:{form}})")


def same(budget_s: float, pairs: int, steps: int | None) -> None:
    """Print every run of one text and seed with and without asking ahead, and how they compare."""
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    server, runs = Server(), {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            s = session_of(Path(folder), server, budget_s, steps)
        print(f"{f'{steps} steps' if steps else f'{budget_s:g} s'} of training, seed {agent.SEED}")
        print("ahead  val_bpb    steps   tokens/s   replies while it trained")
        for number in range(2 * pairs):
            ahead = number % 4 in (1, 2)   # off on, on off, off on
            with contextlib.redirect_stdout(io.StringIO()):
                found = sample(s, server, number, ahead)
            runs[ahead].append(found)
            print(f"{'on' if ahead else 'off':5}  {found.val_bpb:.6f} {found.steps:7} {found.tokens_s:10,.0f}   "
                  f"{found.replies}", flush=True)
        agent.end_spares(s)
    off, on = ([list(column) for column in zip(*runs[ahead])] for ahead in (False, True))
    for ahead, (bpb, steps, tokens_s, _) in ((False, off), (True, on)):
        print("asked ahead" if ahead else "not asked ahead")
        show("val_bpb", bpb, ".6f")
        show("steps", steps, ".1f")
        show("tokens/s", tokens_s, ",.0f")
    compare("val_bpb", off[0], on[0], ".6f")
    compare("tokens/s", off[2], on[2], ",.0f")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--budget", type=float, metavar="S", help="seconds of training; default 5, with --same 30")
    p.add_argument("--rows", type=int, default=8, metavar="N", help="timed rows of each cell")
    p.add_argument("--overhead", type=float, metavar="S", help="seconds outside training of the preset to compute for")
    p.add_argument("--same", action="store_true", help="compare scores of the shipped train.py instead")
    p.add_argument("--pairs", type=int, default=4, metavar="N", help="of runs with --same")
    p.add_argument("--steps", type=int, metavar="N", help="with --same, steps of each run, within the budget")
    args = p.parse_args()
    if args.same:
        same(args.budget or 30.0, args.pairs, args.steps)
    else:
        rates(args.budget or 5.0, args.rows, args.overhead)


if __name__ == "__main__":
    main()
