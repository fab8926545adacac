"""Writes the sheets of sprites from npm packages, whose licences stand in ``data/sprites/LICENSES.md``.

``python -m vtok_eval.scenes.sheets --google TGZ --twitter TGZ --fluent TGZ``, with the archives that ``npm pack`` gives
of ``emoji-datasource-google@16.0.0`` and ``emoji-datasource-twitter@16.0.0`` (PNG, 64 px) and
``@lobehub/fluent-emoji-3d@1.1.0`` (WebP, 256 px). ``concepts.json`` says which pictures, and is edited by hand.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from vtok.errors import VtokError
from vtok_eval.scenes.sprites import CELLS, COLUMNS
from vtok_eval.scenes.vocabulary import CONCEPTS, SPRITES

FILES = {
    "google": ("package/img/google/64/", ".png"),
    "twitter": ("package/img/twitter/64/", ".png"),
    "fluent": ("package/assets/", ".webp"),
}


def _member(archive: tarfile.TarFile, names: list[str], concept: str) -> Image.Image:
    for name in names:
        try:
            stream = archive.extractfile(name)
        except KeyError:
            continue
        if stream is not None:
            return Image.open(io.BytesIO(stream.read())).convert("RGBA")
    raise VtokError(f"{archive.name!s} has no picture of {concept!r}: none of {', '.join(names)}")


def build(style: str, package: Path, out: Path = SPRITES) -> Path:
    """Write the sheet of one style from its npm package: ``COLUMNS`` cells a row, concepts in alphabetical order."""
    cell, (folder, ending) = CELLS[style], FILES[style]
    codes = {name: entry["code"] for name, entry in json.loads((SPRITES / "concepts.json").read_text()).items()}
    sheet = Image.new("RGBA", (COLUMNS * cell, -(-len(CONCEPTS) // COLUMNS) * cell))
    with tarfile.open(package) as archive:
        for place, concept in enumerate(CONCEPTS):
            code = codes[concept]
            plain = code.removesuffix("-fe0f")
            names = [folder + stem + ending for stem in (code, plain, f"{plain}-fe0f")]
            picture = _member(archive, names, concept)
            if picture.width != cell:
                picture = picture.resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(picture, (place % COLUMNS * cell, place // COLUMNS * cell))
    path = out / f"{style}.webp"
    sheet.save(path, quality=92, alpha_quality=95, method=6)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for style in CELLS:
        parser.add_argument(f"--{style}", type=Path, required=True, metavar="TGZ")
    chosen = vars(parser.parse_args())
    for style in CELLS:
        build(style, chosen[style])


if __name__ == "__main__":
    main()
