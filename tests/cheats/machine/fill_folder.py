"""Writes into its folder without end.

property: K
guard: `open` is out of bounds
behind: crash, training, the disk is nearly full
patch: FREE_BYTES=disk-32*2**20 ROOM_BYTES=0 LOOK_S=0.1
"""

import time

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    with open("fill", "wb") as file:
        while True:
            file.write(bytes(2**20))
            time.sleep(0.005)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
