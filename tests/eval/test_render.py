"""Reports of made-up runs: everything is in them, nothing is fetched, nothing breaks them; a real browser agrees."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtok.errors import VtokError
from vtok.protocol import Part
from vtok.show import overlay
from vtok_eval import published, render
from vtok_eval.render import axes, pictures, words
from vtok_eval.render.html import VOID, Html, tag
from vtok_eval.render.page import page
from vtok_eval.render.palette import styles
from vtok_eval.render.results import Run
from vtok_eval.samples import Task

from .fake_results import TASKS, Fake, make

SMALL = Fake(
    methods=("flowcut", "random_deep", "divprune", "random", "downsample"),
    keeps=(192, 64),
    tasks=("objects", "exists", "text", "multi"),
    samples=16,
)
EVIL = " <script>alert('x')</script> & \"quoted\" | *bold*"
BROWSER = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: Counter[str] = Counter()
        self.text: list[str] = []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[name] += 1
        for key, value in attributes:
            self.attributes.append((name, key, value or ""))
            if key == "id":
                self.ids[value or ""] += 1
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open, f"</{name}> closes nothing"
        assert self.open[-1] == name, f"</{name}> inside of {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def parsed(source: Path | str) -> Page:
    found = Page()
    found.feed(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
    found.close()
    assert found.open == []
    return found


def shown(folder: Path, tasks: Sequence[Task] = ()) -> Page:
    """The page alone, without the plots."""
    return parsed(page(render.read(folder), folder, tasks))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Path]]:
    """A small run with everything in it, and its reports."""
    folder = tmp_path_factory.mktemp("small")
    results, tasks = make(folder, SMALL)
    return folder, results, render.write(folder, tasks)


def test_every_file_is_written_and_reads_well(small: Any) -> None:
    folder, _, made = small
    assert set(made) == {"report.html", "results.md", "pareto.png", "curves.png"}
    assert all(path == folder / name for name, path in made.items())
    found = parsed(made["report.html"])
    assert max(found.ids.values()) == 1
    assert found.tags["section"] == 10
    assert found.tags["h1"] == 1
    for name in ("pareto.png", "curves.png"):
        picture = Image.open(made[name])
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_nothing_is_loaded_from_elsewhere(small: Any) -> None:
    found = parsed(small[2]["report.html"])
    links = [value for _, key, value in found.attributes if key in ("src", "href", "srcset", "data", "action")]
    assert links
    assert all(value.startswith(("data:", "#")) for value in links)
    source = small[2]["report.html"].read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", source)


def test_every_entry_stands_in_the_table(small: Any) -> None:
    _, results, made = small
    found = made["report.html"].read_text(encoding="utf-8")
    table = found[found.index('id="results"') : found.index("</table>", found.index('id="results"'))]
    rows = re.findall(r"<tr[^>]*>.*?</tr>", table)[2:]
    assert len(rows) == len(results["entries"])
    for entry in results["entries"]:
        name = entry["id"].rsplit("@", 1)[0]
        keep = f'data-keep="{entry["keep"]:g}"' if entry["keep"] else ""
        assert any(f">{name}</span>" in row and keep in row for row in rows), entry["id"]


def test_what_a_budget_is_out_of_reach_for_stands_behind_its_chain(small: Any) -> None:
    run = render.read(small[0])
    for keep in run.keeps:
        names = [entry.name for entry in run.at(keep)]
        assert names.index("random_deep") == names.index("divprune+random_deep") + 1
        assert "random_deep" not in [entry.name for entry in run.reached(keep)]
    text = parsed(small[2]["report.html"]).words
    assert "stands in for random_deep" in text
    assert "ran at 288" in text
    assert "random_deep cuts late and reaches no average below 288 tokens here" in " ".join(
        value for _, key, value in parsed(small[2]["report.html"]).attributes if key == "title"
    )
    assert [entry.name for entry in run.drawn()].count("random_deep") == 1  # one and the same point


def test_pictures_show_what_was_kept(small: Any) -> None:
    found = parsed(small[2]["report.html"])
    images = [value for name, key, value in found.attributes if (name, key) == ("img", "src")]
    assert len(images) == 4 * 6  # plain and five that reached the budget
    assert all(value.startswith("data:image/webp;base64,") for value in images)
    assert "flowcut: 192 tokens left" in [
        value for name, key, value in found.attributes if (name, key) == ("img", "alt")
    ]
    text = found.words
    assert "What colour is the small shape in picture" in text
    assert "✓" in text
    assert "✗" in text


def test_without_samples_or_tasks_there_are_no_pictures(tmp_path: Path) -> None:
    _, tasks = make(tmp_path, SMALL, lines=False)
    for given in (tasks, ()):
        found = shown(tmp_path, given)
        assert found.tags["img"] == 0
        assert "What was kept" not in found.words


def test_a_torn_line_and_a_lost_picture_cost_nothing_else(tmp_path: Path) -> None:
    _, tasks = make(tmp_path, SMALL)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"entry": "plain", "ta')

    def lost(name: str) -> Image.Image:
        raise VtokError(f"{name} is missing")

    tasks[0] = replace(tasks[0], picture=lost)
    found = shown(tmp_path, tasks)
    assert found.tags["img"] == 3 * 6
    assert "objects-0" not in found.words.split("What was kept")[2].split("Published")[0]


def test_text_from_samples_is_text(tmp_path: Path) -> None:
    _, tasks = make(tmp_path, replace(SMALL, text=EVIL))
    made = render.write(tmp_path, tasks)
    found = parsed(made["report.html"])
    assert found.tags["script"] == 1
    assert "<script>alert('x')</script> & \"quoted\"" in found.words
    assert "<script>" not in made["results.md"].read_text(encoding="utf-8")


def test_a_run_that_was_not_timed(tmp_path: Path) -> None:
    _, tasks = make(tmp_path, replace(SMALL, timing=False, unseen=False, blank=False))
    made = render.write(tmp_path, tasks)
    found = parsed(made["report.html"])
    assert "speed-up" not in found.words
    assert "unseen" not in found.words
    assert "by-tokens" in found.ids
    assert "speed-up" not in made["results.md"].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "fake",
    [
        Fake(methods=("flowcut", "random"), keeps=(64,), tasks=("text",), samples=6),
        Fake(methods=("flowcut", "fastv"), keeps=(0.5, 0.25), tasks=("text", "multi"), samples=6, chains=False),
        Fake(methods=("flowcut", "random"), keeps=(64,), tasks=("text",), samples=6, refused="flowcut"),
        Fake(methods=("flowcut",), keeps=(64,), tasks=("text",), samples=6, refused="flowcut"),
        Fake(methods=(), keeps=(), tasks=("text",), samples=4),
    ],
    ids=["one budget", "shares", "refused", "all refused", "plain alone"],
)
def test_small_runs(fake: Fake, tmp_path: Path) -> None:
    _, tasks = make(tmp_path, fake)
    made = render.write(tmp_path, tasks)
    found = parsed(made["report.html"])
    text = made["results.md"].read_text(encoding="utf-8")
    assert "nan" not in found.words.lower().split()
    if fake.refused:
        assert "flowcut needs a tower with a CLS token" in found.words
        assert "flowcut needs a tower with a CLS token" in text
        assert "| flowcut | 64 | refused |" in text
    if fake.keeps and fake.keeps[0] < 1:
        assert "50% of the tokens" in found.words
        assert "### 25% of the tokens" in text


def test_the_largest_run_stays_small(tmp_path: Path) -> None:
    results, tasks = make(tmp_path, Fake(samples=4))
    assert len(results["entries"]) >= 49
    source = page(render.read(tmp_path), tmp_path, tasks)
    assert len(source.encode()) < 6e6
    found = parsed(source)
    assert all(method in found.words for method in Fake().methods)
    assert all(task in found.words for task in TASKS)


def test_numbers_that_are_missing_or_no_numbers_become_dashes(tmp_path: Path) -> None:
    results, tasks = make(tmp_path, SMALL)
    entry = next(entry for entry in results["entries"] if entry["id"] == "divprune@64")
    entry["overall"].update(ci=[float("nan"), float("nan")], p_plain=None, difference=None, hard=None, groups={})
    entry["tasks"]["text"] = None
    entry["timing"]["share"] = None
    entry["peak_mb"] = None
    results["machine"], results["settings"], results["problems"] = {}, {}, []
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = shown(tmp_path, tasks)
    assert "nan" not in found.words.lower().split()
    assert "No sample was lost" in found.words


def test_the_same_results_make_the_same_bytes(tmp_path: Path) -> None:
    _, tasks = make(tmp_path, SMALL)
    first = {name: path.read_bytes() for name, path in render.write(tmp_path, tasks).items()}
    second = {name: path.read_bytes() for name, path in render.write(tmp_path, tasks).items()}
    assert first == second


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .* run vtok eval"),
        ("{", "is no JSON"),
        ('{"schema": 2}', "has schema 2; this version of vtok reads schema 1"),
        ("[]", "has schema None"),
    ],
)
def test_results_that_cannot_be_read(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(VtokError, match=message):
        render.write(tmp_path)


# -- markdown -----------------------------------------------------------------------------------------------------


def test_markdown_tables_are_whole(small: Any) -> None:
    _, results, made = small
    text = made["results.md"].read_text(encoding="utf-8")
    width = 0
    for line in text.splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert width in (0, cells), line
        width = cells
    plain = next(entry for entry in results["entries"] if entry["id"] == "plain")
    assert f"| plain | – | {100 * plain['overall']['accuracy']:.1f} (" in text  # noqa: RUF001


def test_the_summary_can_be_of_some_budgets(small: Any) -> None:
    _, results, _ = small
    whole, part = render.summary_markdown(results), render.summary_markdown(results, keeps=[64])
    assert "| flowcut | 192 |" in whole
    assert "| flowcut | 192 |" not in part
    assert "| flowcut | 64 |" in part
    assert "| random_deep † | 64 |" in part
    run = Run(results)
    best = run.reached(64)[0]
    assert f"| {best.name} | 64 | **{100 * (best.accuracy() or 0):.1f}** (" in part


# -- parts --------------------------------------------------------------------------------------------------------


def test_tags_escape_whatever_is_not_markup() -> None:
    assert tag("p", "<b>", Html("<i>"), None, ["&", 3]) == "<p>&lt;b&gt;<i>&amp;3</p>"
    assert tag("a", class_='x"y', data_key=1, hidden=True, id=None) == '<a class="x&quot;y" data-key="1" hidden></a>'
    assert tag("meta", name="x") == '<meta name="x">'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (words.percent(0.8642), "86.4"),
        (words.percent(None), words.NONE),
        (words.points(-0.0214), f"{words.MINUS}2.1"),
        (words.points(0.02), "+2.0"),
        (words.points(-0.0001), "0.0"),
        (words.significant(153.4), "153"),
        (words.significant(48.23), "48.2"),
        (words.significant(0.2149), "0.21"),
        (words.significant(1234.5), "1234"),
        (words.significant(0.0), "0"),
        (words.tokens(64.0), "64"),
        (words.tokens(115.2), "115.2"),
        (words.tokens(2880.0), "2,880"),
        (words.chance(0.0004), "<0.001"),
        (words.chance(0.0312), "0.031"),
        (words.chance(0.5), "0.50"),
        (words.stars(0.05), ""),
        (words.stars(0.049), "*"),
        (words.stars(0.0001), "***"),
        (words.budget(0.25), "25%"),
        (words.budget(64), "64"),
        (words.count(1, "task"), "1 task"),
        (words.count(1600, "question"), "1,600 questions"),
        (words.parameters(7_063_000_000), "7.06B"),
        (words.parameters(13_400_000), "13.4M"),
    ],
)
def test_numbers_as_words(text: str, expected: str) -> None:
    assert text == expected


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 0.9), (2.0, 0.8), (2.0, 0.85), (3.0, 0.7), (2.5, 0.6)]
    assert axes.front(points, rising=True) == [0, 2, 3]
    assert axes.front([(64, 0.7), (128, 0.7), (192, 0.9)], rising=False) == [0, 2]
    assert axes.front([], rising=True) == []


def test_labels_keep_off_each_other_and_inside() -> None:
    dots = [(50.0 + i, 50.0) for i in range(0, 60, 15)]
    frame = (0.0, 0.0, 300.0, 200.0)
    found = axes.place([("method", [dot]) for dot in dots], dots, frame)
    boxes = []
    for label in found:
        left = label.x - {"start": 0, "middle": 20, "end": 40}[label.anchor]
        boxes.append((left, label.y - 12, left + 38, label.y + 2))
        assert left >= -2
    assert all(axes._overlap(a, b) < 30 for i, a in enumerate(boxes) for b in boxes[:i])


def test_ticks_are_round_and_inside() -> None:
    assert axes.ticks(0.94, 2.52, 4) == [1.0, 1.5, 2.0, 2.5]
    assert axes.doublings(30, 600, 576) == [36, 72, 144, 288, 576]
    assert axes.apart([32, 64, 128, 192, 576], 1.6) == [32, 64, 192, 576]


def test_methods_look_different() -> None:
    names = ["flowcut", "random", *map(str, range(12)), "a+b"]
    found = styles(names)
    assert len({(style.colour, style.dashes) for style in found.values()}) == len(names)
    assert found["random"].baseline
    assert not found["flowcut"].baseline


def test_what_is_said_of_entries_that_ran_is_said_once(tmp_path: Path) -> None:
    results, _ = make(tmp_path, replace(SMALL, samples=2), lines=False)
    for entry in results["entries"]:
        if entry["keep"] == 192 and entry["status"] == "ok":
            entry["note"] = "small pictures stay whole"
        if entry["id"] == "flowcut@64":
            entry["note"] = "stopped early"
    run = Run(results)
    assert run.remarks() == ["everything at 192: small pictures stay whole", "flowcut at 64: stopped early"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert shown(tmp_path).words.count("small pictures stay whole") == 1
    assert "everything at 192: small pictures stay whole" in render.summary_markdown(results)


def test_the_plain_model_is_as_fast_as_itself(small: Any) -> None:
    _, results, _ = small
    plain = json.loads(json.dumps(results["entries"][0]))
    plain["timing"]["speedup"] = None
    assert render.Entry(plain).speedup == 1.0
    plain["timing"] = None
    assert render.Entry(plain).speedup is None


def test_tasks_are_sorted_by_the_tokens_they_need(small: Any) -> None:
    run = render.read(small[0])
    needs = [need.tokens if (need := run.need(task)) else 1e9 for task in run.by_need()]
    assert needs == sorted(needs)
    assert len(set(needs)) > 1


@pytest.mark.parametrize(
    ("family", "tokens", "size", "record", "expected"),
    [
        ("llava", 576, (640, 480), {}, (Part(24, 24),)),
        ("llava", 577, (640, 480), {}, None),
        ("qwen2_5_vl", 12, (400, 300), {}, (Part(3, 4),)),
        ("qwen2_5_vl", 13, (300, 300), {}, None),
        ("qwen2_5_vl", 0, (300, 300), {}, None),
        ("llava_next", 44, (300, 200), {}, None),
        ("llava_next", 44, (300, 200), {"parts": [[[4, 4], [4, 6, 1, True]]]}, (Part(4, 4), Part(4, 6, 1, True))),
    ],
)
def test_rectangles_of_tokens(family: str, tokens: int, size: Any, record: Any, expected: Any) -> None:
    assert pictures.parts(record, 0, tokens, Image.new("RGB", size), family) == expected


def test_an_overlay_is_clear_where_tokens_are_left() -> None:
    picture = overlay(Image.new("RGB", (240, 240), (200, 120, 60)), [Part(4, 4)], [5], longest=120)
    assert picture.size == (120, 120)
    cells = np.asarray(picture).reshape(4, 30, 4, 30, 3)[:, 8:22, :, 8:22].mean((1, 3))
    assert cells[1, 1].tolist() == [200, 120, 60]
    assert np.delete(cells.reshape(16, 3), 5, 0).max() < 90


# -- published numbers --------------------------------------------------------------------------------------------


def test_published_numbers_are_found_by_model_and_method() -> None:
    found = published.rows(
        model="LLaVA-1.5-7B", method="flowcut", benchmark=published.RETENTION, source="FlowCut paper"
    )
    assert {row.keep: row.value for row in found} == {192: 100.2, 128: 98.5, 64: 96.0}
    assert published.rows(model="none such") == []
    assert published.counterpart("llava", 576.0) == "LLaVA-1.5-7B"
    assert published.counterpart("llava", 256.0) is None
    assert published.counterpart("qwen2_5_vl", 576.0) is None


def test_published_numbers_are_sound() -> None:
    every = published.rows()
    keys = Counter((row.method, row.model, row.benchmark, row.keep, row.source) for row in every)
    assert max(keys.values()) == 1
    for row in every:
        assert row.where
        assert row.value > 0
        assert row.keep > 0
        if row.benchmark == published.RETENTION:
            assert 40 < row.value < 105
            assert row.plain == 100


def test_published_numbers_stand_apart(small: Any, tmp_path: Path) -> None:
    text = parsed(small[2]["report.html"]).words.split("Published numbers")[2]
    assert "arXiv 2505.19536" in text
    assert "FlowCut paper 100.2" in text
    results, tasks = make(tmp_path, replace(SMALL, samples=4))
    results["model"]["tokens_per_image"] = 256.0
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "Published numbers" not in shown(tmp_path, tasks).words


# -- a real browser -----------------------------------------------------------------------------------------------

PROBE = """<script>
window.problems = [];
addEventListener("error", (e) => problems.push(e.message));
addEventListener("securitypolicyviolation", (e) => problems.push(e.violatedDirective));
console.error = console.warn = (...all) => problems.push(all.join(" "));
</script>"""
DRIVE = """<script>
const names = () => [...document.querySelectorAll("#results tbody.entries tr:not([hidden])")].map(
  (row) => [row.querySelector(".name").textContent, row.dataset.keep, row.cells[2].dataset.v].join(" "));
