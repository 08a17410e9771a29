"""`python -m benchmarks.silent_cloning RUN`: a policy from silent expert video, in Catch.

RUN is a Genie that has watched random play (`zoo fit genie/catch-video`). An expert that follows
the ball is filmed. One policy learns the latent actions which Genie reads off that video, and a
number of labelled steps of random play say what these stand for; another, of the same network,
batches and updates, learns the expert's true actions. Both then play the real game. Returns are
means over fresh episodes: 1 is a ball caught, -1 one missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import datamodules.envs.catch  # noqa: F401  registers the environment
from zoo.commands.output import table
from zoo.genie.clips import pixels
from zoo.genie.cloning import ActionMap, Clone, spans
from zoo.genie.module import Genie
from zoo.genie.stages import Rate
from zoo.runs import Run, load

FALL = 1  # pixels in a step, as in the recording of `genie/catch-video`
ACTIONS = 3  # stay, left, right
BATCH, CLIP = 16, 1.0
RATE = Rate(lr=3e-3, final=1e-4, warmup=50)

Act = Callable[[np.ndarray], int]  # from the frames (T, H, W, C) of an episode so far


def follow(frames: np.ndarray) -> int:
    """The expert: moves the middle of the paddle towards the ball."""
    image = frames[-1].astype(int).sum(-1)
    ball = np.argwhere(image == 3 * 255)[:, 1].mean()
    paddle = np.argwhere((image > 0) & (image < 3 * 255))[:, 1].mean()
    return 0 if abs(ball - paddle) < 1 else 1 if ball < paddle else 2


def play(act: Act, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames uint8 (N, T, H, W, C), actions int64 (N, T - 1) and returns (N,) of episodes."""
    env = gym.make("zoo/Catch-v0", fall=FALL)
    videos, taken, returns = [], [], []
    for episode in range(episodes):
        frames, actions, total, over = [env.reset(seed=seed + episode)[0]], [], 0.0, False
        while not over:
            actions.append(act(np.stack(frames)))
            image, reward, over, _, _ = env.step(actions[-1])
            frames.append(image)
            total += float(reward)
        videos.append(np.stack(frames))
        taken.append(actions)
        returns.append(total)
    return np.stack(videos), np.array(taken), np.array(returns)


def clone(model: Genie, video: Tensor, labels: Tensor, actions: int, updates: int) -> Clone:
    """A policy of this model's kind, that says the labels (N, T - 1) of frames (N, T, H, W, C)."""
    torch.manual_seed(0)
    policy = Clone(model.clone.patches, model.clone.transformer.shape, actions, model.clone.frames)
    optimizer = torch.optim.AdamW(policy.parameters(), RATE.lr)
    windows = spans(video[:, :-1], policy.frames)
    labels = spans(labels, policy.frames)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = RATE.at(update, updates)
        chosen = torch.randint(len(windows), (BATCH,))
        logits = policy(pixels(windows[chosen]))
        F.cross_entropy(logits.flatten(0, 1), labels[chosen].flatten()).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return policy.eval()


def acting(policy: Clone, translate: Callable[[Tensor], Tensor]) -> Act:
    """What a policy does, likeliest actions only, by what its own actions stand for."""

    @torch.no_grad()
    def act(frames: np.ndarray) -> int:
        seen = torch.from_numpy(frames[-policy.frames :])[None]
        latent = policy.choose(pixels(seen), torch.tensor([seen.shape[1]]), draw=False)
        return int(translate(latent))

    return act


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--films", type=int, default=200, help="episodes of the expert")
    parser.add_argument("--labelled", type=int, default=200, help="labelled steps of random play")
    parser.add_argument("--updates", type=int, default=3000, help="of each policy")
    parser.add_argument("--episodes", type=int, default=200, help="played by each")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = load(Run(options.run).checkpoint()).eval()
    if not isinstance(model, Genie):
        parser.error(f"{options.run} is no run of genie")
    rng = np.random.default_rng(0)

    def random(_: np.ndarray) -> int:
        return int(rng.integers(ACTIONS))

    video, actions, filmed = play(follow, options.films, seed=10_000)
    film, truth = torch.from_numpy(video), torch.from_numpy(actions)
    latent = torch.cat([model.infer_actions(part) for part in film.split(32)])
    known, labels, _ = play(random, -(-options.labelled // actions.shape[1]), seed=20_000)
    stands_for = ActionMap(model.num_latent_actions, ACTIONS)
    read = model.infer_actions(torch.from_numpy(known))
    stands_for.add(read.flatten(), torch.from_numpy(labels).flatten(), options.labelled)

    silent = clone(model, film, latent, model.num_latent_actions, options.updates)
    oracle = clone(model, film, truth, ACTIONS, options.updates)
    right = (stands_for.translate(latent, draw=False) == truth).float().mean()
    policies = {
        "random": random,
        "expert": follow,
        f"silent video, {options.labelled} labelled steps": acting(
            silent, lambda code: stands_for.translate(code, draw=False)
        ),
        f"all {truth.numel():,} actions known": acting(oracle, lambda code: code),
    }
    rows = []
    for name, act in policies.items():
        score = play(act, options.episodes, seed=30_000)[2]
        error = score.std() / max(1, len(score)) ** 0.5
        rows.append([name, f"{score.mean():.2f}", f"{error:.2f}"])
    print(f"{right:.3f} of the filmed actions are read right; the filmed return is {filmed.mean()}")
    table(["policy", "return", "standard error"], rows)


if __name__ == "__main__":
    main()
