"""Compiled programs, kept for the next start of a command."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from ecomjax.data.cache import Cache

MOST_BYTES = 2**31
"""Of all programs that are kept; those not used for longest go first."""


def keep() -> None:
    """From here on, what takes a second to compile is kept in the user's cache, and read from it.

    JAX finds a program by all that it depends on. Those for CPUs also use whatever instructions
    the machine has, so that machines that share a home keep theirs apart. Where the environment
    names another folder (`JAX_COMPILATION_CACHE_DIR`) that one is used.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(Cache().folder / "compiled" / _processor()))
    # With a bound comes a lock, so that several commands may write at once.
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def _processor() -> str:
    """Changes with the instructions that the machine's CPU knows."""
    told = platform.machine() + platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(told.encode()).hexdigest()[:12]
