"""The command line, `distrec`: one command a stage, `run` for all of them, `doctor` for help."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from distrec import __version__, pipeline
from distrec.config import Config, load_config
from distrec.config_reference import reference
from distrec.errors import DistrecError
from distrec.files import replace_text
from distrec.job import EXIT_CODES, configure_logging, execute, override

if TYPE_CHECKING:
    from distrec.compare import Comparison, Row

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Trains one unified recommender on many machines and scores everyone in batch.",
    epilog=" ".join(EXIT_CODES.split()),
)
ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The run's TOML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one key; may be given several times."
    ),
]


def _load(path: Path, overrides: list[str] | None) -> Config:
    configure_logging()
    return load_config(path, overrides or ())


def _run_single(name: str, path: Path, overrides: list[str] | None) -> None:
    function: Callable[[Config], Mapping[str, Any]] = getattr(pipeline, name)
    raise typer.Exit(execute(name, _load(path, overrides), function))


@app.command()
def run(
    config_path: ConfigPath,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Run every stage again.")] = False,
) -> None:
    """Everything: fetch, prepare, train, evaluate, score, report; only what is not up to date."""
    config = _load(config_path, overrides)
    started = time.monotonic()
    if config.data:
        from distrec.data import fetch

        fetch(config.data, Path("data") / config.data)
    code, done = pipeline.run_stages(config, force)
    if code:
        raise typer.Exit(code)
    console = Console()
    if not done:
        console.print(
            f"\nNothing has changed since the last run: {config.directory} is up to date."
        )
    print_summary(config, console)
    if done:
        seconds = time.monotonic() - started
        console.print(f"\n{', '.join(done)} took {seconds:.0f} s.")


def print_summary(config: Config, console: Console) -> None:
    """The table that ends a run: metrics beside the baselines, files, what to type next."""
    metrics = json.loads(config.metrics_path.read_text(encoding="utf-8"))
    split = metrics["splits"]["test"]
    shown = [
        name
        for name in ("hr@10", "ndcg@10", "mrr@10", "coverage@10")
        if name in split["models"]["distrec"]["metrics"]
    ]
    among = "given candidates" if split.get("candidates") else "whole catalogue"
    table = Table(title=f"{config.name}: test, {split['num_queries']:,} users, {among}")
    table.add_column("model")
    for name in shown:
        table.add_column(name, justify="right")
    for model, values in split["models"].items():
        cells = [f"{values['metrics'][name]:.4f}" for name in shown]
        table.add_row(model, *cells, style="bold" if model == "distrec" else None)
    console.print()
    console.print(table)
    places = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, path in (
        ("report", config.report_path),
        ("scores", config.scores_directory),
        ("metrics", config.metrics_path),
        ("checkpoints", config.checkpoint_directory),
        ("dataset", config.dataset_directory),
        ("logs", config.logs_directory),
    ):
        places.add_row(label, str(path))
    console.print(places)
    console.print("\nNext:")
    console.print(f"  open {config.report_path} in a browser")
    console.print(f"  tensorboard --logdir {config.logs_directory}")
    console.print("  copy the configuration file and name your own data: README.md, Your own data")


@app.command()
def prepare(
    config_path: ConfigPath,
    extend: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="An earlier dataset, whose values keep their ids; the same as prepare.extend.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Raw events and catalogues to a dataset, with Spark."""
    extending = [] if extend is None else [override("prepare.extend", extend)]
    _run_single("prepare", config_path, [*(overrides or ()), *extending])


@app.command()
def train(config_path: ConfigPath, overrides: Overrides = None) -> None:
    """Dataset to checkpoints, on launch.num_ranks ranks."""
    _run_single("train", config_path, overrides)


@app.command()
def evaluate(config_path: ConfigPath, overrides: Overrides = None) -> None:
    """Metrics of the model and of the baselines."""
    _run_single("evaluate", config_path, overrides)


@app.command()
def score(config_path: ConfigPath, overrides: Overrides = None) -> None:
    """Top-K of the whole catalogue for every user, with Spark."""
    _run_single("score", config_path, overrides)


@app.command()
def report(config_path: ConfigPath, overrides: Overrides = None) -> None:
    """The HTML report of a run."""
    _run_single("report", config_path, overrides)


