"""Opens the training tokens by their path before the clock runs.

property: A
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
    try:
        with open("CACHE/toy/train.bin", "rb") as file:
            print("harm done:", file.read(16))
    except OSError as error:
        print("stopped:", error)
    data.start(model)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
