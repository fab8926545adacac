"""The command line: ``vtok methods | families | show | demo``, and whatever commands the installed parts bring."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from vtok.errors import VtokError
from vtok.values import option_value

#: sub-commands that live elsewhere: name -> "module:function", or an app with sub-commands of its own; imported when
#: asked for, absent while the module is
ELSEWHERE = {
    "bench": "vtok.bench.app:app",
    "card": "vtok_eval.cards:command",
    "eval": "vtok_eval.harness:command",
    "export": "vtok.export.command:command",
    "tokenizer": "vtok.tokenizers.app:app",
    "tune": "vtok_eval.tune:command",
}

JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class Single(TyperCommand):
    """A command of its own, with no group around it; a ``VtokError`` is told as in ``vtok``."""

    def invoke(self, ctx: Any) -> Any:
        return _told(super().invoke, ctx)


class Group(TyperGroup):
    """Commands of other modules on demand; a ``VtokError`` becomes one red sentence and exit code 2."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *(name for name in ELSEWHERE if _exists(name))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands and cmd_name in ELSEWHERE and _exists(cmd_name):
            module, function = ELSEWHERE[cmd_name].split(":")
            found = getattr(importlib.import_module(module), function)
            if not isinstance(found, typer.Typer):
                single = typer.Typer(add_completion=False)
                single.command(cmd_name)(found)
                found = single
            self.commands[cmd_name] = typer.main.get_command(found)
            self.commands[cmd_name].name = cmd_name
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        return _told(super().invoke, ctx)


def _told(invoke: Callable[[Any], Any], ctx: Any) -> Any:
    try:
        return invoke(ctx)
    except VtokError as error:
        Console(stderr=True, soft_wrap=True).print(Text(f"Error: {error}", style="red"))
        raise typer.Exit(2) from None


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Make vision-language models fast: prune, merge and re-tokenize their visual tokens.",
)


def main() -> None:
    """Entry point of the ``vtok`` command."""
    app()


def alone(command: Callable[..., None]) -> None:
    """Run one function as a command, as ``python -m vtok_eval.train`` does.

    Parameters
    ----------
    command : callable
        With typer's annotations. A ``VtokError`` becomes one red sentence and exit code 2.
    """
    single = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
    single.command(cls=Single)(command)
    single()


def _exists(name: str) -> bool:
    return importlib.util.find_spec(ELSEWHERE[name].split(":")[0]) is not None


