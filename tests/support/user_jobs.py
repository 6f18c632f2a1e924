"""What users give to a comparison beyond a model, pairs and a loss: steps, batches, metrics, optimizers, arms."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from shims.torchvision_operators import make_torchvision_importable
from torch import Tensor, nn
from torch.utils.data import default_collate

from syncnorm.tools.compare import Metric


def block(a, b):
    # Without a bias, whose gradient before a batch norm is rounding alone, which Adam would amplify.
    return nn.Sequential(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU())


class Pairs(torch.utils.data.Dataset):
    """Two views of a point, with random noise, and whether its first coordinate is positive."""

    def __init__(self, size, noise=0.1):
        self.points = torch.randn(size, 6, generator=torch.Generator().manual_seed(size))
        self.noise = noise

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        point = self.points[index]
        views = {name: point + self.noise * torch.randn(6) for name in ("left", "right")}
        return {**views, "label": int(point[0] > 0)}


def pairs():
    return Pairs(64), Pairs(40, noise=0.0)


@dataclass
class Batch:
    views: list[Tensor]
    label: Tensor


def batch_of_views(items):
    stacked = default_collate(items)
    return Batch([stacked["left"], stacked["right"]], stacked["label"])


class TwoViews(nn.Module):
    """A network that a step calls twice, by a method of its own too; one layer is not used."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.unused = block(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        return self.body(x)

    def classify(self, features):
        return self.head(features)


def two_views():
    return TwoViews()


def two_view_step(model, batch):
    left, right = (model(view) for view in batch.views)
    assert isinstance(batch, Batch)
    return {"class": F.cross_entropy(model.classify(left), batch.label), "same": 0.1 * F.mse_loss(left, right)}


def right(model, batch):
    return (model.classify(model(batch.views[0])).argmax(1) == batch.label).double()


right.higher_is_better, right.share, right.name = True, True, "right labels"


class LargestError:
    """Accumulates: the largest squared error, which no mean over samples gives."""

    higher_is_better = False

    def __init__(self):
        self.largest = 0.0

    def update(self, model, batch):
        probability = model.classify(model(batch.views[0])).softmax(1)
        wrong = (1 - probability.gather(1, batch.label.unsqueeze(1))).square()
        self.largest = max(self.largest, float(wrong.max()))

    def compute(self):
        return torch.tensor(self.largest)


LARGEST = Metric(LargestError, "largest error", higher_is_better=False)


class ByTorchmetrics:
    """Accuracy by torchmetrics, which gathers over all ranks unless it is told not to."""

    higher_is_better = share = True

    def __init__(self):
        make_torchvision_importable()  # torchmetrics imports it
        from torchmetrics.classification import MulticlassAccuracy

        self.metric = MulticlassAccuracy(2, average="micro")

    def update(self, model, batch):
        self.metric.update(model.classify(model(batch.views[0])), batch.label)

    def compute(self):
        return self.metric.compute()


def two_optimizers(model):
    return [torch.optim.Adam(model.body.parameters(), lr=0.01), torch.optim.SGD(model.head.parameters(), lr=0.1)]


def gan():
    generator = nn.Sequential(block(2, 8), nn.Linear(8, 6))
    return nn.ModuleDict({"G": generator, "D": nn.Sequential(block(6, 8), nn.Linear(8, 1))})


def gan_optimizers(model):
    # Not Adam: the generator's last bias has no effect through the batch norm, and Adam would amplify its rounding.
    return {name: torch.optim.SGD(network.parameters(), lr=0.05) for name, network in model.items()}


def gan_step(model, batch, optimizers):
    generator, discriminator, real = model["G"], model["D"], batch["left"]
    fake = generator(real[:, :2])
    d_loss = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean()
    optimizers["D"].zero_grad()
    d_loss.backward()
    optimizers["D"].step()
    g_loss = F.softplus(-discriminator(fake)).mean()
    optimizers["G"].zero_grad()
    g_loss.backward()
    optimizers["G"].step()
    return {"d": d_loss, "g": g_loss}


def distance(model, batch):
    return (model["G"](batch["left"][:, :2]) - batch["left"]).square().mean(1)


distance.higher_is_better = False


def without_biases(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.bias = None


def with_layer_norm(model):
    model.body[1] = nn.LayerNorm(8)
    return model
