"""How soon `--proposer search` finds a spoiled constant: python tests/benchmarks/bench_search.py [--trials 40]

Simulated: train.py's hyperparameters, on the scales that the search walks on, each with a best place (a normal with
deviation 0.35 about its value, 0.35 of a doubling) and a cost of one unit off, squared (log-normal, median 0.002, sigma
1.3). MATRIX_LR begins at twice its best, which costs 0.012. A run has a noise of 0.002; of 96 a night, what scores better
than the best is kept. Wasted is a try that moves nothing that costs half the noise. What is simulated is what the search
supposes, so real tasks gain less. Three minutes.
"""

import argparse
import math
import random
import sys
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import agent  # noqa: E402

SPOILED, WORTH, MARKS = "MATRIX_LR", 0.012, (12, 24, 48, 96)
COSTS = {"costs a fourth": 0.0005, "as said": 0.002, "costs fourfold": 0.008}


def night(seed: int, cost: float, noise: float) -> tuple[float, float, list[float]]:
    """When the spoiled constant is within 0.4 of its best (inf: never), the share wasted, the true gain at the MARKS."""
    rng, rows, found, wasted, gains = random.Random(seed), {}, math.inf, 0, []
    text, *_ = (ROOT / "train.py").read_text().partition("# ---- Attention kernels")  # the constants: quicker to parse
    known = {name: k for name, k in agent.knobs(text, "cpu").items() if k.low is not None}
    place = {name: agent.position(k, k.value) for name, k in known.items()}
    costs = {name: cost * math.exp(rng.gauss(0, 1.3)) for name in known} | {SPOILED: WORTH}
    goal = {name: at + rng.gauss(0, 0.35) for name, at in place.items()} | {SPOILED: place[SPOILED]}
    text = agent.apply_set(text, SPOILED, repr(2 * known[SPOILED].value), "cpu")
    task = agent.Task(ROOT, "score", preset="cpu", noise=noise, required=())

    def true(text: str) -> float:
        values = agent.knobs(text, "cpu")
        return sum(costs[name] * (agent.position(k, values[name].value) - goal[name]) ** 2 for name, k in known.items())

    start = true(text)
    best = start + rng.gauss(0, noise)
    for n in range(1, MARKS[-1] + 1):
        row = agent.search_proposal(text, f"{seed}/{n}", rows, task, tuple(rows.values()))
        new = agent.apply_edits(text, row.edits, "cpu")
        score = true(new) + rng.gauss(0, noise)
        rows[agent.program_key(new)] = agent.replace(row, score=score, bar=best)
        wasted += all(costs[edit.old] < noise / 2 for edit in row.edits)
        text, best = (new, score) if score < best else (text, best)
        off = agent.position(known[SPOILED], agent.knobs(text, "cpu")[SPOILED].value) - goal[SPOILED]
        found = min(found, n if abs(off) < 0.4 else math.inf)
        gains += [start - true(text)] * (n in MARKS)
    return found, wasted / MARKS[-1], gains


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--trials", type=int, default=40, metavar="N", help="nights of each kind (40)")
    args = p.parse_args()
    for (kind, cost), noise in [*((item, 0.002) for item in COSTS.items()), (("as said", 0.002), 0.0)]:
        found, wasted, gains = zip(*(night(seed, cost, noise) for seed in range(args.trials)))
        within = ", ".join(f"{sum(n <= mark for n in found) / len(found):.0%}" for mark in MARKS)
        gained = ", ".join(f"{fmean(column):.4f}" for column in zip(*gains))
        print(f"{kind}, noise {noise:g}: found within {MARKS} tries {within}, median {median(found):g}", end="; ")
        print(f"wasted {fmean(wasted):.0%}; gain {gained}", flush=True)


if __name__ == "__main__":
    main()
