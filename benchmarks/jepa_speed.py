"""`python -m benchmarks.jepa_speed`: what masking saves, and what a plan costs, on one thread.

Hidden patches are dropped before the encoder of I-JEPA and V-JEPA, so an update is the cheaper the
more is hidden. An update is here: targets of all patches, encoder and predictor forwards and back,
and the optimizer. A plan is one action of jepa-wm by CEM: 300 candidates, 10 iterations, 5 steps.
Figures are medians, taken in turns, with random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import median_ms
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.commands.output import table
from zoo.i_jepa.module import IJEPA
from zoo.jepa.masks import Dice, Masks
from zoo.jepa.model import MaskedJEPA
from zoo.jepa_wm.module import JEPAWorldModel
from zoo.nets.vit import take
from zoo.v_jepa.module import VJEPA

VISIBLE = (1.0, 0.75, 0.5, 0.25, 0.1)
BATCH = 4
FRAMES = 8
PLANS = (("nano", 33), ("paper", 65))  # sizes of jepa-wm, and the sides of their images
PLANNER: dict[str, Any] = {"horizon": 5, "iterations": 10, "candidates": 300, "elites": 30}


def masks(patches: int, visible: int, targets: int, batch: int) -> Masks:
    """Random places: so many in the context, and so many other ones (or any) to predict."""
    places = torch.stack([torch.randperm(patches) for _ in range(batch)])
    context, rest = places[:, :visible], places[:, patches - targets :]
    return Masks(context.sort(1).values, rest.sort(1).values[:, None])


def update(model: MaskedJEPA, image: Tensor, visible: float) -> Callable[[], None]:
    """An update in which the encoder reads this share of the patches; a tenth is predicted."""
    optimizer = model.configure_optimizers()

    def run() -> None:
        view = model.view({"image": image}, Dice.of(0, 0))
        count = view.patches.shape[1]
        chosen = masks(count, round(visible * count), count // 10, len(view.patches))
        made = model.predict(view, "loss", chosen)
        optimizer.zero_grad()
        model.distance(made.predicted, take(view.target, chosen.targets)).backward()
        optimizer.step()

    return run


def update_times(model: MaskedJEPA, frames: int, repeats: int) -> list[float]:
    """Milliseconds of an update for each share of `VISIBLE`."""
    shape = BATCH, frames, *model.spec.obs["image"].shape
    image = torch.randint(256, shape, dtype=torch.uint8)
    runs = [update(model, image, visible) for visible in VISIBLE]
    return median_ms(*runs, repeats=repeats, warmup=1)


def plan_time(size: str, side: int, repeats: int) -> float:
    """Milliseconds of one plan."""
    images = dict.fromkeys(("image", "goal"), ArraySpec((side, side, 2), "uint8"))
    action = ActionSpec("box", low=(-1.0, -1.0), high=(1.0, 1.0))
    model = JEPAWorldModel(Spec(images, action), size=size, block=1, replan=1, **PLANNER).eval()
    obs = {key: torch.randint(256, (1, side, side, 2), dtype=torch.uint8) for key in images}
    act = partial(model.act, obs, model.initial_state(1), explore=False)
    return median_ms(act, repeats=repeats, warmup=1)[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", default="tiny", help="of I-JEPA and V-JEPA")
    parser.add_argument("--side", type=int, default=112, help="of their images, in pixels")
    parser.add_argument("--repeats", type=int, default=5, help="timings per figure")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    image = ArraySpec((options.side, options.side, 3), "uint8")
    spec = Spec({"image": image}, ActionSpec("discrete", nvec=(2,)))
    i_jepa = IJEPA(spec, options.size, patch=16, crop_scale=None, min_keep=1)
    v_jepa = VJEPA(spec, options.size, patch=16, crop_scale=None, flip=False)
    times = update_times(i_jepa, 1, options.repeats), update_times(v_jepa, FRAMES, options.repeats)
    rows = [[f"{v:.0%}", f"{i:.0f}", f"{j:.0f}"] for v, i, j in zip(VISIBLE, *times, strict=True)]
    print(f"ms of an update, {BATCH} clips (V-JEPA: of {FRAMES} frames)")
    table(["visible", "i-jepa", "v-jepa"], rows)
    print("\nms of a plan: 300 candidates, 10 iterations, 5 steps")
    plans = [[size, f"{plan_time(size, side, options.repeats):.0f}"] for size, side in PLANS]
    table(["size", "ms"], plans)


if __name__ == "__main__":
    main()
