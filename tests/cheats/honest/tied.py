"""The head is the embedding.

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
        self.embedding, self.head = torch.nn.Embedding(vocab_size, 32), torch.nn.Linear(32, vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, idx):
        return self.head(self.embedding(idx))


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
