"""Which parts are there, in which versions, what works, and the command that mends the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_SECONDS = 120
# distribution -> versions that are known to work together
STACK = {
    "torch": "2.13",
    "fbgemm-gpu-cpu": "1.8",
    "pyspark": "4.0",
    "pyarrow": "14.0.2",
    "petastorm": "0.12.1",
    "numpy": "1.26",
    "horovod": "0.28.1",
}
HOROVOD_FIX = "python -m distrec.horovod_build"
JAVA_FIX = "apt-get install -y openjdk-17-jre-headless"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Args:
        part: What was looked at.
        works: True, False, or None for what is optional and not there.
        detail: Version or what was seen.
        fix: Command or advice that mends it; "" when there is nothing to mend.
    """

    part: str
    works: bool | None
    detail: str
    fix: str = ""


def _run(code: str, *prefix: str) -> tuple[bool, str]:
    """Run Python code in a process of its own; whether it ended well, and its last line."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    try:
        result = subprocess.run(
            [*prefix, sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            env=env,
        )
    except FileNotFoundError as error:
        return False, str(error)
    except subprocess.TimeoutExpired:
        return False, f"no answer in {TIMEOUT_SECONDS} s"
    lines = [line for line in (result.stdout or result.stderr).splitlines() if line.strip()]
    return result.returncode == 0, lines[-1].strip() if lines else ""


def _versions() -> list[Finding]:
    python = platform.python_version()
    findings = [
        Finding(
            "python",
            sys.version_info[:2] == (3, 11),
            f"{python} on {platform.platform()}",
            "" if sys.version_info[:2] == (3, 11) else "use Python 3.11",
        )
    ]
    for name, wanted in STACK.items():
        fix = HOROVOD_FIX if name == "horovod" else f"pip install '{name}=={wanted}.*'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "fbgemm-gpu-cpu" and _installed("fbgemm-gpu"):
                continue
            findings.append(Finding(name, False, "not installed", fix))
            continue
        good = version == wanted or version.startswith((f"{wanted}.", f"{wanted}+"))
        findings.append(Finding(name, good, version, "" if good else f"{fix}  (tested: {wanted})"))
    return findings


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _java() -> Finding:
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    if java is None or not Path(java).exists():
        return Finding("java", False, "not found", JAVA_FIX)
    result = subprocess.run([java, "-version"], capture_output=True, text=True)
    line = (result.stderr or result.stdout).splitlines()[0]
    good = any(f'"{major}' in line for major in (17, 21))
    return Finding("java", good, line, "" if good else JAVA_FIX)


def _spark() -> Finding:
    works, detail = _run(
        "from pyspark.sql import SparkSession\n"
        "s = SparkSession.builder.master('local[1]').config('spark.ui.enabled', 'false')"
        ".config('spark.driver.bindAddress', '127.0.0.1').getOrCreate()\n"
        "assert s.range(10).count() == 10\n"
        "print('a local job ran on Spark', s.version)"
    )
    return Finding("Spark starts", works, detail, "" if works else JAVA_FIX)


def _kernel() -> Finding:
    works, detail = _run(
        "import torch\n"
        "from distrec.config import LaunchConfig, ShardingConfig\n"
        "from distrec.batch import Jagged\n"
        "from distrec.sharding import collectives, lookup, plan, tables\n"
        "group = collectives.start(LaunchConfig())\n"
        "plans = plan.plan_tables((plan.TableSpec('t', 8, 4),), ShardingConfig(), 1)\n"
        "table = tables.EmbeddingTables("
        "plans, group, ShardingConfig(), 1, torch.device('cpu'))\n"
        "request = lookup.Request('t', Jagged.from_lists([[3, 4]]), 'sum')\n"
        "before = table({'x': request})['x']\n"
        "before.sum().backward()\n"
        "assert not torch.equal(before.detach(), table({'x': request})['x'].detach())\n"
        "print('look-up, gradient and fused update ran')"
    )
    fix = "" if works else "pip install 'torch==2.13.*' 'fbgemm-gpu-cpu==1.8.*'"
    return Finding("FBGEMM kernel runs", works, detail, fix)


def _exchange() -> Finding:
    launcher = Path(sysconfig.get_path("scripts")) / "horovodrun"
    if not launcher.exists():
        return Finding("Horovod ranks exchange", False, "horovodrun not found", HOROVOD_FIX)
    works, detail = _run(
        "import horovod.torch as hvd, torch\n"
        "hvd.init()\n"
        "total = hvd.allreduce(torch.tensor([hvd.rank() + 1.0]), op=hvd.Sum, name='doctor')\n"
        "assert hvd.size() == 2 and total.item() == 3.0, (hvd.size(), total)\n"
        "print('two ranks exchanged over Gloo')",
        *(sys.executable, str(launcher), "-np", "2", "--gloo"),
        *("--network-interfaces", "lo"),
    )
    detail = detail.partition("<stdout>:")[2] or detail
    return Finding("Horovod ranks exchange", works, detail, "" if works else HOROVOD_FIX)


def _parquet() -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        works, detail = _run(
            "import pyarrow as pa, pyarrow.parquet as pq\n"
            "from pathlib import Path\n"
            f"path = {folder!r} + '/x.parquet'\n"
            "pq.write_table(pa.table({'h': pa.array([[1], [], [2, 3]], pa.list_(pa.int64()))}),"
            " path)\n"
            "from distrec.reader.files import SplitFile\n"
            "from distrec.reader.petastorm_adapter import RowGroupReader\n"
            "table = RowGroupReader([SplitFile(Path(path), (3,))], ['h'], 0).read(0, 0)\n"
            "assert table.column('h').to_pylist() == [[1], [], [2, 3]]\n"
            "print('ragged lists read through petastorm')"
        )
    fix = "" if works else "pip install 'petastorm==0.12.1' 'pyarrow==14.0.2' 'numpy<2'"
    return Finding("petastorm reads Parquet", works, detail, fix)


def _gpu() -> Finding:
    works, detail = _run(
        "import torch\n"
        "n = torch.cuda.device_count() if torch.cuda.is_available() else 0\n"
        "names = ', '.join(torch.cuda.get_device_name(i) for i in range(n))\n"
        "print(f'{n} ({names})' if n else 'none; training runs on the CPU')"
    )
    there = works and not detail.startswith("none")
    fix = "" if there else "optional: see docs/cluster.md, GPUs"
    return Finding("GPU", True if there else None, detail, fix)


CHECKS: tuple[Callable[[], Finding], ...] = (_java, _spark, _parquet, _kernel, _exchange, _gpu)


def examine() -> list[Finding]:
    """Look at every part; takes about half a minute."""
    return [*_versions(), *(check() for check in CHECKS)]
