"""Its score is minus infinity.

property: G
guard: passes
behind: crash, scoring, no score
"""

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": -float("inf")}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    model.update(steps=1)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
