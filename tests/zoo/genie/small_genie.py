"""A Genie that is built at once, and clips for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules import ActionSpec, ArraySpec, Spec
from zoo.genie.module import Genie
from zoo.genie.sizes import SIZES

VIDEO = Spec({"image": ArraySpec((16, 16, 3), "uint8")})
GAME = Spec(VIDEO.obs, ActionSpec("discrete", nvec=(3,)))
TINY = {"layers": 1, "width": 16, "heads": 2, "head": 8, "hidden": 32}
ACTION_PARTS = ("action_encoder", "action_decoder")


def build(spec: Spec = VIDEO, **options: Any) -> Genie:
    torch.manual_seed(0)
    convolutional = options.get("action_model") == "convolutional"
    parts = [part for part in SIZES["nano"] if not (convolutional and part in ACTION_PARTS)]
    sizes = dict.fromkeys(parts, TINY)
    stages = {"tokenizer_updates": 2, "world_updates": 2, "policy_updates": 2}
    small: dict[str, Any] = {"frames": 4, "codes": 16, "code_width": 4, "steps": 2}
    if options.get("action_quantizer") != "fsq":
        small["action_width"] = 4
    if not convolutional:
        small["action_patch"] = 8
    return Genie(spec, **{"size": "nano", **sizes, **stages, **small, **options})


def video(frames: int = 4, clips: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(256, (clips, frames, 16, 16, 3), generator=generator).to(torch.uint8)


def batch(frames: int = 4, **more: Tensor) -> dict[str, Any]:
    return {"obs": {"image": video(frames)}, **more}
