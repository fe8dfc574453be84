"""Trains a small GPT for a fixed time budget: `python train.py`. prepare.py then scores it: val_bpb, lower is better.

This is the file that experiments change. The rest of the project relies on three things: build_model(vocab_size,
seq_len) returns a module that maps tokens (B, T) to logits (B, T, vocab), main() trains it, importing does nothing.
"""

import copy
import functools
import gc
import math
import re
import sys
from types import SimpleNamespace

import prepare  # before torch: its clock counts that import
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# ---- Hyperparameters: NAME = literal  # what, unit [low, high]. Every value within its bounds runs, memory permitting

# fmt: off
SIZES = {  # the row of the active preset is used
    # DEPTH: transformer blocks [1, 24]
    # HEADS: attention heads; the width of the model is HEADS * HEAD_DIM channels [2, 16]
    # HEAD_DIM: channels per head, rounded to a multiple of 8 [16, 256]
    # WINDOW: tokens that a short-window block sees, itself included; seq_len or more means all [16, 2048]
    # VALUE_EVERY: the last block and every n-th before it has a value embedding, blocks [1, 24]
    # RECALL_PAIRS: what followed in the text that is remembered, at most; 0: no guesses [0, 33554432]
    # BATCH_ROWS: rows of seq_len tokens per optimizer step [1, 512]
    # MICRO_ROWS: rows that are in memory at once, at most; no result depends on it, lower it when memory runs out
    # MATRIX_LR: Muon's rate for the matrices of the blocks [0.002, 0.2]
    # MUON_STEPS: Newton-Schulz steps that make an update orthogonal; 5 take an eighth of a step on a CPU [1, 5]
    # MLP_RATIO: hidden channels of the MLP per channel of the model [0.5, 8]
    # CONV_TAPS: tokens before the present one that the convolution in front of every attention blends in [1, 8]
    # ADAM_BETA1: AdamW's mean of the gradient: share kept per step [0.5, 0.95]
    "datacenter": dict(DEPTH=8, HEADS=6, HEAD_DIM=128, WINDOW=256, VALUE_EVERY=2, RECALL_PAIRS=0, BATCH_ROWS=64,
                       MICRO_ROWS=32, MATRIX_LR=0.04, MUON_STEPS=5, MLP_RATIO=4.0, CONV_TAPS=2, ADAM_BETA1=0.8),
    "consumer": dict(DEPTH=6, HEADS=4, HEAD_DIM=128, WINDOW=256, VALUE_EVERY=2, RECALL_PAIRS=0, BATCH_ROWS=32,
                     MICRO_ROWS=16, MATRIX_LR=0.04, MUON_STEPS=5, MLP_RATIO=4.0, CONV_TAPS=2, ADAM_BETA1=0.8),
    "mac": dict(DEPTH=4, HEADS=2, HEAD_DIM=128, WINDOW=128, VALUE_EVERY=1, RECALL_PAIRS=0, BATCH_ROWS=16,
                MICRO_ROWS=16, MATRIX_LR=0.03, MUON_STEPS=5, MLP_RATIO=4.0, CONV_TAPS=2, ADAM_BETA1=0.8),
    "cpu": dict(DEPTH=2, HEADS=2, HEAD_DIM=64, WINDOW=256, VALUE_EVERY=1, RECALL_PAIRS=16777216, BATCH_ROWS=8,
                MICRO_ROWS=8, MATRIX_LR=0.03, MUON_STEPS=5, MLP_RATIO=2.46, CONV_TAPS=1, ADAM_BETA1=0.867),
}
# fmt: on

# Architecture
WINDOW_PATTERN = "SSSL"  # S: short window, L: full; repeated over the blocks; the last block is always full
ROPE_BASE = 10000.0  # longest wavelength of the rotary embedding, about this many times 2 pi tokens [100, 1000000]
SOFTCAP = 30.0  # the head's logits stay within +-SOFTCAP: x / (1 + |x| / SOFTCAP), as a tanh costs 8 % [10, 100]
GATE_CHANNELS = 32  # channels of a block's input that drive the gates of its value embedding [1, 128]
EMBED_MIX_INIT = 0.1  # share of the token embedding mixed in before every block, at the start [0, 1]
ROW_GRAMS = 3  # guesses from the row go by its last 1 to so many tokens [1, 8]
TEXT_GRAMS = 5  # guesses from the training text go by the last 2, the last 3, ... tokens: so many sources [1, 8]
SLOTS = 13  # guesses from each of these: what followed most often [1, 16]

