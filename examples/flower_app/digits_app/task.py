"""Model, data, training and evaluation."""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small network for images of 8 x 8."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


@cache
def load_all():
    """All images in an order that is the same everywhere; the last 297 are the server's, for its test."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.tensor(data.data[order] / 16.0, dtype=torch.float32)
    labels = torch.tensor(data.target[order], dtype=torch.int64)
    return images, labels


def load_data(partition_id, num_partitions, batch_size):
    """Train and test loader of one client: every num_partitions-th image, a fifth of them held out."""
    images, labels = (part[:1500][partition_id::num_partitions] for part in load_all())
    held_out = max(len(labels) // 5, 1)
    train = TensorDataset(images[held_out:], labels[held_out:])
    test = TensorDataset(images[:held_out], labels[:held_out])
    return DataLoader(train, batch_size=batch_size, shuffle=True), DataLoader(test, batch_size=256)


def load_central_test():
    images, labels = (part[1500:] for part in load_all())
    return DataLoader(TensorDataset(images, labels), batch_size=256)


def train(net, loader, epochs, lr):
    """Train; the mean loss of the last epoch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    for _ in range(epochs):
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / len(loader)


@torch.no_grad()
def test(net, loader):
    """Mean loss and accuracy."""
    net.eval()
    loss, correct = 0.0, 0
    for images, labels in loader:
        outputs = net(images)
        loss += nn.functional.cross_entropy(outputs, labels, reduction="sum").item()
        correct += (outputs.argmax(1) == labels).sum().item()
    return loss / len(loader.dataset), correct / len(loader.dataset)
