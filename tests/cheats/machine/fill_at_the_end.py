"""Writes more than it may just before it ends.

property: K
guard: `import os` is out of bounds
behind: crash, training, wrote more than
patch: WORK_BYTES=32*2**20
"""

import os

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    os.makedirs(os.environ["TORCHINDUCTOR_CACHE_DIR"], exist_ok=True)
    with open(os.environ["TORCHINDUCTOR_CACHE_DIR"] + "/kernel", "wb") as file:
        file.truncate(2**32)  # a hole on this disk, but not in a copy
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
