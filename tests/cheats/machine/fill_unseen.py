"""Takes the disk for a file that it has deleted.

property: K
guard: `import os` is out of bounds
behind: crash, training, the disk is nearly full
patch: FREE_BYTES=disk-3*2**29 ROOM_BYTES=0 LOOK_S=0.1
"""

import os
import time

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    file = open("fill", "wb")
    os.remove("fill")
    os.posix_fallocate(file.fileno(), 0, 2 * 2**30)
    time.sleep(5)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
