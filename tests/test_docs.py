"""The documents keep up with the code: every public name, method, option, family and pair is there and right, and the
README's snippets run as they stand, on a tiny model in place of a real one.

``python -m tests.test_docs`` prints the table of pairs for docs/families.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from textwrap import dedent
from typing import Any
from urllib.parse import unquote

import pytest
import torch
import transformers
from PIL import Image

import vtok
import vtok_kernels
from vtok.geometry import geometry, inputs_of
from vtok.method import _REGISTRY, BARE, registry
from vtok.view import Shape

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md", "model_cards/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
METHODS = [name for name, cls in registry().items() if cls.__module__.startswith("vtok.methods.")]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text(page), re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no section {heading!r}"
    return found.group(1)


def rows(markdown: str) -> dict[str, list[str]]:
    """Table rows by what their first cell names."""
    lines = [line for line in markdown.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("` "): row[1:] for row in cells}


# Names


@pytest.mark.parametrize("name", vtok.__all__)
def test_every_public_name_is_on_the_api_page(name: str) -> None:
    assert re.search(rf"`vtok\.{name}\b", text("docs/api.md")), f"docs/api.md lacks `vtok.{name}`"


@pytest.mark.parametrize("name", vtok_kernels.__all__)
def test_every_operator_is_on_the_api_page(name: str) -> None:
    assert re.search(rf"^\| `{name}\b", section("docs/api.md", "vtok_kernels"), re.MULTILINE), (
        f"docs/api.md lacks {name}"
    )


def test_the_api_page_names_nothing_else() -> None:
    page = text("docs/api.md").split("## Other modules")[0]
    assert set(re.findall(r"^\| `vtok\.(\w+)", page, re.MULTILINE)) == set(vtok.__all__)
    operators = re.findall(r"^\| `(\w+)", section("docs/api.md", "vtok_kernels"), re.MULTILINE)
    assert set(operators) == set(vtok_kernels.__all__)


# Methods and families


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_documented(name: str) -> None:
    cls = registry()[name]
    own = section("docs/methods.md", name)
    assert f"`{cls.site}`" in own
    assert f"positions `{cls.positions}`" in own.replace("positions\n", "positions ")
    if cls.paper.startswith("arXiv"):
        assert cls.paper.removeprefix("arXiv ") in own
    for preset in cls.presets:
        assert f"`{preset}`" in own, f"docs/methods.md lacks the preset {preset!r} of {name}"


@pytest.mark.parametrize("name", METHODS)
def test_options_are_documented_with_their_defaults(name: str) -> None:
    table = rows(section("docs/methods.md", name))
    fields = {field.name: field.default for field in dataclasses.fields(registry()[name])}
    assert list(table) == list(fields)
    for option, default in fields.items():
        written = table[option][0].strip("`")
        shown = repr(default).replace("'", '"')
        assert written == shown or (written.endswith("...") and shown.startswith(written.rstrip("."))), option


def test_methods_pages_list_every_method() -> None:
    assert re.findall(r"^## (\w+)$", text("docs/methods.md"), re.MULTILINE) == METHODS
    table = rows(section("README.md", "Methods"))
    assert list(table) == METHODS
    for name, (site, _, source, serves) in table.items():
        cls = registry()[name]
        assert site == cls.site
        assert cls.paper.removeprefix("arXiv ") in source or cls.paper.split(" ")[0] in source
        assert serves == ("VLMs, ViTs" if serving(name, BARE[0]) is None else "VLMs")
    by_site = rows(text("README.md").split("## ")[0])
    for site in ("encoder", "input", "decoder"):
        assert by_site[site][-1].replace("`", "").split() == [name for name in METHODS if registry()[name].site == site]


def test_families_pages_list_every_family() -> None:
    built_in = [name for name in vtok.families() if adapter(name).__module__.startswith("vtok_adapters.")]
    table = rows(section("README.md", "Families"))
    assert sorted(table) == built_in
    for name, (_, media, positions) in table.items():
        assert media == (", ".join(adapter(name).modalities) or "pixels")
        assert positions == ("-" if name in BARE else ", ".join(sorted(adapter(name).positions)))
    described = rows(text("docs/families.md").split("## ")[0])
    assert sorted(described) == built_in
    for name, (classes, _) in described.items():
        assert all(f"`{cls}`" in classes for cls in getattr(adapter(name), "classes", ()))


def test_the_table_of_pairs_is_right() -> None:
    assert pairs_table() in text("docs/families.md"), f"paste this into docs/families.md:\n\n{pairs_table()}"


def adapter(family: str) -> Any:
    from vtok.api import _adapters

    return _adapters()[family]


def serving(method: str, family: str) -> str | None:
    """Why a method refuses a family, ``None`` where it serves it."""
    tower = {"packed": "qwen" in family, "tiled": family in ("llava_next", "llava_onevision")}
    shape = Shape(0 if family in BARE else 32, 24, True, family=family, **tower)
    reason = vtok.get(method).refuse(shape)
    if reason is None:
        assert method in vtok.methods(family)
    return reason


def pairs_table() -> str:
    families = list(rows(section("README.md", "Families")))
    reasons: list[str] = []
    lines = [f"| | {' | '.join(f'`{family}`' for family in families)} |", "|---" * (len(families) + 1) + "|"]
    for method in METHODS:
        cells = []
        for family in families:
            reason = serving(method, family)
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("✓" if reason is None else f"- ({reasons.index(reason) + 1})")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


# Snippets


def snippets(page: str) -> list[tuple[str, str | None]]:
    """Python blocks of a page in order, each with the text block of its output if one follows directly."""
    pattern = r"^ *```python\n(.*?)```(?:\n\n```text\n(.*?)```)?"
    found = re.findall(pattern, text(page), re.DOTALL | re.MULTILINE)
    return [(dedent(code), output or None) for code, output in found]


class Processor:
    """Stands in for a checkpoint's processor."""

    def __init__(self, model: Any, image: Image.Image) -> None:
        self.model, self.image = model, image

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> transformers.BatchFeature:
        assert any(part["type"] == "image" for part in messages[0]["content"])
        return transformers.BatchFeature(inputs_of(self.model, self.image))

    def decode(self, ids: Any, **kwargs: Any) -> str:
        return f"{len(ids)} tokens"


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What a snippet may take for granted. Checkpoints are replaced by a tiny model of LLaVA-1.5's layout."""
    before = dict(_REGISTRY)
    model, image = geometry("tiny-llava"), Image.new("RGB", (672, 504), "teal")
    for auto, stand_in in (
        (transformers.AutoModelForImageTextToText, model),
        (transformers.AutoProcessor, Processor(model, image)),
    ):
        original = auto.from_pretrained
        monkeypatch.setattr(
            auto,
            "from_pretrained",
            lambda name, *args, _stand_in=stand_in, _original=original, **kwargs: (
                _original(name, *args, **kwargs) if Path(name).is_dir() else _stand_in
            ),
        )
    monkeypatch.chdir(tmp_path)
    yield {"model": model, "image": image, "inputs": inputs_of(model, image), "vtok": vtok, "torch": torch}
    _REGISTRY.clear()
    _REGISTRY.update(before)


