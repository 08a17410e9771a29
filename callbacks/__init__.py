"""What watches a training: budgets, checkpoints, evaluation, dream videos, progress, logs.

```python
from callbacks.budget import Budget
from callbacks.checkpoint import RunCheckpoint
```

`zoo fit` puts them together in `zoo/commands/defaults.yaml`.
"""
