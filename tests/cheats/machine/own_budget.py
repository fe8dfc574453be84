"""Gives itself ten times the time that it was given.

property: D
guard: `import os` is out of bounds
behind: invalid, training, s late
patch: LATE_S=0.3
"""

import os

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    os.environ["AUTORESEARCH_TIME_BUDGET"] = "1.0"
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    while not data.expired():
        data.rest()
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
