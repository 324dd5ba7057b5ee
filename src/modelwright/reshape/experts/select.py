"""Which experts a token needs: the mass each would contribute, and routers that predict it.

mass[t, e] = sum over the expert's neurons of |h_i| * |W_down[:, i]|. For a ReLU layer without gate the paper sums the
activations alone; with a gate a negative h counts too (2110.01786 is not meant for such layers), and the norm of the
column says what the neuron adds to the output [ours].

- oracle: the k experts of largest mass. It costs the whole layer, so it is an upper bound, not a router.
- similarity: the mean of the expert's normalised gate rows, itself normalised: x . c_e. The paper's score is -|x/|x| - c_e| with c_e
  as it is, which is no linear map of x; with equal norms the order is the same.
- mlp: the paper's Linear(d, E) -> tanh -> Linear(E, E) on x / |x|, from the centres and the identity, binary cross-entropy against
  mass / max(mass of the batch), Adam 1e-2, 30 epochs of 512, 90 / 10 in order. The official code keeps the second best
  epoch by an oversight; we keep the best. No stock class has such a router.
- linear: the least squares fit of the MLP's logits, centred over experts: what a stock router can hold.
- ridge: the least squares fit of the masses themselves, in closed form, without an MLP [ours].
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelwright.moe.partition import group_means
from modelwright.reshape.experts.routers import generator


def masses(strength: Tensor, labels: Tensor, experts: int) -> Tensor:
    """(n, E) from strengths (n, F) = |h| * |down column|; neurons with label -1 are always on and have no expert."""
    member = torch.nn.functional.one_hot(labels.clamp(min=0), experts).to(strength.dtype) * (labels >= 0)[:, None]
    return strength @ member


def captured(score: Tensor, mass: Tensor, k: int) -> float:
    """Mean share of a token's mass that lies in the k experts of highest score; (n, E) both."""
    chosen = mass.gather(1, score.topk(k, 1).indices).sum(1)
    total = mass.sum(1)
    return float(torch.where(total > 0, chosen / total.clamp(min=1e-30), 1.0).mean())


def centres(gate: Tensor, labels: Tensor, experts: int) -> Tensor:
    """Mean normalised gate row of each expert (E, d)."""
    routed = labels >= 0
    return group_means(torch.nn.functional.normalize(gate[routed].float(), dim=1), labels[routed], experts)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=1)


@dataclass
class MlpRouter:
    """The paper's router; `quality` is the share of mass that its choice captured on the last tenth of the text."""

    net: nn.Sequential
    quality: float

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.net(unit(x))


def train_mlp(
    x: Tensor, mass: Tensor, start: Tensor, k: int, *, epochs: int = 30, batch: int = 512, seed: int = 0, layer: int = 0
) -> MlpRouter:
    """Fit the MLP router to inputs x (n, d) and masses (n, E); the best epoch is kept."""
    n, e = len(x), mass.shape[1]
    first, last = nn.Linear(x.shape[1], e, bias=False), nn.Linear(e, e, bias=False)
    net = nn.Sequential(first, nn.Tanh(), last)
    with torch.no_grad():
        first.weight.copy_(start)
        last.weight.copy_(torch.eye(e))
    x, split, g = unit(x), max(1, n - max(1, n // 10)), generator(seed, "mlp", layer)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    best, kept = -1.0, net.state_dict()
    for _ in range(epochs):
        for part in torch.randperm(split, generator=g).split(batch):
            target = mass[part] / mass[part].max().clamp(min=1e-30)
            loss = nn.functional.binary_cross_entropy_with_logits(net(x[part]), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            quality = captured(net(x[split:]), mass[split:], k) if split < n else captured(net(x), mass, k)
        if quality > best:
            best, kept = quality, {name: p.clone() for name, p in net.state_dict().items()}
    net.load_state_dict(kept)
    return MlpRouter(net.requires_grad_(False), best)


def least_squares(x: Tensor, target: Tensor, strength: float = 1e-2) -> Tensor:
    """Rows (E, d) of the ridge fit of target (n, E), centred over experts, on x / |x|; strength in units of the mean squared input."""
    x, t = unit(x).double(), target.double() - target.double().mean(1, keepdim=True)
    gram = x.T @ x / len(x)
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram, x.T @ t / len(x)).T.float()
