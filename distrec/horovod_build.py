"""Build and install Horovod 0.28.1 for the torch that is installed, once, and cache the wheel.

Horovod's last release does not compile against torch 2.13 as it stands, and has faults and delays
that are mended on the way: see distrec/horovod_patches.py. Run with ``python -m
distrec.horovod_build``. The wheel is kept under ``$XDG_CACHE_HOME/distrec/wheels`` (by default
``~/.cache``), by torch version, Python version, GPU or not, and the patches.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

from distrec.horovod_patches import PATCHES

HOROVOD_VERSION = "0.28.1"


def cache_directory() -> Path:
    """The folder of the user's cache in which built wheels are kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "distrec" / "wheels"


def wheel_key(torch_version: str, with_nccl: bool) -> str:
    """Name of the cache entry: whatever changes the binary changes the name."""
    recipe = hashlib.sha256(repr(PATCHES).encode()).hexdigest()[:8]
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    torch_name = torch_version.replace("+", "_")
    kind = "nccl" if with_nccl else "gloo"
    return f"horovod-{HOROVOD_VERSION}-{python}-torch{torch_name}-{kind}-{recipe}"


def missing_tools() -> list[str]:
    """Debian packages that the compilation needs and this machine lacks."""
    missing = []
    if shutil.which("g++") is None:
        missing.append("g++")
    if shutil.which("make") is None:
        missing.append("make")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append(f"python{sys.version_info.major}.{sys.version_info.minor}-dev")
    return missing


def patch_sources(source: Path) -> None:
    """Apply PATCHES in place; a text that is not there as often as expected is an error."""
    for name, old, new, count in PATCHES:
        path = source / name
        text = path.read_text()
        if text.count(old) != count:
            raise SystemExit(
                f"the patch of {name} expects {old!r} {count} time(s). "
                f"Received: {text.count(old)}. This recipe is for horovod {HOROVOD_VERSION} only."
            )
        path.write_text(text.replace(old, new))


def _pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, env=env)


def _build_environment(with_nccl: bool) -> dict[str, str]:
    env = dict(os.environ)
    env.update(
        CMAKE_POLICY_VERSION_MINIMUM="3.5",
        HOROVOD_WITH_PYTORCH="1",
        HOROVOD_WITHOUT_TENSORFLOW="1",
        HOROVOD_WITHOUT_MXNET="1",
        HOROVOD_WITHOUT_MPI="1",
        HOROVOD_WITH_GLOO="1",
        MAKEFLAGS=f"-j{os.cpu_count() or 1}",
        # the environment's own scripts first: cmake may live there
        PATH=f"{sysconfig.get_path('scripts')}{os.pathsep}{env.get('PATH', '')}",
    )
    if with_nccl:
        env["HOROVOD_GPU_OPERATIONS"] = "NCCL"
    return env


def build_wheel(destination: Path, with_nccl: bool) -> Path:
    """Download, patch and compile; the wheel appears in `destination` whole or not at all."""
    missing = missing_tools()
    if missing:
        raise SystemExit(
            f"compiling Horovod needs {', '.join(missing)}, not found on this machine. "
            f"Run: apt-get install -y {' '.join(missing)}"
        )
    with tempfile.TemporaryDirectory(prefix="distrec-horovod-") as scratch_name:
        scratch = Path(scratch_name)
        _pip(
            "download", "--quiet", "--no-deps", "--no-binary", "horovod", "--no-build-isolation",
            "--dest", str(scratch), f"horovod=={HOROVOD_VERSION}",
        )  # fmt: skip
        with tarfile.open(next(scratch.glob("horovod-*.tar.gz"))) as archive:
            # Debian's 3.11.2 has no such filter yet; setting it is without effect there
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(scratch)
        source = scratch / f"horovod-{HOROVOD_VERSION}"
        patch_sources(source)
        env = _build_environment(with_nccl)
        if shutil.which("cmake", path=env["PATH"]) is None:
            _pip("install", "--quiet", "cmake>=3.18,<4")
        print(f"compiling Horovod {HOROVOD_VERSION} (two to four minutes)", flush=True)
        log = scratch / "build.log"
        with log.open("w") as stream:
            result = subprocess.run(
                [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
                 "--wheel-dir", str(scratch / "wheel"), str(source)],
                env=env, stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if result.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
            raise SystemExit(f"{tail}\nHorovod did not compile; the last lines stand above")
        built = next((scratch / "wheel").glob("horovod-*.whl"))
        destination.mkdir(parents=True, exist_ok=True)
        partial = destination / f".{built.name}.{os.getpid()}"
        shutil.copy(built, partial)
        return partial.rename(destination / built.name)


def main() -> None:
    """Install the cached wheel, building it first where there is none."""
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("Horovod is built against torch: install it first") from None
    with_nccl = os.environ.get("DISTREC_CUDA") == "1"
    folder = cache_directory() / wheel_key(torch_version, with_nccl)
    wheel = next(folder.glob("horovod-*.whl"), None)
    print(f"horovod: {'cached wheel' if wheel else 'building'} {folder}", flush=True)
    wheel = wheel or build_wheel(folder, with_nccl)
    _pip("install", "--quiet", "--no-deps", "--force-reinstall", str(wheel))
    _pip("install", "--quiet", "cloudpickle", "psutil", "pyyaml", "packaging")
    print(f"horovod {HOROVOD_VERSION} installed", flush=True)


if __name__ == "__main__":
    main()
