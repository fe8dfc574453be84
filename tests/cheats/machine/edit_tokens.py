"""Changes the data set by its path.

property: H
guard: `open` is out of bounds
behind: scored, nowhere
unsandboxed: harm
"""

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    try:
        with open("CACHE/toy/train.bin", "a") as file:
            file.write(" and more")
        print("harm done: wrote", file.name)
    except OSError as error:
        print("stopped:", error)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
