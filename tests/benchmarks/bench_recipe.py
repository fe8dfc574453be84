"""Print how good the first run is: python tests/benchmarks/bench_recipe.py [--seeds 42 43 44] [--time-budget 300]

train.py and plain_recipe.py, in turns, each as `python train.py` in a temporary folder, on the preset and data prepared
last ($AUTORESEARCH_CACHE). GFLOP/s are those of the model's matrix products and attention; the peak is that of square
matrix products here, the mean of before and after a run: fp32 on a CPU, bf16 on a GPU. The original's formula counts
attention as if a query saw its whole window at every position. Compiled before it is measured.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import prepare
import torch
import train

RECIPES = {"train.py": ROOT / "train.py", "plain_recipe.py": Path(__file__).parent / "plain_recipe.py"}
COLUMNS = ("seed", "val_bpb", "tokens M", "tokens/s", "GFLOP/s", "of peak", "by the original's formula", "MFU",
           "outside s", "memory MB")


def peak_flops(device) -> float:
    """FLOP/s of the fastest of some square matrix products."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
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
    """Training FLOPs of the recipe: 6 per matrix weight, 12 per channel, block and key that a query sees; and as the
    original has it."""
    if name == "train.py":
        model = train.build_model(data.vocab_size, data.seq_len)
        weights = sum(p.numel() for p in [*train.matrix_parameters(model), model.head.weight])
        exact = train.flops_per_token(model, data.seq_len)
        return exact, 6 * weights + 12 * model.head.in_features * sum(model.windows)
    import plain_recipe  # not before there is a preset, which its size depends on
    model = plain_recipe.build_model(data.vocab_size, data.seq_len)
    weights = sum(p.numel() for n, p in model.named_parameters() if "embedding" not in n)
    per_key = 12 * plain_recipe.WIDTH * plain_recipe.DEPTH
    return 6 * weights + per_key * (data.seq_len + 1) / 2, 6 * weights + per_key * data.seq_len


def measured(path: Path, seed: int, budget_s: float, folder: Path) -> dict[str, float]:
    """The summary of one run: name -> value; with its exact tokens, and the seconds of the whole command."""
    (folder / "runs").mkdir(parents=True)
    shutil.copyfile(path, folder / "train.py")
    shutil.copyfile(ROOT / "prepare.py", folder / "prepare.py")
    environment = os.environ | {
        "AUTORESEARCH_SEED": str(seed), "AUTORESEARCH_TIME_BUDGET": str(budget_s),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(folder.parent / "cache"),
    }
    began = time.perf_counter()
    run = subprocess.run([sys.executable, "train.py"], cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if run.returncode:
        sys.exit(f"{path.name} with seed {seed} ended with exit code {run.returncode}:\n{run.stdout}{run.stderr}")
    lines = (line.split(":") for line in run.stdout.rpartition("\n---\n")[2].splitlines() if ":" in line)
    facts = json.loads((folder / "runs" / "by-hand" / "facts.json").read_text())  # the summary rounds the tokens
    return {name: float(value) for name, value in lines} | {"tokens": facts["tokens"], "command_seconds": seconds}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], metavar="N", help="one run of each (42 43 44)")
    p.add_argument("--time-budget", type=float, default=prepare.TIME_BUDGET_S, metavar="S", help="seconds (300)")
    p.add_argument("--only", choices=RECIPES, help="one of the two")
    args = p.parse_args()
    data, names = prepare.load(), [args.only] if args.only else list(RECIPES)
    print(f"preset {data.preset}, {data.device}, rows of {data.seq_len}; {' | '.join(COLUMNS)}", flush=True)
    peaks, scores = [peak_flops(data.device)], {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            for name in names:
                measured(RECIPES[name], 0, 1.0, Path(folder) / name)  # compiles
        for seed in args.seeds:
            for name in names:
                run = measured(RECIPES[name], seed, args.time_budget, Path(folder) / f"{name}-{seed}")
                scores[name].append(run["val_bpb"])
                peaks.append(peak_flops(data.device))
                speed = run["tokens"] / run["training_seconds"]
                exact, original = flops_per_token(name, data)
                flops, peak = speed * exact, (peaks[-2] + peaks[-1]) / 2
                print(f"{name:16} {seed:5} {run['val_bpb']:8.4f} {run['tokens'] / 1e6:6.2f} {speed:9.0f} "
                      f"{flops / 1e9:8.1f} {flops / peak:6.1%} {speed * original / peak:6.1%} "
                      f"{run['mfu_percent']:5.1f} {run['command_seconds'] - run['training_seconds']:6.1f} "
                      f"{run['peak_vram_mb']:6.0f}", flush=True)
    print(f"matrix products: {min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f} GFLOP/s, before and after the runs")
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    print("mean val_bpb: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    if len(means) == 2:
        ours, plain = means.values()
        print(f"train.py is {100 * (1 - ours / plain):.1f} % below the plain recipe")


if __name__ == "__main__":
    main()
