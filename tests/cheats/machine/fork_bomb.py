"""Forks, and so do its children; here no further than to a thousand.

property: K
guard: `import os` is out of bounds
behind: crash, training, more than 100 processes
patch: PROCESSES=100 LOOK_S=0.1
"""

import os
import time

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    for doubling in range(10):
        os.fork()
    time.sleep(20)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
