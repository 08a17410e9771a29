"""Checks of Genie's options: errors name the value and the mend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from datamodules.errors import UserError
from zoo.arguments import reject_fractions, reject_outside, reject_unknown, reject_unless_positive

POSITIVE = (
    *("patch", "code_width", "action_patch", "action_width", "steps"),
    *("tokenizer_lr", "world_lr", "action_lr", "policy_lr", "tokenizer_clips", "world_clips"),
)
AT_LEAST_0 = (
    *("tokenizer_updates", "world_updates", "policy_updates"),
    *("tokenizer_final_lr", "world_final_lr", "action_final_lr"),
    *("tokenizer_warmup", "world_warmup"),
    *("commitment", "clip", "temperature", "labelled_steps", "weight_decay"),
)
WHOLE = (
    *("frames", "patch", "codes", "code_width", "action_patch", "action_channels", "num_actions"),
    *("action_width", "tokenizer_updates", "world_updates", "policy_updates", "action_updates"),
    *("tokenizer_clips", "world_clips", "tokenizer_warmup", "world_warmup", "steps"),
)
CHOICES = {
    "tokenizer_quantizer": ("vq", "fsq"),
    "action_quantizer": ("vq", "fsq", "none"),
    "action_model": ("st-transformer", "convolutional"),
}


def reject_mistakes(options: Mapping[str, Any], known: Mapping[str, Parameter]) -> None:
    """Checks the options of a Genie, all but the shapes.

    Args:
        options: {name: value}, all that there are.
        known: the constructor's parameters.

    Raises:
        UserError: a value that is unknown, out of range, missing, or has no effect.
    """
    for name, choices in CHOICES.items():
        reject_unknown("Genie", choices, **{name: options[name]})
    given = {name: value for name, value in options.items() if value is not None}
    reject_fractions("Genie", **{name: given[name] for name in WHOLE if name in given})
    reject_unless_positive("Genie", **{name: given[name] for name in POSITIVE if name in given})
    zeros = {name: given[name] for name in AT_LEAST_0 if name in given}
    reject_outside("Genie", 0, math.inf, **zeros)
    reject_outside("Genie", 2, math.inf, frames=options["frames"])
    if options["known_motion"] and options["frames"] < 3:
        raise UserError(
            f"Genie(known_motion=True) predicts from two frames or more, and frames is "
            f"{options['frames']}: set frames to 3 or more"
        )
    reject_outside("Genie", 2, math.inf, action_channels=options["action_channels"])
    if options["world_updates"]:
        last = options["world_updates"] - 1
        reject_outside("Genie", 0, last, action_updates=options["action_updates"])
    reject_outside("Genie", 0, 1, token_noise=options["token_noise"])
    for name in ("mask_rates", "betas"):
        if len(options[name]) != 2:
            raise UserError(f"Genie needs {name} of two numbers, got {list(options[name])}")
    low, high = options["mask_rates"]
    reject_unless_positive("Genie", mask_rates=high)
    reject_outside("Genie", 0, high, mask_rates=low)
    reject_outside("Genie", 0, 1, mask_rates=high)
    _reject_idle(options, known)
    transforms = options["action_model"] == "st-transformer"
    if options["known_motion"] and transforms and not options["read_changes"]:
        raise UserError(
            "Genie(known_motion=True) reads actions off single frames and how they have changed: "
            "set read_changes=True, too"
        )
    if options["action_quantizer"] == "none" and options["policy_updates"]:
        raise UserError(
            "Genie's policy says codes, and action_quantizer='none' has none: set policy_updates "
            "to 0, or action_quantizer to vq or fsq"
        )
    if not any(options[f"{stage}_updates"] for stage in ("tokenizer", "world", "policy")):
        raise UserError(
            "Genie learns nothing: tokenizer_updates, world_updates and policy_updates are 0"
        )
    _reject_codebook(options, "tokenizer", "codes", "code_levels")
    _reject_codebook(options, "action", "num_actions", "action_levels")


def _reject_idle(options: Mapping[str, Any], known: Mapping[str, Parameter]) -> None:
    """Refuses the first option that is given and does not count."""
    codes, actions, model = (options[name] for name in CHOICES)
    transforms = model == "st-transformer"
    counts = {
        "codes": codes == "vq",
        "code_width": codes == "vq",
        "code_levels": codes == "fsq",
        "num_actions": actions == "vq",
        "action_width": actions != "fsq",
        "action_levels": actions == "fsq",
        "action_patch": transforms,
        "action_encoder": transforms,
        "action_decoder": transforms,
        "read_changes": transforms,
        "action_channels": not transforms,
        "commitment": "vq" in (codes, actions),
    }
    chosen = ", ".join(f"{name}={options[name]}" for name in CHOICES)
    for name, does in counts.items():
        if not does and options[name] != known[name].default:
            raise UserError(
                f"Genie({name}={options[name]}) has no effect with {chosen}: leave it out"
            )


def _reject_codebook(options: Mapping[str, Any], part: str, size: str, levels: str) -> None:
    kind = options[f"{part}_quantizer"]
    if kind == "fsq" and not options[levels]:
        raise UserError(f"Genie({part}_quantizer='fsq') needs {levels}, such as [2, 2, 2]")
    if kind == "vq" and options[size] < 2:
        raise UserError(f"Genie needs {size} of at least 2, got {options[size]}")
