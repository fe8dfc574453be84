"""A classifier of small images: a plain convolutional network, SGD with momentum, a rate that falls to 0."""

import prepare
import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = 16  # of the first layers; the later ones have 2 and 4 times as many [8, 96]
BATCH = 64  # images [16, 1024]
RATE = 0.03  # at its peak [0.003, 0.3]
MOMENTUM = 0.9  # of SGD [0.5, 0.99]
DECAY = 0.0005  # of weights [0.00001, 0.01]
WARM_UP = 0.1  # share of the budget in which the rate rises [0.01, 0.5]
DROPOUT = 0.05  # before the last layer [0, 0.6]
SMOOTHING = 0.05  # of labels [0, 0.4]
MIRRORED = 0.5  # share of the images, left to right [0, 0.5]


def layer(channels_in, channels):
    """A convolution, and what makes it easy to train."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )


class Net(nn.Module):
    """Images (N, 3, SIZE, SIZE), 0 to 1, to logits (N, CLASSES)."""

    def __init__(self):
        super().__init__()
        self.outline = nn.Sequential(layer(3, CHANNELS), layer(CHANNELS, CHANNELS), nn.MaxPool2d(2))
        self.parts = nn.Sequential(layer(CHANNELS, 2 * CHANNELS), nn.MaxPool2d(2))
        self.whole = layer(2 * CHANNELS, 4 * CHANNELS)
        self.head = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(4 * CHANNELS, prepare.CLASSES))

    def forward(self, images):
        x = self.whole(self.parts(self.outline(images - 0.5)))
        return self.head(x.amax((2, 3)))  # wherever it is seen best


def build_model():
    return Net()


def rate_at(progress):
    """The share of the peak rate: up, then down, in straight lines."""
    return min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def batches(images, labels):
    """Shuffled batches for ever; every epoch sees each image once, as it is or mirrored."""
    while True:
        for chosen in torch.randperm(len(images)).split(BATCH):
            mirrored = torch.rand(len(chosen), 1, 1, 1) < MIRRORED
            yield torch.where(mirrored, images[chosen].flip(3), images[chosen]), labels[chosen]


def train(data, model):
    """Steps until the budget is used up, on two cores; returns how many."""
    model, images = (x.to(memory_format=torch.channels_last) for x in (model, data.images))  # convolves faster
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)

    def learn(batch, labels):
        """Adds half the gradients of half a batch, normalized for itself; returns half its loss."""
        loss = F.cross_entropy(model(batch), labels, label_smoothing=SMOOTHING) / 2
        loss.backward()
        return loss.item()

    for step, (batch, labels) in enumerate(batches(images, data.labels), 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * max(0.0, rate_at(data.progress()))
        optimizer.zero_grad()
        loss = sum(data.cores.map(learn, batch.chunk(2), labels.chunk(2)))
        optimizer.step()
        if step % 20 == 0 or data.progress() >= 1:
            speed = step * BATCH / (data.progress() * prepare.BUDGET_S)
            print(
                f"step {step} ({100 * data.progress():.1f}%) | loss {loss:.4f} | images/s {speed:.0f}",
                flush=True,
            )
        if data.progress() >= 1:
            return step


def main():
    data = prepare.load()
    model = build_model()
    data.start()
    steps = train(data, model)
    prepare.finish(model, steps=steps)


if __name__ == "__main__":
    main()
