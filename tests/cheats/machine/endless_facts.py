"""Its facts are a pipe that nobody writes to, as is all else that it might leave.

property: H
guard: `import os` is out of bounds
behind: scored, nowhere
"""

import os
import shutil

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    prepare.finish(model, steps=1, tokens=1)
    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
    os.remove("facts.json")
    for name in ("facts.json", "score.json", os.environ["TORCHINDUCTOR_CACHE_DIR"]):
        os.mkfifo(name)


if __name__ == "__main__":
    main()
