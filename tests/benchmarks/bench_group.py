"""What memory and roles are worth, and what a long record costs: python tests/benchmarks/bench_group.py

First a record of 300 experiments in a real repository: the size of a request, the share of it that is as it was in the
request before, seconds for it, for a restart and for the report. Then sessions with the shipped train.py, spoiled in
four constants, and a scripted model behind HTTP that draws from a fixed pool of ideas: good, neutral and bad, each in
two wordings. The script leaves out what the request tells it was tried, takes its role's ideas first, and writes notes
when asked. Three arms of --minutes each: everything; a script that ignores the record, without roles or notes, but
repeats refused; and nothing refused either. What a script shows is that the loop tells what a reader needs to know, and what repeats cost;
not how well a model reads. An arm is one draw: its gain hangs on which ideas came early. Data: $AUTORESEARCH_CACHE,
prepared if need be.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import agent  # noqa: E402
from conftest import Server, commit_all, make_checkout, reply  # noqa: E402

CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")
SPOILED = {"HEAD_LR": 0.001, "MATRIX_LR": 0.004, "EMBED_LR": 0.05, "CONV_LR": 0.01}
IDEAS = [   # kind, role, name, values in two wordings, which count as one; None: the value that was spoiled
    ("good", "optimizer", "HEAD_LR", None), ("good", "optimizer", "MATRIX_LR", None),
    ("good", "initialization", "EMBED_LR", None), ("good", "architecture", "CONV_LR", None),
    ("neutral", "architecture", "ROPE_BASE", (10050.0, 10060.0)), ("neutral", "architecture", "SOFTCAP", (30.3, 30.31)),
    ("neutral", "optimizer", "ADAM_BETA2", (0.951, 0.9511)), ("neutral", "optimizer", "NEURON_BETA", (0.951, 0.9511)),
    ("neutral", "initialization", "EMBED_MIX_INIT", (0.103, 0.1031)), ("neutral", "optimizer", "MIX_LR", (0.51, 0.511)),
    ("bad", "optimizer", "HEAD_LR", (0.0002, 0.000201)), ("bad", "optimizer", "MATRIX_LR", (0.0005, 0.000501)),
    ("bad", "initialization", "EMBED_LR", (0.002, 0.00201)),
    ("bad", "architecture", "CONV_LR", (0.0005, 0.000501)),
    ("bad", "architecture", "SOFTCAP", (2.01, 2.02)), ("bad", "optimizer", "MOMENTUM_PEAK", (0.999, 0.99901)),
]
ROLES = "optimizer", "architecture", "initialization"
RUN = "import sys, agent; {} sys.exit(agent.main())"
NO_NOTES = "agent.notes_due = lambda s: False;"
NO_REFUSALS = f"{NO_NOTES} agent.tried = lambda results: {{}}; agent.refuse_near = lambda s, text: None;"
ARMS = {   # whether the script reads what the request remembers; the session
    "memory and roles": (True, RUN.format("")), "repeats refused only": (False, RUN.format(NO_NOTES)),
    "neither": (False, RUN.format(NO_REFUSALS)),
}


class Script:
    """A model that draws ideas at random, but none that the request says was tried."""

    def __init__(self, good: dict, reads: bool, seed: int, reply_s: float):
        self.good, self.reads, self.reply_s, self.rng, self.asked = good, reads, reply_s, random.Random(seed), 0

    def __call__(self, body: dict) -> str:
        self.asked += 1
        time.sleep(self.reply_s)
        first, *lessons = (part["content"] for part in body["messages"][1:])
        text = first if self.reads else ""
        tried = {int(n) for n in re.findall(r"\bidea (\d\d):", re.sub(r"# The notes(.|\n)*?(?=\n# )", "", text))}
        left = [i for i in range(len(IDEAS)) if i not in tried]
        if agent.NOTES_FORMAT in text:
            lines = "".join(f"{rank}. idea {i:02}: {IDEAS[i][2]}. Why: untried. Refuted if: worse\n"
                            for rank, i in enumerate(left, 1))
            return f"## Works\n## Failed\n## Untested\n## Ideas\n{lines or '1. something else'}\n"
        tried |= {int(n) for lesson in lessons for n in re.findall(r"\bidea (\d\d):", lesson)}
        role = re.search(r"# Your role this time: (\w+)", text)
        left = [i for i in range(len(IDEAS)) if i not in tried] or list(range(len(IDEAS)))
        i = self.rng.choice([i for i in left if role and IDEAS[i][1] == role[1]] or left)
        kind, _, name, values = IDEAS[i]
        value = self.good[name] if values is None else self.rng.choice(values)
        number = re.search(rf"^(\d+)\. idea {i:02}:", text, re.M)
        named = f"IDEA: {number[1]}\n" if number else ""
        return reply(f"{named}SET {name} = {value!r}", description=f"idea {i:02}: {kind}, {name} = {value}")


def arm(name: str, args) -> None:
    """One session; prints what came of it."""
    reads, code = ARMS[name]
    with tempfile.TemporaryDirectory() as folder:
        checkout, server = make_checkout(Path(folder) / "clone", CACHE, source=ROOT), Server()
        preset = agent.prepared_data(checkout.config()).preset
        good = {n: knob.value for n, knob in agent.knobs(checkout.text(), preset).items() if n in SPOILED}
        text = checkout.text()
        for constant, value in SPOILED.items():
            text = agent.apply_set(text, constant, repr(value), preset)
        (checkout.root / "train.py").write_text(text)
        roles = "".join(f"\n## Role: {role}\n\nLook there.\n" for role in ROLES)
        (checkout.root / "program.md").write_text("Lower the number.\n" + roles * reads)
        commit_all(checkout)
        script = Script(good, reads, args.seed, args.reply)
        server.script = [script] * 100_000
        command = [sys.executable, "-c", code, "--time-budget", str(args.budget), "--hours", str(args.minutes / 60),
                   "--model", "tiny", "--tag", "arm", "--no-prefetch", "--no-verify"]
        began = time.monotonic()
        out = subprocess.run(command, cwd=checkout.root, env=checkout.env(OPENAI_BASE_URL=server.url), check=True,
                             capture_output=True, text=True).stdout
        hours = (time.monotonic() - began) / 3600
        server.http.shutdown()
        record, rows = checkout.record(), agent.experiments(checkout.record())
        if args.lines:
            print(out)
        distinct = {r.description[:7] for r in rows}
        best = [r for r in record if r.status == "keep"][-1]
        gain = agent.value_of(record, record[0]) - agent.value_of(record, best)
        kept = [r.description[9:].split(",")[0] for r in rows if r.status == "keep"]
        print(f"{name:22} {len(rows):3} experiments, {len(distinct):2} distinct ({len(distinct) / hours:.0f} an hour), "
              f"{len(record) - len(rows) - 1:2} repeats of runs, {script.asked:3} replies, "
              f"{sum(r.refused or 0 for r in rows):2} refused; kept {', '.join(sorted(kept)) or 'none'}; "
              f"val_bpb {record[0].val_bpb:.4f} to {agent.value_of(record, best):.4f}, gain {gain:.4f}", flush=True)


def fill(checkout, upto: int) -> None:
    """A record of so many experiments: steps of the search from the last keep, one in fifteen kept."""
    s, _ = agent.opened(checkout.config(), agent.Screen())
    agent.read_branch(s)
    shape = replace(SHAPE, preset=s.data.preset, fingerprint=s.data.fingerprint, device=s.device)
    base = replace(shape, proposer="baseline", parent=s.tip)
    s.best, = agent.write_refs(s, [base], [agent.git(s.config, "rev-parse", "HEAD^{tree}")])
    known, text = {}, s.text
    for i in range(2, upto + 1):
        proposal, new = agent.search_proposal(text, "cpu", f"{i}", known)
        status = "keep" if i % 15 == 0 else "crash" if i % 10 == 0 else "discard"
        row = replace(shape, id=f"{i:04d}", parent=s.best.commit, description=f"{proposal.description} and why"[:80],
                      status=status, val_bpb=None if status == "crash" else 1.1 - i / 1e5 * (status == "keep"),
                      role=ROLES[i % 3], text_key=agent.text_key(new), model="tiny", bar=1.1, proposer="llm",
                      reason="RuntimeError: shapes do not agree" if status == "crash" else "")
        row, = agent.write_refs(s, [row], [agent.write_tree(s, row.parent, new, "a brief")])
        known[row.text_key] = row
        if status == "keep":
            s.best, text = row, new
            agent.git(s.config, "update-ref", f"refs/heads/{s.branch}", row.commit)
            agent.git(s.config, "reset", "-q", "--hard")


SHAPE = agent.Result(
    "", "", "baseline", "A sentence or two of what is expected, and why it should be so.", "0001", "long", "keep", "",
    1.1, 0.5, "2026-01-01T00:00:00Z", "llm", "-", "-", -0.002, 42, 1400, 2.9, 300.0, 314.0, 12_000, "cpu", "f00d",
    "cpu", 300.0, "key",
    "0%:7.6 9%:4.4 18%:3.9 27%:3.6 36%:3.5 45%:3.4 55%:3.3 64%:3.2 73%:3.1 82%:3.0 91%:2.9 100%:2.9")


def long_record(count: int) -> None:
    """Prints sizes and seconds of a long record."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = make_checkout(Path(folder) / "clone", CACHE, source=ROOT)
        (checkout.root / "program.md").write_text((ROOT / "program.md").read_text())
        commit_all(checkout)
        checkout.git("checkout", "-q", "-b", "autoresearch/long")
        config = checkout.config(budget_s=300.0)
        fill(checkout, count)
        program = (ROOT / "program.md").read_text()
        notes = "## Works\n" + "* what was learned of one thing or another, at some length\n" * 30 + (
            "## Ideas\n" + "1. an idea of some length. Why: a reason. Refuted if: a result\n" * 10)
        s, _ = agent.opened(config, agent.Screen())
        start = time.perf_counter()
        agent.read_branch(s)
        everything, best = s.results, s.best
        agent.request(s, agent.chosen(s, program))
        print(f"restart on {count} rows, to the first request: {time.perf_counter() - start:.2f} s")
        start = time.perf_counter()
        agent.request(s, agent.chosen(s, program))
        print(f"the next request: {time.perf_counter() - start:.3f} s")
        shares, before, last_best = [], "", None
        for upto in range(max(2, count - 100), count + 1):
            s.results = everything[:upto]
            s.best = [r for r in s.results if r.status == "keep"][-1]
            if upto % agent.NOTES_ROWS == 0:
                path = s.runs / s.results[-1].id / "notes.md"
                path.parent.mkdir(parents=True)
                for file in (path, s.runs / "notes.md"):
                    file.write_text(f"{notes}2. idea {upto}\n")
            s.text = agent.file_at(s.config, s.best.commit, "train.py")
            text = "".join(part["content"] for part in agent.request(s, agent.chosen(s, program)))
            same = next((i for i, (a, b) in enumerate(zip(before, text)) if a != b), len(before))
            shares += [same / len(text)] if s.best == last_best else []
            before, last_best = text, s.best
        print(f"a request on {count} rows: {len(text):,} characters, about {len(text) // 4:,} tokens; "
              f"{sum(shares) / len(shares):.1%} as in the one before, between keeps ({min(shares):.1%} at least)")
        s.results, s.best = everything, best
        start = time.perf_counter()
        report = agent.report(s)
        print(f"report: {time.perf_counter() - start:.2f} s, {len(report.splitlines())} lines")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rows", type=int, default=300, help="of the long record; 0: leave it out (300)")
    p.add_argument("--minutes", type=float, default=12.0, help="of each arm; 0: leave them out (12)")
    p.add_argument("--budget", type=float, default=10.0, metavar="S", help="seconds of training (10)")
    p.add_argument("--reply", type=float, default=2.0, metavar="S", help="seconds that the script takes to answer (2)")
    p.add_argument("--seed", type=int, default=0, help="of the script's draws")
    p.add_argument("--lines", action="store_true", help="print the sessions' own lines too")
    args = p.parse_args()
    os.environ.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    if args.rows:
        long_record(args.rows)
    for name in ARMS if args.minutes else ():
        arm(name, args)


if __name__ == "__main__":
    main()
