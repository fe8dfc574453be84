"""Its checkpoint is a pipe that nobody writes to.

property: H
guard: `import os` is out of bounds
behind: crash, training, no checkpoint
"""

import os

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    os.mkfifo("checkpoint.pt")
    if data.progress() < 0:
        prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
