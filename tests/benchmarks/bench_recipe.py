"""Print how good the first run is: python tests/benchmarks/bench_recipe.py [--seeds 42 43 44] [--time-budget 300]

train.py and plain_recipe.py, in turns, each as `python train.py` in a temporary folder, on the preset and data prepared
last ($AUTORESEARCH_CACHE). GFLOP/s are those of the model's matrix products and attention; the peak is that of square
matrix products here, the mean of before and after a run: bf16 on a GPU and on a CPU that multiplies it (the plain recipe
computes in fp32 on any CPU), else fp32. The original's formula counts attention as if a query saw its whole window at
every position. Compiled before it is measured.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import prepare
import torch

RECIPES = {"train.py": Path(prepare.__file__).parent, "plain_recipe.py": Path(__file__).parent}  # and their folders
COLUMNS = "seed | val_bpb | tokens M | tokens/s | GFLOP/s | of peak | by the original's formula | MFU | outside s | MB"


def peak_flops(device) -> float:
    """FLOP/s of the fastest of some square matrix products."""
    fast = device.type == "cuda" or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    dtype = torch.bfloat16 if fast else torch.float32
    fastest = 0.0
    for size, count in ((4096, 20), (8192, 10)) if device.type == "cuda" else ((1024, 8), (2048, 2)):
        a = torch.randn(size, size, device=device, dtype=dtype)
        for _ in range(4):
            began = time.perf_counter()
            for _ in range(count):
                b = a @ a
            float(b[0, 0])  # waits for a GPU
            fastest = max(fastest, 2 * size**3 * count / (time.perf_counter() - began))
    return fastest


def flops_per_token(name: str, data) -> tuple[float, float]:
    """Training FLOPs: 6 per matrix weight, 12 per channel, block and key that a query sees; the original's formula."""
    model = importlib.import_module(name.removesuffix(".py")).build_model(data.vocab_size, data.seq_len)
    matrices = (p for name, p in model.blocks.named_parameters() if "embedding" not in name)
    weights = model.head.weight.numel() + sum(p.numel() for p in matrices)
    windows = getattr(model, "windows", [data.seq_len] * len(model.blocks))
    seen = sum(window * (data.seq_len - (window - 1) / 2) / data.seq_len for window in windows)  # keys, mean
    return tuple(6 * weights + 12 * model.head.in_features * keys for keys in (seen, sum(windows)))


def measured(name: str, seed: int, budget_s: float, folder: Path) -> dict[str, float]:
    """facts.json of one run, with its val_bpb and the seconds of the command that were not training."""
    folder.mkdir()
    shutil.copyfile(RECIPES[name] / name, folder / "train.py")
    shutil.copy(prepare.__file__, folder)
    env = os.environ | {"AUTORESEARCH_SEED": str(seed), "AUTORESEARCH_TIME_BUDGET": str(budget_s)}
    began = time.perf_counter()
    run = subprocess.run([sys.executable, "train.py"], cwd=folder, env=env, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{name} with seed {seed} ended with exit code {run.returncode}:\n{run.stdout}{run.stderr}")
    facts = json.loads((folder / "runs" / "by-hand" / "facts.json").read_text())
    facts["outside_s"] = time.perf_counter() - began - facts["training_seconds"]
    return facts | {"val_bpb": float(re.findall(r"^val_bpb: +(\S+)", run.stdout, re.M)[-1])}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], metavar="N", help="one run of each (42 43 44)")
    p.add_argument("--time-budget", type=float, default=300.0, metavar="S", help="seconds (300)")
    p.add_argument("--only", choices=RECIPES, help="one of the two")
    args = p.parse_args()
    data, names = prepare.load(), [args.only] if args.only else [*RECIPES]
    print(f"preset {data.preset}, {data.device}, rows of {data.seq_len}; {COLUMNS}", flush=True)
    peaks, scores = [peak_flops(data.device)], {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/compiled")
        for name in names:
            measured(name, 0, 1.0, Path(folder) / name)  # compiles
        for seed, name in ((seed, name) for seed in args.seeds for name in names):
            run = measured(name, seed, args.time_budget, Path(folder) / f"{name}-{seed}")
            scores[name].append(run["val_bpb"])
            peaks.append(peak_flops(data.device))
            peak, speed = (peaks[-2] + peaks[-1]) / 2, run["tokens"] / run["training_seconds"]
            exact, original = (speed * flops for flops in flops_per_token(name, data))
            row = f"{name:16} {seed:5} {run['val_bpb']:8.4f} {run['tokens'] / 1e6:6.2f} {speed:9.0f} {exact / 1e9:8.1f}"
            row += f" {exact / peak:6.1%} {original / peak:6.1%} {run['mfu_percent']:5.1f} {run['outside_s']:6.1f}"
            print(f"{row} {run['peak_vram_mb']:6.0f}", flush=True)
    print(f"matrix products: {min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f} GFLOP/s, before and after the runs")
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    print("mean val_bpb:", ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    if len(means) == 2:
        print(f"train.py is {100 * (1 - means['train.py'] / means['plain_recipe.py']):.1f} % below the plain recipe")


if __name__ == "__main__":
    main()