# AdamW: embeddings, head and scalars. The rates of the first three are for a width of 768 and grow as width ** -0.5
EMBED_LR = 0.8  # embeddings of tokens and of values [0.05, 5]
GUESS_LR = 0.487  # embedding of guesses [0.02, 2]
HEAD_LR = 0.01  # output head, gates of guesses [0.001, 0.1]
KIND_LR = 0.05  # embedding of the kinds of guesses, and what each is worth [0.005, 0.5]
CONV_LR = 0.1  # weights of the convolutions [0.01, 1]
RESIDUAL_LR = 0.015  # per-block scale of the residual stream [0.001, 0.1]
MIX_LR = 0.5  # per-block share of the token embedding [0.01, 2]
EMBED_DECAY = 0.002  # weight decay of the embeddings of tokens, guesses and values, times their rates [0, 0.05]
HEAD_DECAY = 0.005  # weight decay of head and gates, times their rate [0, 0.1]
ADAM_BETA2 = 0.95  # mean of the gradient's square: share kept per step [0.8, 0.999]
SCALAR_BETA1 = 0.96  # as ADAM_BETA1, for the per-block scalars [0.5, 0.99]

# Muon: the matrices of the blocks
MOMENTUM_START = 0.85  # momentum at the first step [0.5, 0.98]
MOMENTUM_PEAK = 0.95  # momentum between build-up and warm-down [0.5, 0.98]
MOMENTUM_END = 0.92  # momentum at the end [0.5, 0.98]
MOMENTUM_BUILDUP = 0.12  # share of the budget from MOMENTUM_START to MOMENTUM_PEAK [0, 0.5]
NEURON_BETA = 0.95  # mean square of a neuron's update: share kept per step [0.5, 0.99]
MATRIX_DECAY = 0.2  # cautious weight decay, times the rate; falls to 0 over the budget [0, 1]

# Schedule
WARMDOWN = 0.75  # last share of the budget, in which the rates fall linearly [0, 1]
LR_FLOOR = 0.03  # learning-rate factor at the end [0, 0.5]
LOG_EVERY_S = 2.0  # time between step lines, seconds

# ---- Attention kernels: q, k, v and the result are (B, H, T, D) ------------------------------------------------------

SDPA_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q, k, v, window: int, block_mask):
    """Every query sees itself and the window - 1 tokens before it. block_mask: flex attention's, None without it."""
    if window >= q.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if block_mask is not None:  # sparse only where it is compiled
        return flex_attention(q, k, v, block_mask=block_mask)
    return blockwise_attention(q, k, v, window)


@functools.cache
def sparse_mask(window: int, length: int, device):
    """Flex attention's mask of a short window; made once."""

    def in_window(batch, head, query, key):
        return (key <= query) & (query - key < window)

    return create_block_mask(in_window, None, None, length, length, device=device)


def blockwise_attention(q, k, v, window: int):
    """Windowed attention without a (T, T) mask: a block of `window` queries sees its own keys and the block before."""
    batch, heads, length, dim = q.shape
    padded = math.ceil(length / window) * window
    q, k, v = (F.pad(t, (0, 0, 0, padded - length)).reshape(batch * heads, -1, window, dim) for t in (q, k, v))
    k, v = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :-1], t], dim=2) for t in (k, v))  # before the first: zeros
    query = torch.arange(padded, device=q.device).view(-1, window, 1)
    key = query[:, :1] - window + torch.arange(2 * window, device=q.device)
    mask = (key >= 0) & (key <= query) & (query - key < window)  # (blocks, window, 2 * window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
    return out.reshape(batch, heads, padded, dim)[:, :, :length]


# ---- Model -----------------------------------------------------------------------------------------------------------


def multiple_of_8(channels: float) -> int:
    """The nearest positive multiple of 8, which attention kernels ask for."""
    return max(8, round(channels / 8) * 8)


def norm(x):
    """RMSNorm over the last dimension, without parameters."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class Linear(nn.Linear):
    """fp32 weights, multiplied in the input's precision."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotary_table(length: int, head_dim: int):
    """cos and sin of the angle of every position and channel pair: (2, length, 1, head_dim / 2), fp32."""
    wavelengths = ROPE_BASE ** (torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(length)[:, None, None] / wavelengths
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rotary):
    """Rotates channel pairs of x (B, T, H, D) by their position's angles (2, T, 1, D / 2)."""
    cos, sin = rotary.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def blend(x, taps):
    """Short causal convolution by channel: x (B, T, width) plus taps[i] times the token i + 1 places before."""
    return x + sum(tap.to(x.dtype) * F.pad(x, (0, 0, i, 0))[:, : x.shape[1]] for i, tap in enumerate(taps, 1))


