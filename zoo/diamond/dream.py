"""The dream of DIAMOND: what comes next, in frames, rewards and ends.

A state has the last L frames with the actions chosen at all but the last of them, and the memory of
the reward and end model, if there is one. It says which frames are known: at the start of an
episode fewer are.

Letters of shapes: N batch, L frames, C channels, A length of an encoded action.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.base import State
from zoo.diamond.denoiser import Denoiser, to_float, to_uint8
from zoo.diamond.lstm import Memory
from zoo.diamond.reward_end import Outcome, RewardEndModel
from zoo.diamond.sampler import Sampler


class Step(NamedTuple):
    """The state after an action, without the agent's memory, and what the action earned."""

    state: State
    outcome: Outcome


class Dream(NamedTuple):
    """The three parts that make up the world.

    Attributes:
        denoiser: gives the next frame from noise,
        sampler: in these steps;
        reward_end: what it earned; without, nothing is earned and nothing ends.
    """

    denoiser: Denoiser
    sampler: Sampler
    reward_end: RewardEndModel | None

    def observe(self, image: Tensor, action: Tensor, first: Tensor) -> State:
        """The states (N, T, ...) of real sequences.

        Args:
            image: (N, T, H, W, C) uint8.
            action: (N, T, A) encoded, chosen at the frames.
            first: (N, T) bool, an episode begins here.
        """
        past = self.denoiser.past
        episode = first.cumsum(1) + 1
        state = {
            "frames": windows(image, past),
            "past_actions": windows(action, past)[:, :, :-1],
            "known": windows(episode, past) == episode[..., None],
        }
        if self.reward_end is not None:
            met = self.reward_end.burn_in(to_float(image), action, first)
            state |= {"end_h": met.h, "end_c": met.c}
        return state

    @torch.no_grad()
    def step(self, state: State, action: Tensor) -> Step:
        """What encoded actions (N, A) lead to from states (N, ...).

        Box actions are clipped to [-1, 1], as the environment does.
        """
        action = action.clamp(-1, 1)
        known = state["known"]
        past = to_float(state["frames"], known)
        actions = torch.cat([state["past_actions"], action.unsqueeze(1)], 1) * known[..., None]
        frame = self.denoiser.next_frame(past, actions, self.sampler)
        following = {
            "frames": torch.cat([state["frames"][:, 1:], to_uint8(frame).unsqueeze(1)], 1),
            "past_actions": actions[:, 1:],
            "known": torch.cat([known[:, 1:], torch.ones_like(known[:, :1])], 1),
        }
        if self.reward_end is None:
            return Step(following, Outcome.nothing(len(frame), frame.device))
        memory = Memory(state["end_h"], state["end_c"])
        outcome, memory = self.reward_end.step(past[:, -1], frame, action, memory)
        return Step({**following, "end_h": memory.h, "end_c": memory.c}, outcome)


def latest(state: State) -> Tensor:
    """The current frames (N, C, H, W) of states, in [-1, 1]."""
    return to_float(state["frames"][:, -1])


def windows(x: Tensor, length: int) -> Tensor:
    """The `length` entries up to each step, (N, T, length, ...) of (N, T, ...); zeros before 0."""
    padding = x.new_zeros(len(x), length - 1, *x.shape[2:])
    return torch.cat([padding, x], 1).unfold(1, length, 1).movedim(-1, 2)
