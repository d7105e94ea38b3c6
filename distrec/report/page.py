"""Puts the sections together into one HTML file and writes it whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from distrec import __version__
from distrec.config import Config
from distrec.dataset import DatasetManifest
from distrec.files import replace_text
from distrec.report import data, metrics, scales, training
from distrec.report.files import RunFiles, finite, mapping, read_run
from distrec.report.sample import read_sample
from distrec.report.settings import settings_text

Result = TypeVar("Result")


def write_report(config: Config) -> Path:
    """Write the report of a run from what the run left in its directory.

    A part that is missing or damaged is named in its section, with the command that makes it. The
    file depends on nothing but those parts and the configuration: written twice, it is the same.

    Returns:
        config.report_path.
    """
    page = render(config, read_run(config))
    path = config.report_path
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page)
    return path


def render(config: Config, files: RunFiles) -> str:
    """The report as text."""
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": scales.number, "metric": scales.metric}
    sample = _guarded(files, "sample", lambda: read_sample(config, files))
    text = environment.from_string(_asset("report.html.j2")).render(
        style=Markup(_asset("report.css")),
        script=Markup(script),
        script_hash=digest,
        version=__version__,
        config=config,
        files=files,
        commands=_commands(config),
        header=_header(config, files),
        data=_guarded(files, "dataset", lambda: _data(config, files.manifest)),
        curves=training.curves_section(files.steps, files.validations, config.train.metric),
        metrics=metrics.metrics_section(files.metrics or {}),
        tables=training.tables_section(files.plan),
        timings=training.timings_section(files.jobs),
        sample=sample,
        sample_json=sample and script_json(sample),
        settings=settings_text(config),
    )
    return text + "\n"


def script_json(value: Any) -> Markup:
    """JSON for a ``<script>`` element: no title in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # in JSON these stand only inside strings, where the escape means the same
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _asset(name: str) -> str:
    return resources.files("distrec.report").joinpath(name).read_text(encoding="utf-8")


def _guarded(files: RunFiles, part: str, build: Callable[[], Result]) -> Result | None:
    """The section, or a note that says why it cannot be built: Parquet may be gone or damaged."""
    try:
        return build()
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        files.notes[part] = f"{type(error).__name__}: {error}"
        return None


def _data(config: Config, manifest: DatasetManifest | None) -> dict[str, Any] | None:
    return None if manifest is None else data.data_section(config.dataset_directory, manifest)


def _commands(config: Config) -> dict[str, str]:
    """Job -> what to type to run it."""
    resolved = config.directory / "config.toml"
    path = shlex.quote(str(resolved)) if resolved.is_file() else "CONFIG.toml"
    names = ("run", "prepare", "train", "evaluate", "score", "report")
    return {name: f"distrec {name} {path}" for name in names}


def _header(config: Config, files: RunFiles) -> dict[str, Any]:
    """What was run, when, the verdict and the key numbers."""
    verdict = metrics.verdict(files.metrics or {}, config.train.metric)
    manifest = files.manifest
    tiles: list[tuple[str, str, str]] = []
    if verdict is not None:
        tiles.append((verdict["metric"], verdict["value"], f"on {verdict['split']}"))
        if verdict.get("ratio"):
            tiles.append(("of best baseline", verdict["ratio"], verdict["baseline"]))
    if manifest is not None:
        tiles += [
            ("users", scales.number(_rows(manifest, "users")), "in the dataset"),
            ("items", scales.number(_rows(manifest, "items")), "in the catalogue"),
            ("train events", scales.number(_rows(manifest, "train")), "rows"),
        ]
    lengths = [finite(job.get("seconds")) or 0.0 for job in files.jobs]
    if lengths:
        tiles.append(("all jobs", scales.seconds(sum(lengths)), "wall-clock time"))
    return {
        "verdict": verdict,
        "tiles": [{"label": label, "value": value, "note": note} for label, value, note in tiles],
        "facts": _facts(config, files),
    }


def _rows(manifest: DatasetManifest, split: str) -> int:
    entry = manifest.splits.get(split)
    return entry.num_rows if entry else 0


def _facts(config: Config, files: RunFiles) -> list[tuple[str, str]]:
    measured = files.metrics or {}
    scored = files.score_manifest or {}
    spent = mapping(measured.get("privacy"))
    epsilon, delta = finite(spent.get("epsilon")), finite(spent.get("delta"))
    privacy = None
    if epsilon is not None and delta is not None:
        privacy = f"epsilon {epsilon:.3g} at delta {delta:g}"
    facts = [
        ("Dataset made", files.manifest.created_at if files.manifest else None),
        ("Measured", measured.get("created_at")),
        ("Checkpoint", measured.get("checkpoint")),
        ("Model version", measured.get("model_version") or scored.get("model_version")),
        ("Towers", ", ".join(config.model.towers)),
        ("Privacy of training", privacy),
        ("Ranks", f"{config.launch.num_ranks}"),
        ("Seed", f"{config.seed}"),
    ]
    return [(name, _moment(str(value))) for name, value in facts if value]


def _moment(text: str) -> str:
    """An ISO time without its T; other text as it is."""
    if len(text) >= 19 and text[10] == "T" and text[:4].isdigit():
        return f"{text[:10]} {text[11:16]} UTC"
    return text