@pytest.mark.parametrize("page", ["README.md", "docs/api.md", "CONTRIBUTING.md"])
def test_snippets_run(page: str, namespace: dict[str, Any]) -> None:
    found = snippets(page)
    assert found or page != "README.md"
    for code, output in found:
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(code, page, "exec"), namespace)
        if output is not None:
            assert without_times(printed.getvalue()) == without_times(output)


def without_times(output: str) -> list[str]:
    """Lines of a printed report, what a clock measured left out."""
    return [re.sub(r"(\(s\)\s+)[\d.]+$", r"\1", line) for line in output.strip().splitlines()]


def test_the_custom_method_of_the_readme_is_the_one_it_says(namespace: dict[str, Any]) -> None:
    """The dozen lines keep the tokens with the longest embeddings."""
    (code,) = (code for code, _ in snippets("README.md") if "@vtok.register" in code)
    assert len(code.strip().splitlines()) <= 13
    exec(code, namespace)
    features = torch.randn(2, 9, 4)
    view = vtok.View(features, torch.arange(9).expand(2, 9))
    kept = registry()["norm"]().select(view, 3)
    assert torch.equal(kept, features.norm(dim=-1).topk(3).indices.sort().values)
    model = namespace["model"]
    with torch.no_grad():
        model(**namespace["inputs"])
    assert vtok.report(model).tokens_kept == 64
    assert "norm" in vtok.methods("llava")


