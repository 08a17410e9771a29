"""Where a number comes from: commit, versions and hardware, as three short strings."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("torch", "pytorch-lightning", "gymnasium", "numpy", "stable-baselines3")


@cache
def git_sha() -> str:
    """Short commit of the code, "-dirty" if tracked files differ, the package version if no git."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():  # installed, perhaps inside somebody else's repository
        return _package_version()
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return _package_version()
    return described.stdout.strip() or _package_version()


@cache
def versions() -> str:
    """Python and the packages that decide the numbers: `python 3.11.7; torch 2.13.0; ...`."""
    found = [f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "; ".join(found)


def hardware() -> str:
    """Processor with the number of usable cores, memory, and NVIDIA GPUs."""
    described = f"{_processor()}, {cores()} cores, {_memory_gb():.0f} GB"
    gpu = _gpu()
    return f"{described}; {gpu}" if gpu else described


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def peak_rss_mb() -> float:
    """Most memory that this process has held, in MB (10^6 bytes)."""
    # VmHWM belongs to this program alone; ru_maxrss may be inherited from the one that started it.
    for key, value in _colon_table("/proc/self/status"):
        if key == "VmHWM":
            return int(value.split()[0]) * 1024 / 1e6
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@cache
def _processor() -> str:
    for key, value in _colon_table("/proc/cpuinfo"):
        if key == "model name":
            return value
    return platform.processor() or platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _gpu() -> str:
    # Asking torch would import it, which takes seconds that a random policy does not need.
    files = Path("/proc/driver/nvidia/gpus").glob("*/information")
    models = [value for file in files for key, value in _colon_table(str(file)) if key == "Model"]
    return ", ".join(f"{models.count(model)}x {model}" for model in dict.fromkeys(models))


def _colon_table(path: str) -> list[tuple[str, str]]:
    """`key : value` lines of a file under /proc; empty where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [(key.strip(), value.strip()) for key, _, value in pairs]


def _package_version() -> str:
    try:
        return f"v{version('world-model-zoo')}"
    except PackageNotFoundError:
        return "unknown"
