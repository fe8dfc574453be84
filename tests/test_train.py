"""train.py, in units and in real runs: pytest tests/test_train.py [-m "slow or not slow"]"""

import ast
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import prepare
import train

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "train.py").read_text()
VOCAB, SEQ_LEN = 64, 32
POSITION = torch.arange(SEQ_LEN)
TINY = dict(DEPTH=3, HEADS=2, HEAD_DIM=16, WINDOW=8, VALUE_EVERY=2, RECALL_PAIRS=9999, BATCH_ROWS=4, MICRO_ROWS=4)
TINY |= dict(MATRIX_LR=0.02, MUON_STEPS=5, MLP_RATIO=4.0, CONV_TAPS=2, ADAM_BETA1=0.8)


@pytest.fixture(autouse=True)
def fixed_seed_and_precision(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    torch.manual_seed(0)


def tiny_trainer(compiled=False, seed=0, **changes):
    """A trainer whose weights follow from the seed, and what is drawn after it too."""
    torch.manual_seed(seed)
    return train.Trainer(train.GPT(VOCAB, SEQ_LEN, SimpleNamespace(**TINY | changes)), compiled, has_flex=False)


def remember(recall, text):
    if recall.orders:
        recall.context, recall.token, recall.kind = recall.counted(text)


def busy_model(**changes):
    """A model whose every weight matters: the output projections and gates start at zero, which would hide mistakes."""
    model = tiny_trainer(**changes).model
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.recall.gate.weight, std=0.1)  # as what comes out is rounded
    remember(model.recall, torch.randint(VOCAB, (2, 2000)))
    return model


def batch(rows=4):
    """Random x, y: (rows, SEQ_LEN)."""
    idx = torch.randint(VOCAB, (rows, SEQ_LEN + 1))
    return idx[:, :-1], idx[:, 1:]


# ---- Model -----------------------------------------------------------------------------------------------------------


def test_loss_at_start_is_that_of_guessing_and_logits_are_capped(monkeypatch):
    assert tiny_trainer().loss(*batch()).item() == pytest.approx(math.log(VOCAB), abs=0.05)
    monkeypatch.setattr(train, "SOFTCAP", 0.5)
    model = busy_model()
    torch.nn.init.zeros_(model.recall.worth.weight)  # what is guessed comes on top
    assert 0.4 < model(batch()[0]).abs().max() < 0.5


@pytest.mark.parametrize("cut", [1, 7, 8, 20, 31])
def test_later_tokens_change_no_earlier_logits(cut):
    model, (idx, _) = busy_model(), batch()
    remember(model.recall, idx)
    before, after = model(idx), model(idx.where(POSITION < cut, (idx + 1) % VOCAB))
    torch.testing.assert_close(before[:, :cut], after[:, :cut], rtol=0, atol=1e-5)
    assert (before[:, cut] - after[:, cut]).abs().max() > 1e-3


