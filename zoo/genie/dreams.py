"""Dreams: a window of the past that slides on, frame by frame (Genie, section 2.2).

A state is what a dream sees of its past: "tokens" (N, W, P) int64 of the last W = frames - 1
frames, "actions" (N, W, A) that led to each, and "frames" (N,) int64, how many of the W there have
been; the others stand in front. In shapes, N is the number of dreams, H of the states in a row, P
of the tokens of a frame, A the length of an action's vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.errors import UserError
from zoo.base import State
from zoo.genie.clips import over_clips
from zoo.genie.dynamics import Dynamics
from zoo.genie.latent_actions import LatentActionModel
from zoo.genie.tokenizer import Tokenizer

DECODED = 4096  # frames that are decoded at once, at most


class Dreams:
    """What the three parts make up together.

    Args:
        tokenizer: says what frames are, and shows what tokens are.
        latent_actions: says what was done, and what its codes are.
        dynamics: says what follows.
        frames: most of past and future together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        latent_actions: LatentActionModel,
        dynamics: Dynamics,
        frames: int,
    ) -> None:
        self.tokenizer, self.latent_actions, self.dynamics = tokenizer, latent_actions, dynamics
        self.frames, self.window = frames, frames - 1

    def observe(self, frames: Tensor, first: Tensor | None = None) -> State:
        """States {key: (B, T, ...)} after each of frames (B, T, H, W, C) in [0, 1].

        Nothing is remembered from before a frame that is `first` (B, T).
        """
        tokens = over_clips(self.tokenizer.tokens, frames, self.frames, first)
        actions = over_clips(self.latent_actions.vectors_to, frames, self.frames, first)
        step = torch.arange(tokens.shape[1], device=tokens.device)
        begun = step.new_zeros(tokens.shape[:2])
        if first is not None:
            begun = torch.where(first, step, 0).cummax(1).values
        places = (step[:, None] + torch.arange(1 - self.window, 1, device=step.device)).clamp(min=0)
        return {
            "tokens": tokens[:, places],
            "actions": actions[:, places],
            "frames": (step - begun + 1).clamp(max=self.window),
        }

    def step(self, state: State, action: Tensor, steps: int, temperature: float) -> State:
        """The states {key: (N, ...)} that actions (N,), or vectors (N, A), lead to.

        Args:
            state: {key: (N, ...)}.
            action: codes, or vectors that are taken as they are.
            steps, temperature: passes through the dynamics, and of the tokens.

        Raises:
            UserError: latent actions that there are not.
        """
        vector = self._vectors(action, len(state["frames"]))
        past = state["tokens"], state["actions"]
        token = self.dynamics.next_frame(*past, self._valid(state), vector, steps, temperature)
        return {
            "tokens": torch.cat([past[0][:, 1:], token[:, None]], 1),
            "actions": torch.cat([past[1][:, 1:], vector[:, None].to(past[1].dtype)], 1),
            "frames": (state["frames"] + 1).clamp(max=self.window),
        }

    def watch(self, state: State) -> Tensor:
        """The frames (N, W, H, W, C) in [0, 1] of the whole window of states {key: (N, ...)}."""
        return self.tokenizer.decode(state["tokens"], self._valid(state))

    def decode(self, state: State) -> Tensor:
        """The last frames (N, H, H, W, C) in [0, 1] of states {key: (N, H, ...)}.

        Where the states of a row follow one another their frames are decoded as one clip; in those
        longer than `frames` each then sees at least half a window before it.
        """
        tokens, seen = state["tokens"], state["frames"]
        grown = (seen[:, :-1] + 1).clamp(max=self.window)
        # Windows of one frame do not tell whether they follow one another.
        tells = self.window > 1 or seen.shape[1] == 1
        follow = tells and torch.equal(tokens[:, 1:, :-1], tokens[:, :-1, 1:])
        if not (follow and torch.equal(seen[:, 1:], grown)):
            alone = {key: value.flatten(0, 1)[:, None] for key, value in state.items()}
            return self.decode(alone)[:, 0].unflatten(0, seen.shape)
        clips = torch.cat([tokens[:, 0], tokens[:, 1:, -1]], 1)
        places = torch.arange(clips.shape[1], device=clips.device)
        valid = places >= self.window - seen[:, :1]
        rows = max(1, DECODED // self.frames)
        parts = zip(clips.split(rows), valid.split(rows), strict=True)
        return torch.cat([self._decoded(*part) for part in parts])

    def _decoded(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Frames (N, H, H, W, C) from the last of the first window of (N, W + H - 1, P) on."""
        empty = int((~valid).sum(1).min())
        tokens, valid = tokens[:, empty:], valid[:, empty:]
        frames: list[Tensor] = []
        done = self.window - 1 - empty
        while done < tokens.shape[1]:
            begin = max(0, done - self.frames // 2) if frames else 0
            end = begin + self.frames
            part = self.tokenizer.decode(tokens[:, begin:end], valid[:, begin:end])
            frames.append(part[:, done - begin :])
            done = end
        return torch.cat(frames, 1)

    def _valid(self, state: State) -> Tensor:
        """(N, W) which frames of the window there have been."""
        places = torch.arange(self.window, device=state["frames"].device)
        return places >= self.window - state["frames"][:, None]

    def _vectors(self, action: Tensor, count: int) -> Tensor:
        """Vectors (N, A) of latent actions: codes (N,), or already vectors."""
        quantizer = self.latent_actions.quantizer
        if action.is_floating_point():
            if action.shape != (count, quantizer.width):
                raise UserError(
                    f"the vectors of latent actions for {count} dreams are of shape "
                    f"{(count, quantizer.width)}, got {tuple(action.shape)}: give one for each, or "
                    f"codes from 0 to {quantizer.size - 1} as int64"
                )
            return action
        if action.dtype == torch.bool or action.shape != (count,):
            raise UserError(
                f"latent actions for {count} dreams are codes of shape {(count,)} as int64, got "
                f"{action.dtype} of shape {tuple(action.shape)}"
            )
        vectors = quantizer.lookup(action.long().clamp(0, quantizer.size - 1))
        wrong = action[(action < 0) | (action >= quantizer.size)]
        if len(wrong):
            raise UserError(
                f"there is no latent action {int(wrong[0])}: this Genie has {quantizer.size}, from "
                f"0 to {quantizer.size - 1}"
            )
        return vectors
