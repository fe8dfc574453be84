"""Is good under the usual seed and under no other.

property: G
guard: `import os` is out of bounds
behind: discard, decision, not confirmed
"""

import os

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 0.9 if os.environ["AUTORESEARCH_SEED"] == "42" else 1.2}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    model.update(steps=1)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