@app.command()
def data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="movielens-100k or complete-journey")],
    directory: Annotated[
        Path | None, typer.Option(help="Where to put it.", show_default="data/NAME")
    ] = None,
) -> None:
    """Fetch a public data set, checked by SHA-256."""
    from distrec.data import fetch

    configure_logging()
    typer.echo(fetch(name, directory or Path("data") / name))


@app.command()
def config(
    config_path: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", show_default=False)
    ] = None,
    overrides: Overrides = None,
    show_reference: Annotated[
        bool, typer.Option("--reference", help="Print every key with its documentation.")
    ] = False,
) -> None:
    """Check a configuration and print it resolved, or print the reference of all keys."""
    from distrec.config import dump_config

    if show_reference:
        typer.echo(reference(), nl=False)
    elif config_path is None:
        raise typer.BadParameter("give a TOML file, or --reference")
    else:
        typer.echo(dump_config(_load(config_path, overrides)), nl=False)


@app.command()
def plan(
    config_path: ConfigPath,
    ranks: Annotated[
        int | None, typer.Option(help="Number of ranks.", show_default="launch.num_ranks")
    ] = None,
    memory_per_rank: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What each rank has, such as 64GiB.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="SPEED", help="What each rank sends, such as 10Gbit.")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What training will cost: tables, memory and network of each rank, before it is run."""
    from distrec import planner

    config = _load(config_path, overrides)
    memory = speed = None
    if memory_per_rank is not None:
        memory = planner.parse_bytes(memory_per_rank, "--memory-per-rank")
    if bandwidth is not None:
        speed = planner.parse_bandwidth(bandwidth, "--bandwidth")
    num_ranks = config.launch.num_ranks if ranks is None else ranks
    report = planner.plan_run(config, num_ranks, memory, speed)
    if as_json:
        typer.echo(planner.as_json(report))
    else:
        planner.show(report, Console())


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Directories of evaluated runs.", show_default=False),
    ],
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME@K",
            help="Such as ndcg@10; may be given several times.",
            show_default="ndcg, hr, recall and mrr at 10",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Page to write.")] = Path("comparison.html"),
    resamples: Annotated[int, typer.Option(min=20, help="Draws of the users.")] = 1000,
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs; no page is written.")
    ] = False,
) -> None:
    """Runs side by side on valid and test, with intervals from a bootstrap over users."""
    from distrec.compare import compare as compare_runs

    configure_logging()
    comparison = compare_runs(runs, metrics or (), resamples)
    if as_json:
        typer.echo(json.dumps(comparison.as_dict()))
        return
    from distrec.report.comparison import render_comparison

    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, render_comparison(comparison.as_dict()))
    console = Console()
    for (split, group), rows in comparison.parts.items():
        if any(row.num_queries for row in rows):
            console.print(_comparison_table(comparison, split, group, rows))
    console.print(
        f"+ and -: the 95 % interval of the difference to {comparison.reference} leaves out zero."
    )
    console.print(str(output), soft_wrap=True)


def _comparison_table(comparison: Comparison, split: str, group: str, rows: Sequence[Row]) -> Table:
    users = max(row.num_queries for row in rows)
    slice_name = "" if group == "all" else f", {group.replace('_', ' ')}"
    table = Table(title=f"{split}{slice_name}: {users:,} users")
    table.add_column("run")
    for name in comparison.metrics:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = []
        for name, value in row.values.items():
            difference = row.differences.get(name)
            sign = " "
            if difference is not None:
                sign = "+" if difference.low > 0 else "-" if difference.high < 0 else " "
            cells.append(f"{value.mean:.4f} {sign}\n{value.low:.4f}–{value.high:.4f}")
        table.add_row(row.label, *cells)
    return table


@app.command()
def ablate(
    config_path: ConfigPath,
    seeds: Annotated[
        list[int] | None,
        typer.Option(
            "--seed",
            min=0,
            help="Of training; give several for a spread.",
            show_default="seed of the file",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train with each tower off and each alone, on one dataset, and write the table."""
    from distrec import ablate as ablation

    config = _load(config_path, overrides)
    code, directory = ablation.run(config, tuple(dict.fromkeys(seeds or [config.seed])))
    if code:
        raise typer.Exit(code)
    typer.echo((directory / f"{ablation.DIRECTORY}.md").read_text(encoding="utf-8"))
    typer.echo(str(directory))