# Of guesses from a source; of the text, by turns of its one half and the other; tokens of a piece that are remembered
KINDS, PIECES, PIECE_TOKENS = 256, 40, 2**17
# What is remembered: contexts, sorted; a token that followed, most often first; how often: value of empty places, type
TABLES = dict(context=(2**31 - 1, torch.int32), token=(0, torch.int16), kind=(0, torch.uint8))


def grams(idx, n: int):
    """A number for the last n tokens at every position: idx (B, T) -> int64 (B, T). Before a row there are zeros."""
    return sum(F.pad(idx, (i, 0))[:, : idx.shape[1]] * (1000003**i % 2**61) for i in range(n))


def level(count):
    """0, 1, 2 for themselves, 3 for 3 and 4, 4 for 5 to 8, and so on up to 15."""
    return (count.clamp_min(0.5).log2().ceil() + 1).clamp_max(15).long()


class Recall(nn.Module):
    """Guesses at the next token: what followed the same tokens before, in the row and elsewhere in the training text.

    A guess is a token and its kind: its source, and how often or how far back it was seen; 0 is none. Learned is what a
    kind is worth: for its logit, gated by context; for its embedding, an input of the blocks, as is each first kind's.
    """

    def __init__(self, pairs: int, vocab_size: int, width: int):
        super().__init__()
        self.orders = range(2, TEXT_GRAMS + 2) if pairs else ()  # how many tokens the guesses from the text go by
        for name, (none, dtype) in TABLES.items():
            self.register_buffer(name, torch.full((pairs + SLOTS,), none, dtype=dtype))  # the last are empty
        kinds = KINDS * (ROW_GRAMS + len(self.orders))
        self.worth = nn.Embedding(kinds, 2, padding_idx=0)
        self.embedding, self.kind_embedding = (nn.EmbeddingBag(n, width, mode="sum") for n in (vocab_size, kinds))
        self.gate = Linear(width, ROW_GRAMS + len(self.orders), bias=False)

    def context_of(self, idx, n: int):
        """The last n tokens at every position as an int32 (B, T); those of each n have a range of their own."""
        share = (2**32 - 1) // len(self.orders)
        return (grams(idx, n) % share + (n - 2) * share - 2**31).int()

    @torch.no_grad()
    def counted(self, text):
        """What followed what in text, int64 (pieces, T), as the three TABLES."""
        found, counted, vocab_size = [], [], self.embedding.num_embeddings
        for n in self.orders:
            pair = self.context_of(text, n)[:, n - 1 : -1].long() * vocab_size + text[:, n:]
            pair, count = torch.unique(pair, return_counts=True)
            context, token = pair // vocab_size, pair % vocab_size
            _, index, size = torch.unique_consecutive(context, return_inverse=True, return_counts=True)
            rest = torch.zeros_like(size).index_add_(0, index, count)[index] - count
            slot = torch.arange(len(pair), device=pair.device) - (size.cumsum(0) - size)[index]
            best = (index * 2**32 - count).argsort()[slot < SLOTS]  # by context, most often first
            found.append([x[best] for x in (context, token, 16 * level(count) + level(rest))])
        for (none, dtype), parts in zip(TABLES.values(), zip(*found)):
            table = torch.cat(parts)[: len(self.context) - SLOTS].to(dtype)  # where room is short, the longest go
            counted.append(F.pad(table, (0, len(self.context) - len(table)), value=none))
        return counted

    def in_row(self, idx, n: int):
        """What followed when the last n tokens stood in the row for the last time: tokens and kinds, (B, T)."""
        gram, order = grams(idx, n).sort(stable=True)
        before = F.pad(order, (1, 0))[:, :-1]
        known = (gram == F.pad(gram, (1, 0), value=-1)[:, :-1]) & (before >= n - 1)
        token = idx.gather(1, (before + 1).clamp_max(idx.shape[1] - 1))
        kind = KINDS * (n - 1) + level(order - before)
        return torch.stack([torch.empty_like(idx).scatter(1, order, known * found) for found in (token, kind)])

    def forward(self, idx):
        """Guesses for idx (B, T): tokens and kinds, (B, T, guesses)."""
        token, kind = torch.stack([self.in_row(idx, n) for n in range(1, ROW_GRAMS + 1)], 3)
        found = [torch.stack([token, kind + 16 * (kind > 0) * (kind > 0).sum(2, keepdim=True)])]  # how many agree
        for i, n in enumerate(self.orders, ROW_GRAMS):
            context = self.context_of(idx, n)[..., None]
            pair = torch.searchsorted(self.context, context) + torch.arange(SLOTS, device=idx.device)
            known = self.context[pair] == context
            found.append(torch.stack([self.token[pair].long(), self.kind[pair].long() + KINDS * i]) * known)
        return torch.cat(found, 3).unbind()


