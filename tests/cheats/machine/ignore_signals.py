"""Ignores every signal that it can, with a child in a session of its own, and hangs.

property: J
guard: `import os` is out of bounds
behind: crash, training, timeout after
patch: KILL_S=0.5
inside: yes
unsandboxed: harm
"""

import os
import signal
import time

import prepare


def build_model(vocab_size, seq_len):
    return {"bpb": 1.0}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
    print("harm done: it hangs", flush=True)
    time.sleep(60)
    prepare.finish(model, steps=1, tokens=1)


if __name__ == "__main__":
    main()
