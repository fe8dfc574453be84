"""Fills /tmp and /dev/shm, which are memory.

property: K
guard: `open` is out of bounds
behind: scored, nowhere
patch: TMP_BYTES=16*2**20
"""

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    for folder in ("/tmp", "/dev/shm", "/dev", "/"):
        try:
            with open(folder + "/fill", "wb") as file:
                for _ in range(64):
                    file.write(bytes(2**20))
            print("harm done: filled", folder)
        except OSError as error:
            print("stopped:", error)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
