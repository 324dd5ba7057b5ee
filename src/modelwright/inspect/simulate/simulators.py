"""Simulators of training: from the order of the examples and the first losses to the losses of every step."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.core.numbers.stats import spearman
from modelwright.inspect.simulate.runs import Runs


def roll_out(phi: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """phi_t = sum_j alpha[j, t] phi_{t-1-j} + beta[t] from the first losses phi (R, M); alpha (n, R, T, M), beta (R, T, M).

    Losses before the first are 0, as in the official code. Returns (R, T + 1, M).
    """
    found = [phi]
    for t in range(beta.shape[1]):
        step = beta[:, t]
        for j in range(min(len(alpha), t + 1)):
            step = step + alpha[j, :, t] * found[t - j]
        found.append(step)
    return torch.stack(found, 1)


def one_step(phi: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """The same with the true losses (R, T + 1, M) as history: (R, T, M), the losses from the second on."""
    found = beta
    steps = beta.shape[1]
    for j in range(len(alpha)):
        past = torch.cat([torch.zeros_like(phi[:, :j]), phi[:, : steps - j]], 1)
        found = found + alpha[j] * past
    return found


def coefficients(seen: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """alpha (n, R, T, M) and beta (R, T, M) from what the pairs add: a (n, N, M), b (N, M).

    Without any example alpha_1 is 1 and the loss stays: a sum that began at 0 would take a batch of half the size for half the loss.
    """
    alpha = torch.einsum("rtn,jnm->jrtm", seen, a)
    return torch.cat([alpha[:1] + 1, alpha[1:]]), seen @ b


# ---- without parameters to search ------------------------------------------------------------------------------------------
def constant(train: Runs, test: Runs) -> np.ndarray:
    """Nothing changes."""
    return np.repeat(test.phi[:, :1], test.phi.shape[1], 1)


def mean_curve(train: Runs, test: Runs) -> np.ndarray:
    """Every run is the mean of the runs seen, from its own first loss on. It knows nothing of examples."""
    curve = train.phi.mean(0)
    return test.phi[:, :1] + (curve - curve[:1])[None]


def tables(train: Runs, ridge: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    """Simfluence: A and B of each pair of training and test example, (N, M) each, by ridge regression. What they add is learnt."""
    seen, n = train.seen.reshape(-1, train.seen.shape[-1]), train.seen.shape[-1]
    a, b = np.zeros((2, n, train.phi.shape[-1]))
    for m in range(train.phi.shape[-1]):
        before, after = train.phi[:, :-1, m].ravel(), train.phi[:, 1:, m].ravel()
        x = np.concatenate([seen * before[:, None], seen], 1)
        found = np.linalg.solve(x.T @ x + ridge * np.eye(2 * n), x.T @ (after - before))
        a[:, m], b[:, m] = found[:n], found[n:]
    return a, b


def by_tables(a: np.ndarray, b: np.ndarray, runs: Runs) -> np.ndarray:
    """Roll-out of tables."""
    alpha, beta = coefficients(torch.from_numpy(runs.seen), torch.from_numpy(a)[None], torch.from_numpy(b))
    return roll_out(torch.from_numpy(runs.phi[:, 0]), alpha, beta).numpy()


def tracin_terms(runs: Runs, kernel: np.ndarray) -> np.ndarray:
    """-lr sum_i <g_i, g'> of each step, (R, T, M): what one step of SGD changes, to first order."""
    return -runs.lr[..., None] * (runs.seen @ kernel) / np.maximum(runs.seen.sum(-1, keepdims=True), 1)


def tracin(train: Runs, test: Runs, kernel: np.ndarray) -> np.ndarray:
    """TracIn with gradients of the first checkpoint; one scale for all, fitted on the training runs (the official code fits it on the test
    runs, so that its baseline is told the answer)."""
    moved = np.diff(train.phi, axis=1)
    terms = tracin_terms(train, kernel)
    scale = float((terms * moved).sum() / max((terms * terms).sum(), 1e-30))
    return np.concatenate([test.phi[:, :1], test.phi[:, :1] + scale * tracin_terms(test, kernel).cumsum(1)], 1)


def _kernel_features(phi: np.ndarray, runs: Runs, kernel: np.ndarray, t: int) -> np.ndarray:
    """(R, M, 5): what the step's change is regressed on; `phi` (R, M) is the loss before."""
    term = -(runs.seen[:, t] @ kernel) / np.maximum(runs.seen[:, t].sum(-1, keepdims=True), 1)
    share = np.full_like(phi, t / max(1, runs.seen.shape[1] - 1))
    rate = np.broadcast_to(runs.lr[:, t : t + 1], phi.shape)
    return np.stack([rate * np.ones_like(phi), rate * phi, rate * term, rate * np.sign(term), rate * share], -1)


def gradient_kernel(train: Runs, test: Runs, kernel: np.ndarray, ridge: float = 1e-4) -> np.ndarray:
    """Ours: the change of a loss from the loss, the gradient kernel of its batch and the time, one ridge regression for all tests, so that
    tests that were never seen are simulated too."""
    kernel = kernel / (np.abs(kernel).mean() + 1e-30)
    steps = train.seen.shape[1]
    x = np.concatenate([_kernel_features(train.phi[:, t], train, kernel, t).reshape(-1, 5) for t in range(steps)])
    y = np.concatenate([(train.phi[:, t + 1] - train.phi[:, t]).ravel() for t in range(steps)])
    spread = np.sqrt((x * x).mean(0)) + 1e-30
    z = x / spread
    w = np.linalg.solve(z.T @ z + ridge * len(z) * np.eye(5), z.T @ y) / spread
    found = [test.phi[:, 0]]
    for t in range(steps):
        found.append(found[-1] + _kernel_features(found[-1], test, kernel, t) @ w)
    return np.stack(found, 1)


