"""Takes all the memory that it can get.

property: K
guard: passes
behind: crash, training, out of memory
patch: FREE_SHARE=(available-200*2**20)/total LOOK_S=0.1
"""

import time

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    hoard = []
    for _ in range(150):
        hoard.append(b"x" * (10 * 2**20))
        time.sleep(0.005)
    time.sleep(10)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
