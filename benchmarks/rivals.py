"""`python -m benchmarks.rivals`: Decision Transformer against `transformers`, in turns, one thread.

The shape is the paper's for MuJoCo (K 20, D 128, 3 blocks, batch 64). A training step is forward,
loss, backward, clipping and AdamW of `DecisionTransformerModel`, with the same sizes and the same
batch; it is left out, and said so, if transformers is not installed. An action with the cache is
compared with the whole context read anew at every step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed import median_ms
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.decision_transformer.module import DecisionTransformer

HOPPER = Spec(
    {"vector": ArraySpec((11,), "float32")}, ActionSpec("box", low=(-1.0,) * 3, high=(1.0,) * 3)
)
CONTEXT, BATCH = 20, 64


def contexts(batch_size: int) -> dict[str, Any]:
    """Random contexts without padding."""
    lead = (batch_size, CONTEXT)
    return {
        "obs": {"vector": torch.randn(*lead, 11)},
        "action": torch.rand(*lead, 3) * 2 - 1,
        "return_to_go": 1000 * torch.randn(lead),
        "timestep": torch.randint(1000, lead),
        "mask": torch.ones(lead, dtype=torch.bool),
    }


def ours(batch: dict[str, Any]) -> Callable[[], None]:
    """One training update of ours."""
    model = DecisionTransformer(HOPPER)
    optimizer = model.configure_optimizers()["optimizer"]
    return _update(model, optimizer, lambda: model.training_step(batch, 0))


def theirs(batch: dict[str, Any]) -> Callable[[], None] | None:
    """One training update of transformers' model; None if it is not installed."""
    try:
        from transformers import DecisionTransformerConfig, DecisionTransformerModel
    except ImportError:
        return None
    config = DecisionTransformerConfig(
        state_dim=11, act_dim=3, hidden_size=128, max_ep_len=1000, n_layer=3, n_head=1,
        n_inner=512, activation_function="relu", n_positions=1024,
    )  # fmt: skip
    model = DecisionTransformerModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=1e-4, foreach=True)
    mask = batch["mask"]

    def loss() -> Tensor:
        out = model(
            states=batch["obs"]["vector"],
            actions=batch["action"],
            rewards=None,
            returns_to_go=batch["return_to_go"][..., None] / 1000,
            timesteps=batch["timestep"],
            attention_mask=mask.long(),
        )
        return (out.action_preds[mask] - batch["action"][mask]).square().mean()

    return _update(model, optimizer, loss)


def _update(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]
) -> Callable[[], None]:
    def update() -> None:
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()

    return update


def acting(rows: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """One action for each row: with the cache, whose refreshes are spread, and read anew."""
    model = DecisionTransformer(HOPPER).eval()
    batch, obs = contexts(rows), {"vector": torch.randn(rows, 11)}
    state = [model.initial_state(rows)]

    def cached() -> None:  # as many steps as there are between two refreshes
        for _ in range(model.hop):
            _, state[0] = model.act(obs, state[0], explore=False)

    @torch.no_grad()
    def anew() -> None:
        for _ in range(model.hop):
            model.predict(batch)

    for _ in range(3):
        cached()
    return cached, anew


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = contexts(BATCH)
    mine, rival = ours(batch), theirs(batch)
    if rival is None:
        (time,) = median_ms(mine, repeats=repeats)
        print(f"training step {time:.1f} ms; transformers is not installed: nothing to compare")
    else:
        time, other = median_ms(mine, rival, repeats=repeats)
        print(f"training step {time:.1f} ms, transformers {other:.1f} ms: {time / other:.2f} of it")
    for rows in (1, 4, 16, 64):
        time, other = (t / 10 for t in median_ms(*acting(rows), repeats=repeats))
        print(f"{rows} actions {time:.2f} ms, read anew {other:.2f} ms: {other / time:.1f} times")


if __name__ == "__main__":
    main()
