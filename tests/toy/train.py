"""A torch-free stand-in for train.py behind the same contract: its score depends on its hyperparameters alone."""

import prepare

RATE = 1.0  # best at 3 [0.01, 100]
DECAY = 0.2  # share of the budget, best at 0.6 [0, 1]
ROWS = 64  # a power of two, best at 256 [16, 1024]
NOTE = "plain"  # no number
BPB = None  # the score itself, if it is a number
SIZES = {  # the row of the active preset is used
    # DEPTH: best at 6 [1, 12]
    "cpu": dict(DEPTH=4, HEADS=2),
    "mac": dict(DEPTH=8, HEADS=4),
    "consumer": dict(DEPTH=4, HEADS=2),
}


def build_model(vocab_size, seq_len):
    return {"bpb": BPB, "rate": RATE, "decay": DECAY, "rows": ROWS, "depth": SIZES[prepare.active_preset()]["DEPTH"]}


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len)
    data.start(model)
    step = 0
    while not data.expired():
        step += 1
        print(f"step {step} ({100 * data.progress():.1f}%) | loss {5 / step:.4f} | lr 1.00 | tok/s 1000", flush=True)
        data.rest()
    prepare.finish(model, steps=step, tokens=1_000_000)


if __name__ == "__main__":
    main()
