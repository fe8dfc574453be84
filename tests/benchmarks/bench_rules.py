"""Simulate nights whose true gains are known: python tests/benchmarks/bench_rules.py [--nights 1000] [--coverage 2000]

What would the branch have gained under different rules for a keep, and is the sentence at the end of a night true?
The decisions are agent.py's own functions on rows like those of a record; only the runs are drawn at random.

A night is 88 runs, the repeats counted; the final verification has time of its own. An idea is good with some
probability: its true gain is then log-normal with the given median. Of the others one in twenty changes nothing, the rest
do harm, exponential with median 0.004. (Chosen to give greedy search about the figures of an earlier, independent
simulation with rich ideas: gain 0.0141, 17 % false keeps, over-claim 0.0005 at a seed's noise of 0.0004.) Every run adds
the seed's noise; what an idea does differs from one part of the held-out text to another.
"""

import argparse
import math
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import agent

RUNS, RUN_S = 88, 314.0
IDEAS = {"rich": (0.13, 0.0012), "lean": (0.06, 0.0003)}   # share of good ones, their median gain
NOISES = (0.0004, 0.001)
SPREAD, NEUTRAL, HARM = 0.6, 0.05, 0.004
BLOCK_SHARE, BLOCK_SD = 0.4, 0.0002   # what an idea does to a block of held-out text beyond its true effect: deviation
RULES = ("greedy", "present", "always confirm", "1 sd", "2 sd")
START = agent.seconds_of("2026-01-01T00:00:00Z")
ROW = agent.Result(
    "", "", "an idea", "", "0001", "sim", "keep", "", 1.0, 1.0, "2026-01-01T00:00:00Z", "llm", "-", "sim", None, 42,
    1000, 100.0, 300.0, RUN_S, None, "datacenter", "f00d", "simulated", 300.0, "", "-",
)


class Night:
    """One night under one rule: the rows that it would have made, and what is true of every program in them."""

    def __init__(self, seed: int, rule: str, noise: float, ideas: str):
        self.ideas, self.luck = random.Random(f"ideas {seed}"), random.Random(f"luck {seed}")
        self.rule, self.noise, (self.good, self.median) = rule, noise, IDEAS[ideas]
        self.results, self.true, self.sd = [], {}, {}   # by program: true bits per byte; of its blocks, the deviation
        self.blocks = {}             # by program: bits per byte on the blocks of val
        self.kept = self.false = 0
        self.best = self.add("baseline", "", 0.0, status="keep", proposer="baseline")
        self.base = self.best

    def run(self, program: str) -> float:
        return statistics.fmean(self.blocks[program]) + self.luck.gauss(0, self.noise)

    def row(self, program: str, seed: int = agent.SEED, **more) -> agent.Result:
        """A run of a program, not recorded."""
        number = len(self.results) + 1
        time = agent.datetime.fromtimestamp(START + number * RUN_S, agent.timezone.utc).strftime(agent.TIME_FORMAT)
        return replace(ROW, commit=f"{number:040}", id=f"{number:04d}", time=time, text_key=program, seed=seed,
                       val_bpb=self.run(program), **more)

    def add(self, program: str, origin: str, change: float, **more) -> agent.Result:
        """Run a new program, which changes its origin's bits per byte on all text by so much, and record it."""
        sd = BLOCK_SHARE * abs(change) + BLOCK_SD if origin else 0.0
        self.true[program] = self.true.get(origin, 1.0) + change
        self.sd[program] = math.hypot(self.sd.get(origin, 0.0), sd)
        before = self.blocks.get(origin, [1.0] * agent.BLOCKS)
        self.blocks[program] = [block + self.ideas.gauss(change, sd) for block in before]
        self.results.append(self.row(program, **more))
        return self.results[-1]

    def repeat(self, row: agent.Result, seed: int) -> agent.Result:
        again = self.row(row.text_key, seed, status="verify", parent=row.commit)
        self.results.append(again)
        return again

    def idea(self) -> float:
        """The true change of the next idea: the n-th is the same under every rule."""
        share, size, harm = self.ideas.random(), self.ideas.gauss(0, 1), self.ideas.expovariate(math.log(2))
        if share < self.good:
            return -self.median * math.exp(SPREAD * size)
        return 0.0 if share < self.good + (1 - self.good) * NEUTRAL else HARM * harm

    def value(self) -> float:
        """What a candidate must be below."""
        margin = {"1 sd": 1.0, "2 sd": 2.0}.get(self.rule, 0.0) * math.sqrt(2) * self.noise
        if self.rule in ("present", "always confirm"):
            return agent.value_of(self.results, self.best)
        return self.best.val_bpb - margin

    def step(self) -> None:
        """The next run or runs, as agent.step() and agent.experiment() would decide."""
        now_s = START + (len(self.results) + 1) * RUN_S
        if self.rule == "present" and agent.drift(self.results, self.best, now_s):
            self.repeat(self.best, agent.next_seed(self.results, self.best))
            return
        change = self.idea()
        name, origin = f"program {len(self.true)}", self.best.text_key
        row = self.add(name, origin, change, status="discard", parent=self.best.commit)
        before, value = self.results[:-1], self.value()
        status = agent.decide(agent.Run("", "", 300.0, {}, "", "-"), agent.Score(row.val_bpb), value)[0]
        mode = {"present": "auto", "always confirm": "always"}.get(self.rule, "never")
        if mode != "never" and agent.doubt(mode, before, self.best, row.val_bpb, False):
            again = self.repeat(row, agent.CONFIRM_SEED)
            if agent.needs_repeat(before, self.best, [row, again]):
                self.repeat(self.best, agent.next_seed(before, self.best))
            status = agent.after_repeat([row, again], agent.value_of(self.results, self.best))[0]
        if status == "keep":
            self.results[self.results.index(row)] = row = replace(row, status="keep")
            self.kept, self.false, self.best = self.kept + 1, self.false + (change >= 0), row

    def finish(self) -> "Night":
        while len(self.results) < RUNS:
            self.step()
        return self

    @property
    def gain(self) -> float:
        return 1.0 - self.true[self.best.text_key]

    @property
    def claim(self) -> float:
        """The gain by the numbers that the search went by, beyond the true one."""
        return agent.value_of(self.results, self.base) - agent.value_of(self.results, self.best) - self.gain

    def verified(self) -> dict[str, agent.Gain]:
        """The gains of the final sentence, on val and on test, from runs on fresh seeds and from rows."""
        gains, best, base = {}, self.best.text_key, self.base.text_key
        others = agent.repeated(agent.unchosen(self.results))
        test = {best: [self.luck.gauss(self.true[best], self.sd[best]) for _ in range(agent.BLOCKS)],
                base: [1.0] * agent.BLOCKS}
        for split, blocks in (("val", self.blocks), ("test", test)):
            runs = [[statistics.fmean(blocks[p]) + self.luck.gauss(0, self.noise) for _ in agent.VERIFY_SEEDS]
                    for p in (best, base)]
            rows = [[[block * math.log(2) for block in blocks[p]]] for p in (best, base)]   # nats, of a byte each
            gains[split] = agent.gain_of(*runs, others, agent.text_sd(*rows, agent.BLOCKS))
        return gains


