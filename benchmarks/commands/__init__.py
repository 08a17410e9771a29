"""The verbs of the `zoo` command that belong to the benchmarks."""
