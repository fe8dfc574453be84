"""Makes files without end.

property: K
guard: `open` is out of bounds
behind: crash, training, the disk is nearly full
patch: FREE_FILES=files-500 LOOK_S=0.1
"""

import time

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    for number in range(10**6):
        open(f"{number}", "x").close()
        time.sleep(0.0002)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
