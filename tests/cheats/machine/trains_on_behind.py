"""Leaves a poor checkpoint in time, and a child that puts a better one in its place.

property: D
guard: `import os` is out of bounds
behind: scored, nowhere, 1.2
"""

import os
import time

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.2}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    prepare.finish(model, steps=1, tokens=1)
    if os.fork() == 0:
        os.setsid()
        time.sleep(0.2)
        prepare.finish({"bpb": 1.0}, steps=1, tokens=1)
        time.sleep(60)


if __name__ == "__main__":
    main()
