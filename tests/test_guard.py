"""What the guard lets a train.py say, and what not. Run: pytest tests/test_guard.py"""

import ast
from pathlib import Path

import pytest

import agent

TRAIN = (Path(__file__).parent.parent / "train.py").read_text()
COMPILES = "def can_compile(device_type: str) -> bool:"
MLP = "        return self.down(F.relu(self.up(x)).square())"


def faults(text):
    return agent.faults(ast.parse(text), text)


def put(name, value):
    return agent.Edit("set", name, value)


def block(old, new):
    return agent.Edit("block", old, new)


def before(old, new):
    return agent.Edit("block", old, f"{new}\n{old}")


def last(new):
    """Adds definitions at the end of the file, before main() is called."""
    return before('if __name__ == "__main__":', new)


# Honest research passes

HONEST = {
    # Changes that are known to be good
    "half the batch": [put("BATCH_ROWS", "32"), put("MICRO_ROWS", "32")],
    "width 1024": [put("HEADS", "8")],
    "weight decay on embeddings": [put("EMBED_DECAY", "0.01"), put("VALUE_DECAY", "0.0005"), put("HEAD_DECAY", "0.01")],
    "longer warm-down with a floor": [put("WARMDOWN", "0.83"), put("LR_FLOOR", "0.02")],
    "QK-norm before RoPE": [
        block(
            "        q = rotate(norm(self.query(x).view(per_head)), rotary)\n"
            "        k = rotate(norm(self.key(x).view(per_head)), rotary)",
            "        q = norm(rotate(self.query(x).view(per_head), rotary))\n"
            "        k = norm(rotate(self.key(x).view(per_head), rotary))",
        )
    ],
    "shorter window": [put("WINDOW", "128"), put("WINDOW_PATTERN", '"SSL"')],
    "rates": [put("EMBED_LR", "0.74"), put("HEAD_LR", "0.004"), put("RESIDUAL_LR", "0.04"), put("MATRIX_LR", "0.02")],
    "Muon's momentum falls further": [put("MOMENTUM_END", "0.9")],
    # Autograd, kernels, compilers
    "a custom autograd function": [
        before(
            "class MLP(nn.Module):",
            """\
class SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        kept = x.clamp_min(0)
        ctx.save_for_backward(kept)
        ctx.mark_non_differentiable()
        return kept.square()

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return 2 * kept * grad

""",
        ),
        block(MLP, "        return self.down(SquaredReLU.apply(self.up(x)))"),
    ],
    "a Triton kernel": [
        before("import torch.nn.functional as F", "import triton\nimport triton.language as tl"),
        last(
            """\
@triton.autotune(configs=[triton.Config({"BLOCK": 512}, num_warps=4)], key=["n"])
@triton.jit
def square_kernel(source, target, n, seed, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + offsets, mask=offsets < n, other=0.0)
    tl.store(target + offsets, tl.math.exp2(x) * tl.rand(seed, offsets), mask=offsets < n)


@torch.library.triton_op("own::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.library.wrap_triton(square_kernel)[(triton.cdiv(x.numel(), 512),)](x, out, x.numel(), 1)
    return out


"""
        ),
    ],
    "options of torch.compile": [
        before("import torch.nn.functional as F", "import torch._dynamo.config\nimport torch._inductor.config"),
        before(
            "def attend(q, k, v, window: int, block_mask):",
            """\
torch._inductor.config.coordinate_descent_tuning = True
torch._dynamo.config.cache_size_limit = 64
torch._functorch.config.activation_memory_budget = 0.5
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
torch.backends.cudnn.benchmark = True
torch.set_float32_matmul_precision("high")
setattr(torch._inductor.config.triton, "cudagraphs", True)

""",
        ),
        block(
            "        self.block, self.head_loss = compile_fn(Block.forward), compile_fn(head_loss)",
            "        self.block = compile_fn(Block.forward)\n"
            '        self.head_loss = torch.compile(head_loss, mode="max-autotune-no-cudagraphs", fullgraph=True)\n'
            "        torch._dynamo.mark_dynamic(model.head.weight, 0)\n"
            "        model.compile(options={'epilogue_fusion': True})",
        ),
    ],
    "a custom operator": [
        last(
            """\
@torch.library.custom_op("own::scale", mutates_args=())
def scale(x: torch.Tensor, by: float) -> torch.Tensor:
    return x * by


@scale.register_fake
def _(x, by):
    return torch.empty_like(x)


def setup_context(ctx, inputs, output):
    ctx.by = inputs[1]


scale.register_autograd(lambda ctx, grad: (grad * ctx.by, None), setup_context=setup_context)


"""
        )
    ],
    "a head in FP8": [
        last(
            """\
def fp8_linear(x, weight):
    scale_x, scale_w = (t.abs().amax().float() / 448 for t in (x, weight))
    x8, w8 = (t.div(s).to(torch.float8_e4m3fn) for t, s in ((x, scale_x), (weight, scale_w)))
    return torch._scaled_mm(x8, w8.T, out_dtype=torch.bfloat16, scale_a=scale_x, scale_b=scale_w, use_fast_accum=True)


def int8_linear(x, weight):
    return torch._int_mm(x.to(torch.int8), weight.to(torch.int8).T)


"""
        )
    ],
    "CUDA graphs and streams": [
        last(
            """\
class Graphed:
    def __init__(self, function, batch):
        self.static = [t.clone() for t in batch]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*self.static)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = function(*self.static)

    def __call__(self, *batch):
        torch._foreach_copy_(self.static, list(batch), non_blocking=True)
        self.graph.replay()
        return self.loss


"""
        )
    ],
    "torch.func": [
        before("import torch.nn.functional as F", "from torch.func import functional_call, grad, hessian, vmap"),
        last(
            """\
def per_row_gradients(model, params, x, y):
    def loss(params, row, target):
        return F.cross_entropy(functional_call(model, params, (row[None],))[0], target)

    return vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)


"""
        ),
    ],
    "an associative scan": [
        before(
            "import torch.nn.functional as F",
            "from torch._higher_order_ops import associative_scan\nfrom torch.utils.checkpoint import checkpoint",
        ),
        last(
            """\
class Recurrent(nn.Module):
    def forward(self, decay, x):
        def combine(a, b):
            return a[0] * b[0], b[0] * a[1] + b[1]

        _, state = associative_scan(combine, (decay, x), dim=1)
        return checkpoint(torch.tanh, state + torch.fft.irfft(torch.fft.rfft(x, dim=1), dim=1), use_reentrant=False)


"""
        ),
    ],
    # Models
    "a moving average of the weights": [
        before("import torch.nn.functional as F", "from torch.optim.swa_utils import AveragedModel"),
        before(
            "class Log:",
            """\
class Average:
    def __init__(self, model, share):
        self.share, self._model = share, model
        self.shadow = copy.deepcopy(model).requires_grad_(False).eval()
        self.torch_average = AveragedModel(model)

    @torch.no_grad()
    def update(self):
        torch._foreach_lerp_(list(self.shadow.parameters()), list(self._model.parameters()), 1 - self.share)

    def load(self):
        self._model.load_state_dict(self.shadow.state_dict())


""",
        ),
        block(
            "    steps = train(data, trainer, tokens_per_step)",
            "    average = Average(model, 0.99)\n    steps = train(data, trainer, tokens_per_step)\n    average.load()",
        ),
    ],
    "SwiGLU": [
        block(
            "        self.up, self.down = Linear(width, hidden), Linear(hidden, width)",
            "        self.up, self.gate = Linear(width, hidden), Linear(width, hidden)\n"
            "        self.down = Linear(hidden, width)",
        ),
        block(MLP, "        return self.down(F.silu(self.gate(x)) * self.up(x))"),
    ],
    "a mixture of experts": [
        before(
            "class Block(nn.Module):",
            """\
class Experts(nn.Module):
    def __init__(self, width: int, count: int = 4):
        super().__init__()
        self.router = Linear(width, count)
        self.experts = nn.ModuleList(MLP(width) for _ in range(count))

    def forward(self, x):
        weight, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = (weight * (chosen == i)).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return out / weight.sum(-1, keepdim=True)


""",
        ),
        block("        self.mlp = MLP(heads * head_dim)", "        self.mlp = Experts(heads * head_dim)"),
        block(
            "            block.mlp.down.weight.zero_()",
            "            for expert in block.mlp.experts:\n                expert.down.weight.zero_()",
        ),
    ],
    "another activation by name": [
        block(MLP, '        return self.down(getattr(F, "gelu")(self.up(x)))'),
        block("        return x + self.mlp(norm(x))", '        return x + getattr(self, "mlp")(norm(x))'),
    ],
    "layers with private names and hooks": [
        before("        self.init_weights()", "        self._cache = {}\n        self._hook()"),
        before(
            "    def hidden(self, idx, run_block=Block.forward, block_mask=None):",
            """\
    def _hook(self):
        self.head.register_forward_hook(lambda module, args, out: out)
        self.embedding.weight.register_hook(lambda grad: grad)
        nn.utils.parametrizations.weight_norm(self.blocks[0].mlp.up)
        for name, buffer in self._buffers.items():
            setattr(self, "rotary", buffer.clone())
        return self.__class__.__name__, super().__repr__()

    def __getattr__(self, name):
        return super().__getattr__(name)
""",
        ),
    ],
    # Training
    "a schedule by lerp": [
        block(
            "    return LR_FLOOR + (1 - LR_FLOOR) * max(0.0, left)",
            "    return torch.lerp(torch.tensor(LR_FLOOR), torch.tensor(1.0), max(0.0, left)).item()",
        )
    ],
    "clipped gradients": [
        block(
            "        self.muon.step()",
            "        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)\n"
            "        if norm.isnan():\n            sys.exit(1)\n        self.muon.step()",
        )
    ],
    "short rows first": [
        block(
            "        batches = (data.gather(next(starts), data.seq_len) for _ in range(trainer.micro_batches))",
            "        length = data.seq_len // 2 if data.progress() < 0.3 else data.seq_len\n"
            "        batches = (data.gather(next(starts), length) for _ in range(trainer.micro_batches))",
        )
    ],
    "the order of the rows": [
        block(
            "            first = int(torch.randint(min(length, num_tokens - length), ()))",
            "            first = np.random.randint(length) + random.randrange(2) + int(torch.rand(()) * 2)\n"
            "            first += int(np.array(0).copy() + torch.chunk(torch.zeros(2), 2)[0].select(0, 0))",
        ),
        before("from types import SimpleNamespace", "import random"),
        before("import torch.nn.functional as F", "import numpy as np"),
    ],
    "a scheduler and an optimizer of torch": [
        last(
            """\
class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4):
        super().__init__(params, dict(lr=lr))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self, lr_factor)

    def __setstate__(self, state):
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.sign(), alpha=-group["lr"])
                p.grad = None
                p.data = p.data.contiguous()


"""
        )
    ],
    "mixed precision": [
        block(
            "            loss = self.loss(x, y) / self.micro_batches",
            "            with torch.autocast(x.device.type, torch.bfloat16), torch.profiler.record_function('loss'):\n"
            "                loss = self.loss(x, y) / self.micro_batches",
        )
    ],
    # Plain Python
    "a dataclass and an enum": [
        before(
            "from types import SimpleNamespace",
            "from collections import namedtuple\nfrom dataclasses import dataclass, field, replace\n"
            "from enum import Enum\nfrom typing import NamedTuple, Optional",
        ),
        before(
            "def sizes() -> SimpleNamespace:",
            """\
class Kind(Enum):
    SHORT = "S"
    FULL = "L"


@dataclass(frozen=True)
class Settings:
    windows: list[int] = field(default_factory=list)
    kind: Kind = Kind.SHORT
    parent: Optional["Settings"] = None


class Pair(NamedTuple):
    a: int
    b: int = 0


class Point(namedtuple("Point", "x y")):
    __slots__ = ()


SETTINGS = replace(Settings(), kind=Kind.__members__["FULL"])
PAIR = Pair(1)._replace(b=2)._asdict()

""",
        ),
    ],
    "a cache of tables": [block(f"@functools.cache\n{COMPILES}", f"@functools.lru_cache(maxsize=None)\n{COMPILES}")],
    "errors caught and printed": [
        block(
            "        self.muon.step()",
            """\
        try:
            self.muon.step()
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            print(f"step failed: {error!r} {type(error).__name__} {self.rows:>{8}d}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            sys.exit("NaN")""",
        )
    ],
    "the collector and the clock": [
        before("    gc.freeze()", "    gc.collect()\n    began = time.time()"),
        before("from types import SimpleNamespace", "import time"),
    ],
    "a class with methods of its own": [
        last(
            """\
class Timer:
    def __init__(self, *, compile: bool = False):
        self.compile, self.seconds = compile, []

    def __repr__(self):
        return f"{type(self).__name__}({self.seconds})"

    def __iter__(self):
        return iter(self.seconds)

    def __len__(self):
        return len(self.seconds)

    def __eq__(self, other):
        return isinstance(other, Timer) and self.seconds == other.seconds

    def __enter__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        return self

    def __exit__(self, *error):
        self.event.record()

    def forward(self, input, copy=False):
        match input:
            case torch.Tensor(shape=(rows, *_)):
                return input.copy_(input) if copy else rows
            case {"rows": rows, **others}:
                return rows


"""
        )
    ],
}