# ---- GPTfluence ------------------------------------------------------------------------------------------------------------
class Gptfluence(nn.Module):
    """alpha_j(c, z') = sum over the batch of <f_j(h_i), f_j(h')>, beta likewise; f is Linear, ReLU, Linear, one for both sides.

    The products begin near 0 and are added to alpha_1 = 1: a sum from the default initialisation makes roll-outs explode.
    """

    def __init__(self, width: int, order: int, batch: float, hidden: int = 64):
        super().__init__()
        self.batch = batch
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden)) for _ in range(order + 1))
        for net in self.nets:
            nn.init.normal_(net[2].weight, std=0.1 / math.sqrt(hidden))  # type: ignore[arg-type, union-attr, index]

    def tables(self, h: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
        """A (n, N, M) and B (N, M)."""
        products = [net(h) @ net(to).T / self.batch for net in self.nets]
        return torch.stack(products[:-1]), products[-1]


def fit_gptfluence(
    train: Runs, h: Tensor, to: Tensor, *, order: int, objective: str, epochs: int, lr: float, seed: int, tick: Callable[[int], None]
) -> Gptfluence:
    """Learn on all steps of all runs at once; a fifth of the runs says when to stop, by the error of whole roll-outs."""
    torch.manual_seed(seed)
    seen, phi = torch.from_numpy(train.seen).float(), torch.from_numpy(train.phi).float()
    at = max(1, len(train) - max(1, len(train) // 5))
    model = Gptfluence(h.shape[1], order, train.batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=1e-5)
    best, state, waited = math.inf, {k: v.clone() for k, v in model.state_dict().items()}, 0

    def predicted(part: slice, how: str) -> Tensor:
        a, b = model.tables(h, to)
        alpha, beta = coefficients(seen[part], a, b)
        return roll_out(phi[part, 0], alpha, beta)[:, 1:] if how == "roll_out" else one_step(phi[part], alpha, beta)

    for epoch in range(epochs):
        if epoch % 10 == 0:
            with torch.no_grad():
                error = float((predicted(slice(at, None), "roll_out") - phi[at:, 1:]).square().mean())
            waited = 0 if error < best else waited + 1
            if error < best:
                best, state = error, {k: v.clone() for k, v in model.state_dict().items()}
            if waited > 10:
                break
        optimizer.zero_grad()
        loss = (predicted(slice(0, at), objective) - phi[:at, 1:]).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tick(1)
    model.load_state_dict(state)
    return model


@torch.no_grad()
def by_gptfluence(model: Gptfluence, h: Tensor, to: Tensor, runs: Runs) -> np.ndarray:
    """Roll-out."""
    a, b = model.tables(h, to)
    return roll_out(torch.from_numpy(runs.phi[:, 0]).float(), *coefficients(torch.from_numpy(runs.seen).float(), a, b)).numpy()


# ---- how good ----------------------------------------------------------------------------------------------------------------
def errors(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """All-steps MSE and MAE over the steps after the first, and Spearman's rho over tests at the last step, averaged over runs."""
    gap = found[:, 1:] - truth[:, 1:]
    rho = [spearman(f, t) for f, t in zip(found[:, -1], truth[:, -1], strict=True)]
    return {"mse": float((gap**2).mean()), "mae": float(np.abs(gap).mean()), "final_rho": float(np.mean(rho))}


def lds(found: np.ndarray, truth: np.ndarray) -> float:
    """Linear datamodelling score: Spearman's rho over retrained subsets of predicted and true last losses, averaged over tests; (K, M)."""
    return float(np.mean([spearman(found[:, m], truth[:, m]) for m in range(truth.shape[1])]))


def left_out_effects(a: np.ndarray, b: np.ndarray, runs: Runs) -> np.ndarray:
    """By how much the mean last loss of each test rises when an example is replaced by the average of the others; (N, M).

    Every run is rolled out once for each example, all together; what is positive was helpful. a (n, N, M), b (N, M).
    """
    n = runs.seen.shape[-1]
    phi0, effects = torch.from_numpy(runs.phi[:, 0]).double(), []
    seen = torch.from_numpy(runs.seen).double()
    ta, tb = torch.from_numpy(a).double(), torch.from_numpy(b).double()
    alpha, beta = coefficients(seen, ta, tb)
    usual = roll_out(phi0, alpha, beta)[:, -1]
    others_a, others_b = (ta.sum(1, keepdim=True) - ta) / max(1, n - 1), (tb.sum(0, keepdim=True) - tb) / max(1, n - 1)
    for i in range(n):
        count = seen[..., i, None]
        moved = roll_out(phi0, alpha + count * (others_a - ta)[:, None, None, i], beta + count * (others_b - tb)[i])[:, -1]
        effects.append((moved - usual).mean(0))
    return torch.stack(effects).numpy()
