"""16 points in the plane, their distances as equal as can be: descent on a smooth stand-in for the squared ratio."""

import numpy as np
import prepare

SETS = 64  # of points, improved side by side [8, 1024]
STEPS = 1000  # of descent, from random points to a set [100, 10000]
RATE = 0.01  # of the first step, in widths of the square that the points begin in; falls to 0 [0.001, 0.2]
MOMENTUM = 0.9  # of Adam [0, 0.99]
SHARP_FIRST = 5.0  # how much the extreme distances count beside the others, at the first step [0.5, 50]
SHARP_LAST = 1500.0  # at the last one [30, 10000]
KICKED = 0.25  # share of the sets that begin as the best so far, disturbed [0, 1]
KICK = 0.05  # how far, in its largest distance [0.001, 0.5]

COUNT = prepare.POINTS
SELF = np.eye(COUNT, dtype=bool)  # a point's distance to itself does not count


def squares(points):
    """Between points (B, COUNT, 2): vectors (B, COUNT, COUNT, 2) and squared lengths, 1 to itself."""
    gap = points[:, :, None] - points[:, None]
    return gap, np.where(SELF, 1.0, (gap**2).sum(-1) + 1e-12)


def ratios(points):
    """The largest squared distance over the smallest, of each set."""
    square = squares(points)[1]
    return np.where(SELF, 0.0, square).max((1, 2)) / np.where(SELF, np.inf, square).min((1, 2))


def weights(logs, sharp):
    """How much each of logs (B, COUNT, COUNT) counts in a smooth maximum: softmax of sharp times them."""
    logs = np.where(SELF, -np.inf, logs)
    found = np.exp(sharp * (logs - logs.max((1, 2), keepdims=True)))
    return found / found.sum((1, 2), keepdims=True)


def slope(points, sharp):
    """The gradient of the smooth maximum minus the smooth minimum of the logarithms of all squared distances."""
    gap, square = squares(points)
    logs = np.log(square)
    pull = (weights(logs, sharp) - weights(-logs, sharp)) / square
    return 4 * (pull[..., None] * gap).sum(2)


def descended(points, data):
    """The points after STEPS of Adam on an ever sharper measure, or as far as the time goes."""
    mean, spread = np.zeros_like(points), np.zeros_like(points)
    for step in range(STEPS):
        done = step / STEPS
        now = slope(points, SHARP_FIRST * (SHARP_LAST / SHARP_FIRST) ** done)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * now
        spread = 0.99 * spread + 0.01 * now**2
        unbiased = mean / (1 - MOMENTUM ** (step + 1)), spread / (1 - 0.99 ** (step + 1))
        points = points - RATE * (1 - done) * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-9)
        if data.expired():
            break
    return points


def begun(best):
    """Where the next sets begin: at random, or as the best, made as large as the square and disturbed."""
    points = np.random.rand(SETS, COUNT, 2)
    if best is not None:
        kicked = round(KICKED * SETS)
        size = np.sqrt(squares(best[None])[1].max())
        points[:kicked] = best / size + KICK * np.random.randn(kicked, COUNT, 2)
    return points


def search(data):
    """The best set (COUNT, 2) that the time allows, and how often there were new ones."""
    best, least, rounds = None, np.inf, 0
    while not data.expired():
        points = descended(begun(best), data)
        found = ratios(points)
        rounds += 1
        if found.min() < least:
            best, least = points[found.argmin()], found.min()
        share = 100 * min(1, data.progress())
        print(f"step {rounds} ({share:.1f}%) | loss {least:.6f} | this round {found.min():.6f}", flush=True)
    return best, rounds


def main():
    data = prepare.load()
    data.start()
    best, rounds = search(data)
    prepare.finish(best, steps=rounds)


if __name__ == "__main__":
    main()