# Numbers alone, as the shorter window too
NUMBERS = ("half the batch", "width 1024", "weight decay on embeddings", "longer warm-down with a floor", "rates",
           "Muon's momentum falls further")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in NUMBERS)) for name in HONEST
])
def test_honest_changes_pass(name):
    text = agent.apply_edits(TRAIN, tuple(HONEST[name]), "datacenter")
    assert faults(text) == []
    agent.guard(text, TRAIN, {})


# What is refused, each line for one reason only


IMPORTS = "`{}` is out of bounds: train.py may import"
LEADS_OUT = "`{}` leads to files, processes or the interpreter"
SEEDS = "`{}` touches random seeds: the seed is the harness's; another seed is not an improvement"
OF = "`{}` is out of bounds: of {}, train.py may use "
INSIDE = "`{}` is an inside of Python"
HANDED_ON = "`{}` is a module and no value to hand on"
CHANGED = "`{}` is not train.py's to change"
REFUSED = {
    # Imports
    "import os": IMPORTS.format("import os"),
    "import os.path as functools": IMPORTS.format("import os.path"),
    "from subprocess import run": IMPORTS.format("from subprocess import run"),
    "from . import agent": IMPORTS.format("from . import agent"),
    "from math import *": IMPORTS.format("from math import *"),
    "import math as numpy": "`import math as numpy` gives a module's name to another thing",
    "from prepare import PRESETS": OF.format("from prepare import PRESETS", "prepare") + "active_preset, finish, load.",
    "from sys import modules": OF.format("from sys import modules", "sys"),
    "from operator import attrgetter": LEADS_OUT.format("from operator import attrgetter"),
    "import torch.utils.cpp_extension": OF.format("import torch.utils.cpp_extension", "torch.utils"),
    "import torch.utils.data as d": OF.format("import torch.utils.data", "torch.utils"),
    "import torch.distributed as dist": LEADS_OUT.format("import torch.distributed"),
    "from torch.overrides import TorchFunctionMode": LEADS_OUT.format("from torch.overrides import TorchFunctionMode"),
    "from torch import _C": "`from torch import _C` is private",
    "from json import codecs": LEADS_OUT.format("from json import codecs"),
    # Names below torch, numpy and the others, under whatever name they are imported
    'torch.load("x")': LEADS_OUT.format("torch.load"),
    "F.torch": LEADS_OUT.format("torch.nn.functional.torch"),
    "torch.hub": LEADS_OUT.format("torch.hub"),
    "torch.os": LEADS_OUT.format("torch.os"),
    "nn.modules.module.warnings": LEADS_OUT.format("torch.nn.modules.module.warnings"),
    "torch.jit.load": OF.format("torch.jit.load", "torch.jit"),
    'torch.ops.load_library("x")': LEADS_OUT.format("torch.ops.load_library"),
    'torch.UntypedStorage.from_file("x")': LEADS_OUT.format("torch.UntypedStorage.from_file"),
    'torch.cuda.memory.CUDAPluggableAllocator("x")': LEADS_OUT.format("torch.cuda.memory.CUDAPluggableAllocator"),
    'torch.library.Library("aten", "IMPL")': OF.format("torch.library.Library", "torch.library"),
    "torch._C": "`torch._C` is private",
    "torch._weights_only_unpickler": "`torch._weights_only_unpickler` is private",
    "sys.modules": OF.format("sys.modules", "sys"),
    "sys.stdout.buffer": OF.format("sys.stdout.buffer", "sys.stdout"),
    "gc.get_objects()": OF.format("gc.get_objects", "gc"),
    "prepare.Data": OF.format("prepare.Data", "prepare"),
    'import numpy as np; np.load("x")': LEADS_OUT.format("numpy.load"),
    "import numpy as np; np.ctypeslib": LEADS_OUT.format("numpy.ctypeslib"),
    "import numpy as np; np.lib.format": OF.format("numpy.lib.format", "numpy.lib"),
    "import string; string.Formatter": LEADS_OUT.format("string.Formatter"),
    "import contextlib; contextlib.redirect_stdout": OF.format("contextlib.redirect_stdout", "contextlib"),
    # Attributes of anything
    'torch.ones(1).numpy().tofile("x")': LEADS_OUT.format(".tofile"),
    "[nn][0].os": LEADS_OUT.format(".os"),
    "(x for x in ()).gi_frame": LEADS_OUT.format(".gi_frame"),
    "main.__globals__": INSIDE.format(".__globals__"),
    "().__class__.__base__": INSIDE.format(".__base__"),
    "prepare.load.__globals__": INSIDE.format("prepare.load.__globals__"),
    "super().__getattribute__": INSIDE.format(".__getattribute__"),
    "from torch import nn as cls; cls._x": "`torch.nn._x` is private",
    "[1]._tokens": "`._tokens` is private: only self, cls and super()",
    "match main:\n    case object(__globals__=x):\n        pass": INSIDE.format(".__globals__"),
    # Builtins and reflection
    'open("x")': "`open` is out of bounds: train.py opens no files",
    'eval("1")': "`eval` is out of bounds",
    "run = exec": "`exec` is out of bounds",
    "globals()": "`globals` is out of bounds",
    'compile("1", "", "eval")': "`compile` is out of bounds",
    "__builtins__": "`__builtins__` is out of bounds",
    'getattr(main, "__glo" + "bals__")': "`getattr` may only be called, and with a literal name",
    'getattr(*[main, "x"], "y")': "`getattr` may only be called, and with a literal name",
    "list(map(hasattr, [], []))": "`hasattr` may only be called",
    'getattr(torch, "load")': LEADS_OUT.format("torch.load"),
    'functools.wraps(main, ["__globals__"])': "'__globals__' is the name of an inside",
    'type("T", (), {})': "`type` of three arguments",
    "type(*[])": "`type` of three arguments",
    "def f(x: 'exec()'): pass": "'exec()' is more than the name of a type",
    "def f() -> 'exec()': pass": "'exec()' is more than the name of a type",
    "x: list['exec()'] = 1": "'exec()' is more than the name of a type",
    # What belongs to others
    "F.gelu = F.relu": CHANGED.format("torch.nn.functional.gelu"),
    "torch.Tensor.float = main": CHANGED.format("torch.Tensor.float"),
    "from torch import Tensor; Tensor.x = 1": CHANGED.format("torch.Tensor.x"),
    "Own = torch.Tensor; Own.x = 1": CHANGED.format("torch.Tensor.x"),
    "del prepare.load": CHANGED.format("prepare.load"),
    "for nn.x in []: pass": CHANGED.format("torch.nn.x"),
    'setattr(F, "gelu", F.relu)': CHANGED.format("torch.nn.functional.gelu"),
    "type(main).x = 1": CHANGED.format(".x"),
    "main.__class__.x = 1": CHANGED.format(".x"),
    "main.__class__ = int": CHANGED.format(".__class__"),
    "nn.x[0] = 1": CHANGED.format("torch.nn.x"),
    "torch.backends = 1": CHANGED.format("torch.backends"),
    "prepare = 1": "`prepare` is the name of a module and keeps its meaning",
    "def torch(): pass": "`torch` is the name of a module",
    "def f(sys): pass": "`sys` is the name of a module",
    "[0 for F.x in []]": CHANGED.format("torch.nn.functional.x"),
    "print(torch)": HANDED_ON.format("torch"),
    "print(sys.stdout)": HANDED_ON.format("sys.stdout"),
    "print(torch.utils)": HANDED_ON.format("torch.utils"),
    "class T(torch.Tensor): pass": "`class T` could pass for a tensor or a type",
    "class T(nn.Parameter): pass": "`class T` could pass",
    "class T(type(main)): pass": "`class T` could pass",
    "class T(metaclass=type): pass": "`class T` could pass",
    "class T:\n    def __torch_function__(self): pass": "`__torch_function__` may not be defined",
    "class T:\n    __class__ = int": "`__class__` may not be defined",
    "class T:\n    def __reduce__(self): pass": "`__reduce__` may not be defined",
    # Seeds
    "torch.manual_seed(43)": SEEDS.format("torch.manual_seed"),
    "torch.cuda.manual_seed_all(43)": SEEDS.format("torch.cuda.manual_seed_all"),
    "torch.seed()": SEEDS.format("torch.seed"),
    "torch.random.set_rng_state(0)": SEEDS.format("torch.random.set_rng_state"),
    "torch.Generator()": SEEDS.format("torch.Generator"),
    "[1].manual_seed(43)": SEEDS.format(".manual_seed"),
    "torch.cuda.default_generators": SEEDS.format("torch.cuda.default_generators"),
    "import numpy.random as r; r.default_rng(1)": SEEDS.format("numpy.random.default_rng"),
    "import random; random.seed(43)": SEEDS.format("random.seed"),
    "from random import Random": SEEDS.format("from random import Random"),
    # Data in place of code
    f"X = {'x' * 4001!r}": "a string of over 4000 characters",
    f"X = b{'x' * 4001!r}": "a string of over 4000 characters",
    f"X = {[0] * 513}": "a literal of over 512 elements",
    f"X = {dict.fromkeys(range(513))}": "a literal of over 512 elements",
    f"X = {10**64}": "an integer of over 64 digits",
}


