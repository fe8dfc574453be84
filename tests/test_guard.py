"""What the guard lets a train.py say, and what it refuses in which words: pytest tests/test_guard.py"""

import pytest
from conftest import ROOT, TOY

import agent

TRAIN, TOY_TRAIN = (ROOT / "train.py").read_text(), (TOY / "train.py").read_text()
REQUIRED = ("build_model", "main", "load", "start", "finish")  # as prepare.py has it in meta.json
TASK = agent.Task(ROOT, "val_bpb", required=REQUIRED)
MLP = "        return self.down(F.relu(self.up(x)).square())"
QK = "rotate(norm(self.{}(x).view(per_head)), rotary)"


def guarded(text, base=TRAIN, **more):
    agent.guard(text, base, {}, TASK, **more)


def refusal(text, base=TRAIN):
    with pytest.raises(agent.EditError) as error:
        guarded(text, base)
    return str(error.value)


# Changes that are known to be good: SET lines, or (old lines, new lines)
CHANGES = {
    "half the batch, width 1024": "BATCH_ROWS 32, HEADS 8",
    "weight decay on embeddings": "EMBED_DECAY 0.01, HEAD_DECAY 0.01",
    "longer warm-down with a floor": "WARMDOWN 0.83, LR_FLOOR 0.02",
    "shorter window": 'WINDOW 128, WINDOW_PATTERN "SSL"',
    "rates and momentum": "EMBED_LR 0.74, HEAD_LR 0.004, RESIDUAL_LR 0.04, MATRIX_LR 0.02, MOMENTUM_END 0.9",
    "QK-norm after RoPE": (QK.format("query"), "norm(rotate(self.query(x).view(per_head), rotary))"),
    "another activation by name": (MLP, '        return self.down(getattr(F, "gelu")(self.up(x)))'),
    "SwiGLU": (MLP, "        return self.down(F.silu(self.gate(x)) * self.up(x))"),
}

# Honest definitions, each put at the end of the file
DEFINITIONS = {
    "local names of builtins": """
def forward(input, dir=1, compile=False, *, seed=0, vars=()):
    for open in range(3):
        help = input.copy_(input) if compile else [seed * dir for eval in vars]
    return open, help, [globals for globals in ()]""",
    "options of torch.compile": """
torch._inductor.config.coordinate_descent_tuning = True
torch.backends.cuda.matmul.allow_tf32 = True
step = torch.compile(main, mode="max-autotune-no-cudagraphs", fullgraph=True)
setattr(torch._inductor.config.triton, "cudagraphs", True)""",
    "an average of the weights": """
import copy
def averaged(model, share):
    shadow = copy.deepcopy(model).requires_grad_(False).eval()
    torch._foreach_lerp_(list(shadow.parameters()), list(model.parameters()), 1 - share)
    model.load_state_dict(shadow.state_dict())
    return model.eval()""",
    "a Triton kernel": """
import triton
import triton.language as tl
@triton.jit
def square(source, target, n, seed, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + offsets, mask=offsets < n, other=0.0)
    tl.store(target + offsets, x * tl.rand(seed, offsets), mask=offsets < n)""",
    "an FP8 head and clipped gradients": """
def scaled(x, weight, model):
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with torch.cuda.stream(torch.cuda.Stream()), torch.autocast(x.device.type, torch.bfloat16):
        return torch._scaled_mm(x.to(torch.float8_e4m3fn), weight.T, out_dtype=torch.bfloat16)""",
    "an optimizer of torch": """
class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4): super().__init__(params, dict(lr=lr))
    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]): p.add_(p.grad.sign(), alpha=-0.1)""",
    "plain Python": """
import time
from dataclasses import dataclass, field
from enum import Enum
@dataclass(frozen=True)
class Timer:
    began: float = field(default_factory=time.monotonic)
    def __call__(self): return f"{type(self).__name__} {time.monotonic() - self.began:.1f}"
    def __enter__(self): return self""",
    "the order of the rows": """
import random
import numpy as np
def starts(data, n): return random.randrange(n) + np.random.randint(n) + int(torch.randint(n, ()))""",
}
HONEST = {path.stem: path.read_text() for path in sorted((ROOT / "tests" / "cheats" / "honest").glob("*.py"))}


def changed(change):
    if not isinstance(change, str):
        assert change[0] in TRAIN
        return TRAIN.replace(*change)
    edits = (agent.Edit("set", *one.split(" ")) for one in change.split(", "))
    return agent.apply_edits(TRAIN, tuple(edits), "datacenter")


