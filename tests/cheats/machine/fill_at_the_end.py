"""Makes a file with a large hole just before it ends.

property: K
guard: `import os` is out of bounds
behind: scored, nowhere
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
        file.truncate(2**32)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
