"""Run: pytest tests/test_train.py"""
import ast
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train

ROOT = Path(__file__).parent.parent
SOURCE = (ROOT / "train.py").read_text()
STEP_LINE = re.compile(r"step (\d+) \(([\d.]+)%\) \| loss (\S+) \| lr ([\d.]+) \| tok/s ([\d,]+)")
TINY = dict(DEPTH=3, HEADS=2, HEAD_DIM=16, WINDOW=8, VALUE_EVERY=2, BIGRAM_ROWS=1024, BATCH_ROWS=4, MICRO_ROWS=4,
            MATRIX_LR=0.02, MUON_STEPS=5)
VOCAB, SEQ_LEN = 64, 32


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def tiny_size(**changes) -> SimpleNamespace:
    return SimpleNamespace(**TINY | changes)


def tiny_model(**changes):
    return train.GPT(VOCAB, SEQ_LEN, tiny_size(**changes))


def tiny_trainer(**changes):
    return train.Trainer(tiny_model(**changes), tiny_size(**changes), compiled=False)


def busy_model(**changes):
    """A model whose every weight matters: the output projections and gates start at zero, which would hide mistakes."""
    model = tiny_model(**changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(rows: int = 4, length: int = SEQ_LEN):
    return torch.randint(VOCAB, (rows, length))


# ---------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------


def test_loss_at_start_is_that_of_guessing():
    model = tiny_model()
    loss = train.head_loss(model.head, model.hidden(tokens()), tokens())
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.05)


@pytest.mark.parametrize("cut", [1, 7, 8, 20, 31])
def test_later_tokens_change_no_earlier_logits(cut):
    model, idx = busy_model(), tokens()
    changed = idx.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % VOCAB
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :cut], after[:, :cut], rtol=0, atol=1e-5)
    assert (before[:, cut] - after[:, cut]).abs().max() > 1e-3


def test_rows_do_not_depend_on_each_other():
    model, idx = busy_model(), tokens()
    torch.testing.assert_close(model(idx)[2:3], model(idx[2:3]), rtol=0, atol=1e-5)


def test_shorter_input_gives_the_first_logits_of_the_longer():
    model, idx = busy_model(), tokens()
    for length in (1, 5, 8, 13):
        torch.testing.assert_close(model(idx[:, :length]), model(idx)[:, :length], rtol=0, atol=1e-5)


def test_logits_are_capped_fp32():
    logits = busy_model()(tokens())
    assert logits.dtype == torch.float32 and logits.abs().max() <= train.SOFTCAP


def test_short_windows_hide_what_is_far():
    model, idx = busy_model(DEPTH=2), tokens()
    model.blocks[1].attention.window = 8  # normally the last block sees all
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    difference = (model(idx) - model(changed)).abs().amax(dim=(0, 2))
    reach = 2 * (8 - 1 + train.CONV_TAPS) + 1  # of two blocks, and a pair at the end
    assert difference[reach] > 1e-4 and difference[reach + 1 :].max() < 1e-5


def test_the_short_convolution_is_torchs_own_forward_and_backward():
    x, taps = torch.randn(2, 9, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    present_last = torch.cat([taps.flip(0), torch.ones(1, 5)]).mT[:, None]  # conv1d's order: the oldest token first
    padded = torch.nn.functional.pad(x.mT, (3, 0))
    reference = torch.nn.functional.conv1d(padded, present_last, groups=5).mT
    torch.testing.assert_close(train.blend(x, taps), reference)
    weights = torch.randn(2, 9, 5)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), (x, taps)) for y in (train.blend(x, taps), reference))
    torch.testing.assert_close(ours, theirs)


