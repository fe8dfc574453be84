"""Print where the time of a training step goes, from a profile: python tests/benchmarks/bench_step.py [--steps 40]

train.py as it is, on the preset that was prepared last ($AUTORESEARCH_CACHE), compiled and warmed up as in a run.
"""
import argparse
import contextlib
import gc
import os
import resource
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import prepare
import torch
import train
from torch.profiler import ProfilerActivity, profile

KINDS = {   # of what a profile names, by the beginnings of the names; the first that fits
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::_scaled_mm"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::_efficient", "aten::_cudnn"),
    "compiled kernels": ("## Call CompiledFxGraph", "triton_"),
    "embeddings": ("aten::embedding", "aten::index_select", "aten::native_batch"),
    "AdamW": ("aten::_fused_adamw", "aten::_foreach"),
}


class Loop:
    """Training as train.py does it, step by step."""

    def __init__(self):
        self.data, size = prepare.load(), train.sizes()
        self.model = train.build_model(self.data.vocab_size, self.data.seq_len).to(self.data.device)
        self.trainer = train.Trainer(self.model, size, train.can_compile(self.data.device.type))
        self.trainer.warm_up(self.data.dummy_batch(self.trainer.rows))
        gc.freeze()
        gc.disable()
        self.data.start(self.model)
        self.starts = train.shuffled_starts(
            self.data.num_tokens, self.data.seq_len, self.trainer.rows, self.data.device
        )

    def batch(self):
        return self.data.gather(next(self.starts), self.data.seq_len)

    def steps(self, count: int) -> float:
        """Seconds that one step takes, the mean over so many."""
        self.wait()
        began = time.perf_counter()
        for _ in range(count):
            self.trainer.schedule(self.data.progress())
            self.trainer.step(self.batch() for _ in range(self.trainer.micro_batches))
        self.wait()
        return (time.perf_counter() - began) / count

    def wait(self) -> None:
        if self.data.device.type == "cuda":
            torch.cuda.synchronize()


def memory_mb(device) -> float:
    """Resident memory of this process, on a GPU what torch has reserved there."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved() / 2**20
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def shares(loop: Loop, count: int) -> None:
    """Print the milliseconds of a step by what is done in them, self time of the operators."""
    on_gpu = loop.data.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities) as profiled:
        step_s = loop.steps(count)
    spent = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in profiled.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), "everything else")
        spent[kind] += own / 1e3 / count
    print(f"one step, profiled: {1e3 * step_s:.1f} ms")
    for kind, ms in spent.items():
        print(f"  {kind:18}{ms:9.2f} ms {ms / 10 / step_s:6.1f} %")


def counted() -> tuple[int, int]:
    """Page faults and garbage collections of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt, sum(part["collections"] for part in gc.get_stats())


def growth(loop: Loop, count: int) -> None:
    """Print speed, page faults, memory and collections while it trains on; on a GPU, how often a step waits for it."""
    tokens = loop.trainer.micro_batches * loop.trainer.rows * loop.data.seq_len
    for part in range(3):
        before = counted()
        step_s = loop.steps(count)
        faults, collected = (now - was for now, was in zip(counted(), before))
        print(f"steps {part * count + 1} to {(part + 1) * count}: {1e3 * step_s:.1f} ms, {tokens / step_s:.0f} tokens/s, "
              f"{faults / count:.0f} page faults a step, {collected} collections, {memory_mb(loop.data.device):.0f} MB")
    if loop.data.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            loop.steps(count)
        torch.cuda.set_sync_debug_mode("default")
        print(f"{sum('synchroniz' in str(w.message) for w in seen)} waits for the GPU in {count} steps")


def loader(loop: Loop, count: int, step_s: float) -> None:
    """Print what the loader costs by itself."""
    loop.wait()
    began = time.perf_counter()
    for _ in range(count * loop.trainer.micro_batches):
        loop.batch()
    loop.wait()
    ms = 1e3 * (time.perf_counter() - began) / count
    print(f"loader alone: {ms:.3f} ms a step, {ms / 10 / step_s:.2f} % of it")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=40, metavar="N", help="of each measurement (40)")
    count = p.parse_args().steps
    loop = Loop()
    print(f"preset {loop.data.preset}, {loop.data.device}, {os.cpu_count()} cores")
    growth(loop, count)
    loader(loop, count, loop.steps(count))
    shares(loop, count)


if __name__ == "__main__":
    main()
