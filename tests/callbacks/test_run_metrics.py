from callback_standins import TinyData, TinyModel, rows, trainer

from callbacks.budget import Budget
from callbacks.run_metrics import RunMetrics


class Data(TinyData):
    def metrics(self):
        return {"env/return": float(self.env_steps)}


def test_logs_the_datamodules_metrics_and_the_speed(tmp_path):
    t = trainer(tmp_path, Budget(updates=12), RunMetrics())
    t.fit(TinyModel(sleep=0.01), Data())
    logged = rows(tmp_path, but=("train/",))
    assert [r for r in logged if r[2] == "env/return"] == [
        ["5", "10", "env/return", "10.0"],
        ["10", "20", "env/return", "20.0"],
    ]
    speed = {r[2]: float(r[3]) for r in logged if r[0] == "10"}
    assert 1 < speed["time/updates_per_s"] < 100
    assert abs(speed["time/env_steps_per_s"] / speed["time/updates_per_s"] - 2) < 1e-6
