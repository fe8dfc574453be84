"""Small images: `prepare.py` draws them, `prepare.py score RUN_DIR [--split val|test]` scores what a run learned."""

import hashlib
import json
import os
import random
import runpy
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or Path(__file__).resolve().parent / "runs" / "data")
FILES = {split: [f"{split}_images.bin", f"{split}_labels.bin"] for split in ("train", "val", "test")}
CLASSES, SIZE, BATCH = 10, 20, 250  # SIZE: pixels; BATCH: images that are scored at a time
BUDGET_S = float(os.environ.get("AUTORESEARCH_TIME_BUDGET") or 30)


def make() -> None:
    """Draws the images, always the same. All of it stands in here, and in nothing that train.py can import."""
    (folder := CACHE / "images").mkdir(parents=True, exist_ok=True)
    for n, split in zip((8000, 4000, 4000), FILES):
        rng, axis = np.random.default_rng(list(split.encode())), (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
        each = lambda low, high, channels=1: rng.uniform(low, high, (n, channels, 1, 1))  # noqa: E731
        box = lambda u, v, a, b: np.maximum(abs(u) - a, abs(v) - b)  # noqa: E731
        labels, turn, size = rng.permutation(np.arange(n) % CLASSES), each(0, 2 * np.pi), each(0.5, 0.9)
        x, y = axis - each(-0.3, 0.3), axis[:, None] - each(-0.3, 0.3)
        u, v = (np.cos(turn) * x + np.sin(turn) * y) / size, (np.cos(turn) * y - np.sin(turn) * x) / size
        r, square = np.hypot(u, v), box(u, v, 0.8, 0.8)
        shapes = [r - 0.85, abs(r - 0.7) - 0.22, np.maximum(r - 0.9, 0.55 - np.hypot(u - 0.5, v))]  # disc, ring, moon
        shapes += [square, abs(square + 0.15) - 0.2, box(u, abs(v) - 0.5, 0.9, 0.25)]  # square, frame, two bars
        shapes += [np.minimum(box(u, v - a, 1 - a, 0.26), box(v + a, u, 1 - a, 0.26)) for a in (0, 0.3)]  # cross, T
        shapes += [r - 0.75 - 0.25 * np.cos(arms * np.arctan2(v, u)) for arms in (3, 5)]  # stars
        inside = np.clip(0.5 - np.choose(labels[:, None, None, None], shapes) * size * SIZE / 2, 0, 1)
        images = (ground := each(0, 1, 3)) * (1 - inside) + (ground + each(0.25, 0.75, 3)) % 1 * inside  # two colours
        images += 0.15 * np.sin(each(-9, 9) * x + each(-9, 9) * y + each(0, 7, 3))
        images += each(0.02, 0.2) * rng.normal(size=images.shape)
        for name, data in zip(FILES[split], (np.uint8(255 * np.clip(images, 0, 1)), np.uint8(labels))):
            (folder / name).write_bytes(data.tobytes())
    meta = {"format": 2, "dataset": "images", "fingerprint": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    meta |= {"metric": "accuracy", "lower_is_better": False, "plausible": [0.0, 1.0], "noise": 0.013}
    meta |= {"handed": FILES["train"], "judged": {s: FILES[s] for s in ("val", "test")}, "budget_s": 30.0}
    meta |= {"startup_s": 60.0, "required": ["build_model", "main", "load", "start", "finish"]}
    (folder / "meta.json").write_text(json.dumps(meta))
    (CACHE / "current").write_text("images")


def receive(split: str) -> tuple:
    """A message, a split's images (N, 3, SIZE, SIZE) from 0 to 1, its file of labels. agent.py's clock starts here."""
    message, opened = b"", []
    if channel := os.environ.get("AUTORESEARCH_HANDOVER_FD"):
        with socket.socket(fileno=int(channel)) as channel:
            channel.sendall(b"start\n")
            message, opened, _, _ = socket.recv_fds(channel, 1024, 2)
    images, labels = (open(file, "rb") for file in opened or [CACHE / "images" / name for name in FILES[split]])
    images = torch.frombuffer(bytearray(images.read()), dtype=torch.uint8).view(-1, 3, SIZE, SIZE) / 255
    return message.decode(), images, labels


class Data:
    """A run's clock, and after start() its images (N, 3, SIZE, SIZE), labels (N,) and two cores."""

    def start(self) -> None:
        _, self.images, labels = receive("train")
        self.labels, self.cores = torch.tensor(list(labels.read())), ThreadPoolExecutor(2)
        self.began = time.monotonic()

    def progress(self) -> float:
        return (time.monotonic() - self.began) / BUDGET_S


def load() -> Data:
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(int(os.environ.get("AUTORESEARCH_SEED", "42")))
    torch.set_num_threads(1)  # within each core's thread: two on one operator wait for each other on a busy machine
    return Data()


def finish(model: torch.nn.Module, **facts) -> None:
    torch.save(model.state_dict(), "checkpoint.pt")
    Path("facts.json").write_text(json.dumps(facts))


@torch.no_grad()
def measure(run_dir: Path, split: str) -> dict:
    """The content of score.json. The labels are read after the model and its twin have answered."""
    (secret, images, labels), rng, found = receive(split), np.random.default_rng(), []
    order, again = (torch.from_numpy(rng.permutation(len(images))[:most]) for most in (None, 1000))
    for indices in (order, again):  # who looks at the batch, or remembers, answers otherwise in another company
        model = runpy.run_path(str(run_dir / "train.py"))["build_model"]().eval()
        model.load_state_dict(torch.load(run_dir / "checkpoint.pt", weights_only=True))
        for batch in indices.split(BATCH):
            logits = model(images[batch])
            if type(logits) is not torch.Tensor or logits.shape != (len(batch), CLASSES):
                return {"invalid": f"wrong output: forward must return plain logits of shape (N, {CLASSES})"}
            found.append(logits.float().log_softmax(1))
    first, second = torch.cat(found).split([len(order), len(again)])
    moved = float((first[order.argsort()[again]] - second).abs().max())
    if not (torch.cat(found).isfinite().all() and moved < 0.01):
        return {"invalid": f"log probabilities are not finite, or change by {moved:.2g} among other images"}
    guess, truth = dict(zip(order.tolist(), first.argmax(1).tolist())), labels.read()
    blocks = [sum(guess[i] == truth[i] for i in range(k, len(truth), 20)) / len(truth) for k in range(20)]
    return {"score": sum(blocks), "blocks": blocks, "secret": secret}


if __name__ != "__main__":
    del make  # so that who imports this file draws nothing
elif sys.argv[1:2] != ["score"]:
    make()
else:
    folder, split = Path(sys.argv[2]), (sys.argv[4:5] or ["val"])[0]
    result = measure(folder, split)
    print(f"{split}: {result.get('invalid') or result['score']}", flush=True)
    (folder / ("score.json" if split == "val" else "score-test.json")).write_text(json.dumps(result))
    os._exit(3 if "invalid" in result else 0)  # what a model left to do at the exit is not done