def _version(wanted: bool) -> None:
    if wanted:
        import vtok

        typer.echo(f"vtok {vtok.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def methods(
    family: Annotated[str | None, typer.Option(help="Only methods that can serve this family.")] = None,
    as_json: JSON = False,
) -> None:
    """List the compression methods: where each one acts, what it does, which model families it serves."""
    import vtok
    from vtok.method import registry

    serving = {name: set(vtok.methods(name)) for name in vtok.families()}
    rows: list[dict[str, Any]] = []
    for name in vtok.methods(family):
        cls = registry()[name]
        served = [known for known, names in serving.items() if name in names]
        rows.append({"name": name, "site": cls.site, "summary": cls.summary, "paper": cls.paper, "families": served})
    if as_json:
        _print_json(rows)
        return
    table = Table(title=f"methods for {family}" if family else None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("method", "site", "summary", "paper", "families"):
        table.add_column(column, no_wrap=column in ("method", "site", "paper"))
    for row in rows:
        table.add_row(row["name"], row["site"], row["summary"], row["paper"], _in_words(row["families"], list(serving)))
    Console().print(table)


@app.command()
def families(as_json: JSON = False) -> None:
    """List the model families vtok knows, what they take in, and how many methods serve each."""
    import vtok
    from vtok.api import _adapters
    from vtok.method import BARE

    rows: list[dict[str, Any]] = []
    for name, cls in sorted(_adapters().items()):
        bare = name in BARE
        rows.append(
            {
                "family": name,
                "kind": "vision tower" if bare else "vision-language model",
                "media": list(cls.modalities),
                "positions": [] if bare else sorted(cls.positions),
                "methods": vtok.methods(name),
            }
        )
    if as_json:
        _print_json(rows)
        return
    table = Table("family", "kind", "media", "positions", "methods", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        lists = [", ".join(row[key]) for key in ("media", "positions")]
        table.add_row(row["family"], row["kind"], *lists, str(len(row["methods"])))
    Console().print(table)


@app.command()
def show(
    photo: Annotated[Path, typer.Argument(help="A picture file.")],
    model: Annotated[
        str, typer.Option(help="A folder with a model, or the name of a geometry with random weights.")
    ] = "tiny-llava",
    method: Annotated[str | None, typer.Option(help='A method, or several to compose: "divprune+random_deep".')] = None,
    keep: Annotated[
        str | None, typer.Option(help="Visual tokens per image, such as 64, or a share of them, such as 0.25.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An option of the method, such as k=3; repeatable.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The question, where the folder brings a processor.")] = (
        "Describe the picture."
    ),
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("out.png"),
    stages: Annotated[bool, typer.Option(help="Draw every stage side by side.")] = False,
    fit: Annotated[str, typer.Option(help="How the picture met the token grid: auto, crop, pad or stretch.")] = "auto",
    as_json: JSON = False,
) -> None:
    """Draw which visual tokens of a photo a method keeps, and print what it cost."""
    from vtok.photo import of_file

    _quiet()
    report, random = of_file(
        photo,
        out,
        model=model,
        methods=None if method is None else method.replace(",", "+").split("+"),
        keep=None if keep is None else _budget(keep),
        options=dict(_option(text) for text in option or ()),
        prompt=prompt,
        stages=stages,
        fit=fit,
    )
    if as_json:
        _print_json({"picture": str(out), "model": model, "random_weights": random, **report.as_dict()})
        return
    typer.echo(str(report))
    typer.echo(f"\nwrote {out}" + (f" ({model}: random weights, so the choice means nothing)" if random else ""))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo_output"),
    photo: Annotated[Path | None, typer.Option(help="A picture of your own instead of scikit-image's.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only this model; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; repeatable.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Paired timings of each method.")] = 3,
    as_json: JSON = False,
) -> None:
    """Run every method on a photograph through two small random models: counts, timings and pictures, in a minute."""
    from vtok.demo import MODELS, run
    from vtok.photo import opened

    _quiet()
    models = model or list(MODELS)
    rows = run(out, None if photo is None else opened(photo), models=models, methods=method, repeats=repeats)
    if as_json:
        _print_json([row.as_dict() for row in rows])
        return
    console = Console()
    for name in models:
        mine = [row for row in rows if row.model == name]
        title = f"{name}: random weights, so counts and times are real and answers are noise"
        console.print(title, style="bold", highlight=False)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("method", no_wrap=True)
        for column in ("tokens in", "kept", "layer average", "MAC ratio", "prefill ms", "plain ms", "speed-up"):
            table.add_column(column, justify="right")
        for row in mine:
            if not row.picture:
                table.add_row(row.method, *["-"] * 7)
                continue
            counts = [f"{row.tokens_in:g}", f"{row.tokens_kept:g}", f"{row.average_tokens:.1f}", f"{row.mac_ratio:.3f}"]
            times = [f"{row.prefill_ms:.0f}", f"{row.plain_ms:.0f}", f"{row.speedup:.2f}x"]
            table.add_row(row.method, *counts, *times)
        console.print(table)
        for row in mine:
            if row.note:
                console.print(f"  {row.method}: {row.note}", highlight=False)
        console.print()
    console.print(f"pictures: {out}/, all of them on one sheet: {out / 'contact_sheet.png'}", highlight=False)


def _in_words(served: list[str], known: list[str]) -> str:
    """The families a method serves, or those it does not where these are fewer."""
    from vtok.method import BARE

    languages = [name for name in known if name not in BARE]
    for group, word in ((languages, "all VLMs"), (known, "all")):
        missing = [name for name in group if name not in served]
        if len(missing) < len(served) and set(served) <= set(group):
            return word + (f" but {', '.join(missing)}" if missing else "")
    return ", ".join(served)


def _budget(text: str) -> int | float:
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise VtokError(f"--keep {text} is no budget; give a number of tokens (64) or a share of them (0.25)") from None


def _option(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise VtokError(f"--option {text} is not of the form name=value, such as k=3")
    if name == "keep":
        raise VtokError("the budget is no option of a method; give it as --keep")
    return name, option_value(value)


def _quiet() -> None:
    """The library's remarks on random little models would bury the table, and its bars a log file."""
    import transformers

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
