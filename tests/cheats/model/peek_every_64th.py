"""Looks one token ahead at every 64th position only.

property: C
guard: passes
behind: invalid, start, looks ahead: log probabilities at
"""

import prepare
import torch
import torch.nn.functional as F


class Model(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx):
        ahead = 20.0 * F.one_hot(idx.roll(-1, 1), self.table.num_embeddings)
        here = torch.arange(idx.shape[1], device=idx.device) % 64 == 63
        return self.table(idx) + ahead * here[:, None]


def build_model(vocab_size, seq_len):
    return Model(vocab_size)


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len).to(data.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data.start(model)
    steps = 0
    while not data.expired():
        x, y = data.gather(torch.randint(data.num_tokens - 33, (4,)), 32)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    prepare.finish(model, steps=steps, tokens=128 * steps)


if __name__ == "__main__":
    main()
