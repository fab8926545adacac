"""``python -m vtok_eval.models.photographs NAME``: what a model says about real photographs, whole and compressed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import vtok
from vtok.cli import alone
from vtok.demo import photograph
from vtok.errors import VtokError
from vtok_eval.answering import Answerer
from vtok_eval.render.markdown import table
from vtok_eval.samples import INSTRUCTION

FILE = "photographs.md"

#: photograph of scikit-image, question, and what a person would say
QUESTIONS = (
    ("coffee", "What is it?", "coffee, cup"),
    ("coffee", "Is there a cat in the picture?", "no"),
    ("cat", "What is it?", "cat"),
    ("cat", "Is there a cat in the picture?", "yes"),
    ("rocket", "What is it?", "rocket"),
    ("rocket", "Is there a rocket in the picture?", "yes"),
    ("astronaut", "Is there a rocket in the picture?", "yes, a model"),
    ("astronaut", "What colour is the background?", "no single one"),
    ("hubble_deep_field", "What colour is the background?", "black"),
    ("retina", "What is it?", "eye (a retina)"),
)


def answers(model: Any, processor: Any, name: str, methods: Sequence[str], keep: int) -> str:
    """A markdown table: a row a question, a column for the plain model and for each method.

    Parameters
    ----------
    model, processor
        Not compressed; it is left so.
    name : str
        Of the model.
    methods : sequence of str
        Names, as for ``vtok.compress``.
    keep : int
        Their budget.
    """
    asker = Answerer(model, processor, name)

    def said() -> list[str]:
        found = []
        for photo, question, _ in QUESTIONS:
            picture = photograph(photo).convert("RGB")
            content = [{"type": "image", "image": picture}, {"type": "text", "text": f"{question}\n{INSTRUCTION}"}]
            (answer,) = asker.answer([asker.prompt([{"role": "user", "content": content}])])
            found.append(answer.text)
        return found

    columns = [said()]
    for method in methods:
        with vtok.compressed(model, method, keep=keep):
            columns.append(said())
    heads = ["photograph", "question", "a person", "plain", *(f"{method} {keep}" for method in methods)]
    asked = [[photo.replace("_", " "), question, truth] for photo, question, truth in QUESTIONS]
    return "\n".join(table(heads, [[*own, *said] for own, *said in zip(asked, *columns, strict=True)])) + "\n"


def command(
    name: Annotated[str, typer.Argument(help="An embedded model.")],
    method: Annotated[str, typer.Option(help="Methods, with commas between.")] = "divprune,flowcut,random",
    keep: Annotated[int, typer.Option(help="Their budget.", min=1)] = 64,
    out: Annotated[Path, typer.Option(help="Folder of cards.")] = Path("model_cards"),
) -> None:
    """Write out/NAME/photographs.md, which the card takes up."""
    from vtok_eval.models import load

    methods = [part.strip() for part in method.split(",") if part.strip()]
    if not (out / name).is_dir():
        raise VtokError(f"there is no folder {out / name}; name one with --out")
    text = answers(*load(name), name, methods, keep)
    (out / name / FILE).write_text(text, encoding="utf-8")
    typer.echo(text)


if __name__ == "__main__":
    alone(command)