def test_the_picture_tells_the_truth(namespace: dict[str, Any]) -> None:
    """Counts in docs/tokens.svg are those of the chain that its caption names."""
    caption = text("README.md").split("docs/tokens.svg)")[1]
    chain = re.findall(r'"(\w+)"', caption.split("`")[1])
    model = vtok.compress(namespace["model"], chain, keep=64)
    with torch.no_grad():
        model(**namespace["inputs"])
    report = vtok.report(model)
    counts = [576] + [len(stage.kept[0][0]) for stage in report.stages[1:6]]
    counts += [counts[-1], int(report.layer_tokens[0]), int(report.layer_tokens[0]), int(report.layer_tokens[-1])]
    drawing = text("docs/tokens.svg")
    assert [int(n) for n in re.findall(r">(\d+)</text>", drawing)] == counts
    # bars: 190 high for 576 tokens
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" rx="1.5"', drawing)]
    tower, tokens = [], 576
    for block in range(23):
        here = [stage for stage in report.stages if (stage.site, stage.layer) == ("encoder", block)]
        tokens = len(here[0].kept[0][0]) if here else tokens
        tower.append(tokens)
    drawn = [*[576] * 57, *tower, tower[-1], report.layer_tokens[0], *report.layer_tokens]
    assert heights == pytest.approx([max(3.0, tokens / 576 * 190) for tokens in drawn], abs=0.1)
    assert f"layer {report.stages[-1].layer}" in drawing


# Links and language


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = unquote(target).partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name} links to {target}"


def test_named_files_exist() -> None:
    """Paths in backticks are real, whichever page names them (placeholders have angle brackets)."""
    folders = ("vtok/", "adapters/", "kernels/", "eval/", "tests/", "docs/", "model_cards/", ".ci/")
    for page in PAGES:
        for name in re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8")):
            if name.startswith(folders):
                assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_commands_exist() -> None:
    """Every `vtok <command>` and `make <target>` that a page names."""
    from typer.main import get_command

    from vtok.cli import app

    group: Any = get_command(app)
    commands = set(group.list_commands(None))
    targets = set(re.findall(r"^(\w+):", text("Makefile"), re.MULTILINE))
    for page in PAGES:
        body = page.read_text(encoding="utf-8")
        code = "\n".join(
            [*re.findall(r"^```\n(.*?)^```", body, re.DOTALL | re.MULTILINE), *re.findall(r"`([^`\n]+)`", body)]
        )
        assert set(re.findall(r"(?:^|; )vtok (\w+)", code, re.MULTILINE)) <= commands, page.name
        assert set(re.findall(r"(?:^|; )make (\w+)", code, re.MULTILINE)) <= targets, page.name


def test_docstrings_of_public_functions() -> None:
    for name in vtok.__all__:
        found = getattr(vtok, name)
        if inspect.isfunction(found) or inspect.isclass(found):
            assert inspect.getdoc(found), f"vtok.{name} has no docstring"


if __name__ == "__main__":
    print(pairs_table())  # noqa: T201
