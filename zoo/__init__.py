"""World models that are picked by name, trained by a Lightning `Trainer` and compared fairly.

```python
import zoo

zoo.list_models("dreamer*")
model = zoo.create("dreamer-v3", spec=data.spec, size="nano")
model = zoo.load("runs/dreamer-v3/cartpole/seed=0")
```

Names are imported when they are first used, so that `import zoo` costs neither torch nor Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.base import ZooModel
    from zoo.dreamer_v3.module import DreamerV3
    from zoo.registry import card, create, list_models
    from zoo.runs import load

    __version__: str

__all__ = ["DreamerV3", "ZooModel", "__version__", "card", "create", "list_models", "load"]

_HOMES = {
    "DreamerV3": "zoo.dreamer_v3.module",
    "ZooModel": "zoo.base",
    "card": "zoo.registry",
    "create": "zoo.registry",
    "list_models": "zoo.registry",
    "load": "zoo.runs",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("world-model-zoo")
        except PackageNotFoundError:  # the folders are on the path without an installation
            return "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