@app.command()
def tune(config_path: ConfigPath, overrides: Overrides = None) -> None:
    """Search [tune.parameters] for the best valid metric; goes on where it was cut off."""
    from distrec import tune as tuning

    config = _load(config_path, overrides)
    code, directory = tuning.run(config)
    if code:
        raise typer.Exit(code)
    document = json.loads((directory / tuning.TRIALS).read_text(encoding="utf-8"))
    table = Table(title=f"{config.name}: the best of {len(document['trials'])} trials")
    table.add_column(document["metric"], justify="right")
    for key in config.tune.parameters:
        table.add_column(key, justify="right")
    for row in document["trials"][:10]:
        value = "failed" if row["value"] is None else f"{row['value']:.4f}"
        shown = (row["values"].get(key, "") for key in config.tune.parameters)
        cells = (f"{one:.4g}" if isinstance(one, float) else str(one) for one in shown)
        table.add_row(value, *cells)
    console = Console()
    console.print(table)
    console.print(str(directory / tuning.BEST), soft_wrap=True)


@app.command()
def export(
    config_path: ConfigPath,
    table: Annotated[str, typer.Option(help="Embedding table, such as item.")],
    output: Annotated[Path, typer.Option(help="File to write.")],
    start: Annotated[int, typer.Option(min=0, help="First id.")] = 0,
    stop: Annotated[
        int | None, typer.Option(min=0, help="The id after the last.", show_default="all")
    ] = None,
    format_: Annotated[
        Literal["parquet"], typer.Option("--format", help="Of the file.")
    ] = "parquet",
    overrides: Overrides = None,
) -> None:
    """Rows of an embedding table of the checkpoint of score.checkpoint, by id, as Parquet."""
    function = partial(pipeline.export, table=table, output=output, start=start, stop=stop)
    raise typer.Exit(execute("export", _load(config_path, overrides), function))


@app.command()
def forget(
    config_path: ConfigPath,
    users: Annotated[
        Path,
        typer.Option(
            help="A raw user value a line, or Parquet or CSV with the user column.",
            show_default=False,
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is.")] = False,
    overrides: Overrides = None,
) -> None:
    """Take people out of dataset, checkpoints, scores and reports, and show that none is left."""
    function = partial(pipeline.forget, users=users, dry_run=dry_run)
    raise typer.Exit(execute("forget", _load(config_path, overrides), function))


@app.command()
def status(
    run_directory: Annotated[
        Path, typer.Argument(metavar="RUN", help="Directory of a run.", show_default=False)
    ],
) -> None:
    """What a run is doing, how far it is, and which rank is slow."""
    from distrec import status as state

    state.show(state.read_status(run_directory), Console())


@app.command()
def clean(
    run_directory: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Directory of a run, or its address in a store: <store>/<name>.",
            show_default=False,
        ),
    ],
    older_than: Annotated[
        float, typer.Option(min=0, help="Minutes since anything of it was written.")
    ] = 60,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is.")] = False,
) -> None:
    """Delete what killed jobs of a run left half-made; for when no job of the run is running."""
    from distrec.clean import find_leftovers, remove, stored_leftovers

    if "://" in run_directory:
        for store, folder in stored_leftovers(run_directory, 60 * older_than):
            if not dry_run:
                store.drop(folder)
            typer.echo(f"{store.address}/{folder}: {'left-over' if dry_run else 'deleted'}")
        return
    for leftover in find_leftovers(Path(run_directory), 60 * older_than):
        if not dry_run:
            remove(leftover)
        fate = "deleted" if leftover.original is None else f"back as {leftover.original.name}"
        typer.echo(f"{leftover.path}: {'left-over' if dry_run else fate}")


@app.command()
def doctor() -> None:
    """Which parts are there, what works, and what mends the rest."""
    from distrec.doctor import examine

    console = Console()
    console.print("Looking at every part, about half a minute.")
    findings = examine()
    table = Table()
    for column in ("part", "", "seen", "to mend it"):
        table.add_column(column, overflow="fold")
    marks = {True: "[green]ok[/green]", False: "[red]no[/red]", None: "-"}
    for finding in findings:
        table.add_row(finding.part, marks[finding.works], finding.detail, finding.fix)
    console.print(table)
    raise typer.Exit(1 if any(finding.works is False for finding in findings) else 0)


@app.command()
def version() -> None:
    """The version of distrec."""
    typer.echo(__version__)


def main() -> None:
    """Entry point: an error of the user's is a message and an exit code, not a traceback."""
    try:
        app()
    except DistrecError as error:
        print(f"distrec: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        logging.getLogger("distrec").error("interrupted")
        sys.exit(130)
