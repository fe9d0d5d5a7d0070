"""Eight simulated devices for a test: the settings of a process of its own.

Devices have to exist before JAX starts, so what needs several runs as a script and prints what it
measured. A collective blocks the thread that runs it until every device has joined; with as many
threads as devices, independent collectives can hold them all and never meet. Hence the larger pool
(XLA takes its size from NPROC) and, for a machine under load, the longer patience.
"""

import os
import pathlib
import subprocess
import sys

import jax


def environment(*, devices: int = 8, optimize: bool = True) -> dict[str, str]:
    """The environment of a process with simulated CPU devices and the tests' compilation cache.

    With `optimize=False` LLVM's optimisations are off: compiling is quicker, running slower.
    """
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_cpu_collective_call_terminate_timeout_seconds=240",
    ]
    if not optimize:
        flags.append("--xla_backend_optimization_level=0")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "NPROC": "64",
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
        "XLA_FLAGS": " ".join(flags),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def output(*arguments: str | pathlib.Path, devices: int = 8, optimize: bool = True) -> str:
    """What Python prints when it runs `arguments` on simulated devices; fails with its errors."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(devices=devices, optimize=optimize),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