@pytest.mark.parametrize("line, words", REFUSED.items())
def test_refused_lines(line, words):
    text = f"{TRAIN}\n{line}\n"
    (sentence,) = faults(text)
    first = TRAIN.count("\n") + 2
    where, why = sentence.split(": ", 1)
    assert why.startswith(words) and why.endswith(".")
    assert first <= int(where.removeprefix("line ")) <= first + line.count("\n")


def test_the_guard_says_so_to_the_proposer():
    with pytest.raises(agent.EditError, match="`import os` is out of bounds: train.py may import"):
        agent.guard(TRAIN + "import os\n", TRAIN, {})


def test_shipped_files_pass():
    assert faults(TRAIN) == [] == faults((Path(__file__).parent / "toy" / "train.py").read_text())


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("def build_model(", "def build(", "train.py must keep def build_model(): the contract"),
        ("def main():", "def run():", "train.py must keep def main()"),
        ("data = prepare.load()", "data = None", "train.py must keep prepare.load()"),
        ("    data.start(model)\n", "", "train.py must keep data.start()"),
        ("prepare.finish(model", "dict(model=model", "train.py must keep prepare.finish()"),
        ("    data = prepare.load()\n", "    prepare.load()\n    data = prepare.load()\n", "prepare.load() once only"),
    ],
)
def test_the_contract_is_kept(old, new, words):
    assert TRAIN.count(old) == 1
    (sentence,) = faults(TRAIN.replace(old, new))
    assert words in sentence


def test_a_text_has_bounds():
    assert "longer than 100000 characters" in faults(TRAIN + "#" * 100_000)[0]
    assert "over 20000 characters in all" in faults(TRAIN + 10 * f"print({'x' * 2000!r})\n")[0]
    assert faults(TRAIN + f"def f():\n    {'x' * 3000!r}\n" * 7) == []
    assert faults(TRAIN + "x = y" + ".z" * 900) == []  # and no recursion to a depth that a text chooses


def test_no_coding_hides_lines_from_the_guard():
    """Under utf-7, `+AAo-` in a comment is the end of a line."""
    assert faults("# coding: utf_7 +AAo-import os\n" + TRAIN) == [
        "train.py names a coding other than utf-8: leave that comment out."
    ]
    assert faults("# coding: utf-8\n" + TRAIN) == []


def test_what_the_user_has_committed_is_not_held_against_an_edit():
    mine = "import os\n" + TRAIN
    agent.guard(mine.replace("SOFTCAP = 30.0", "SOFTCAP = 31.0"), mine, {})
    with pytest.raises(agent.EditError, match="os.system"):
        agent.guard(mine + "os.system('ls')\n", mine, {})
