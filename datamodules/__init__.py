"""Where the data comes from: environments, replay, offline recordings and video.

```python
from datamodules import EnvDataModule

data = EnvDataModule("CartPole-v1")
```

Names are imported when they are first used, so that `import datamodules` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.env_datamodule import EnvDataModule
    from datamodules.errors import MissingExtra, UserError
    from datamodules.offline_datamodule import OfflineDataModule
    from datamodules.replay import ReplayBuffer
    from datamodules.spec import ActionSpec, ArraySpec, Spec
    from datamodules.store import EpisodeStore
    from datamodules.video_datamodule import VideoDataModule

__all__ = [
    "ActionSpec",
    "ArraySpec",
    "EnvDataModule",
    "EpisodeStore",
    "MissingExtra",
    "OfflineDataModule",
    "ReplayBuffer",
    "Spec",
    "UserError",
    "VideoDataModule",
]

_HOMES = {
    "ActionSpec": "datamodules.spec",
    "ArraySpec": "datamodules.spec",
    "EnvDataModule": "datamodules.env_datamodule",
    "EpisodeStore": "datamodules.store",
    "MissingExtra": "datamodules.errors",
    "OfflineDataModule": "datamodules.offline_datamodule",
    "ReplayBuffer": "datamodules.replay",
    "Spec": "datamodules.spec",
    "UserError": "datamodules.errors",
    "VideoDataModule": "datamodules.video_datamodule",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'datamodules' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
