"""26 circles in the unit square: `prepare.py score RUN_DIR` proves how large the sum of radii is that a run found."""

import hashlib
import json
import math
import os
import random
import resource
import socket
import sys
import time
from fractions import Fraction
from itertools import combinations
from pathlib import Path

CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or Path(__file__).resolve().parent / "runs" / "data")
CIRCLES = 26
BUDGET_S = float(os.environ.get("AUTORESEARCH_TIME_BUDGET") or 60)
BEFORE_S = 5.0  # of a processor's time before the clock starts: enough to import torch, not to search


def make() -> None:
    """Writes what agent.py must know. There are no data: the file that sets the rules is the fingerprint."""
    meta = {"format": 2, "dataset": "circles", "fingerprint": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    meta |= {"metric": "sum_of_radii", "lower_is_better": False, "budget_s": 60.0, "handed": [], "judged": {"val": []}}
    meta |= {"noise": 0.0, "plausible": [0.0, 13.0], "startup_s": 10.0}  # a packing is worth what is proved of it
    meta |= {"required": ["main", "load", "start", "finish"], "max_digits": 250}  # of the literals of a train.py
    (CACHE / "circles").mkdir(parents=True, exist_ok=True)
    (CACHE / "circles" / "meta.json").write_text(json.dumps(meta))
    (CACHE / "current").write_text("circles")


def receive() -> str:
    """The message that agent.py hands over, empty by hand. Its clock starts here."""
    if not (channel := os.environ.get("AUTORESEARCH_HANDOVER_FD")):
        return ""
    with socket.socket(fileno=int(channel)) as channel:
        channel.sendall(b"start\n")
        return channel.recv(1024).decode()


class Data:
    """A run's clock."""

    def start(self) -> None:
        if time.process_time() > BEFORE_S:
            print("searched before the clock started: call data.start() first", file=sys.stderr, flush=True)
            sys.exit(3)
        receive()
        self.began = time.monotonic()

    def progress(self) -> float:
        return (time.monotonic() - self.began) / BUDGET_S

    def expired(self) -> bool:
        return self.progress() >= 1


def load() -> Data:
    """Seeds random, numpy, and torch where train.py has imported it."""
    import numpy as np

    torch = sys.modules.get("torch")
    for set_seed in (random.seed, np.random.seed, *([torch.manual_seed] if torch else [])):
        set_seed(int(os.environ.get("AUTORESEARCH_SEED", "42")))
    return Data()


def finish(circles, **facts) -> None:
    """Writes circles (26, 3), of centre x, centre y, radius, and facts such as steps."""
    rows = [[float(value) for value in row] for row in circles]
    Path("checkpoint.pt").write_text(json.dumps(rows))
    facts |= {"peak_vram_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    Path("facts.json").write_text(json.dumps(facts))


def root(square: Fraction) -> Fraction:
    """The square root, rounded down to a multiple of 2**-200."""
    return Fraction(math.isqrt((square.numerator << 400) // square.denominator), 1 << 200)


def share_that_fits(circles: list) -> Fraction:
    """The largest share, at most 1, of all radii with which no two circles overlap and none leaves the square."""
    walls = [min(x, 1 - x, y, 1 - y) / r for x, y, r in circles if r]
    pairs = [(r + s, (x - u) ** 2 + (y - v) ** 2) for (x, y, r), (u, v, s) in combinations(circles, 2)]
    return min([Fraction(1), *walls, *(root(square) / both for both, square in pairs if both)])


def measure(text: bytes) -> dict:
    """What a checkpoint is worth: {"score": ...} or {"invalid": reason}. All in fractions, without any tolerance."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        return {"invalid": "the checkpoint is no JSON list of numbers"}
    if not (isinstance(rows, list) and all(isinstance(row, list) and len(row) == 3 for row in rows)):
        return {"invalid": "wrong shape: rows of x, y, radius are asked for"}
    if len(rows) != CIRCLES:
        return {"invalid": f"{CIRCLES} circles are asked for, not {len(rows)}"}
    if not all(type(value) is float and math.isfinite(value) for row in rows for value in row):
        return {"invalid": "not finite: a coordinate or radius is NaN, infinite or no number"}
    circles = [[Fraction(value) for value in row] for row in rows]
    if not all(0 <= x <= 1 and 0 <= y <= 1 and r >= 0 for x, y, r in circles):
        return {"invalid": "a centre is outside the unit square, or a radius below 0"}
    if (share := share_that_fits(circles)) < Fraction(999, 1000):
        return {
            "invalid": f"circles overlap, or leave the square: all radii would have to shrink to {float(share):.4f}"
        }
    return {"score": float(share * sum(r for _, _, r in circles))}


if __name__ == "__main__":
    if sys.argv[1:2] != ["score"]:
        sys.exit(make())
    folder, split, secret = Path(sys.argv[2]), (sys.argv[4:5] or ["val"])[0], receive()
    with open(folder / "checkpoint.pt", "rb") as file:
        result = measure(file.read(65_536))
    result |= {"blocks": [result["score"]], "secret": secret} if "score" in result else {}
    print(f"{split}: {result.get('invalid') or result['score']}", flush=True)
    (folder / ("score.json" if split == "val" else "score-test.json")).write_text(json.dumps(result))
    sys.exit(3 if "invalid" in result else 0)
