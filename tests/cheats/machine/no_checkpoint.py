"""Ends well and leaves no checkpoint.

property: G
guard: passes
behind: crash, training, no checkpoint
"""

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    if data.progress() < 0:
        prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
