"""The speed of the JEPAs: that what is timed is what they do."""

from __future__ import annotations

import pytest
import torch

from benchmarks import jepa_speed
from benchmarks.jepa_speed import main, masks, update
from datamodules import ActionSpec, ArraySpec, Spec
from zoo.i_jepa.module import IJEPA
from zoo.v_jepa.module import VJEPA


def test_hidden_patches_are_what_is_predicted() -> None:
    torch.manual_seed(0)
    chosen = masks(20, 12, 3, 5)
    assert chosen.context.shape == (5, 12)
    assert chosen.targets.shape == (5, 1, 3)
    for context, targets in zip(chosen.context, chosen.targets[:, 0], strict=True):
        assert not set(context.tolist()) & set(targets.tolist())


@pytest.mark.parametrize(("kind", "frames"), [(IJEPA, 1), (VJEPA, 4)])
def test_an_update_learns(kind: type[IJEPA] | type[VJEPA], frames: int) -> None:
    spec = Spec({"image": ArraySpec((64, 64, 3), "uint8")}, ActionSpec("discrete", nvec=(2,)))
    model = kind(spec, "nano", patch=16, crop_scale=None)
    image = torch.randint(256, (2, frames, 64, 64, 3), dtype=torch.uint8)
    before = [p.clone() for p in model.encoder.parameters()]
    update(model, image, 0.5)()
    after = model.encoder.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_both_tables_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jepa_speed, "VISIBLE", (1.0, 0.5))
    monkeypatch.setattr(jepa_speed, "PLANS", (("nano", 33),))
    threads = torch.get_num_threads()
    main(["--size", "nano", "--side", "64", "--repeats", "1"])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line][1:4] == ["visible", "100%", "50%"]
    assert lines[-1].split()[0] == "nano"
    assert float(lines[-1].split()[1]) > 0
