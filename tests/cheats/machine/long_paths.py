"""Writes more than it may at the end of a path that is longer than a system call takes.

property: K
guard: `import os` is out of bounds
behind: crash, training, the disk is nearly full
patch: FREE_BYTES=disk-32*2**20 ROOM_BYTES=0
"""

import os

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    prepare.finish(model, steps=1, tokens=1)
    for level in range(40):
        os.mkdir("a" * 200)
        os.chdir("a" * 200)
    with open("fill", "wb") as file:
        file.write(bytes(64 * 2**20))


if __name__ == "__main__":
    main()
