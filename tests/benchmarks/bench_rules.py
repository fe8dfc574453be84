"""Simulate nights whose true gains are known: python tests/benchmarks/bench_rules.py [--nights 1000] [--coverage 500]

What would the branch have gained under different rules for a second run, and is the sentence at the end of a night
true? What State says (noise, best, doubt, verdict, verified) is agent.py's own, on rows like a record's; which run
comes next is written out below as next_job() has it, and only the scores are drawn at random.

A night is 88 runs, repeats counted; the final verification has time of its own. An idea is good with some probability: its
true gain is then log-normal with the given median. Of the others one in twenty changes nothing, the rest do harm,
exponential with median 0.004. Every run adds the seed's noise; what an idea does differs from block to block of the
held-out text, so the search fits the val text too. The n-th idea of a night is the same under every rule.
"""

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import agent  # noqa: E402

RUNS, RUN_S, BLOCKS = 88, 314.0, 20
IDEAS = {"rich": (0.13, 0.0012), "lean": (0.06, 0.0003)}  # share of good ones, their median gain
NOISES = (0.0004, 0.001)  # of a seed; what the task says of it is right
SPREAD, NEUTRAL, HARM = 0.6, 0.05, 0.004
BLOCK_SHARE, BLOCK_SD = 0.4, 0.0002  # what an idea does to a block beyond its true effect: standard deviation
TASK = agent.Task(Path(), "val_bpb", noise=0.0)
PLAIN = {f.name: {"str": "-", "int": 42, "float": 1.0}.get(f.type) for f in fields(agent.Row)}
PLAIN |= dict.fromkeys(("reason", "held", "conditions", "repeats"), "")
PLAIN |= {"tag": "sim", "status": "discard", "proposer": "llm", "session": "tonight"}
PLAIN = agent.Row(**PLAIN)


def below(deviations: float) -> Callable:
    """The rule that doubts any gain under so many standard deviations of a difference."""

    def rule(state: agent.State, score: float) -> str:
        gain, sd = state.task.gain(score, state.bar), math.sqrt(2) * state.noise.sd
        return f"below {deviations:g} sd" if 0 < gain < deviations * sd else ""

    return rule


MODES = {"greedy": "never", "today: auto": "auto", "always": "always"}
CANDIDATE = agent.Job("candidate")
RULES = {n: partial(lambda m, state, score: state.verdict(m, CANDIDATE, score, False)[1], m) for n, m in MODES.items()}
RULES |= {f"below {n:g} sd": below(n) for n in (1.0, 2.0)}


@dataclass
class Night:
    """One night under one rule: the rows that it makes, and what is true of every program in them."""

    seed: int
    rule: str
    noise: float
    ideas: str
    rows: list = field(default_factory=list)
    true: dict = field(default_factory=dict)  # by program: true bits per byte
    changed: dict = field(default_factory=dict)  # by program: the same, less its origin's
    sd: dict = field(default_factory=dict)  # by program: of its blocks, about that
    blocks: dict = field(default_factory=dict)  # by program: bits per byte on the blocks of val

    def __post_init__(self):
        self.idea = random.Random(f"ideas {self.seed}")
        self.task = replace(TASK, noise=self.noise)
        self.program("base", "", 0.0)
        self.add("base", status="keep", proposer="baseline")

    def program(self, name: str, origin: str, change: float) -> str:
        """A new program, which changes its origin's bits per byte on all text by so much."""
        sd = BLOCK_SHARE * abs(change) + BLOCK_SD if origin else 0.0
        self.true[name], self.changed[name] = self.true.get(origin, 1.0) + change, change
        self.sd[name] = math.hypot(self.sd.get(origin, 0.0), sd)
        self.blocks[name] = [b + self.idea.gauss(change, sd) for b in self.blocks.get(origin, [1.0] * BLOCKS)]
        return name

    def luck(self, text: str, seed: int) -> float:
        """What a seed does to a program's score: the same whenever it runs, under every rule."""
        return random.Random(f"{self.seed} {text} {seed}").gauss(0, self.noise)

    def score(self, text: str, seed: int) -> float:
        return fmean(self.blocks[text]) + self.luck(text, seed)

    def add(self, text: str, seed: int = agent.SEED, **more) -> agent.Row:
        """Record a run of a program."""
        more = {"text": text, "seed": seed, "score": self.score(text, seed), **more}
        self.rows.append(replace(PLAIN, id=f"{len(self.rows) + 1:04d}", commit=f"c{len(self.rows) + 1}", **more))
        return self.rows[-1]

    def state(self) -> agent.State:
        rows = tuple(self.rows)
        return agent.State(self.task, "tip", "root", rows, rows, rows)

    def change(self) -> float:
        """The true change of the next idea."""
        good, median = IDEAS[self.ideas]
        share, size, harm = self.idea.random(), self.idea.gauss(0, 1), self.idea.expovariate(math.log(2))
        if share < good:
            return -median * math.exp(SPREAD * size)
        return 0.0 if share < good + (1 - good) * NEUTRAL else HARM * harm

    def step(self) -> None:
        """One candidate, and what next_job() would run to judge it; or the best again, after two hours."""
        state = self.state()
        tried = [r for r in state.mine if r.text == state.best.text]
        if len(self.rows) - self.rows.index(tried[-1]) > max(agent.REPEAT_S, agent.REPEAT_RUNS * 300.0) / RUN_S:
            self.add(state.best.text, agent.SEED + len(tried), status="verify", repeats=state.best.id)
            return
        text = self.program(f"program {len(self.true)}", state.best.text, self.change())
        score, job, more = self.score(text, agent.SEED), agent.Job("candidate"), {}
        if why := RULES[self.rule](state, score):
            found = self.add(text, status="maybe", reason=why)
            if len(tried) < 2:
                self.add(state.best.text, agent.CONFIRM_SEED, status="verify", repeats=state.best.id)
            state, score = self.state(), self.score(text, agent.CONFIRM_SEED)
            job, more = agent.Job("confirmation", of=found), {"seed": agent.CONFIRM_SEED, "repeats": found.id}
        status, reason = state.verdict("never", job, score, False)
        self.add(text, status=status, reason=reason, **more)

    def verify(self) -> None:
        """The runs of the final verification, on val and on text that the search never saw."""
        best = self.state().best.text
        test = {best: [self.idea.gauss(self.true[best], self.sd[best]) for _ in range(BLOCKS)], "base": [1.0] * BLOCKS}
        for seed in agent.VERIFY_SEEDS if best != "base" else ():
            for text in (best, "base"):
                off, held = self.luck(text, seed), {}
                for split, blocks in (("val", self.blocks[text]), ("test", test[text])):
                    held[split] = [(block + off) / BLOCKS for block in blocks]
                self.add(text, seed, status="verify", held=json.dumps(held))


