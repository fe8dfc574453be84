"""26 circles in the unit square: many packings at a time, by gradient descent on radii minus a penalty for overlap."""

import numpy as np
import prepare

PACKINGS = 64  # improved side by side [8, 512]
STEPS = 800  # of descent, from random centres to a packing [100, 10000]
RATE = 0.01  # of the first step, in widths of the square; falls to 0 [0.001, 0.1]
MOMENTUM = 0.9  # of Adam [0, 0.99]
STIFF_FIRST = 3.0  # weight of the penalty at the first step [0.3, 100]
STIFF_LAST = 2000.0  # at the last one [30, 10000]
RADIUS = 0.05  # of all circles at first [0.001, 0.1]
KICKED = 0.25  # share of the packings that begin as the best so far, disturbed [0, 1]
KICK = 0.1  # how far, in widths of the square [0.001, 0.5]

COUNT = prepare.CIRCLES
SELF = 9 * np.eye(COUNT)  # keeps a circle from meeting itself


def distances(x):
    """Between the centres x (B, COUNT, 2): vectors (B, COUNT, COUNT, 2) and lengths."""
    gap = x[:, :, None] - x[:, None]
    return gap, np.sqrt((gap**2).sum(-1)) + SELF


def slope(circles, stiff):
    """The gradient of minus the radii, plus stiff / 2 times the squares of all overlaps, for circles (B, COUNT, 3)."""
    x, r = circles[..., :2], circles[..., 2]
    gap, length = distances(x)
    push = stiff * np.maximum(r[:, :, None] + r[:, None] - length, 0)
    low, high = stiff * np.maximum(r[..., None] - x, 0), stiff * np.maximum(r[..., None] + x - 1, 0)  # of the walls
    slope_x = high - low - ((push / length)[..., None] * gap).sum(2)
    slope_r = push.sum(2) + (low + high).sum(2) - 1
    return np.concatenate([slope_x, slope_r[..., None]], axis=2)


def shrunk(circles):
    """The circles, all radii of a packing shrunk by the one share after which none overlap or leave the square."""
    x, r = circles[..., :2].clip(1e-9, 1 - 1e-9), circles[..., 2].clip(1e-9)
    shares = distances(x)[1] / (r[:, :, None] + r[:, None])
    walls = np.minimum(x, 1 - x).min(2) / r
    share = np.minimum(np.minimum(shares.min((1, 2)), walls.min(1)), 1)
    return np.concatenate([x, (share[:, None] * r)[..., None]], axis=2)


def descended(circles, data):
    """The circles after STEPS of Adam under a growing penalty, or as far as the time goes."""
    mean, square = np.zeros_like(circles), np.zeros_like(circles)
    for step in range(STEPS):
        done = step / STEPS
        now = slope(circles, STIFF_FIRST * (STIFF_LAST / STIFF_FIRST) ** done)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * now
        square = 0.99 * square + 0.01 * now**2
        unbiased = mean / (1 - MOMENTUM ** (step + 1)), square / (1 - 0.99 ** (step + 1))
        circles = circles - RATE * (1 - done) * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-9)
        if data.expired():
            break
    return circles


def begun(best):
    """Where the next packings begin: centres at random, or the best's, disturbed."""
    centres = np.random.rand(PACKINGS, COUNT, 2)
    if best is not None:
        kicked = round(KICKED * PACKINGS)
        centres[:kicked] = (best[:, :2] + KICK * np.random.randn(kicked, COUNT, 2)).clip(0.01, 0.99)
    return np.concatenate([centres, np.full((PACKINGS, COUNT, 1), RADIUS)], axis=2)


def search(data):
    """The best packing (COUNT, 3) that the time allows, and how often there were new ones."""
    best, most, rounds = None, 0.0, 0
    while not data.expired():
        found = shrunk(descended(begun(best), data))
        sums = found[..., 2].sum(1)
        rounds += 1
        if sums.max() > most:
            best, most = found[sums.argmax()], sums.max()
        share = 100 * min(1, data.progress())
        print(f"step {rounds} ({share:.1f}%) | loss {-most:.6f} | this round {sums.max():.6f}", flush=True)
    return best, rounds


def main():
    data = prepare.load()
    data.start()
    best, rounds = search(data)
    prepare.finish(best, steps=rounds)


if __name__ == "__main__":
    main()
