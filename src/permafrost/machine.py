"""What of a machine can change the bits of a result."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# Beside torch: what decodes and resizes images, and computes ranks.
_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "captum")
_LIBRARIES = re.compile(r"(?:Intel.*Math Kernel Library|MKL-DNN|OpenMP|BLAS_INFO=\w+)[^,\n]*")
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
_VARIABLES = re.compile(
    r"(OMP|KMP|MKL|DNNL|ONEDNN|OPENBLAS|ATEN|CUBLAS)_|NVIDIA_TF32|TORCH_ALLOW_TF32"
)


def machine_identity(device: torch.device, precision: str) -> dict[str, Any]:
    """Return what of this machine, and of how it is used, enters the key of a training."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": precision,
    }


def fingerprint() -> dict[str, str]:
    """Return what could make another machine's results differ.

    Where all of it is equal, the bits should be; a difference need not change any.

    Returns
    -------
    dict of str to str
        Versions, numerical libraries, processor, GPU, threads, and what makes PyTorch
        deterministic.
    """
    threads = f"{torch.get_num_threads()}, {torch.get_num_interop_threads()} between operations"
    return {
        "system": f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "libraries": "; ".join(_LIBRARIES.findall(torch.__config__.show())),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": _gpu(),
        "threads": threads,
        "determinism": _determinism(),
        "environment": " ".join(
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if _VARIABLES.match(name) and name != "OMP_WAIT_POLICY"  # how threads wait
        ),
    }


def _cpu() -> str:
    """Return the processor's name and those of its features that numerical kernels look for."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    names = re.findall(r"^(?:model name|CPU part)\s*: (.*)$", text, re.MULTILINE) or _apple()
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    known = [name for name in _CPU_FEATURES if flags and name in flags[1].split()]
    return " ".join([names[0] if names else platform.processor(), *known])


def _apple() -> list[str]:
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    if platform.system() != "Darwin":
        return []
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    cudnn = torch.backends.cudnn.version()
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {cudnn}"


def _determinism() -> str:
    # How float32 is multiplied is not among them: every stage sets that itself.
    switches = {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
    }
    return " ".join(f"{name}={value}" for name, value in switches.items())
