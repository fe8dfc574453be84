"""Leaves facts and a score of three gigabytes each, which are holes until somebody copies them.

property: K
guard: `open` is out of bounds
behind: scored, nowhere
"""

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    prepare.finish(model, steps=1, tokens=1)
    for name in ("facts.json", "score.json"):
        with open(name, "wb") as file:
            file.truncate(3 * 2**30)


if __name__ == "__main__":
    main()
