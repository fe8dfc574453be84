"""A plain GPT to compare train.py with: pre-norm, RoPE, squared ReLU, value embeddings in half the blocks, Muon, AdamW.

It trains and is scored as train.py is: bench_recipe.py runs both. Small presets: 4 blocks of 128 channels, 2,048 tokens
a step; others: 8 blocks of 512 channels, 524,288 tokens a step, as in karpathy/autoresearch, whose other parts it lacks.
"""

import prepare  # before torch: its clock counts that import
import torch
import torch.nn.functional as F
from torch import nn

IS_SMALL = prepare.active_preset() in ("cpu", "mac")
DEPTH, HEADS, WIDTH = (4, 2, 128) if IS_SMALL else (8, 4, 512)
BATCH_TOKENS, MICRO_ROWS = (2048, 8) if IS_SMALL else (524288, 32)
MATRIX_LR, EMBED_LR, HEAD_LR = (0.02, 0.3, 0.004) if IS_SMALL else (0.04, 0.6, 0.004)
MOMENTUM, WARMDOWN = 0.95, 0.5


def norm(x):
    return F.rms_norm(x, x.shape[-1:])


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, vocab_size: int | None):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.value_embedding = nn.Embedding(vocab_size, WIDTH) if vocab_size else None
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x, idx, cos, sin):
        q, k, v = self.qkv(norm(x)).chunk(3, -1)
        if self.value_embedding is not None:
            v = v + self.value_embedding(idx)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = (self.rotate(norm(t), cos, sin) for t in (q, k))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(norm(x))).square())

    def rotate(self, t, cos, sin):
        a, b = t.chunk(2, -1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


class GPT(nn.Module):
    """Tokens (B, T) -> logits (B, T, vocab_size)."""

    def __init__(self, vocab_size: int, seq_len: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.blocks = nn.ModuleList(Block(vocab_size if i % 2 else None) for i in range(DEPTH))
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)
        angles = torch.arange(seq_len)[:, None] / 10000 ** (torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        self.register_buffer("rotary", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def forward(self, idx):
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=idx.is_cuda):
            x = norm(self.embedding(idx))
            for block in self.blocks:
                x = block(x, idx, *self.rotary[:, : idx.shape[1]])
            logits = self.head(norm(x))
        return 15 * torch.tanh(logits.float() / 15)


def build_model(vocab_size: int, seq_len: int) -> nn.Module:
    return GPT(vocab_size, seq_len)


def orthogonal(matrix):
    """Newton-Schulz: the nearest orthogonal matrix, roughly."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT


@torch.no_grad()
def muon_step(matrices, lr: float):
    for weight, velocity in matrices:
        velocity.lerp_(weight.grad, 1 - MOMENTUM)
        rate = lr * max(1, weight.shape[0] / weight.shape[1]) ** 0.5
        weight -= rate * orthogonal(weight.grad.lerp(velocity, MOMENTUM))


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len).to(data.device)
    matrices = [(p, torch.zeros_like(p)) for name, p in model.blocks.named_parameters() if "embedding" not in name]
    tables = [p for name, p in model.named_parameters() if "embedding" in name]
    groups = [dict(params=tables, lr=EMBED_LR), dict(params=[model.head.weight], lr=HEAD_LR)]
    adam = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    compiled = torch.compile(model, dynamic=False, disable=data.device.type == "mps")
    rows = min(MICRO_ROWS, BATCH_TOKENS // data.seq_len)
    micro_batches = BATCH_TOKENS // (rows * data.seq_len)  # no remainder: all are powers of 2

    def backward(x, y):
        loss = F.cross_entropy(compiled(x).flatten(0, 1), y.flatten()) / micro_batches
        loss.backward()
        return loss.detach()

    backward(*data.dummy_batch(rows))
    model.zero_grad()
    data.start(model)
    steps = 0
    while not data.expired():
        factor = min(1.0, (1 - data.progress()) / WARMDOWN)
        loss = 0.0
        for _ in range(micro_batches):
            starts = torch.randint(data.num_tokens - data.seq_len, (rows,), device=data.device)
            loss += backward(*data.gather(starts, data.seq_len))
        muon_step(matrices, factor * MATRIX_LR)
        for group, peak in zip(adam.param_groups, (EMBED_LR, HEAD_LR)):
            group["lr"] = factor * peak
        adam.step()
        model.zero_grad()
        steps += 1
        if steps % 50 == 1:
            print(f"step {steps} ({100 * data.progress():.1f}%) | loss {loss:.4f}", flush=True)
    prepare.finish(model, steps=steps, tokens=steps * BATCH_TOKENS, depth=DEPTH, mfu_percent=0.0)


if __name__ == "__main__":
    main()
