"""When which part learns, and how fast."""

from __future__ import annotations

import math

import pytest

from zoo.genie.stages import Rate


def test_rates_rise_and_fall_within_a_stage() -> None:
    rate = Rate(2.0, 1.0, 4)
    assert [rate.at(u, 12) for u in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate.at(8, 12) == pytest.approx(1.5)
    assert rate.at(6, 12) == pytest.approx(1.5 + math.cos(math.pi / 4) / 2)
    assert rate.at(12, 12) == rate.at(50, 12) == pytest.approx(1.0)
