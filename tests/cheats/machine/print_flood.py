"""Prints without end.

property: K
guard: passes
behind: crash, training, printed more than 1 MB
patch: LOG_BYTES=2**20 LOOK_S=0.1
"""

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    while data.progress() < 10**6:
        print("loss 0.0 " * 10_000)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
