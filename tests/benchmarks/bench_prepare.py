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
import prepare


def write_varied(folder: Path, mb: float) -> None:
    """Standard library sources over and over, in files of about 1 MB, every tenth word changed at random."""
    folder.mkdir()
    sources, rng = [re.split(r"(\w+)", text) for text in prepare.builtin_texts()], random.Random(0)
    words = sorted({word for source in sources for word in source[1::2]})
    written, number = 0, 0
    while written < mb * 1e6:
        parts, size = [], 0
        while size < 1e6:
            source = rng.choice(sources).copy()
            for i in range(1, len(source), 20):
                source[i] = rng.choice(words)
            parts.append("".join(source))
            size += len(parts[-1])
        written += (folder / f"{number}.txt").write_text("".join(parts), encoding="utf-8", errors="replace")
        number += 1


def measure(cache: Path, *arguments: str) -> tuple[float, float]:
    """Seconds and peak resident memory in GB of one preparation for the cpu preset; it is one process."""
    began = time.monotonic()
    command = [sys.executable, ROOT / "prepare.py", "--preset", "cpu", "--cache", cache, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("the preparation failed")
    return time.monotonic() - began, usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def main() -> None:
    mb = float(sys.argv[1]) if len(sys.argv) > 1 else 200.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_varied(folder / "texts", mb)
        sizes = {"builtin": sum(len(text.encode()) for text in prepare.builtin_texts()) / 1e6,
                 str(folder / "texts"): sum(file.stat().st_size for file in (folder / "texts").iterdir()) / 1e6}
        print(f"{os.cpu_count()} cores; text, seconds, speed, peak memory")
        for dataset, size in sizes.items():
            seconds, memory = measure(folder / "cache", "--dataset", dataset)
            print(f"{Path(dataset).name:8} {size:6.1f} MB {seconds:6.1f} s {size / seconds:5.1f} MB/s {memory:5.2f} GB")


if __name__ == "__main__":
    main()
