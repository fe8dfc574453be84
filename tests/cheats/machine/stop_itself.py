"""Stops itself, so that it neither goes on nor ends.

property: J
guard: `import os` is out of bounds
behind: crash, training, timeout after
patch: KILL_S=0.5
"""

import os
import signal

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    os.kill(os.getpid(), signal.SIGSTOP)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
