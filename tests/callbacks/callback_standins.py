"""Small models, data and environments with known behaviour."""

import time
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from callbacks.checkpoint import RunCheckpoint
from callbacks.logger import RunLogger
from datamodules.envs.factory import make_env
from datamodules.envs.sprites import MOVES, move_agent, render_sprites
from datamodules.envs.wrappers import DictObservation
from datamodules.spec import ArraySpec, Spec
from zoo.base import Imagined, ZooModel

EPISODE = 40
SPRITES = Spec({"image": ArraySpec((32, 32, 3), "uint8")})


class Walk(gym.Env):
    """The position moves by one to the right (action 1) or left; its value is the reward."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, image=False, terminates=True):
        self.image, self.terminates = image, terminates
        self.observation_space = (
            gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
            if image
            else gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = 0, 0
        return self._obs(), {}

    def step(self, action):
        self.x += 1 if action == 1 else -1
        self.t += 1
        over = self.t >= EPISODE
        return self._obs(), float(self.x), over and self.terminates, over, {}

    def _obs(self):
        if self.image:
            return np.full((16, 16, 3), 3 * self.x, np.uint8)
        return np.array([self.x, self.t], np.float32)


def walk_spec(image=False):
    env = Walk(image)
    return Spec.from_spaces(env.observation_space, env.action_space)


class TinyModel(ZooModel):
    """Learns noise with dropout, so that it shows every disturbed random number."""

    name = "tiny"

    def __init__(self, spec=None, nan_at=None, sleep=0.0):
        super().__init__(spec or walk_spec())
        self.keep_hyperparameters(locals())
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.nan_at, self.sleep = nan_at, sleep

    def training_step(self, batch, batch_idx):
        time.sleep(self.sleep)
        error = self.net(batch).square().mean()
        extra = error.detach() * (float("nan") if self.updates == self.nan_at else 1.0)
        return self.total_loss({"error": error, "extra": extra}, {"error": 1.0, "extra": 1.0})

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)

    def initial_state(self, batch_size):
        return {"steps": torch.zeros(batch_size, 1)}

    def act(self, obs, state, *, explore):
        go = (torch.rand(len(state["steps"])) < 0.5 + self.net[0].bias[0]).long()
        return go, {"steps": state["steps"] + 1}


class PerfectDreamer(TinyModel):
    """Knows `Walk` and always walks right; promises `greed` times the reward."""

    name = "perfect"

    def __init__(self, spec=None, greed=1.0):
        super().__init__(spec)
        self.greed = greed
        self.is_image = "image" in self.spec.obs

    def act(self, obs, state, *, explore):
        return torch.ones(len(state["steps"]), dtype=torch.int64), state

    def observe(self, batch):
        if self.is_image:
            x = batch["obs"]["image"][..., 0, 0, 0].float() / 3
            return {"x": torch.stack([x, torch.arange(x.shape[1]).expand_as(x)], -1)}
        return {"x": batch["obs"]["vector"]}

    def imagine(self, state, actions, horizon):
        x = state["x"]
        action = torch.ones(len(x), horizon, dtype=torch.int64) if actions is None else actions
        moves = torch.stack([2.0 * action - 1, torch.ones(action.shape)], -1)
        states = x[:, None] + moves.cumsum(1)
        cont = (states[..., 1] < EPISODE).float()
        return Imagined(self.greed * states[..., 0], cont, {"x": states}, action)

    def decode(self, state):
        if not self.is_image:
            return {"vector": state["x"]}
        value = state["x"][..., :1] * 3 / 255
        return {"image": value[..., None, None].expand(*value.shape[:2], 16, 16, 3)}


class TinyData(pl.LightningDataModule):
    """Noise from the global generator and from one of its own; two env steps per batch."""

    def __init__(self, updates_per_epoch=10, image=False, terminates=True):
        super().__init__()
        self.length = updates_per_epoch
        self.make_env = lambda: DictObservation(Walk(image, terminates))
        self.env_steps = 0
        self.progress = None
        self.collector = SimpleNamespace(finished=[])
        self.rng = np.random.default_rng(0)
        self.saves = 0

    def state_dict(self):
        self.saves += 1
        generator = {**self.rng.bit_generator.state["state"]}
        return {
            "env_steps": self.env_steps,
            "torch": torch.get_rng_state(),
            "rng": {k: str(v) for k, v in generator.items()},
        }

    def load_state_dict(self, state):
        self.env_steps = state["env_steps"]
        self.restored = state

    def setup(self, stage):
        self.restored = None

    def train_dataloader(self):
        return _Loader(self)

    def next_batch(self):
        if self.restored is not None:
            torch.set_rng_state(self.restored["torch"])
            state = self.rng.bit_generator.state
            state["state"] = {k: int(v) for k, v in self.restored["rng"].items()}
            self.rng.bit_generator.state = state
            self.restored = None
        elif self.env_steps == 0:
            torch.manual_seed(1)
        self.env_steps += 2
        self.collector.finished.append(SimpleNamespace(return_=1.0, length=2, env_steps=2))
        if self.progress is not None:
            self.progress()
        return torch.as_tensor(self.rng.normal(size=(3, 4)), dtype=torch.float32)


class Knows(TinyModel):
    """Sees where the one sprite is, and calls the move that was made by the next number."""

    needs_actions = False
    num_latent_actions = 5

    def __init__(self):
        super().__init__(SPRITES)

    def infer_actions(self, video):
        place = self.observe({"obs": {"image": video}})["place"]
        moves = torch.from_numpy(np.sign(MOVES)).float()
        near = (place.diff(dim=1).sign()[:, :, None] - moves).abs().sum(-1)
        return (near.argmin(-1) + 1) % 5

    def observe(self, batch):
        lit = (batch["obs"]["image"][..., 0] > 0).float()
        axis = torch.arange(32.0)
        count = lit.sum((-2, -1))
        x, y = (lit.sum(-2) * axis).sum(-1) / count, (lit.sum(-1) * axis).sum(-1) / count
        return {"place": torch.stack([x, y], -1)}

    def imagine(self, state, actions, horizon):
        place, places = state["place"].numpy(), []
        for step in range(horizon):
            place, _ = move_agent(place, (actions[:, step].numpy() - 1) % 5)
            places.append(torch.from_numpy(place).float())
        flat = torch.zeros(len(place), horizon)
        return Imagined(flat, flat + 1, {"place": torch.stack(places, 1)}, actions)

    def decode(self, state):
        none = np.zeros((*state["place"].shape[:-1], 0, 2))
        return {"image": torch.from_numpy(render_sprites(state["place"].numpy(), none)) / 255}


class SpritesData(TinyData):
    def __init__(self):
        super().__init__()
        self.make_env = partial(make_env, "zoo/Sprites-v0", distractors=0)


class _Loader:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return self.data.length

    def __iter__(self):
        for _ in range(len(self)):
            yield self.data.next_batch()


def trainer(run, *callbacks, logger=None, checkpoint=None, **options):
    """A Trainer as `zoo fit` makes it, on CPU, with log_every_n_steps=5."""
    settings = {"max_epochs": -1, "log_every_n_steps": 5, "accelerator": "cpu"} | options
    return pl.Trainer(
        default_root_dir=run,
        logger=[logger or RunLogger()],
        callbacks=[*callbacks, checkpoint or RunCheckpoint(every_updates=5)],
        enable_progress_bar=any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks),
        enable_model_summary=False,
        **settings,
    )


def rows(run, but=("time/",)):
    """The rows of metrics.csv, without those whose metric starts with one of `but`."""
    lines = (run / "metrics.csv").read_text().splitlines()
    assert lines[0] == "updates,env_steps,metric,value"
    split = [line.split(",") for line in lines[1:]]
    return [row for row in split if not row[2].startswith(but)]
