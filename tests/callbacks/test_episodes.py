import gymnasium as gym
import numpy as np
import pytest
import torch
from callback_standins import EPISODE, PerfectDreamer, TinyModel, Walk

from callbacks.episodes import record, require_dreamer
from datamodules.errors import UserError


def play(model, **options):
    settings = {"episodes": 2, "max_steps": 100, "explore": False} | options
    return record(model, Walk, seed=np.random.SeedSequence(0), **settings)


def test_steps_follow_the_contract():
    recording = play(PerfectDreamer())
    batch = recording.batch
    assert recording.length.tolist() == [EPISODE + 1] * 2
    assert recording.terminal.tolist() == [True, True]
    x = torch.arange(EPISODE + 1.0)
    assert torch.equal(batch["obs"]["vector"][1], torch.stack([x, x], -1))
    assert torch.equal(batch["reward"][1], x)
    assert batch["action"][1].tolist() == [1] * EPISODE + [0]
    assert batch["is_first"][1].nonzero().tolist() == [[0]]
    assert batch["is_last"][1].nonzero().tolist() == [[EPISODE]]
    assert batch["is_terminal"][1].nonzero().tolist() == [[EPISODE]]


def test_recording_may_stop_early():
    recording = play(PerfectDreamer(), max_steps=7)
    assert recording.length.tolist() == [8, 8]
    assert not recording.batch["is_last"].any()
    assert not recording.terminal.any()


def test_actions_and_observations_belong_together():
    batch = play(TinyModel(), explore=True).batch
    moves = 2 * batch["action"][:, :-1] - 1
    assert torch.equal(batch["obs"]["vector"][:, 1:, 0].diff(dim=1), moves[:, 1:].float())
    assert not torch.equal(batch["action"][0], batch["action"][1])


class Short(gym.Wrapper):
    """Ends after as many steps as the first reset's seed says."""

    def reset(self, *, seed=None, options=None):
        self.end = 3 + seed % 5
        return self.env.reset(seed=seed)

    def step(self, action):
        obs, reward, *_, info = self.env.step(action)
        return obs, reward, False, self.env.t >= self.end, info


def test_ended_episodes_are_padded_with_zeros():
    recording = record(
        PerfectDreamer(),
        lambda: Short(Walk()),
        episodes=6,
        max_steps=100,
        seed=np.random.SeedSequence(0),
        explore=False,
    )
    assert len(set(recording.length.tolist())) > 1
    for i, n in enumerate(recording.length.tolist()):
        assert recording.batch["is_last"][i].nonzero().tolist() == [[n - 1]]
        assert recording.batch["reward"][i, n - 1] == n - 1
        assert not recording.batch["reward"][i, n:].any()
        assert not recording.batch["obs"]["vector"][i, n:].any()
    assert not recording.batch["is_terminal"].any()


def test_dreams_of_latent_actions_cannot_be_compared():
    require_dreamer(PerfectDreamer(), "DreamVideo")

    class Silent(PerfectDreamer):
        num_latent_actions = 3

        def infer_actions(self, video):
            raise NotImplementedError

    with pytest.raises(UserError, match="those of Silent are of latent ones: remove DreamVideo"):
        require_dreamer(Silent(), "DreamVideo")
