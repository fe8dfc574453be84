"""Print where the time of a training step goes, from a profile: python tests/benchmarks/bench_step.py [--steps 40]

train.py as it is, on the preset that was prepared last ($AUTORESEARCH_CACHE), compiled and warmed up as in a run.
"""

import argparse
import gc
import resource
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import prepare
import psutil
import torch
import train
from torch.profiler import ProfilerActivity, profile

KINDS = {  # of what a profile names, by the beginnings of the names; the first that fits
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::_scaled_mm"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::_efficient", "aten::_cudnn"),
    "compiled kernels": ("## Call CompiledFxGraph", "triton_"),
    "embeddings": tuple(
        f"aten::{name}" for name in "embedding index searchsorted _embedding_bag sort scatter gather".split()
    ),
    "AdamW": ("aten::_fused_adamw", "aten::_foreach"),
    "everything else": ("",),
}


class Loop:
    """Training as train.py does it, step by step."""

    def __init__(self):
        self.data = data = prepare.load()
        model = train.build_model(data.vocab_size, data.seq_len).to(data.device)
        self.trainer = train.warmed_up(model, data.dummy_batch, train.WAYS[data.device.type])
        gc.disable()
        data.start(model)
        if model.recall.orders:
            counted = model.recall.counted(data.gather([0], min(data.num_tokens - 1, 2**20))[0])
            model.recall.context, model.recall.token, model.recall.kind = counted
        self.starts = train.shuffled_starts(data.num_tokens, data.seq_len, self.trainer.rows, data.device, 0)
        self.on_gpu = data.device.type == "cuda"

    def batches(self):
        return (self.data.gather(next(self.starts), self.data.seq_len) for _ in range(self.trainer.micro_batches))

    def step(self) -> None:
        self.trainer.schedule(self.data.progress())
        self.trainer.step(self.batches())

    def seconds(self, action, count: int) -> float:
        """Seconds that a call takes, the mean over so many."""
        wait = torch.cuda.synchronize if self.on_gpu else lambda: None
        wait()
        began = time.perf_counter()
        for _ in range(count):
            action()
        wait()
        return (time.perf_counter() - began) / count


def counted() -> tuple[int, int]:
    """Page faults and garbage collections of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt, sum(part["collections"] for part in gc.get_stats())


def growth(loop: Loop, count: int) -> None:
    """Print speed, page faults, memory and collections while it trains on; on a GPU, how often a step waits for it."""
    tokens = loop.trainer.micro_batches * loop.trainer.rows * loop.data.seq_len
    for last in (count, 2 * count, 3 * count):
        before, step_s = counted(), loop.seconds(loop.step, count)
        faults, collected = (now - was for now, was in zip(counted(), before))
        memory = torch.cuda.memory_reserved() if loop.on_gpu else psutil.Process().memory_info().rss
        speed = f"{1e3 * step_s:.1f} ms, {tokens / step_s:.0f} tokens/s, {faults / count:.0f} page faults a step"
        print(f"up to step {last}: {speed}, {collected} collections, {memory / 2**20:.0f} MB")
    if loop.on_gpu:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            loop.seconds(loop.step, count)
        torch.cuda.set_sync_debug_mode("default")
        print(f"{sum('synchroniz' in str(w.message) for w in seen)} waits for the GPU in {count} steps")


def shares(loop: Loop, count: int) -> None:
    """Print the milliseconds of a step by what is done in them, self time of the operators."""
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * loop.on_gpu]) as profiled:
        step_s = loop.seconds(loop.step, count)
    spent = {"one step, profiled": 1e3 * step_s} | dict.fromkeys(KINDS, 0.0)
    for event in profiled.key_averages():
        own = event.self_device_time_total if loop.on_gpu else event.self_cpu_time_total
        spent[next(kind for kind, names in KINDS.items() if event.key.startswith(names))] += own / 1e3 / count
    for kind, ms in spent.items():
        print(f"{kind:18}{ms:9.2f} ms {ms / 10 / step_s:6.1f} %")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=40, metavar="N", help="of each measurement (40)")
    count, loop = p.parse_args().steps, Loop()
    print(f"preset {loop.data.preset}, {loop.data.device}, {psutil.cpu_count()} cores")
    growth(loop, count)
    step_s, loader_s = loop.seconds(loop.step, count), loop.seconds(lambda: list(loop.batches()), count)
    print(f"loader alone: {1e3 * loader_s:.3f} ms a step, {100 * loader_s / step_s:.2f} % of it")
    shares(loop, count)


if __name__ == "__main__":
    main()
