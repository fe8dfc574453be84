"""A torch-free stand-in for prepare.py, for tests of the loop alone: same command line, same files, same hand-over."""

import json
import math
import os
import socket
import sys
import time
from pathlib import Path

CACHE = Path(os.environ.get("AUTORESEARCH_CACHE", "/nowhere"))
HERE = Path(__file__).resolve().parent


def meta():
    return json.loads(
        (CACHE / (os.environ.get("AUTORESEARCH_DATA") or (CACHE / "current").read_text()) / "meta.json").read_text()
    )


def active_preset():
    return meta()["preset"]


def receive():
    """The message and the open files that agent.py hands over."""
    with socket.socket(fileno=int(os.environ["AUTORESEARCH_HANDOVER_FD"])) as harness:
        harness.sendall(b"start\n")
        return socket.recv_fds(harness, 128, 2)[:2]


class Data:
    vocab_size, seq_len = 256, 16

    def start(self, model):
        assert os.read(receive()[1][0], 16) == b"the train tokens"
        self.began = time.monotonic()

    def progress(self):
        return (time.monotonic() - self.began) / float(os.environ["AUTORESEARCH_TIME_BUDGET"])

    def expired(self):
        return self.progress() >= 1

    def rest(self):
        time.sleep(0.02)


def load():
    return Data()


def finish(model, **facts):
    """Writes what the scorer needs. BPB may be a table by seed (0: any other); CACHE/speed is how fast the machine is."""
    if isinstance(model.get("bpb"), dict):
        model["bpb"] = model["bpb"].get(int(os.environ["AUTORESEARCH_SEED"]), model["bpb"].get(0))
    if (CACHE / "speed").exists():
        facts["tokens"] *= float((CACHE / "speed").read_text())
    Path("checkpoint.pt").write_text(json.dumps(model))
    Path("facts.json").write_text(json.dumps({**facts, "peak_vram_mb": 512.0}))


def bpb(m):
    """Lowest, 1.0, at rate 3, decay 0.6, rows 256, depth 6."""
    off = (math.log(m["rate"] / 3), m["decay"] - 0.6, math.log2(m["rows"] / 256), (m["depth"] - 6) / 4)
    return 1 + 0.01 * sum(x * x for x in off)


def score(folder, split):
    secret, (rows,) = receive()
    assert os.read(rows, 13) == f"the {split} rows".encode()
    model = json.loads((folder / "checkpoint.pt").read_text())
    if "invalid" in model:
        (folder / "score.json").write_text(json.dumps({"invalid": model["invalid"]}))
        sys.exit(3)
    if model.get("flaky_until", 0) > time.monotonic():
        time.sleep(model["flaky_until"] - time.monotonic())
        raise RuntimeError("the scorer stumbled")
    value = bpb(model) if model.get("bpb") is None else model["bpb"]
    blocks = [value * (20 + i % 3) / 419 for i in range(20)]
    found = {"score": value, "blocks": blocks, "fingerprint": meta()["fingerprint"], "secret": secret.decode()}
    (folder / ("score.json" if split == "val" else "score-test.json")).write_text(json.dumps(found))


def make():
    folder = CACHE / os.environ.get("TOY_NAME", "toy")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.bin").write_bytes(b"the train tokens")
    (folder / "train_docs.npy").write_bytes(b"docs")
    (folder / "val.bin").write_bytes(b"the val rows")
    (folder / "test.bin").write_bytes(b"the test rows")
    preset, fingerprint = os.environ.get("TOY_PRESET", "cpu"), os.environ.get("TOY_FINGERPRINT", "f00d")
    meta = {
        "format": 2,
        "dataset": "toy",
        "preset": preset,
        "fingerprint": fingerprint,
        "metric": "val_bpb",
        "noise": float(os.environ.get("TOY_NOISE", "0.006")),
        "handed": ["train.bin", "train_docs.npy"],
        "judged": {"val": ["val.bin"], "test": ["test.bin"]},
        "plausible": [0.0, 100.0],
        "required": ["build_model", "main", "load", "start", "finish"],
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    (CACHE / "current").write_text(folder.name)


if __name__ == "__main__":
    score(Path(sys.argv[2]), sys.argv[4]) if sys.argv[1:2] == ["score"] else make()