@pytest.mark.parametrize("name", [*CHANGES, *DEFINITIONS, *HONEST])
def test_honest_research_passes(name):
    guarded(changed(CHANGES[name]) if name in CHANGES else HONEST.get(name, TRAIN + DEFINITIONS.get(name, "") + "\n"))


@pytest.mark.parametrize("text", [TRAIN, TOY_TRAIN], ids=["shipped", "toy"])
def test_the_shipped_files_have_no_fault(text):
    assert not agent.faults_of(text, TASK.required, TASK.max_digits)


WORDS = {
    "imports": "is out of bounds: train.py may import torch, numpy, prepare",
    "files": "is out of bounds: train.py opens no files, runs no text, starts no processes",
    "insides": "is an inside of Python: use what it stands for",
    "computed": "getattr and the like",
    "seeds": "touches random seeds: the seed is the harness's; another is no improvement",
    "sizes": "a literal of that size is data, not code: compute it",
}
REFUSED = """
imports: import os|import os.path as functools|from subprocess import run|from . import agent|import math, socket
files: open('x')|eval('1')|run = exec|globals()|vars(nn)|compile('1', '', 'eval')|torch.load('x')|torch.save({}, 'x')
files: torch.os|nn.modules.x.shutil|torch.ones(1).numpy().tofile('x')|torch.jit.load|np.memmap|[nn][0].os|input('?')
files: from operator import attrgetter|c.load_inline|(x for x in ()).gi_frame|getattr(torch, 'load')|np.fromfile
files: from torch import distributed|from json import codecs|import torch.utils.cpp_extension as c; c.load_library
insides: main.__globals__|().__class__.__base__|__builtins__|__import__('math')|prepare.load.__code__|nn.__dict__
computed: getattr(main, 'lo' + 'ad')|setattr(nn, main.x, 1)|hasattr(nn, str(1))|getattr(nn, {}['x'])|delattr(nn, f'{x}')
seeds: torch.manual_seed(43)|torch.cuda.manual_seed_all(43)|torch.seed()|torch.random.set_rng_state(0)|torch.Generator()
seeds: [1].manual_seed(43)|torch.cuda.default_generators|np.random.default_rng(1)|np.random.seed(1)|random.seed(43)
seeds: from random import Random|from torch import manual_seed as f|getattr(torch, 'manual_seed')(43)
seeds: np.random.RandomState(7)|random.setstate(0)|torch.initial_seed()|np.random.PCG64(3)|torch.default_generator
"""
PAIRS = [line.split(": ", 1) for line in REFUSED.strip().splitlines()]
CASES = [(line, WORDS[name]) for name, lines in PAIRS for line in lines.split("|")]
BIG = ("x" * 4001, b"x" * 4001, [0] * 1500, dict.fromkeys(range(513)), 10**4001)
CASES += [(f"X = {value!r}", WORDS["sizes"]) for value in BIG]


@pytest.mark.parametrize("line, words", CASES, ids=[line[:40] for line, _ in CASES])
def test_a_line_is_refused_with_its_number_and_one_sentence_that_teaches(line, words):
    message = refusal(f"{TOY_TRAIN}\n{line}\n", TOY_TRAIN)
    assert words in message and message.startswith(f"line {TOY_TRAIN.count(chr(10)) + 2}: ") and ". " not in message


CONTRACT = {"def build_model(": "def build(", "data.start(model)": "pass", "prepare.finish(": "dict("}


@pytest.mark.parametrize("old, new", CONTRACT.items())
def test_the_contract_with_prepare_is_kept(old, new):
    text, name = TRAIN.replace(old, new).replace("= build_model(", "= build("), next(n for n in REQUIRED if n in old)
    assert f"train.py must keep {name}: the contract" in refusal(text)


def test_what_does_not_parse_changes_nothing_or_is_too_long_goes_back():
    for more in ("\ndef (:\n", "\0", "\nX = " + "(" * 3000 + "\n"):
        assert "does not parse" in refusal(TRAIN + more)
    for same in (TRAIN + "# more\n", '"""Other."""\n' + TRAIN.split('"""\n', 1)[1], TRAIN.replace("= 30.0", "=  30.0")):
        assert "changes nothing but comments, docstrings or layout" in refusal(same)
    assert "longer than 100000 characters" in refusal(TRAIN + "X = 1\n" * 17_000)


def test_what_the_user_has_committed_is_the_users_affair_and_rules_can_be_off():
    mine = "import os\n" + TRAIN
    guarded(mine.replace("SOFTCAP = 30.0", "SOFTCAP = 31.0"), mine)
    assert "`system` is out of bounds" in refusal(mine + "os.system('ls')\n", mine)
    guarded(TRAIN + "import os\n", rules=False)