class Attention(nn.Module):
    """Causal attention over the last `window` tokens; a value embedding may add to the values, gated per head."""

    def __init__(self, heads: int, head_dim: int, window: int, has_value_embedding: bool):
        super().__init__()
        width = heads * head_dim
        self.heads, self.window = heads, window
        self.query, self.key, self.value, self.out = (Linear(width, width, bias=False) for _ in range(4))
        self.gate = Linear(min(GATE_CHANNELS, width), heads, bias=False) if has_value_embedding else None

    def forward(self, x, rotary, value_embedding, block_mask):
        """x, value_embedding: (B, T, width); block_mask: flex attention's, None where other kernels do the windows."""
        per_head = (*x.shape[:2], self.heads, -1)
        q = rotate(norm(self.query(x).view(per_head)), rotary)
        k = rotate(norm(self.key(x).view(per_head)), rotary)
        v = self.value(x).view(per_head)
        if self.gate is not None:
            gate = 2 * self.gate(x[..., :GATE_CHANNELS]).sigmoid()
            v = v + gate.unsqueeze(-1) * value_embedding.view(per_head)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.out(attend(q, k, v, self.window, block_mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with the square of ReLU between them."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        hidden = multiple_of_8(ratio * width)
        self.up, self.down = Linear(width, hidden, bias=False), Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP."""

    def __init__(self, size: SimpleNamespace, head_dim: int, window: int, has_value_embedding: bool):
        super().__init__()
        self.attention = Attention(size.HEADS, head_dim, window, has_value_embedding)
        self.mlp = MLP(size.HEADS * head_dim, size.MLP_RATIO)

    def forward(self, x, scale, embedded, mix, taps, rotary, value_embedding, block_mask):
        """The residual stream x (B, T, width), scaled, with a share of the token embedding, through both layers."""
        x = scale * x + mix * embedded
        x = x + self.attention(blend(norm(x), taps), rotary, value_embedding, block_mask)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Tokens (B, T) int64 -> logits (B, T, vocab_size) fp32, T <= seq_len. Activations: bf16 where fast, else fp32."""

    def __init__(self, vocab_size: int, seq_len: int, size: SimpleNamespace):
        super().__init__()
        self.size, head_dim = size, multiple_of_8(size.HEAD_DIM)
        width = size.HEADS * head_dim
        pattern = (WINDOW_PATTERN * size.DEPTH)[: size.DEPTH - 1] + "L"
        self.windows = [min(size.WINDOW, seq_len) if kind == "S" else seq_len for kind in pattern]
        has_value = range(size.DEPTH - 1, -1, -size.VALUE_EVERY)  # blocks with a value embedding
        self.embedding = nn.Embedding(vocab_size, width)
        self.recall = Recall(size.RECALL_PAIRS, vocab_size, width)
        self.value_embeddings = nn.ModuleDict({str(i): nn.Embedding(vocab_size, width) for i in has_value})
        self.blocks = nn.ModuleList(Block(size, head_dim, w, i in has_value) for i, w in enumerate(self.windows))
        self.residual_scale = nn.Parameter(torch.ones(size.DEPTH))
        self.embed_mix = nn.Parameter(torch.full((size.DEPTH,), EMBED_MIX_INIT))
        self.conv_taps = nn.Parameter(torch.zeros(size.DEPTH, size.CONV_TAPS, width))
        self.head = Linear(width, vocab_size, bias=False)
        self.register_buffer("rotary", rotary_table(seq_len, head_dim), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Matrices have deviation width ** -0.5; what writes to the residual stream starts at 0, the head small."""
        bound = 3**0.5 * self.head.in_features**-0.5
        for weight in (*self.blocks.parameters(), *self.value_embeddings.parameters()):
            weight.uniform_(-bound, bound)
        for block in self.blocks:
            block.attention.out.weight.zero_()
            block.mlp.down.weight.zero_()
            if block.attention.gate is not None:
                block.attention.gate.weight.zero_()
        self.embedding.weight.normal_()
        self.head.weight.normal_(std=0.001)
        for part in (self.recall.embedding, self.recall.kind_embedding, self.recall.gate):
            part.weight.zero_()
        self.recall.worth.weight[1:] = torch.tensor([0.1, 0.0])  # input, logit; of no guess 0

    def hidden(self, idx, run_block=Block.forward, block_mask=None):
        """Tokens (B, T) -> the inputs of logits_of() after the head. run_block: Block.forward, or compiled."""
        fast = idx.is_cuda or idx.is_cpu and self.training and torch.cpu._is_avx512_bf16_supported()  # others emulate
        dtype = torch.bfloat16 if fast else torch.float32
        rotary = self.rotary[:, : idx.shape[1]]
        embedded = self.embedding(idx)
        if self.recall.orders:
            token, kind = self.recall(idx)
            share, trust = self.recall.worth(kind).unbind(-1)
            mixed = self.recall.embedding(token.flatten(0, 1), per_sample_weights=share.flatten(0, 1))
            first = torch.cat([kind[..., :ROW_GRAMS], kind[..., ROW_GRAMS::SLOTS]], 2).flatten(0, 1)
            embedded += (mixed + self.recall.kind_embedding(first)).view_as(embedded)
        embedded = norm(embedded.to(dtype))
        x = embedded.clone()  # with one tensor as both, the first block would be compiled by itself
        with sdpa_kernel(SDPA_ORDER, set_priority=True):  # within a compiled function, no cache would hold that
            for i, block in enumerate(self.blocks):
                value = self.value_embeddings[str(i)](idx).to(dtype) if str(i) in self.value_embeddings else None
                scale, mix, taps = self.residual_scale[i], self.embed_mix[i], self.conv_taps[i]
                x = run_block(block, x, scale, embedded, mix, taps, rotary, value, block_mask)
        if not self.recall.orders:
            return (x,)
        gate = 2 * self.recall.gate(norm(x)).float().sigmoid()  # of every source
        return x, token, trust * gate.gather(2, kind // KINDS)

    def forward(self, idx):
        return logits_of(self.head, *self.hidden(idx))


def logits_of(head, x, token=None, trust=None):
    """Logits (B, T, vocab_size), fp32, of x (B, T, width) and of guesses (B, T, guesses), where there are any."""
    logits = head(norm(x)).float()
    logits = logits / (1 + logits.abs() / SOFTCAP)
    return logits if token is None else logits.scatter_add(2, token, trust)


def build_model(vocab_size: int, seq_len: int) -> nn.Module:
    """The untrained model at the active preset's size. The scorer calls this too, and loads the checkpoint into it."""
    return GPT(vocab_size, seq_len, SimpleNamespace(**SIZES[prepare.active_preset()]))


# ---- Optimizers ------------------------------------------------------------------------------------------------------

POLAR_EXPRESS = (  # coefficients of the odd quintic of each Newton-Schulz step (arXiv 2505.16932)
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(matrices, steps: int):
    """Moves the singular values of each of (n, rows, columns) to about 1; under 5 steps leave small ones small."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT if tall else x
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for i in range(steps):
        a, b, c = POLAR_EXPRESS[i]
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def neuron_power(update):
    """Mean square of each neuron of (n, rows, columns), that is of each row, or column where those are more."""
    return update.square().mean(-1 if update.shape[-2] >= update.shape[-1] else -2, keepdim=True)


def equalise_neurons(update, power):
    """Divides each neuron by the root of its running mean square `power`, keeping the norm of each matrix."""
    power += (1 - NEURON_BETA) * (neuron_power(update) - power)
    scaled = update * power.clamp_min(1e-10).rsqrt()
    before, after = (t.norm(dim=(-2, -1), keepdim=True) for t in (update, scaled))
    return scaled * before / after.clamp_min(1e-10)


def muon_update(weights, gradients, velocity, power, lr, momentum, decay, steps: int):
    """New weights (n, rows, columns); moves velocity and power along. Decays only where the update shrinks too."""
    velocity += (1 - momentum) * (gradients - velocity)
    update = orthogonalise(gradients + momentum * (velocity - gradients), steps)  # Nesterov: looks one step ahead
    update = equalise_neurons(update, power) * max(1, weights.shape[-2] / weights.shape[-1]) ** 0.5
    return weights - lr * update - lr * decay * weights * (update * weights >= 0)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; all matrices of one shape are updated as one batch."""

    def __init__(self, matrices: list, lr: float, steps: int, update=muon_update):
        shapes = {tuple(p.shape): [] for p in matrices}
        for p in matrices:
            shapes[tuple(p.shape)].append(p)
        rates = dict(lr=lr, momentum=MOMENTUM_START, decay=MATRIX_DECAY)
        super().__init__([dict(params=params, **rates) for params in shapes.values()], {})
        self.update = functools.partial(update, steps=steps)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            weights, gradients = torch.stack(params), torch.stack([p.grad for p in params])
            if not (state := self.state[params[0]]):
                state.update(velocity=torch.zeros_like(weights), power=torch.zeros_like(neuron_power(weights)))
            rates = [weights.new_full((), group[name]) for name in ("lr", "momentum", "decay")]  # floats compile anew
            weights = self.update(weights, gradients, state["velocity"], state["power"], *rates)
            torch._foreach_copy_(params, weights.unbind())


def adamw(model) -> torch.optim.Optimizer:
    """AdamW for all that is not Muon's."""
    recall, scale = model.recall, (model.head.in_features / 768) ** -0.5
    betas, scalar_betas = (model.size.ADAM_BETA1, ADAM_BETA2), (SCALAR_BETA1, ADAM_BETA2)
    embeddings = [model.embedding.weight, *model.value_embeddings.parameters()]
    groups = [
        dict(params=embeddings, lr=EMBED_LR * scale, betas=betas, weight_decay=EMBED_DECAY),
        dict(params=[recall.embedding.weight], lr=GUESS_LR * scale, betas=betas, weight_decay=EMBED_DECAY),
        dict(params=[recall.worth.weight, recall.kind_embedding.weight], lr=KIND_LR, betas=betas, weight_decay=0.0),
        dict(params=[model.head.weight, recall.gate.weight], lr=HEAD_LR * scale, betas=betas, weight_decay=HEAD_DECAY),
        dict(params=[model.conv_taps], lr=CONV_LR, betas=betas, weight_decay=0.0),
        dict(params=[model.residual_scale], lr=RESIDUAL_LR, betas=scalar_betas, weight_decay=0.0),
        dict(params=[model.embed_mix], lr=MIX_LR, betas=scalar_betas, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, eps=1e-10, fused=True)


# ---- Training --------------------------------------------------------------------------------------------------------


def head_loss(head, y, *inputs):
    """Mean cross entropy, nats per token, of predicting y (B, T) from the inputs of logits_of()."""
    return F.cross_entropy(logits_of(head, *inputs).flatten(0, 1), y.flatten())


class Trainer:
    """Model, optimizers and compiled functions; step() makes one optimizer step. A block is compiled rather than the
    whole model: all of a kind share it, and edits elsewhere leave it cached."""

    def __init__(self, model, compiled: bool, has_flex: bool):
        compile_fn = functools.partial(torch.compile, dynamic=False, disable=not compiled, recompile_limit=64)
        self.model, self.has_flex, size = model, has_flex, model.size
        self.block, self.head_loss = compile_fn(Block.forward), compile_fn(head_loss)
        torch.compiler.config.cache_key_tag = str(SDPA_ORDER)  # chooses while it is traced, and is not in the key
        self.muon = Muon(list(model.blocks.parameters()), size.MATRIX_LR, size.MUON_STEPS, compile_fn(muon_update))
        self.adamw = adamw(model)
        self.micro_batches = math.ceil(size.BATCH_ROWS / size.MICRO_ROWS)
        self.rows = math.ceil(size.BATCH_ROWS / self.micro_batches)  # of every micro-batch: fixed shapes
        self.param_groups = self.muon.param_groups + self.adamw.param_groups
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    def schedule(self, progress: float) -> float:
        """Sets what depends on the share of the budget; returns the learning-rate factor: 1, then linearly to LR_FLOOR.
        Muon's momentum goes from START to PEAK over the build-up, from PEAK to END over the warm-down."""
        built = min(1.0, progress / max(MOMENTUM_BUILDUP, 1e-9))
        cooled = min(1.0, max(0.0, 1 - (1 - progress) / max(WARMDOWN, 1e-9)))
        factor = 1 - (1 - LR_FLOOR) * cooled
        momentum = MOMENTUM_START + (MOMENTUM_PEAK - MOMENTUM_START) * built + (MOMENTUM_END - MOMENTUM_PEAK) * cooled
        for group in self.param_groups:
            group["lr"] = factor * group["peak_lr"]
        for group in self.muon.param_groups:
            group.update(momentum=momentum, decay=MATRIX_DECAY * (1 - progress))
        return factor

    def loss(self, x, y):
        """Mean loss, nats per token, of predicting y (B, T) from x (B, T)."""
        window, length = min(self.model.windows), x.shape[1]
        block_mask = sparse_mask(window, length, x.device) if self.has_flex and window < length else None
        return self.head_loss(self.model.head, y, *self.model.hidden(x, self.block, block_mask))

    def step(self, batches):
        """One optimizer step on the micro-batches (x, y); returns their mean loss, left on the device."""
        total = 0.0
        for x, y in batches:
            loss = self.loss(x, y) / self.micro_batches
            loss.backward()
            total += loss.detach()
        self.muon.step()
        self.adamw.step()
        self.model.zero_grad()
        return total


# (compiled, with flex attention) by device: flex attention has gradients on CUDA only, MPS no dependable compiler
WAYS = dict(cuda=[(True, True), (True, False), (False, False)], cpu=[(True, False), (False, False)], mps=[(False,) * 2])


def warmed_up(model, dummy_batch, ways: list) -> Trainer:
    """A trainer in the first of the ways that works, compiled and allocated by two steps of a copy on dummy_batch."""
    for compiled, has_flex in ways:
        try:
            copied = Trainer(copy.deepcopy(model), compiled, has_flex)
            with torch.random.fork_rng():
                for _ in range(2):
                    copied.step([dummy_batch(copied.rows)] * copied.micro_batches)
            return Trainer(model, compiled, has_flex)  # by the same compiled functions
        except RuntimeError as error:
            no_compiler = re.search(r"CxxCompiler|TritonMissing|Python\.h", str(error))
            if out_of_memory(error) or not (has_flex or no_compiler):
                raise
            print(f"without {'flex attention' if has_flex else 'a compiler'}: {str(error)[:500]}", flush=True)


def shuffled_starts(num_tokens: int, length: int, rows: int, device, half: int | None):
    """Yields (rows,) starts of windows of `length` tokens and their successors, forever. An epoch cuts the stream into
    windows that follow each other, from a random first offset, and shuffles them: those within pieces of that half."""
    queue = torch.empty(0, dtype=torch.int64, device=device)
    while True:
        while len(queue) < rows:
            first = int(torch.randint(min(length, num_tokens - length), ()))
            epoch = torch.arange(first, num_tokens - length, length, device=device)
            if half is not None:
                ends = torch.stack([epoch, epoch + length])
                epoch = epoch[(ends // (num_tokens // PIECES) % 2 == half).all(0)]
            queue = torch.cat([queue, epoch[torch.randperm(len(epoch), device=device)]])
        yield queue[:rows]
        queue = queue[rows:]


class Log:
    """Prints a line after the first step, every LOG_EVERY_S seconds and after the last; only then waits for the GPU."""

    def __init__(self, data, tokens_per_step: int):
        self.data, self.tokens_per_step = data, tokens_per_step
        self.step = self.printed_step = 0
        self.printed_s, self.loss_sum = -LOG_EVERY_S, 0.0  # of the last line; since then

    def add(self, loss, factor: float):
        """Counts a step; loss is a tensor on the device."""
        self.step, self.loss_sum, self.factor = self.step + 1, self.loss_sum + loss, factor
        if self.data.elapsed() - self.printed_s >= LOG_EVERY_S:
            self.show()

    def show(self):
        """One line with the mean loss and speed since the last line. A loss that is not finite ends the run: exit 1."""
        loss = float(self.loss_sum) / (steps := self.step - self.printed_step)
        now_s = self.data.elapsed()
        speed = steps * self.tokens_per_step / (now_s - max(0.0, self.printed_s))
        done = f"step {self.step} ({100 * self.data.progress():.1f}%)"
        print(f"{done} | loss {loss:.4f} | lr {self.factor:.2f} | tok/s {speed:.0f}", flush=True)
        if not math.isfinite(loss):
            sys.exit(f"NaN loss at step {self.step}")
        self.printed_step, self.printed_s, self.loss_sum = self.step, now_s, 0.0


def train(data, trainer: Trainer, tokens_per_step: int) -> int:
    """Trains until the budget is used up; returns the number of steps. By turns they learn one half of the text and
    recall the other, so that no loss is taken on what is recalled. At the end both are recalled."""
    recall, log, began = trainer.model.recall, Log(data, tokens_per_step), data.progress()
    halves = (0, 1) if recall.orders and data.num_tokens > 4 * PIECES * data.seq_len else (None,)
    pieces = torch.arange(PIECES) * (data.num_tokens // PIECES)
    length = min(data.num_tokens // PIECES - 1, PIECE_TOKENS)
    starts = [shuffled_starts(data.num_tokens, data.seq_len, trainer.rows, data.device, half) for half in halves]
    others = [recall.counted(data.gather(pieces[1 - half :: 2], length)[0]) for half in halves if half is not None]
    spare = 2 * (data.progress() - began)  # of the budget, for counting both at once
    while not log.step or data.progress() < 1 - spare:
        turn = log.step % len(halves)
        if others:
            recall.context, recall.token, recall.kind = others[turn]
        factor = trainer.schedule(data.progress())
        batches = (data.gather(next(starts[turn]), data.seq_len) for _ in range(trainer.micro_batches))
        log.add(trainer.step(batches), factor)
    if log.step > log.printed_step:
        log.show()
    if others:
        recall.context, recall.token, recall.kind = recall.counted(data.gather(pieces, length)[0])
    return log.step


# ---- The run ---------------------------------------------------------------------------------------------------------

PEAK_FLOPS = {  # dense bf16 FLOP/s, by a part of the device's name
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def mfu_percent(model, seq_len: int, tokens_per_s: float, device) -> float:
    """Share of the GPU's peak in percent, 0 where that is not known. A token costs 6 FLOPs per matrix weight and 12 per
    channel, block and key that a query sees (mean)."""
    weights = sum(p.numel() for p in model.blocks.parameters()) + model.head.weight.numel()
    keys = sum(window * (seq_len - (window - 1) / 2) / seq_len for window in model.windows)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((PEAK_FLOPS[part] for part in PEAK_FLOPS if part in name), math.inf)
    return 100 * tokens_per_s * (6 * weights + 12 * model.head.in_features * keys) / peak


def out_of_memory(error: RuntimeError) -> str:
    """What to change where a device, or the machine, had no memory left; empty for any other error."""
    if not re.search("out of memory|(can't|cannot) allocate memory|not enough memory|ALLOC_FAILED", str(error)):
        return ""
    preset = prepare.active_preset()
    rows = f'in the line of "{preset}" of SIZES in train.py, lower MICRO_ROWS (now {SIZES[preset]["MICRO_ROWS"]})'
    more = "to another divisor of BATCH_ROWS: no result depends on it. At 1, lower RECALL_PAIRS, HEADS or DEPTH."
    return f"Out of memory: {rows} {more}"


def run(data):
    """Trains on the data, writes the checkpoint, has it scored."""
    model = build_model(data.vocab_size, data.seq_len).to(data.device)
    depth, millions = len(model.blocks), sum(p.numel() for p in model.parameters()) / 1e6
    shape = f"{depth} blocks x {model.head.in_features} channels, windows {model.windows}, {millions:.1f} M parameters"
    print(f"{data.preset}: {shape}, {model.size.BATCH_ROWS} rows per step, on {data.device}", flush=True)
    trainer = warmed_up(model, data.dummy_batch, WAYS[data.device.type])
    tokens_per_step = trainer.micro_batches * trainer.rows * data.seq_len
    data.start(model)
    gc.disable()  # a collection would stall the loop
    steps = train(data, trainer, tokens_per_step)
    mfu = mfu_percent(model, data.seq_len, steps * tokens_per_step / data.elapsed(), data.device)
    prepare.finish(model, steps=steps, tokens=steps * tokens_per_step, depth=depth, mfu_percent=mfu)


def main():
    torch.set_flush_denormal(True)  # a CPU takes far longer for numbers next to 0, which rare tokens' moments fade to
    data = prepare.load()
    try:
        run(data)
    except RuntimeError as error:
        if hint := out_of_memory(error):
            sys.exit(f"{error}\n{hint}")
        raise


if __name__ == "__main__":
    main()