const found = {start: names()};
const head = (key) => document.querySelector(`#results th[data-key="${key}"]`);
head("accuracy").click();
found.accuracy = names();
found.sorted = head("accuracy").getAttribute("aria-sort");
head("accuracy").click();
found.rising = names();
head("name").dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
found.byName = names();
document.querySelector('.filter [data-only="64"]').click();
found.only = names();
document.querySelector('.filter [data-only=""]').click();
found.all = names().length;
const legend = document.querySelector("#cost .key button");
legend.click();
found.picked = document.querySelectorAll("#cost svg .picked").length;
found.dimmed = document.querySelector("#cost .plots").classList.contains("focused");
const panel = (key) => getComputedStyle(document.querySelector(".panel.by-" + key)).display;
found.panels = [panel("speed"), panel("tokens")];
document.getElementById("by-tokens").checked = true;
found.panels.push(panel("speed"), panel("tokens"));
found.wide = document.documentElement.scrollWidth - innerWidth;
found.problems = problems;
const out = document.createElement("pre");
out.id = "probe";
out.textContent = JSON.stringify(found);
document.body.append(out);
</script>"""


def browse(path: Path, *arguments: str) -> str:
    """What headless Chromium prints about a page."""
    assert BROWSER is not None
    profile = path.parent / "profile"
    base = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    done = subprocess.run([*base, *arguments, path.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_sorts_the_table(width: int, small: Any, tmp_path: Path) -> None:
    source = small[2]["report.html"].read_text(encoding="utf-8")
    path = tmp_path / "probe.html"
    path.write_text(source.replace("<head>", "<head>" + PROBE).replace("</body>", DRIVE + "</body>"), encoding="utf-8")
    printed = browse(path, "--dump-dom", "--virtual-time-budget=3000", f"--window-size={width},900")
    raw = re.search(r'<pre id="probe">(.*?)</pre>', printed)
    assert raw, printed[-2000:]
    found = json.loads(raw.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["problems"] == []
    values = [float(row.split()[2]) for row in found["accuracy"]]
    assert values == sorted(values, reverse=True)
    assert found["accuracy"] != found["start"]
    assert found["sorted"] == "descending"
    rising = [float(row.split()[2]) for row in found["rising"]]
    assert rising == sorted(rising)
    assert [row.split()[0] for row in found["byName"]] == sorted(row.split()[0] for row in found["start"])
    assert {row.split()[1] for row in found["only"]} == {"64"}
    assert found["all"] == len(found["start"])
    assert found["picked"] > 0
    assert found["dimmed"]
    assert found["panels"] == ["block", "none", "none", "block"]
    assert found["wide"] <= 0  # tables scroll in their own boxes, the page does not


@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")
def test_a_browser_shows_the_page_in_light_and_dark(small: Any, tmp_path: Path) -> None:
    means = []
    for scheme in ("1", "0"):  # Blink's numbers of light and dark
        shot = tmp_path / f"{scheme}.png"
        chosen = f"--blink-settings=preferredColorScheme={scheme}"
        path = tmp_path / "report.html"
        shutil.copy(small[2]["report.html"], path)
        browse(path, f"--screenshot={shot}", "--window-size=1280,2600", chosen)
        pixels = np.asarray(Image.open(shot).convert("RGB")).astype(float)
        means.append(pixels.mean())
        assert pixels.std() > 8
        inked = (np.abs(pixels - np.median(pixels, (0, 1))).max(-1) > 40).mean(1)
        assert (inked > 0.003).mean() > 0.4  # most lines of the picture hold something
    assert means[0] > 200
    assert means[1] < 70