def test_pairs_depend_on_a_token_and_the_one_before_and_share_rows_as_rarely_as_random_ones():
    idx = torch.tensor([[5, 7, 5, 7, 9, 7]])
    a, b, c, d, e, f = train.pair_rows(idx, 1024)[0].tolist()
    assert b == d and len({a, b, c, e, f}) == 5  # (5, 7) twice; (9, 7) is another pair
    first, second = torch.meshgrid(torch.arange(181), torch.arange(181), indexing="ij")
    rows = train.pair_rows(torch.stack([first, second], -1).view(-1, 2), 32768)[:, 1]
    assert 0 <= rows.min() and rows.max() < 32768
    assert len(rows.unique()) > 0.6 * len(rows)  # as random ones: 1 - 1 / e


def test_rotary_attention_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16)
    rotary = train.rotary_table(100, 16)

    def score(query_at, key_at):
        return (train.rotate(q, rotary[:, query_at:][:, :1]) * train.rotate(k, rotary[:, key_at:][:, :1])).sum()

    torch.testing.assert_close(score(7, 3), score(90, 86), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 5)) > 1e-3


def dense_attention(q, k, v, window):
    position = torch.arange(q.shape[2])
    distance = position[:, None] - position
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill((distance < 0) | (distance >= window), -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("length, window", [(32, 8), (37, 8), (5, 3), (40, 39), (33, 1), (16, 16), (9, 100)])
def test_windowed_attention_is_the_dense_one_forward_and_backward(length, window):
    inputs = [torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    output, reference = train.attend(*inputs, window, None), dense_attention(*inputs, window)
    torch.testing.assert_close(output, reference)
    direction = torch.randn_like(output)
    torch.testing.assert_close(
        torch.autograd.grad(output, inputs, direction), torch.autograd.grad(reference, inputs, direction)
    )


def test_windows_follow_the_pattern_and_the_last_is_full(monkeypatch):
    monkeypatch.setattr(train, "WINDOW_PATTERN", "SSSL")
    assert train.block_windows(6, 8, 32) == [8, 8, 8, 32, 8, 32]


@pytest.mark.parametrize("preset, vocab, seq_len, millions", [
    ("datacenter", 8192, 2048, (60, 180)), ("consumer", 8192, 1024, (20, 80)),
    ("mac", 4096, 512, (10, 25)), ("cpu", 2048, 256, (4, 10)),
])
def test_every_preset_builds_at_its_size(preset, vocab, seq_len, millions):
    size = SimpleNamespace(**train.SIZES[preset])
    with torch.device("meta"):
        model = train.GPT(vocab, seq_len, size)
    assert model(torch.zeros(2, seq_len, dtype=torch.int64, device="meta")).shape == (2, seq_len, vocab)
    assert millions[0] < sum(p.numel() for p in model.parameters()) / 1e6 < millions[1]


def test_attention_flops_count_the_keys_that_are_seen():
    model = tiny_model(DEPTH=2, WINDOW=8)  # windows 8 and 32 of a row of 32
    keys = sum(min(t + 1, 8) + t + 1 for t in range(SEQ_LEN)) / SEQ_LEN
    weights = sum(p.numel() for p in train.matrix_parameters(model)) + model.head.weight.numel()
    assert train.flops_per_token(model, SEQ_LEN) == pytest.approx(6 * weights + 12 * 32 * keys)


# ---------------------------------------------------------------------------
# Optimizers and schedule
# ---------------------------------------------------------------------------


def slow_muon(weight, gradients, lr, momentum, decay, steps):
    """Muon for one matrix in float64, as the papers write it; the orthogonalisation follows the same polynomials."""
    rows, columns = weight.shape
    axis = 1 if rows >= columns else 0
    velocity, power = torch.zeros_like(weight), torch.zeros_like(weight.mean(axis, keepdim=True))
    for gradient in gradients:
        velocity = momentum * velocity + (1 - momentum) * gradient
        u, s, vh = torch.linalg.svd((1 - momentum) * gradient + momentum * velocity, full_matrices=False)
        s = s / (1.02 * s.norm() + 1e-6)
        for a, b, c in train.POLAR_EXPRESS[:steps]:
            s = a * s + b * s**3 + c * s**5
        update = u @ s.diag() @ vh
        power = train.NEURON_BETA * power + (1 - train.NEURON_BETA) * (update**2).mean(axis, keepdim=True)
        scaled = update / power.sqrt()
        update = scaled * update.norm() / scaled.norm() * max(1, rows / columns) ** 0.5
        weight = weight - lr * update - lr * decay * torch.where(update * weight >= 0, weight, 0)
    return weight


@pytest.mark.parametrize("steps", sorted({size["MUON_STEPS"] for size in train.SIZES.values()}))
def test_muon_agrees_with_a_slow_float64_reference(steps):
    weights = [torch.randn(shape) for shape in [(16, 16), (16, 16), (32, 16), (16, 32), (16, 16)]]
    gradients = [[torch.randn_like(w) for _ in range(3)] for w in weights]
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    muon = train.Muon(params, lr=0.05, steps=steps)
    for i in range(3):
        for param, seen in zip(params, gradients):
            param.grad = seen[i]
        muon.step()
    for param, weight, seen in zip(params, weights, gradients):
        seen = [gradient.double() for gradient in seen]
        reference = slow_muon(weight.double(), seen, 0.05, train.MOMENTUM_START, train.MATRIX_DECAY, steps)
        torch.testing.assert_close(param.double(), reference, rtol=1e-3, atol=1e-4)


def test_orthogonalised_matrices_have_singular_values_near_one():
    for shape in [(4, 32, 32), (4, 64, 32), (4, 32, 64)]:
        values = torch.linalg.svdvals(train.orthogonalise(torch.randn(shape), 5))
        assert 0.6 < values.median() < 1.2 and values.max() < 1.3


def test_every_parameter_has_one_optimizer():
    trainer = tiny_trainer()
    optimized = [p for group in trainer.param_groups() for p in group["params"]]
    assert len(optimized) == len(set(optimized)) and set(optimized) == set(trainer.model.parameters())


def test_schedule_endpoints():
    assert train.lr_factor(0) == train.lr_factor(1 - train.WARMDOWN) == 1
    assert train.lr_factor(1 - train.WARMDOWN / 2) == pytest.approx((1 + train.LR_FLOOR) / 2)
    assert train.lr_factor(1) == train.lr_factor(1.1) == pytest.approx(train.LR_FLOOR)
    assert train.momentum_at(0) == train.MOMENTUM_START
    assert train.momentum_at(1 - train.WARMDOWN) == pytest.approx(train.MOMENTUM_PEAK)
    assert train.momentum_at(1) == pytest.approx(train.MOMENTUM_END)


def test_schedule_reaches_the_optimizers():
    trainer = tiny_trainer()
    assert trainer.schedule(1.0) == pytest.approx(train.LR_FLOOR)
    assert trainer.muon.param_groups[0]["decay"] == 0
    for group in trainer.param_groups():
        assert group["lr"] == pytest.approx(train.LR_FLOOR * group["peak_lr"])


# ---------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------


def test_overfits_one_batch():
    trainer, idx = tiny_trainer(), tokens(length=SEQ_LEN + 1)
    losses = [trainer.step([(idx[:, :-1], idx[:, 1:])]).item() for _ in range(60)]
    assert losses[-1] < 0.1 < losses[0]


def test_micro_batches_add_up_to_the_batch():
    idx = tokens(rows=6, length=SEQ_LEN + 1)
    x, y = idx[:, :-1], idx[:, 1:]
    whole, parts = tiny_trainer(BATCH_ROWS=6, MICRO_ROWS=6), tiny_trainer(BATCH_ROWS=6, MICRO_ROWS=4)
    parts.model.load_state_dict(whole.model.state_dict())
    assert (parts.rows, parts.micro_batches) == (3, 2)
    assert whole.step([(x, y)]).item() == pytest.approx(parts.step([(x[:3], y[:3]), (x[3:], y[3:])]).item(), abs=1e-5)
    torch.testing.assert_close(whole.model.head.weight, parts.model.head.weight, rtol=1e-2, atol=1e-4)


def first_losses(stream, seed: int) -> list[float]:
    torch.manual_seed(seed)
    trainer, starts = tiny_trainer(), train.shuffled_starts(len(stream), SEQ_LEN, TINY["BATCH_ROWS"], "cpu")
    rows = (stream[next(starts)[:, None] + torch.arange(SEQ_LEN + 1)] for _ in range(10))
    return [trainer.step([(row[:, :-1], row[:, 1:])]).item() for row in rows]


def test_the_same_seed_gives_the_same_first_ten_losses():
    stream = torch.randint(VOCAB, (2000,))
    assert first_losses(stream, 1) == first_losses(stream, 1) != first_losses(stream, 2)


def everything(trainer):
    """All that training carries from step to step: tensors, optimizer state, gradients, random stream."""
    model = trainer.model
    return ([t.detach().clone() for t in (*model.parameters(), *model.buffers())], trainer.muon.state_dict(),
            trainer.adamw.state_dict(), [p.grad for p in model.parameters()], torch.get_rng_state())


def test_warm_up_leaves_no_trace():
    idx = tokens(length=SEQ_LEN + 1)
    warm, cold = tiny_trainer(), tiny_trainer()
    cold.model.load_state_dict(warm.model.state_dict())
    warm.model.register_forward_hook(lambda *_: torch.rand(1) and None)  # as dropout would, draws from the stream
    before = everything(warm)
    warm.warm_up((idx[:, :-1], idx[:, 1:]))
    torch.testing.assert_close(everything(warm), before, rtol=0, atol=0)
    for _ in range(3):
        losses = [trainer.step([(idx[:, :-1], idx[:, 1:])]) for trainer in (warm, cold)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_a_failing_warm_up_leaves_no_trace(monkeypatch):
    trainer, idx = tiny_trainer(), tokens(length=SEQ_LEN + 1)
    before, calls = everything(trainer), []

    def fail_at_last(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a kernel failed")
        return torch.optim.AdamW.step(trainer.adamw)

    monkeypatch.setattr(trainer.adamw, "step", fail_at_last)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        trainer.warm_up((idx[:, :-1], idx[:, 1:]))
    torch.testing.assert_close(everything(trainer), before, rtol=0, atol=0)


def test_where_flex_attention_fails_the_windows_are_computed_in_blocks(capsys):
    trainer, plain, idx = tiny_trainer(), tiny_trainer(), tokens(length=SEQ_LEN + 1)
    plain.model.load_state_dict(trainer.model.state_dict())
    trainer.has_flex = True  # on a CPU it has no backward
    trainer.warm_up((idx[:, :-1], idx[:, 1:]))
    assert not trainer.has_flex and "as flex attention fails: " in capsys.readouterr().out
    losses = [t.step([(idx[:, :-1], idx[:, 1:])]).item() for t in (trainer, plain) for _ in range(3)]
    assert losses[:3] == losses[3:]


@pytest.mark.parametrize("num_tokens, length, rows", [(1000, 10, 7), (33, 32, 4), (100, 32, 3)])
def test_an_epoch_reads_every_token_once(num_tokens, length, rows):
    starts = train.shuffled_starts(num_tokens, length, rows, "cpu")
    drawn = torch.cat([next(starts) for _ in range(300)])
    assert drawn.min() >= 0 and drawn.max() + length < num_tokens
    windows = torch.unique(drawn[: (num_tokens - 1) // length - 1])  # no epoch is shorter
    assert len(windows) == (num_tokens - 1) // length - 1
    assert (windows.diff() % length == 0).all()


# ---------------------------------------------------------------------------
# Hyperparameters
# ---------------------------------------------------------------------------

BOUNDED = re.compile(r"^(?:    # )?([A-Z][A-Z0-9_]*)(?: = (\S+)  # |: ).*\[([\d.]+), ([\d.]+)\]$", re.M)
BOUNDS = {name: (float(low), float(high)) for name, _, low, high in BOUNDED.findall(SOURCE)}
BLOCK = SOURCE[SOURCE.index("# Hyperparameters") : SOURCE.index("# Attention kernels")]


def like(value, bound: float):
    return type(value)(bound)


def test_hyperparameters_are_literals_within_their_bounds():
    names = [ast.unparse(node.targets[0]) for node in ast.parse(BLOCK).body]
    assert names[0] == "SIZES" and len(names) > 20
    for node in ast.parse(BLOCK).body[1:]:
        name, value = ast.unparse(node.targets[0]), ast.literal_eval(node.value)
        assert re.search(rf"^{name} = \S+  # \w", BLOCK, re.M), name
        assert name not in BOUNDS or BOUNDS[name][0] <= value <= BOUNDS[name][1], name


def test_sizes_are_literals_within_their_bounds():
    table = ast.parse(BLOCK).body[0].value
    assert [ast.literal_eval(key) for key in table.keys] == ["datacenter", "consumer", "mac", "cpu"]
    for row in table.values:
        sizes = {entry.arg: ast.literal_eval(entry.value) for entry in row.keywords}
        assert list(sizes) == list(TINY)
        bounded = {name: value for name, value in sizes.items() if name != "MICRO_ROWS"}  # no result depends on it
        assert all(BOUNDS[name][0] <= value <= BOUNDS[name][1] for name, value in bounded.items())


LONG = ("BATCH_ROWS", 1), ("HEAD_DIM", 1)   # seconds each


@pytest.mark.parametrize("name, end", [
    pytest.param(name, end, marks=[pytest.mark.slow] * ((name, end) in LONG)) for end in (0, 1) for name in BOUNDS
])
def test_a_step_runs_at_the_ends_of_the_bounds(name, end, monkeypatch):
    if name in TINY:
        changes = {name: like(TINY[name], BOUNDS[name][end])}
    else:
        changes = {}
        monkeypatch.setattr(train, name, like(getattr(train, name), BOUNDS[name][end]))
    trainer = tiny_trainer(**changes)
    for progress in (0.0, 1.0):
        trainer.schedule(progress)
        x = tokens(trainer.rows)
        assert math.isfinite(trainer.step([(x, x)] * trainer.micro_batches))


def test_odd_values_within_the_bounds_run():
    trainer = tiny_trainer(DEPTH=5, HEADS=3, HEAD_DIM=21, WINDOW=17, VALUE_EVERY=3, BATCH_ROWS=7, MICRO_ROWS=3)
    x = tokens(trainer.rows)
    assert math.isfinite(trainer.step([(x, x)] * trainer.micro_batches))


# ---------------------------------------------------------------------------
# Real runs: python train.py on a small data set
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_cache(tmp_path_factory):
    """A cache with a small data set prepared for the cpu preset."""
    folder = tmp_path_factory.mktemp("data")
    for i, source in enumerate(sorted(Path(ast.__file__).parent.glob("[a-h]*.py"))):
        (folder / f"{i}.txt").write_text(source.read_text(errors="replace"))
    cache = tmp_path_factory.mktemp("cache")
    arguments = ["--dataset", str(folder), "--preset", "cpu"]
    run("prepare.py", cache, tmp_path_factory.mktemp("run"), *arguments).check_returncode()
    return cache


def run(script, cache: Path, folder: Path, *arguments, budget_s=3, path=None, **edits):
    """Runs a script of the project in `folder`, after edits NAME=value to train.py, with the compilers of `path`."""
    source = SOURCE
    for name, value in edits.items():
        source = re.sub(rf"\b{name}=[\d.]+", f"{name}={value}", source)
    (folder / "train.py").write_text(source)
    shutil.copy(ROOT / "prepare.py", folder)
    environment = os.environ | dict(AUTORESEARCH_CACHE=str(cache), AUTORESEARCH_TIME_BUDGET=str(budget_s))
    environment |= {} if path is None else dict(PATH=path, CXX="")
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)


@pytest.mark.slow
def test_without_a_compiler_it_runs_uncompiled_to_the_summary(data_cache, tmp_path):
    done = run("train.py", data_cache, tmp_path, path="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("running uncompiled") == 1
    steps = [[float(field.replace(",", "")) for field in line] for line in STEP_LINE.findall(done.stdout)]
    assert len(steps) >= 2 and steps[0][0] == 1 and steps[-1][1] == pytest.approx(100, abs=20)
    assert steps[0][2] == pytest.approx(math.log(2048), abs=0.1) and steps[-1][2] < steps[0][2]
    summary = dict(line.split(":") for line in done.stdout.split("---\n")[1].splitlines())
    assert 0 < float(summary["val_bpb"]) < 8
    assert int(summary["num_steps"]) == steps[-1][0] and int(summary["depth"]) == train.SIZES["cpu"]["DEPTH"]


def test_no_memory_is_answered_with_the_line_to_change():
    with pytest.raises(RuntimeError) as ours:
        torch.empty(2**60)
    assert train.is_out_of_memory(ours.value)
    assert 'in the line of "consumer" of SIZES in train.py, lower MICRO_ROWS (now 16)' in train.memory_hint("consumer")
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not train.is_out_of_memory(other.value)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(data_cache, tmp_path):
    done = run("train.py", data_cache, tmp_path, path="", budget_s=30, MATRIX_LR="1e9")
    assert done.returncode == 1
    assert re.fullmatch(r"NaN loss at step \d+", done.stderr.splitlines()[-1])


def test_importing_it_loads_no_compiler():
    code = "import sys, train; print({'torch._dynamo', 'torch._inductor'} & {*sys.modules})"  # seconds of every scoring
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.slow
def test_flex_attention_is_the_windowed_one_inside_a_compiled_function_and_alone():
    if not train.can_compile("cpu"):
        pytest.skip("no C++ compiler")
    q, k, v = torch.randn(3, 2, 2, 256, 32)
    mask = train.sparse_mask(64, 256, torch.device("cpu"))
    expected = train.attend(q, k, v, 64, None)
    for attend in (train.attend, torch.compile(train.attend, dynamic=False, fullgraph=True)):
        torch.testing.assert_close(attend(q, k, v, 64, mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_blocks_of_a_kind_share_what_is_compiled_and_the_cache_holds_all_of_it():
    if not train.can_compile("cpu"):
        pytest.skip("no C++ compiler")
    from torch._dynamo.utils import counters

    size = tiny_size(DEPTH=6, VALUE_EVERY=2)  # windows 8 8 8 32 8 32, a value embedding on the 2nd, 4th and 6th
    trainer = train.Trainer(train.GPT(VOCAB, SEQ_LEN, size), size, compiled=True)
    torch._dynamo.reset()
    counters.clear()
    trainer.loss(tokens(), tokens()).backward()
    trainer.loss(tokens(), tokens()).backward()
    assert counters["stats"]["unique_graphs"] == 3 + 1  # short, short with value, full with value; the head
    assert counters["aot_autograd"]["total"] == 4 and not counters["aot_autograd"]["autograd_cache_bypass"]


@pytest.mark.slow
def test_compiled_functions_compute_what_they_say():
    if not train.can_compile("cpu"):
        pytest.skip("no C++ compiler")
    model, x, y = busy_model(), tokens(), tokens()
    trainers = [train.Trainer(model, tiny_size(), compiled) for compiled in (False, True)]
    gradients = [torch.autograd.grad(trainer.loss(x, y), list(model.parameters())) for trainer in trainers]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    batch = torch.randn(3, 4, 32, 16)  # weights, gradients, velocity and what the mean square is taken from
    rates = torch.tensor([0.02, 0.9, 0.2, 0.95])
    updated = [
        update(*batch[:2], *batch[2:3].clone(), train.neuron_power(batch[0]), *rates, steps=5)
        for update in (train.muon_update, torch.compile(train.muon_update, dynamic=False))
    ]
    torch.testing.assert_close(*updated, rtol=1e-3, atol=1e-4)
