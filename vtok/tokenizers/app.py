"""``vtok tokenizer``: train a tokenizer, turn pictures into tokens and back, look at it, count its codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.errors import VtokError
from vtok.resampler.command import distill
from vtok.values import option_value

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Image tokenizers: train one, turn pictures into ordered tokens and back, look at what k tokens show, count.",
)

Tokenizer = Annotated[
    str, typer.Argument(help="A folder that training or save_pretrained wrote, or the name of an installed tokenizer.")
]
Data = Annotated[str, typer.Argument(help="A folder of PNG, JPEG or WebP files, one such file, or a name: scenes.")]
Limit = Annotated[int | None, typer.Option(help="At most so many pictures.", min=1)]
Steps = Annotated[int, typer.Option(help="Of a flow decoder.", min=1)]
Guidance = Annotated[float | None, typer.Option(help="Of a flow decoder; the tokenizer's own by default.")]
Seed = Annotated[int, typer.Option(help="Of whatever is drawn.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one by default.")]
Batch = Annotated[int, typer.Option(help="Pictures at a time.", min=1)]
Vae = Annotated[Path | None, typer.Option(help="A diffusers AutoencoderKL's folder, for tokenizers of latents.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("train")
def train_command(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, log, the finished tokenizer and its measures.")],
    data: Annotated[str, typer.Option(help="A folder of pictures (PNG, JPEG, WebP), or a name: scenes.")] = "scenes",
    preset: Annotated[
        str | None, typer.Option(help="Shapes: test, nano, tiny, small, base, d12-d12, ...; nano by default.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help='A field of the config, such as quantiser="vq" or tokens=64; repeatable.'),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help="A trained tokenizer whose tokens stay: trains another decoder for them; its shapes hold."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Batches.", min=1)] = 8000,
    batch: Annotated[int, typer.Option(help="Pictures in a batch.", min=1)] = 32,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    views: Annotated[int, typer.Option(help="Cuts of each picture in a batch.", min=1)] = 1,
    check: Annotated[
        list[str] | None, typer.Option(help="Measure on these pictures, not on what --data holds out; repeatable.")
    ] = None,
    share: Annotated[float, typer.Option(help="Of a folder that is held out.")] = 0.05,
    limit: Annotated[int, typer.Option(help="Pictures to measure on, at most.", min=1)] = 256,
    seed: Seed = 0,
    device: Device = None,
    workers: Annotated[int, typer.Option(help="Processes that prepare pictures.", min=0)] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in the folder.")] = True,
    vae: Vae = None,
    as_json: Json = False,
) -> None:
    """Train a tokenizer and measure it; interrupted, the same command goes on."""
    from vtok.tokenizers import tables
    from vtok.tokenizers.config import TokenizerConfig
    from vtok.tokenizers.config import preset as named
    from vtok.tokenizers.data import find
    from vtok.tokenizers.files import device_of, vae_of
    from vtok.tokenizers.files import tokenizer as load
    from vtok.tokenizers.train import FINISHED, Recipe, assess, train

    if preset is not None and start is not None:
        raise VtokError("--preset and --start both give shapes; leave one of them out")
    place, changes = device_of(device), dict(_option(text) for text in option or ())
    trained = None if start is None else load(start, device, vae)
    if trained is None:
        config = named(preset or "nano", **changes)
    else:
        config = TokenizerConfig.of(dataclasses.asdict(trained.config) | changes)
    pictures = find(data, "train", seed=seed, share=share)
    held_out = [find(each, "held-out" if each == data else "all", seed=seed, share=share) for each in check or [data]]
    recipe = Recipe(steps, batch, rate, views=views, seed=seed)
    training = {"device": place, "workers": workers, "resume": resume, "vae": vae_of(vae, place), "start": trained}
    tokenizer = train(config, pictures, out, recipe, **training)
    report = assess(tokenizer, held_out, out, limit=limit)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    tables.report(report)
    typer.echo(f"wrote {out / FINISHED}, and beside it its measures and pictures")


@app.command()
def encode(
    tokenizer: Tokenizer,
    data: Data,
    out: Annotated[Path, typer.Option(help="The file of tokens.")] = Path("tokens.safetensors"),
    k: Annotated[
        str | None, typer.Option("--tokens", "-k", help='The first so many tokens, or "auto": as many as it takes.')
    ] = None,
    quality: Annotated[float, typer.Option(help="With auto: the mean absolute error of pixels in [0, 1].")] = 0.05,
    bits: Annotated[
        int | None, typer.Option(help="Of continuous tokens: bits a number; half precision without it.", min=1)
    ] = None,
    limit: Limit = None,
    batch: Batch = 32,
    seed: Seed = 0,
    device: Device = None,
    vae: Vae = None,
    as_json: Json = False,
) -> None:
    """Turn pictures into tokens, in a compact file."""
    from vtok.tokenizers import files
    from vtok.tokenizers.data import find

    tok = files.tokenizer(tokenizer, device, vae)
    wanted = _count(k)
    found = files.encode(
        tok, find(data, seed=seed), out, k=wanted, quality=quality, bits=bits, limit=limit, batch=batch
    )
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for label, reason in found["left_out"].items():
        typer.echo(f"left out {label}: {reason}", err=True)
    each = found["tokens"] / found["pictures"]
    typer.echo(f"wrote {out}: {found['pictures']} pictures, {each:g} tokens each, {found['bytes']} bytes")


@app.command()
def decode(
    tokenizer: Tokenizer,
    tokens: Annotated[Path, typer.Argument(help="A file of tokens.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("decoded"),
    k: Annotated[int | None, typer.Option("--tokens", "-k", help="The first so many tokens of each.", min=1)] = None,
    steps: Steps = 20,
    guidance: Guidance = None,
    limit: Limit = None,
    batch: Batch = 32,
    seed: Seed = 0,
    device: Device = None,
    vae: Vae = None,
    as_json: Json = False,
) -> None:
    """Turn tokens back into pictures, from any number of them."""
    from vtok.tokenizers import files

    tok = files.tokenizer(tokenizer, device, vae)
    decoding = {"steps": steps, "guidance": guidance, "seed": seed}
    written = files.decode(tok, tokens, out, k=k, limit=limit, batch=batch, **decoding)
    if as_json:
        typer.echo(json.dumps([str(path) for path in written], indent=1))
        return
    typer.echo(f"wrote {len(written)} pictures to {out}")


@app.command()
def show(
    tokenizer: Tokenizer,
    data: Data,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("reconstructions.png"),
    k: Annotated[
        str | None, typer.Option("--tokens", "-k", help="Numbers of tokens with commas between; 1,2,4,... by default.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Pictures to draw.", min=1)] = 8,
    limit: Annotated[int, typer.Option(help="Pictures to measure on, at most.", min=1)] = 64,
    steps: Steps = 20,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = None,
    vae: Vae = None,
    as_json: Json = False,
) -> None:
    """Draw what the first k tokens of pictures show, and print PSNR and SSIM over k."""
    from vtok.tokenizers import files, tables
    from vtok.tokenizers.data import find

    tok = files.tokenizer(tokenizer, device, vae)
    decoding = {"steps": steps, "guidance": guidance, "seed": seed}
    found = files.show(tok, find(data, seed=seed), out, ks=_counts(k), rows=rows, limit=limit, **decoding)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    tables.curve(found["name"], found["curve"])
    typer.echo(f"wrote {out}")


@app.command("stats")
def stats_command(
    source: Annotated[
        str,
        typer.Argument(help="A file of tokens of any discrete tokenizer (.safetensors, .npy, .jsonl), or a tokenizer."),
    ],
    data: Annotated[str | None, typer.Option(help="With a tokenizer: pictures to encode.")] = None,
    codes: Annotated[int | None, typer.Option(help="Size of the codebook, where the file does not say.", min=1)] = None,
    levels: Annotated[
        str | None, typer.Option(help="Digits of a code, the lowest first, such as 8,8,8,5,5,5 of FSQ.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Pictures to encode, at most.", min=1)] = 512,
    seed: Seed = 0,
    device: Device = None,
    vae: Vae = None,
    as_json: Json = False,
) -> None:
    """Count tokens: Zipf's law, innovation, entropy of each position, dead tails, compression."""
    from vtok.tokenizers import files, tables
    from vtok.tokenizers.data import find

    if Path(source).is_file():
        found = files.count(source, codes, _counts(levels) or (), seed)
    else:
        if data is None:
            raise VtokError(f"{source} is no file of tokens; to encode pictures with a tokenizer first, add --data")
        tok = files.tokenizer(source, device, vae)
        found = files.count_with(tok, find(data, seed=seed), limit, seed)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
        return
    tables.statistics(found.as_dict())


def _option(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise VtokError(f"--option {text} is not of the form name=value, such as tokens=64")
    return name, option_value(value)


def _count(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    found = _counts(text)
    if found is None or len(found) != 1:
        raise VtokError(f"--tokens {text} is no number of tokens; give one, such as 16, or auto")
    return found[0]


def _counts(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise VtokError(f"{text!r} must be whole numbers with commas between, such as 1,4,16") from None


app.command("distill")(distill)
