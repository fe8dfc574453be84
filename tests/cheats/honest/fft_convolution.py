"""A long causal convolution through the Fourier transform: causal but for rounding.

property: -
guard: passes
behind: scored, nowhere
"""

import prepare
import torch
import torch.nn.functional as F


class Model(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(vocab_size, 32), torch.nn.Linear(32, vocab_size)
        self.filter = torch.nn.Parameter(torch.randn(32, 256) / 16)

    def forward(self, idx):
        x, length = self.embedding(idx).mT, idx.shape[1]
        spectrum = torch.fft.rfft(x, 2 * length) * torch.fft.rfft(self.filter[:, :length], 2 * length)
        return self.head(torch.fft.irfft(spectrum, 2 * length)[..., :length].mT)


def build_model(vocab_size, seq_len):
    return Model(vocab_size)


def main():
    data = prepare.load()
    model = build_model(data.vocab_size, data.seq_len).to(data.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data.start(model)
    steps = 0
    while not data.expired():
        x, y = data.gather(torch.randint(data.num_tokens - 33, (4,)), 32)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    prepare.finish(model, steps=steps, tokens=128 * steps)


if __name__ == "__main__":
    main()
