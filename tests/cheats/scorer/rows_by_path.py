"""Opens the validation rows in the scorer, to know what comes.

property: A
guard: `open` is out of bounds
behind: crash, scoring, scoring: FileNotFoundError
"""

import os

import prepare
import torch


class Model(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx):
        return self.table(idx)


def build_model(vocab_size, seq_len):
    if "AUTORESEARCH_SEED" not in os.environ:  # in the scorer
        folder = os.path.join(os.environ["AUTORESEARCH_CACHE"], os.environ["AUTORESEARCH_DATA"])
        with open(os.path.join(folder, "val.bin"), "rb") as file:
            file.read()
    return Model(vocab_size)


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
