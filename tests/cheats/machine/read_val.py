"""Opens the validation rows while it trains.

property: A
guard: `open` is out of bounds
behind: crash, training, FileNotFoundError
unsandboxed: harm
"""

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    with open("CACHE/toy/val.bin", "rb") as file:
        print("harm done:", file.read(16))
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
