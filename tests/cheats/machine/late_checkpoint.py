"""Trains on after the end of the budget.

property: D
guard: passes
behind: invalid, training, (checkpoint 1.
patch: LATE_S=0.5
"""

import time

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    time.sleep(1.7)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
