"""
Seconds, MB/s and peak memory of preparing the built-in corpus and 200 MB of text.

    python tests/benchmarks/bench_prepare.py [MB]
"""

import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402


def write_varied(folder: Path, mb: float) -> float:
    """Standard library sources over and over, in files of about 1 MB, every tenth word changed; returns their MB."""
    folder.mkdir()
    sources, rng = [re.split(r"(\w+)", text) for text in prepare.builtin_texts()], random.Random(0)
    words, written = sorted({word for source in sources for word in source[1::2]}), 0
    while written < mb * 1e6:
        parts = []
        while sum(map(len, parts)) < 1e6:
            source = rng.choice(sources).copy()
            for i in range(1, len(source), 20):
                source[i] = rng.choice(words)
            parts.append("".join(source))
        written += (folder / f"{written}.txt").write_bytes("".join(parts).encode("utf-8", "replace"))
    return written / 1e6


def measure(cache: Path, dataset: str) -> tuple[float, float]:
    """Seconds and peak resident memory in GB of one preparation for the cpu preset; it is one process."""
    began = time.monotonic()
    command = [sys.executable, ROOT / "prepare.py", "--preset", "cpu", "--cache", cache, "--dataset", dataset]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("the preparation failed")
    return time.monotonic() - began, usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        texts = Path(name) / "texts"
        sizes = {"builtin": sum(len(text.encode()) for text in prepare.builtin_texts()) / 1e6}
        sizes[str(texts)] = write_varied(texts, float(sys.argv[1]) if len(sys.argv) > 1 else 200.0)
        print(f"{os.cpu_count()} cores; text, seconds, speed, peak memory")
        for dataset, mb in sizes.items():
            seconds, memory = measure(Path(name) / "cache", dataset)
            print(f"{Path(dataset).name:8} {mb:6.1f} MB {seconds:6.1f} s {mb / seconds:5.1f} MB/s {memory:5.2f} GB")
