"""Metadata of the package. Horovod is not named here: see distrec/horovod_build.py.

DISTREC_CUDA=1 picks the CUDA build of FBGEMM (install the CUDA build of torch first).
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "distrec/__init__.py").read_text()).group(1)
FBGEMM = "fbgemm-gpu" if os.environ.get("DISTREC_CUDA") == "1" else "fbgemm-gpu-cpu"

setup(
    name="distrec",
    version=VERSION,
    description="Trains one unified recommender on many machines and scores everyone in batch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["distrec", "distrec.*"]),
    package_data={
        "distrec": ["py.typed", "spark_conf/*"],
        "distrec.report": ["*.html.j2", "*.css", "*.js"],
    },
    # torch and fbgemm move together; pyarrow, numpy and pandas are held by petastorm
    install_requires=[
        "torch==2.13.*",
        f"{FBGEMM}==1.8.*",
        "pyspark==4.0.*",
        "pyarrow==14.0.2",
        "numpy>=1.26,<2",
        "pandas>=2.2,<3",
        "scipy>=1.11",
        "petastorm==0.12.1",
        "safetensors>=0.5",
        "pydantic>=2.9,<3",
        "typer>=0.12",
        "rich>=13",
        "jinja2>=3.1",
        "tomli-w>=1.0",
        "tensorboard>=2.17",
        # torch and tensorboard import pkg_resources' package; petastorm's own metadata too
        "setuptools<81",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "scikit-learn>=1.4",
            "torchmetrics>=1.4",
            "ruff>=0.6",
            "mypy>=1.11",
            "pandas-stubs",
            "optuna>=5,<6",
            "opacus>=1.6,<2",
            "mlflow-skinny>=3",
            # an object store for the tests
            "moto[s3]>=5",
            "flask>=3",
            "flask-cors",
        ],
        "mlflow": ["mlflow-skinny>=3"],
        "privacy": ["opacus>=1.6,<2"],
        "tune": ["optuna>=5,<6"],
    },
    entry_points={"console_scripts": ["distrec = distrec.cli:main"]},
)
