"""16 points in the plane: `prepare.py score RUN_DIR` computes how far apart its largest and smallest distance are."""

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
POINTS = 16
BUDGET_S = float(os.environ.get("AUTORESEARCH_TIME_BUDGET") or 60)
BEFORE_S = 5.0  # of a processor's time before the clock starts: enough to import torch, not to search


def make() -> None:
    """Writes what agent.py must know. There are no data: the file that sets the rules is the fingerprint."""
    meta = {"format": 2, "dataset": "distances", "fingerprint": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    meta |= {"metric": "squared_ratio", "lower_is_better": True, "budget_s": 60.0, "handed": [], "judged": {"val": []}}
    meta |= {"noise": 0.0, "plausible": [1.0, 1e6], "startup_s": 10.0}  # points are worth what is computed of them
    meta |= {"required": ["main", "load", "start", "finish"], "max_digits": 200}  # of the literals of a train.py
    (CACHE / "distances").mkdir(parents=True, exist_ok=True)
    (CACHE / "distances" / "meta.json").write_text(json.dumps(meta))
    (CACHE / "current").write_text("distances")


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


def finish(points, **facts) -> None:
    """Writes points (16, 2), and facts such as steps."""
    rows = [[float(value) for value in row] for row in points]
    Path("checkpoint.pt").write_text(json.dumps(rows))
    facts |= {"peak_vram_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    Path("facts.json").write_text(json.dumps(facts))


def measure(text: bytes) -> dict:
    """What a checkpoint is worth: {"score": ...} or {"invalid": reason}. In fractions, and rounded once."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        return {"invalid": "the checkpoint is no JSON list of numbers"}
    if not (isinstance(rows, list) and all(isinstance(row, list) and len(row) == 2 for row in rows)):
        return {"invalid": "wrong shape: rows of x, y are asked for"}
    if len(rows) != POINTS:
        return {"invalid": f"{POINTS} points are asked for, not {len(rows)}"}
    if not all(type(value) is float and math.isfinite(value) for row in rows for value in row):
        return {"invalid": "not finite: a coordinate is NaN, infinite or no number"}
    points = [[Fraction(value) for value in row] for row in rows]
    squares = [(x - u) ** 2 + (y - v) ** 2 for (x, y), (u, v) in combinations(points, 2)]
    if min(squares) == 0:
        return {"invalid": "two points are equal"}
    if (ratio := max(squares) / min(squares)) > 10**6:
        return {"invalid": "two points are nearly equal: the largest distance is over 1000 times the smallest"}
    return {"score": float(ratio)}


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