def test_logits_depend_on_no_other_row_and_not_on_the_length():
    model, (idx, _) = busy_model(), batch()
    remember(model.recall, idx)
    for length in (1, 5, 8, 13, SEQ_LEN):
        torch.testing.assert_close(model(idx[2:3, :length]), model(idx)[2:3, :length], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_logit_of_a_guess_is_gated_by_the_context_for_each_source_apart():
    model, idx = busy_model(), torch.randint(3, (4, SEQ_LEN))  # so few that every source has guesses
    remember(model.recall, idx)
    gates = model.recall.gate.weight
    sources = [[source] for source in range(len(gates))]
    kind, found = model.recall(idx)[1], model.hidden(idx)[2]
    trust = model.recall.worth(kind)[..., 1]
    for wanted in [[], *sources]:
        kept = gates.clone()
        gates[:] = 0
        gates[wanted] = kept[wanted]
        gated = model.hidden(idx)[2]
        known, own = trust != 0, torch.isin(kind // train.KINDS, torch.tensor(wanted))
        assert torch.equal(gated[known & ~own], trust[known & ~own])  # without weights a gate is 1
        assert torch.equal(gated[own], found[own]) and (not wanted or not torch.equal(gated[own], trust[own]))
        gates[:] = kept


def test_a_cpu_that_multiplies_bf16_trains_with_it_and_scores_in_fp32(monkeypatch):
    model, (idx, y) = busy_model(), batch()
    plain, loss = model(idx), tiny_trainer().loss(idx, y).item()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert 1e-4 < (model(idx) - plain).abs().max() < 0.3 and model(idx).dtype == torch.float32
    assert torch.equal(model.eval()(idx), plain)
    trainer = tiny_trainer()
    losses = [trainer.step([(idx, y)]).item() for _ in range(60)]
    assert losses[0] == pytest.approx(loss, rel=1e-3) and losses[-1] < 0.1


def test_windows_follow_the_pattern_and_the_last_is_full(monkeypatch):
    monkeypatch.setattr(train, "WINDOW_PATTERN", "SSSL")
    blocks = tiny_trainer(DEPTH=6).model.blocks
    assert [block.attention.window for block in blocks] == [8, 8, 8, 32, 8, 32]


def assert_same_with_gradients(ours, theirs, inputs):
    """Two results that are equal, and so are their gradients with regard to the inputs."""
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    gradients = [torch.autograd.grad(result, inputs, direction) for result in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("length, window", [(32, 8), (37, 8), (5, 3), (40, 39), (33, 1), (16, 16), (9, 100)])
def test_windowed_attention_is_the_dense_one_forward_and_backward(length, window):
    q, k, v = inputs = [torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    scores = (q @ k.mT / 8**0.5).masked_fill((distance < 0) | (distance >= window), -math.inf)
    assert_same_with_gradients(train.attend(q, k, v, window, None), scores.softmax(-1) @ v, inputs)


def test_the_short_convolution_is_torchs_own_forward_and_backward():
    x, taps = torch.randn(2, 9, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    present_last = torch.cat([taps.flip(0), torch.ones(1, 5)]).mT[:, None]  # conv1d's order: the oldest token first
    reference = torch.nn.functional.conv1d(torch.nn.functional.pad(x.mT, (3, 0)), present_last, groups=5).mT
    assert_same_with_gradients(train.blend(x, taps), reference, (x, taps))


def test_a_context_is_a_number_of_its_own_for_the_last_tokens():
    recall = train.Recall(100, VOCAB, 8)
    a, b, c, d, e, f = recall.context_of(torch.tensor([[5, 7, 5, 7, 9, 7]]), 2)[0].tolist()
    assert b == d and len({a, b, c, e, f}) == 5  # (5, 7) twice; (9, 7) is another pair
    found = [recall.context_of(torch.randint(2048, (20_000, n)), n)[:, -1] for n in recall.orders]
    assert all(len(one.unique()) > 0.99 * len(one) for one in found)
    assert all(one.max() < other.min() for one, other in zip(found, found[1:]))


def guessed(recall, idx, source):
    """Tokens and kinds that a source, counted from 0, guesses at every position of idx (1, T)."""
    sizes = [1] * train.ROW_GRAMS + [train.SLOTS] * len(recall.orders)
    return [part.split(sizes, 2)[source][0].tolist() for part in recall(idx)]


@pytest.mark.parametrize("n", range(1, train.ROW_GRAMS + 1))
def test_a_guess_from_the_row_is_what_followed_the_same_tokens_last(n):
    idx, recall = torch.randint(3, (1, 60)), train.Recall(0, VOCAB, 8)
    row, (tokens, kinds), orders = idx[0].tolist(), guessed(recall, idx, n - 1), range(1, train.ROW_GRAMS + 1)
    for i, ((token,), (kind,)) in enumerate(zip(tokens, kinds)):
        earlier = [j for j in range(n - 1, i) if row[j - n + 1 : j + 1] == row[i - n + 1 : i + 1]]
        assert (kind > 0) == bool(earlier)
        if earlier:
            assert token == row[earlier[-1] + 1]
            stood = sum(row[i - m + 1 : i + 1] in (row[j - m + 1 : j + 1] for j in range(m - 1, i)) for m in orders)
            assert kind == train.KINDS * (n - 1) + 16 * stood + int(train.level(torch.tensor(i - earlier[-1])))


@pytest.mark.parametrize("n", range(2, train.TEXT_GRAMS + 2))
def test_guesses_from_the_text_are_what_followed_the_same_tokens_most_often(n, monkeypatch):
    monkeypatch.setattr(train, "SLOTS", 2)
    text, recall = torch.randint(4, (3, 500)), train.Recall(10_000, VOCAB, 8)
    remember(recall, torch.randint(VOCAB, (2, 50)))  # nothing of this is left
    remember(recall, text)
    counts = defaultdict(Counter)
    for piece in text.tolist():
        for i in range(n, len(piece)):
            counts[tuple(piece[i - n : i])][piece[i]] += 1
    idx = torch.cat([text[:1, 100:140], torch.full((1, n), 60)], 1)
    for i, (tokens, kinds) in enumerate(zip(*guessed(recall, idx, train.ROW_GRAMS + n - 2))):
        seen = counts[tuple(idx[0, i - n + 1 : i + 1].tolist())] if i >= n - 1 else {}
        told = {token: kind for token, kind in zip(tokens, kinds) if kind}
        assert i < n - 1 or [seen[token] for token in told] == sorted(seen.values())[::-1][:2]
        for token, kind in told.items() if i >= n - 1 else ():
            own, rest = (int(train.level(torch.tensor(c))) for c in (seen[token], sum(seen.values()) - seen[token]))
            assert kind == train.KINDS * (train.ROW_GRAMS + n - 2) + 16 * own + rest


def test_where_room_is_short_the_longest_contexts_go(monkeypatch):
    monkeypatch.setattr(train, "TEXT_GRAMS", 2)
    recall = train.Recall(50, VOCAB, 8)
    remember(recall, torch.arange(45)[None])  # 43 of two tokens, 42 of three
    two, three = (guessed(recall, torch.arange(45)[None], train.ROW_GRAMS + i)[1] for i in range(2))
    assert (sum(map(any, two)), sum(map(any, three))) == (43, 7)


def test_what_no_guess_is_worth_stays_nothing():
    trainer = tiny_trainer()
    for _ in range(3):
        trainer.step([batch()])
    worth = trainer.model.recall.worth.weight
    assert not worth[0].any() and worth[:, 1].any()


def test_rotary_attention_depends_on_distance_only():
    q, k = (train.rotate(t, train.rotary_table(100, 16)) for t in torch.randn(2, 1, 1, 1, 16))  # at every position
    scores = q[0, :, 0] @ k[0, :, 0].mT
    torch.testing.assert_close(scores[7, 3], scores[90, 86], rtol=1e-4, atol=1e-4)
    assert abs(scores[7, 3] - scores[7, 5]) > 1e-3


@pytest.mark.parametrize("preset", prepare.PRESETS)
def test_every_preset_builds_at_its_size(preset):
    least, most = {"datacenter": (60, 180), "consumer": (20, 80), "mac": (10, 25), "cpu": (1.5, 3)}[preset]  # millions
    vocab, seq_len = prepare.PRESETS[preset].vocab_size, prepare.PRESETS[preset].seq_len
    with torch.device("meta"):
        model = train.GPT(vocab, seq_len, SimpleNamespace(**train.SIZES[preset]))
        assert model(torch.zeros(2, seq_len, dtype=torch.int64)).shape == (2, seq_len, vocab)
    assert least < sum(p.numel() for p in model.parameters()) / 1e6 < most


# ---- Optimizers and schedule -----------------------------------------------------------------------------------------


def slow_muon(weight, gradients, lr, momentum, decay, steps):
    """Muon for one matrix in float64, as the papers write it; the orthogonalisation follows the same polynomials."""
    rows, columns = weight.shape
    axis, velocity, power = 1 if rows >= columns else 0, 0.0, 0.0
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


@pytest.mark.parametrize("steps", sorted({3, *(size["MUON_STEPS"] for size in train.SIZES.values())}))
def test_muon_agrees_with_a_slow_float64_reference(steps):
    weights = [torch.randn(shape) for shape in [(16, 16), (16, 16), (32, 16), (16, 32), (16, 16)]]
    gradients = [torch.randn(3, *weight.shape) for weight in weights]
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    muon = train.Muon(params, lr=0.05, steps=steps)
    for i in range(3):
        for param, seen in zip(params, gradients):
            param.grad = seen[i]
        muon.step()
    for param, weight, seen in zip(params, weights, gradients):
        reference = slow_muon(weight.double(), seen.double(), 0.05, train.MOMENTUM_START, train.MATRIX_DECAY, steps)
        torch.testing.assert_close(param.double(), reference, rtol=1e-3, atol=1e-4)


def test_every_parameter_has_one_optimizer():
    trainer = tiny_trainer()
    optimized = [p for group in trainer.param_groups for p in group["params"]]
    assert len(optimized) == len(set(optimized)) and set(optimized) == set(trainer.model.parameters())


def test_the_schedule_reaches_the_optimizers():
    trainer, cooling, peak, end = tiny_trainer(), 1 - train.WARMDOWN, train.MOMENTUM_PEAK, train.MOMENTUM_END
    points = [(0.0, 1, train.MOMENTUM_START), (cooling, 1, peak)]
    points += [((cooling + 1) / 2, (1 + train.LR_FLOOR) / 2, (peak + end) / 2), (1.0, train.LR_FLOOR, end)]
    for progress, factor, momentum in points:
        assert trainer.schedule(progress) == pytest.approx(factor)
        assert all(group["lr"] == pytest.approx(factor * group["peak_lr"]) for group in trainer.param_groups)
        for group in trainer.muon.param_groups:
            assert group["momentum"] == pytest.approx(momentum)
            assert group["decay"] == pytest.approx(train.MATRIX_DECAY * (1 - progress))
    assert trainer.schedule(1.1) == pytest.approx(train.LR_FLOOR)


# ---- Training --------------------------------------------------------------------------------------------------------


def test_overfits_one_batch():
    trainer, only = tiny_trainer(), batch()
    losses = [trainer.step([only]).item() for _ in range(60)]
    assert losses[-1] < 0.1 < losses[0]


def test_micro_batches_add_up_to_the_batch():
    x, y = batch(rows=6)
    whole, parts = (tiny_trainer(BATCH_ROWS=6, MICRO_ROWS=rows) for rows in (6, 4))
    assert (parts.rows, parts.micro_batches) == (3, 2)
    assert whole.step([(x, y)]).item() == pytest.approx(parts.step([(x[:3], y[:3]), (x[3:], y[3:])]).item(), abs=1e-5)
    torch.testing.assert_close(whole.model.head.weight, parts.model.head.weight, rtol=1e-2, atol=1e-4)


def three_losses(trainer, only):
    return [trainer.step([only]).item() for _ in range(3)]


def test_the_same_seed_gives_the_same_losses():
    first, again, other = (three_losses(tiny_trainer(seed=seed), batch()) for seed in (1, 1, 2))
    assert first == again != other


def everything(model):
    """All that training carries from step to step before the first: tensors, gradients, random stream."""
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    return tensors, [p.grad for p in model.parameters()], torch.get_rng_state()


@pytest.mark.parametrize("has_flex", [False, True])  # on a CPU it has no backward
def test_warm_up_leaves_no_trace_and_does_without_flex_attention_where_it_fails(has_flex, capsys):
    cold, model, only = tiny_trainer(), tiny_trainer().model, batch()
    hook = model.head.register_forward_hook(lambda *_: torch.rand(1) and None)  # draws, as dropout would
    before = everything(model)
    warm = train.warmed_up(model, lambda rows: only, [(False, has_flex), (False, False)][not has_flex :])
    torch.testing.assert_close(everything(model), before, rtol=0, atol=0)
    hook.remove()
    assert three_losses(warm, only) == pytest.approx(three_losses(cold, only), rel=1e-5)
    assert not warm.has_flex and ("without flex attention: " in capsys.readouterr().out) == has_flex


LARGE, SMALL = [(1000, 10, 7), (20_000, 32, 3)], [(33, 32, 4), (100, 32, 3)]  # of both halves; too small for halves


@pytest.mark.parametrize("half, sizes", [*itertools.product((None, 0, 1), LARGE), *itertools.product((None,), SMALL)])
def test_an_epoch_reads_every_token_of_its_half_once(half, sizes):
    num_tokens, length, rows = sizes
    starts, piece = train.shuffled_starts(num_tokens, length, rows, "cpu", half), max(1, num_tokens // train.PIECES)
    drawn = torch.cat([next(starts) for _ in range(300)])
    assert drawn.min() >= 0 and drawn.max() + length < num_tokens
    if half is None:
        count = (num_tokens - 1) // length - 1  # no epoch is shorter
    else:
        tokens = torch.tensor([[start // piece, (start + length) // piece] for start in drawn.tolist()])
        assert (tokens % 2 == half).all()  # none of its tokens is in the other
        count = train.PIECES // 2 * (piece // length - 1)
    windows = torch.unique(drawn[:count])
    assert len(windows) == count and (windows.diff() % length == 0).all()


class Text:
    """Tokens as a run's data have them; each look at the clock is a hundredth of the budget."""

    def __init__(self, tokens):
        self.tokens, self.num_tokens, self.vocab_size, self.seq_len, self.looks = tokens, len(tokens), VOCAB, SEQ_LEN, 0
        self.device = tokens.device

    def progress(self):
        self.looks += 1
        return min(1.0, self.looks / 100)

    def elapsed(self):
        return self.looks / 100

    def gather(self, starts, length):
        windows = self.tokens[starts[:, None] + torch.arange(length + 1)]
        return windows[:, :-1], windows[:, 1:]


def test_it_recalls_the_half_of_the_text_that_it_does_not_learn_from_and_at_last_both(monkeypatch):
    """The pieces differ in their tokens, so what is learned from and what is recalled can be told apart."""
    monkeypatch.setattr(train, "PIECES", 4)
    trainer, learned, recalled = tiny_trainer(RECALL_PAIRS=99_999), [], []
    counted, step = trainer.model.recall.counted, trainer.step

    def noted(text):
        recalled.append({*(text[:, 5] // 16).tolist()})
        return counted(text)

    def learns(batches):
        batches = list(batches)
        x = torch.cat([x for x, _ in batches])
        known = trainer.model.recall(x)[1][:, 9:] >= train.KINDS * train.ROW_GRAMS
        assert known.float().mean() < 0.001, "it recalls what it learns from"
        learned.append({*(x[:, 0] // 16).tolist()})
        return step(batches)

    monkeypatch.setattr(trainer.model.recall, "counted", noted)
    monkeypatch.setattr(trainer, "step", learns)
    text = Text(torch.arange(4000) // 1000 * 16 + torch.randint(16, (4000,)))
    train.train(text, trainer, 1)
    assert recalled == [{1, 3}, {0, 2}, {0, 1, 2, 3}]
    assert set.union(*learned[::2]) == {0, 2} and set.union(*learned[1::2]) == {1, 3}
    kinds = trainer.model.recall(text.gather(torch.arange(500, 4000, 1000), SEQ_LEN)[0])[1]
    assert (kinds[:, 9:] >= train.KINDS * train.ROW_GRAMS).any(2).all(), "it does not recall both in the end"


def test_no_memory_is_answered_with_the_line_to_change(monkeypatch):
    monkeypatch.setattr(prepare, "active_preset", lambda: "consumer")
    with pytest.raises(RuntimeError) as ours:
        torch.empty(2**60)
    hint = train.out_of_memory(ours.value)
    assert 'in the line of "consumer" of SIZES in train.py, lower MICRO_ROWS (now 16)' in hint
    assert not train.out_of_memory(RuntimeError("inconsistent tensor size"))


# ---- Hyperparameters -------------------------------------------------------------------------------------------------

BOUNDED = re.compile(r"^(?:    # )?([A-Z][A-Z0-9_]*)(?: = \S+  # |: ).*\[([\d.]+), ([\d.]+)\]$", re.M)
BOUNDS = {name: (float(low), float(high)) for name, low, high in BOUNDED.findall(SOURCE)}
BLOCK = SOURCE[SOURCE.index("# ---- Hyperparameters") : SOURCE.index("# ---- Attention kernels")]
SLOW = {"BATCH_ROWS": 512, "HEAD_DIM": 256}  # seconds each
ENDS = [(name, end) for name, ends in BOUNDS.items() for end in ends]
ENDS = [pytest.param({n: end}, marks=[pytest.mark.slow] * (SLOW.get(n) == end)) for n, end in ENDS]
ODD = dict(DEPTH=5, HEADS=3, HEAD_DIM=21, WINDOW=17, VALUE_EVERY=3, BATCH_ROWS=7, MICRO_ROWS=3)


def test_hyperparameters_are_literals_within_their_bounds():
    nodes = {ast.unparse(node.targets[0]): node.value for node in ast.parse(BLOCK).body}
    table = nodes.pop("SIZES")
    assert len(nodes) > 20
    for name, node in nodes.items():
        value = ast.literal_eval(node)
        assert re.search(rf"^{name} = \S+  # \w", BLOCK, re.M), name
        assert name not in BOUNDS or BOUNDS[name][0] <= value <= BOUNDS[name][1], name
    assert [ast.literal_eval(key) for key in table.keys] == ["datacenter", "consumer", "mac", "cpu"]
    for row in table.values:
        sizes = {entry.arg: ast.literal_eval(entry.value) for entry in row.keywords}
        assert list(sizes) == list(TINY)
        del sizes["MICRO_ROWS"]  # no result depends on it: it has no bounds
        assert all(BOUNDS[name][0] <= value <= BOUNDS[name][1] for name, value in sizes.items())


@pytest.mark.parametrize("changes", [*ENDS, ODD], ids=lambda changes: " ".join(changes))
def test_a_step_runs_at_the_ends_of_the_bounds_and_at_odd_values(changes, monkeypatch):
    for name, value in changes.items():
        if name not in TINY:
            monkeypatch.setattr(train, name, type(getattr(train, name))(value))
    trainer = tiny_trainer(**{name: type(TINY[name])(value) for name, value in changes.items() if name in TINY})
    remember(trainer.model.recall, torch.randint(VOCAB, (2, 300)))
    for progress in (0.0, 1.0):
        trainer.schedule(progress)
        assert math.isfinite(trainer.step([batch(trainer.rows)] * trainer.micro_batches))


# ---- Real runs, and what is compiled ---------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run():
    log = train.Log(SimpleNamespace(elapsed=lambda: 1.0, progress=lambda: 0.1), 1)
    with pytest.raises(SystemExit, match="NaN loss at step 1"):
        log.add(torch.tensor(math.nan), 1.0)


@pytest.mark.slow
def test_without_a_compiler_it_runs_uncompiled_to_the_summary(tmp_path):
    env = os.environ | dict(AUTORESEARCH_CACHE=str(tmp_path), AUTORESEARCH_TIME_BUDGET="3", PATH="", CXX="")
    texts = str(Path(ast.__file__).parent / "asyncio")
    for name, *words in (["prepare.py", "--dataset", texts, "--preset", "cpu"], ["train.py"]):
        shutil.copy(ROOT / name, tmp_path)
        done = subprocess.run([sys.executable, name, *words], cwd=tmp_path, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("without a compiler: ") == 1
    line = r"step (\d+) \(([\d.]+)%\) \| loss (\S+) \| lr [\d.]+ \| tok/s \d+"
    steps = [[float(field) for field in fields] for fields in re.findall(line, done.stdout)]
    assert len(steps) >= 2 and steps[0][0] == 1 and steps[-1][1] == pytest.approx(100, abs=20)
    assert steps[0][2] == pytest.approx(math.log(2048), abs=0.1) and steps[-1][2] < steps[0][2]
    summary = dict(line.split(":") for line in done.stdout.split("---\n")[1].splitlines())
    assert 0 < float(summary["val_bpb"]) < 8
    assert int(summary["num_steps"]) == steps[-1][0] and int(summary["depth"]) == train.SIZES["cpu"]["DEPTH"]


def test_importing_it_loads_no_compiler():
    code = "import sys, train; print({'torch._dynamo', 'torch._inductor'} & {*sys.modules})"  # seconds of every scoring
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.fixture
def compiler():
    try:
        torch.compile(torch.square)(torch.ones(8))
    except RuntimeError:
        pytest.skip("no C++ compiler")


@pytest.mark.slow
def test_blocks_of_a_kind_share_what_is_compiled_and_the_cache_holds_all_of_it(compiler):
    from torch._dynamo.utils import counters

    trainer = tiny_trainer(True, DEPTH=6)  # windows 8 8 8 32 8 32, a value embedding on the 2nd, 4th and 6th
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        trainer.loss(*batch()).backward()
    assert counters["stats"]["unique_graphs"] == 3 + 1  # short, short with value, full with value; the head
    assert counters["aot_autograd"]["total"] == 4 and not counters["aot_autograd"]["autograd_cache_bypass"]
    warm = train.warmed_up(tiny_trainer(DEPTH=6).model, batch, [(True, False)])
    compiled = counters["stats"]["unique_graphs"]
    warm.step([batch()])
    assert counters["stats"]["unique_graphs"] == compiled  # what the copy compiled is used again


@pytest.mark.slow
def test_compiled_functions_compute_what_they_say(compiler):
    model, only = busy_model(), batch()
    trainers = [train.Trainer(model, compiled, has_flex=False) for compiled in (False, True)]
    gradients = [torch.autograd.grad(trainer.loss(*only), list(model.parameters())) for trainer in trainers]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    weights, gradient, velocity, other = torch.randn(4, 4, 32, 16)
    rates = torch.tensor([0.02, 0.9, 0.2])
    updates = [train.muon_update, torch.compile(train.muon_update, dynamic=False)]
    states = [(velocity.clone(), train.neuron_power(other)) for _ in updates]
    updated = [update(weights, gradient, *state, *rates, steps=5) for update, state in zip(updates, states)]
    torch.testing.assert_close([updated[0], *states[0]], [updated[1], *states[1]], rtol=1e-3, atol=1e-4)
    q, k, v = torch.randn(3, 2, 2, 256, 32)
    expected, mask = train.attend(q, k, v, 64, None), train.sparse_mask(64, 256, torch.device("cpu"))
    for attend in (train.attend, torch.compile(train.attend, dynamic=False, fullgraph=True)):
        torch.testing.assert_close(attend(q, k, v, 64, mask), expected, rtol=1e-4, atol=1e-5)