def simulate(rule: str, noise: float, ideas: str, verify: bool, seed: int) -> dict:
    """One night's figures, in units of 1e-4."""
    night = Night(seed, rule, noise, ideas)
    while len(night.rows) < RUNS:
        night.step()
    state = night.state()
    gain = 1.0 - night.true[state.best.text]
    seen = state.means["base"] - state.bar
    kept = [night.changed[r.text] for r in night.rows[1:] if r.status == "keep"]
    false = sum(change >= 0 for change in kept)
    figures = {"gain": 1e4 * gain, "kept": len(kept), "false": false, "over": 1e4 * (seen - gain)}
    if verify:
        night.verify()
        found = night.state().verified()[0].items()
        figures |= {s: (g.low <= gain <= g.high, 1e4 * (g.mean - gain), 1e4 * (g.high - g.low)) for s, g in found}
    return figures


def rules(pool: ProcessPoolExecutor, nights: int) -> None:
    """Print what each rule gains, how many of its keeps were false, and what it over-claims."""
    print(f"{nights} nights of {RUNS} runs; true gain, minus greedy's in the same nights, over-claim: x 1e-4")
    print("noise   ideas  rule          true gain         - greedy  kept  false  over-claim")
    for noise, ideas in ((noise, ideas) for noise in NOISES for ideas in IDEAS):
        greedy = []
        for rule in RULES:
            found = list(pool.map(partial(simulate, rule, noise, ideas, False), range(nights), chunksize=10))
            gains = [f["gain"] for f in found]
            greedy = greedy or gains
            off = [a - b for a, b in zip(gains, greedy)]
            kept, false = sum(f["kept"] for f in found), sum(f["false"] for f in found)
            print(
                f"{noise:<7} {ideas:6} {rule:13} {fmean(gains):9.1f} {fmean(off):+9.2f} ± {stdev(off) / nights**0.5:4.2f} "
                f"{kept / nights:5.1f} {false / max(1, kept):6.0%} {fmean(f['over'] for f in found):11.1f}",
                flush=True,
            )


def coverage(pool: ProcessPoolExecutor, nights: int) -> None:
    """Print how often the interval of the final sentence covers the true gain, and what it over-claims."""
    print(f"\nthe final sentence, {nights} nights each: intervals that cover the true gain; over-claim, width: x 1e-4")
    for noise, ideas in ((noise, ideas) for noise in NOISES for ideas in IDEAS):
        found = list(pool.map(partial(simulate, "today: auto", noise, ideas, True), range(nights), chunksize=10))
        for split in ("val", "test"):
            covers, over, width = zip(*(f[split] for f in found if split in f))
            share = f"{noise:<7} {ideas:6} {split:5} {fmean(covers):6.1%} of {len(covers)}"
            print(
                f"{share}   {fmean(over):+.2f} ± {stdev(over) / len(over) ** 0.5:.2f}   {fmean(width):.1f}", flush=True
            )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--nights", type=int, default=1000, help="for the rules, of each noise and kind of ideas")
    p.add_argument("--coverage", type=int, default=500, help="for the final sentence, likewise")
    args = p.parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rules(pool, args.nights)
        coverage(pool, args.coverage)
