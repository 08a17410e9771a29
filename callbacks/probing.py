"""Probes: how well the truth can be read out of features that were not trained for it.

All scores are R^2 on clips of their own: 1 - squared error / variance, both summed over the
numbers of the truth. 1 is perfect, 0 is guessing the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.spec import Spec

STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the ridge; what a third part of the data says
NEIGHBOURS = 5
ATTENTIVE_UPDATES = 500
ATTENTIVE_BATCH = 128
_TOGETHER = 32  # clips that are encoded at once


class Truth(NamedTuple):
    """N clips of T steps and what is to be read out of them.

    Attributes:
        obs: {key: (N, T, ...)}.
        value: (N, T, D) float32.
        action: (N, T - 1, ...) what was done between the steps, if that is known.
    """

    obs: dict[str, Tensor]
    value: Tensor
    action: Tensor | None = None


def record_truth(
    make_env: Callable[[], gym.Env],
    key: str | None,
    clips: int,
    length: int,
    seed: int,
    hold: int = 4,
) -> Truth:
    """Plays clips with random actions, each held for 1 to `hold` steps, one clip an episode.

    A clip begins at a random step within its episode, if that is long enough.

    Args:
        make_env: builds the environment, whose `info` has the truth.
        key: under which; None for no truth, (N, T, 0).
        clips: N.
        length: T.
        seed: of environments and actions.
        hold: longest time that an action is held.

    Raises:
        UserError: no such key in `info`, or episodes shorter than a clip.
    """
    env = make_env()
    rng = np.random.default_rng(seed)
    action_spec = Spec.from_spaces(env.observation_space, env.action_space).action
    frames: list[list[Any]] = []
    values: list[list[np.ndarray]] = []
    actions: list[list[np.ndarray]] = []
    tries = 0
    while len(frames) < clips:
        obs, info = env.reset(seed=int(rng.integers(2**31)))
        seen, truth, over, left = [obs], [_truth(info, key, env)], False, 0
        done: list[np.ndarray] = []
        wanted = length + int(rng.integers(length))
        while not over and len(seen) < wanted:
            if not left:
                action, left = action_spec.sample(rng), int(rng.integers(1, hold + 1))
            obs, _, terminated, truncated, info = env.step(action)
            over, left = terminated or truncated, left - 1
            seen.append(obs)
            truth.append(_truth(info, key, env))
            done.append(np.asarray(action))
        tries += 1
        if len(seen) >= length:
            frames.append(seen[-length:])
            values.append(truth[-length:])
            actions.append(done[len(done) - length + 1 :])
        elif tries >= 10 * clips:
            raise UserError(
                f"episodes are hardly ever {length} steps long: probe with a shorter clip_length"
            )
    env.close()
    together = {k: np.stack([[o[k] for o in clip] for clip in frames]) for k in frames[0][0]}
    return Truth(
        {k: torch.from_numpy(v) for k, v in together.items()},
        torch.from_numpy(np.stack(values).astype(np.float32)),
        torch.from_numpy(np.stack([np.stack(done) for done in actions])) if length > 1 else None,
    )


@torch.no_grad()
def features(encode: Callable[[dict[str, Tensor]], Tensor], truth: Truth, device: Any) -> Tensor:
    """What `encode` makes of all clips, (N, ...) float32 on the CPU."""
    found = []
    for start in range(0, len(truth.value), _TOGETHER):
        rows = slice(start, start + _TOGETHER)
        found.append(encode({k: v[rows].to(device) for k, v in truth.obs.items()}).float().cpu())
    return torch.cat(found)


def linear_r2(x: Tensor, truth: Tensor) -> float:
    """Ridge regression from features (N, T, F) to truths (N, T, D).

    It is fitted on half of the clips, its strength chosen on a quarter, and scored on the last.
    """
    (fit, choose, test), (y_fit, y_choose, y_test) = _parts(x), _parts(truth)
    mean, scale = fit.mean(0), fit.std(0).clamp(min=1e-6)
    fit, choose, test = ((part - mean) / scale for part in (fit, choose, test))
    centre = y_fit.mean(0)
    gram, cross = fit.T @ fit / len(fit), fit.T @ (y_fit - centre) / len(fit)
    eigenvalues, basis = torch.linalg.eigh(gram)
    cross = basis.T @ cross

    def weights(strength: float) -> Tensor:
        return basis @ (cross / (eigenvalues.clamp(min=0) + strength)[:, None])

    def score(strength: float, x: Tensor, y: Tensor) -> float:
        return _r2(x @ weights(strength) + centre, y)

    best = max(STRENGTHS, key=lambda strength: score(strength, choose, y_choose))
    return score(best, test, y_test)


def nearest_r2(x: Tensor, truth: Tensor) -> float:
    """Mean truth of the nearest neighbours, by cosine of standardised features (N, T, F)."""
    (fit, _, test), (y_fit, _, y_test) = _parts(x), _parts(truth)
    mean, scale = fit.mean(0), fit.std(0).clamp(min=1e-6)
    fit, test = (F.normalize((part - mean) / scale, dim=-1) for part in (fit, test))
    count = min(NEIGHBOURS, len(fit))
    found = [y_fit[(rows @ fit.T).topk(count).indices].mean(1) for rows in test.split(512)]
    return _r2(torch.cat(found), y_test)


class AttentiveProbe(nn.Module):
    """A learned query that attends to tokens (B, P, F), and a linear map of what it finds.

    After V-JEPA's (Bardes et al., 2024, section 4), without its MLP, residual and further heads: it
    may pick patches, but not compute with them.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)
        self.out = nn.Linear(width, out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Truths (B, D)."""
        tokens = self.norm(tokens)
        query = self.query.expand(len(tokens), -1, -1)
        found, _ = self.attention(query, tokens, tokens, need_weights=False)
        out: Tensor = self.out(found[:, 0])
        return out


def attentive_r2(tokens: Tensor, truth: Tensor, seed: int = 0) -> float:
    """An `AttentiveProbe` on tokens (N, T, ..., F) of truths (N, T, D).

    It learns from three quarters of the clips and is scored on the last.
    """
    quarter = len(tokens) // 4
    x, y = tokens.flatten(2, -2), truth
    centre, scale = y[:-quarter].mean((0, 1)), y[:-quarter].std((0, 1)).clamp(min=1e-6)
    fit, y_fit = x[:-quarter].flatten(0, 1), ((y[:-quarter] - centre) / scale).flatten(0, 1)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        probe = AttentiveProbe(x.shape[-1], y.shape[-1])
        optimizer = torch.optim.AdamW(probe.parameters(), 3e-3, weight_decay=1e-3)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, ATTENTIVE_UPDATES)
        for _ in range(ATTENTIVE_UPDATES):
            rows = torch.randint(len(fit), (ATTENTIVE_BATCH,))
            optimizer.zero_grad()
            F.mse_loss(probe(fit[rows]), y_fit[rows]).backward()
            optimizer.step()
            rate.step()
    with torch.no_grad():
        test = x[-quarter:].flatten(0, 1)
        found = torch.cat([probe(part) for part in test.split(512)])
    return _r2(found * scale + centre, y[-quarter:].flatten(0, 1))


def _parts(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps of half of the clips, of a quarter, and of the rest: (n, F) float64 each."""
    quarter = len(values) // 4
    split = values.double().split([len(values) - 2 * quarter, quarter, quarter])
    fit, choose, test = (part.flatten(0, 1) for part in split)
    return fit, choose, test


def _r2(found: Tensor, truth: Tensor) -> float:
    error = (found - truth).square().sum()
    return float(1 - error / (truth - truth.mean(0)).square().sum().clamp(min=1e-12))


def _truth(info: dict[str, Any], key: str | None, env: gym.Env) -> np.ndarray:
    if key is None:
        return np.zeros(0, np.float32)
    if key not in info:
        known = ", ".join(sorted(info)) or "nothing"
        raise UserError(f"the `info` of {env} has no '{key}' to probe for, only {known}")
    return np.asarray(info[key], np.float32).reshape(-1)