def rules(nights: int) -> None:
    """Print what each rule gains, how many of its keeps were false, and what it over-claims."""
    print(f"{nights} nights of {RUNS} runs; true gain, minus greedy's in the same nights, over-claim: x 1e-4")
    print("noise   ideas  rule           true gain         - greedy  kept  false over-claim")
    for noise in NOISES:
        for ideas in IDEAS:
            greedy = []
            for rule in RULES:
                found = [Night(seed, rule, noise, ideas).finish() for seed in range(nights)]
                gains = [1e4 * night.gain for night in found]
                greedy = greedy or gains
                off = [a - b for a, b in zip(gains, greedy)]
                error = statistics.stdev(off) / math.sqrt(nights)
                kept, false = sum(night.kept for night in found), sum(night.false for night in found)
                print(f"{noise:<7} {ideas:6} {rule:14} {statistics.mean(gains):9.1f} {statistics.mean(off):+9.2f} ± "
                      f"{error:4.2f} {kept / nights:5.1f} {false / max(1, kept):6.0%} "
                      f"{1e4 * statistics.mean(night.claim for night in found):10.1f}", flush=True)


def coverage(nights: int) -> None:
    """Print how often the interval of the final sentence covers the true gain, and what it over-claims."""
    print(f"\nthe final sentence, {nights} nights under the present rule: share of intervals that cover the true gain, "
          f"over-claim and mean width x 1e-4")
    for noise in NOISES:
        for ideas in IDEAS:
            found = [(night, night.verified()) for seed in range(nights)
                     for night in [Night(seed, "present", noise, ideas).finish()] if night.best is not night.base]
            for split in ("val", "test"):
                pairs = [(gains[split], night.gain) for night, gains in found]
                covered = statistics.mean(gain.low <= true <= gain.high for gain, true in pairs)
                over = [1e4 * (gain.mean - true) for gain, true in pairs]
                width = statistics.mean(gain.high - gain.low for gain, _ in pairs)
                print(f"{noise:<7} {ideas:6} {split:5} {covered:6.1%} of {len(pairs)}   {statistics.mean(over):+.2f} ± "
                      f"{statistics.stdev(over) / math.sqrt(len(over)):.2f}   {1e4 * width:.1f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=1000, help="for the rules")
    parser.add_argument("--coverage", type=int, default=2000, help="nights for the final sentence")
    args = parser.parse_args()
    rules(args.nights)
    coverage(args.coverage)
