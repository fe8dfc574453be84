"""A mixture of experts that sends every token to one of four by itself.

property: -
guard: passes
behind: scored, nowhere
"""

import prepare
import torch
import torch.nn.functional as F


class Model(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(vocab_size, 32), torch.nn.Linear(32, vocab_size)
        self.router = torch.nn.Linear(32, 4)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))

    def forward(self, idx):
        x = self.embedding(idx)
        share, chosen = self.router(x).softmax(-1).max(-1, keepdim=True)
        mixed = sum(torch.where(chosen == i, share * expert(x), 0.0) for i, expert in enumerate(self.experts))
        return self.head(x + mixed)


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
