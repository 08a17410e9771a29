"""The stages of a training: which parts learn in an update, and at which learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

STAGES: dict[str, tuple[str, ...]] = {
    "tokenizer": ("tokenizer",),
    "world": ("latent_actions", "dynamics"),
    "policy": ("clone",),
}
PARTS = tuple(part for parts in STAGES.values() for part in parts)


class Clock(NamedTuple):
    """Where a training is: the stage, the update in it, and the stage's length."""

    stage: str
    update: int
    length: int


class Rate(NamedTuple):
    """A learning rate: rises linearly over `warmup` updates, then half a cosine to `final`."""

    lr: float
    final: float
    warmup: int

    def at(self, update: int, length: int) -> float:
        """Of an update, counted from 0, of a stage of `length`; afterwards `final`."""
        if update >= length:
            return self.final
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        progress = (update - self.warmup) / (length - self.warmup)
        return self.final + (self.lr - self.final) * (1 + math.cos(math.pi * progress)) / 2


class Stages:
    """Who learns when.

    Args:
        lengths: {stage: updates}, of which one at least is not 0.
        head_start: updates at the beginning of the world stage in which only the latent action
            model learns; its rate falls over these, and then stays.
        rates: of each part.
    """

    def __init__(
        self, lengths: Mapping[str, int], head_start: int, rates: Mapping[str, Rate]
    ) -> None:
        self.lengths, self.head_start, self.rates = dict(lengths), head_start, dict(rates)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Stages:
        """Those that Genie's options describe."""
        world = options["world_lr"], options["world_final_lr"]
        own = options["action_lr"], options["action_final_lr"]
        action_lr, action_final = (w if o is None else o for w, o in zip(world, own, strict=True))
        warmup = options["world_warmup"]
        tokenizer = (options[f"tokenizer_{name}"] for name in ("lr", "final_lr", "warmup"))
        return cls(
            {stage: options[f"{stage}_updates"] for stage in STAGES},
            options["action_updates"],
            {
                "tokenizer": Rate(*tokenizer),
                "latent_actions": Rate(action_lr, action_final, warmup),
                "dynamics": Rate(*world, warmup),
                "clone": Rate(options["policy_lr"], options["policy_lr"], 0),
            },
        )

    def clock(self, update: int) -> Clock:
        """The stage of an update of the training; the last one goes on."""
        last = ""
        for stage, length in self.lengths.items():
            if update < length:
                return Clock(stage, update, length)
            if length:
                update, last = update - length, stage
        return Clock(last, self.lengths[last] + update, self.lengths[last])

    def learning(self, update: int) -> tuple[str, ...]:
        """The parts that an update is for."""
        clock = self.clock(update)
        begins = clock.stage == "world" and clock.update < self.head_start
        return ("latent_actions",) if begins else STAGES[clock.stage]

    def learning_rates(self, update: int) -> dict[str, float]:
        """Of the parts that an update is for."""
        clock = self.clock(update)
        spans = {"dynamics": (self.head_start, clock.length)}
        if self.head_start:
            spans["latent_actions"] = (0, self.head_start)
        rates = {}
        for part in self.learning(update):
            begin, end = spans.get(part, (0, clock.length))
            rates[part] = self.rates[part].at(clock.update - begin, end - begin)
        return rates
