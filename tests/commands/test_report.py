"""The report: what the page says of runs, what it refuses, and how a browser shows it."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from sid_fast.data.images import save_grid
from sid_fast.errors import UserError
from sid_fast.tools.run_report import charts, grids, runs
from tests.helpers.browser import Browser, find_chromium
from tests.helpers.images import png
from tests.helpers.runs import DISTANCE, make_run, progress

VOID = {"meta", "link", "img", "input", "br", "wbr"}
CANDIDATE = {"kernels": {"group_norm": "triton"}, "cuda_graph": True}
ROW = {"low": 9.8, "high": 10.4, "images": 128, "gib": 3.25, "wrong": ""}
TUNING = {
    "candidate": CANDIDATE,
    "text": "tuned: group_norm triton, CUDA graphs (1.83 times eager)",
    "machine": {"device": "NVIDIA H100", "cores": 16},
    "rows": [
        ROW | {"name": "eager", "candidate": {}, "ms": 18.3, "img_s": 6995.0, "won": True},
        ROW | {"name": "CUDA graphs", "candidate": CANDIDATE, "ms": 10.0, "img_s": 12800.0,
               "won": True},
        ROW | {"name": "compiled blocks", "candidate": {"compile": True}, "wrong": "out of memory",
               "ms": None, "low": None, "high": None, "img_s": None, "gib": None, "won": False},
    ],
}  # fmt: skip


class Page(HTMLParser):
    """The elements of a page and its text; fails where tags do not nest."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.rows: list[tuple[str, list[str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append((dict(attrs).get("class") or "", []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        data = data.replace("\xa0", " ")
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += data
        if "td" in self._open or "th" in self._open:
            self.rows[-1][1][-1] += data

    def row(self, name: str) -> tuple[str, list[str]]:
        """Class and cells of the first row that begins with a name."""
        return next(row for row in self.rows if row[1] and row[1][0].removeprefix("≠ ") == name)

    def all(self, tag: str, kind: str = "") -> list[dict]:
        """Attributes of the elements of a tag and class."""
        return [
            attrs
            for name, attrs in self.elements
            if name == tag and kind in ("", *(attrs.get("class") or "").split())
        ]


@pytest.fixture
def report(run_command, tmp_path):
    """report(run, …) -> the page."""

    def make(*runs) -> Page:
        status, error = run_command("report", *runs, "--out", tmp_path / "page.html")
        assert status == 0, error
        return Page((tmp_path / "page.html").read_text("utf-8"))

    return make


def test_the_page_says_what_a_run_was_and_reached(report, tmp_path):
    page = report(make_run(tmp_path / "sid", best=0.4))
    assert "0.4best Fréchet distance (pixels), at 8.19 kimg" in page.text
    assert "teacher, 18 steps: 0.21" in page.text
    assert "8.19 of 8 kimg, finished" in page.text
    assert page.row("median throughput, img/s")[1][1] == "512"
    assert page.row("training time")[1][1] == "16 s"  # 8192 images at 512 img/s
    assert page.row("time of evaluations")[1][1] == "8 s"
    assert page.row("peak memory")[1][1] == "0.50 GiB"
    assert ["kimg", "8preset: 32"] in [cells for _, cells in page.rows]
    assert not any(cells[:1] == ["out"] for _, cells in page.rows)
    assert page.row("PyTorch")[1][1] == "2.13.0"
    assert page.row("8.19")[1][1] == "0.4"
    assert "distilling digits on cpu" in page.text
    titles = {"Loss of the fake score", "Throughput, img/s", "Peak memory, GiB", DISTANCE}
    described = [a["aria-label"] for a in page.all("svg") if a.get("role") == "img"]
    assert titles <= {label.partition(" against")[0] for label in described}
    assert any("sid: 3.4 at 0, 0.4 at 8.192. teacher, 18 steps: 0.21." in d for d in described)
    assert "Nothing was dropped" in page.text


def test_runs_stand_side_by_side_and_differences_are_marked(report, tmp_path):
    one = make_run(tmp_path / "a" / "run", best=0.5)
    two = make_run(tmp_path / "b" / "run", options={"alpha": 1.0}, images=4096, best=0.6)
    page = report(one, two)
    assert page.row("option")[1] == ["option", "a/run", "b/run"]  # of one name: told apart
    assert page.row("alpha") == ("differs", ["≠ alpha", "1.2", "1"])
    assert page.row("batch_size") == ("", ["batch_size", "128", "128"])
    first = [cells[0] for _, cells in page.rows].index("≠ alpha")
    assert first < [cells[0] for _, cells in page.rows].index("batch_size")
    assert "4.1 of 8 kimg, 51%, running or stopped" in page.text
    assert page.row("4.1")[1][1:] == ["1.304", "0.6"]
    (slider,) = page.all("input")
    assert slider["data-stops"] == "0 2048 4096 6144 8192"
    frames = [a["data-images"] for a in page.all("figure", "frame")]
    assert frames == ["0", "2048", "4096", "6144", "8192", "0", "2048", "4096"]
    printed = [a["data-images"] for a in page.all("figure", "print")]
    assert printed == ["0", "4096", "8192", "0", "4096"]  # first, middle, last
    lines = [a for a in page.all("g", "line") if a["data-label"] == "b/run"]
    assert all("r1" in a["class"].split() for a in lines)
    assert lines


def test_tuning_shows_its_candidates_and_why_one_was_chosen(report, tmp_path):
    page = report(make_run(tmp_path / "run", tuning=TUNING))
    assert "Tuned: group_norm triton, CUDA graphs (1.83 times eager)." in page.text
    name, cells = page.row("CUDA graphs")
    assert name == "won"
    assert cells[1:3] == ["right, chosen: fastest", "12,800"]
    assert cells[4:] == ["10 (9.8 to 10.4)", "3.25"]
    assert page.row("compiled blocks")[1] == ["compiled blocks", "out of memory", "", "", "", ""]
    assert "device NVIDIA H100, cores 16" in page.text


def test_adversarial_metrics_are_drawn_by_name_and_unknown_ones_too(report, tmp_path):
    run = make_run(tmp_path / "run")
    metrics = {
        "fake/discriminator": 0.7, "generator/adversarial": 0.6, "fake/real_logit": 0.1,
        "fake/fake_logit": -0.1, "fake/clipped": 3.0, "input_waits": 0.25, "brand/new": 1.0,
    }  # fmt: skip
    faults = {"fake/dropped": 2.0, "generator/skipped": 1.0}
    with (run / "log.jsonl").open("a") as log:
        for images in (9000, 9500):
            log.write(json.dumps(progress(images, **metrics, **faults)) + "\n")
    page = report(run)
    described = " ".join(a["aria-label"] for a in page.all("svg") if a.get("role") == "img")
    for title in ("Adversarial losses", "Mean logits of the discriminator", "brand/new"):
        assert f"{title} against" in described
    assert "run discriminator: 0.7 at 9, 0.7 at 9.5. run generator: 0.6" in described
    assert "run real: 0.1 at 9" in described
    assert page.row("fake: samples dropped as not finite")[1][1] == "4"
    assert page.row("steps that waited for images")[1][1] == "25.0%"


def test_hostile_text_stays_text(report, tmp_path):
    evil = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'\u202e\x1b[31m"
    url = "https://me:secret@example.org/t.pkl"
    run = make_run(
        tmp_path / "<b>run&", options={"data": evil, evil: 1, "teacher": url},
        tuning={"text": evil, "rows": [{"name": evil, "wrong": evil}]}, headline=evil + "\n" + evil,
        environment={"torch": evil, evil: evil},
    )  # fmt: skip
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"images": 9000, evil: 1.0, "evaluation_s": 1}) + "\n")
        log.write(json.dumps({"images": 9001, evil + " ": 1.0}) + "\n")
    page = report(run)
    source = (tmp_path / "page.html").read_text("utf-8")
    assert len(page.all("script")) == 1
    assert all(a["src"].startswith("data:image/") for a in page.all("img"))
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert "alert(1)" in page.text
    assert "<b>run&" in page.text
    assert "secret" not in source
    assert "\u202e" not in source
    assert "\x1b" not in source
    (policy,) = (a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy


def test_a_page_names_no_other_file(report, tmp_path):
    page = report(make_run(tmp_path / "run"))
    links = [v for _, attrs in page.elements for n, v in attrs.items() if n in ("src", "href")]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "url(" not in (tmp_path / "page.html").read_text("utf-8")
    anchors = {a["id"] for a in page.all("section")}
    assert {link[1:] for link in links if link.startswith("#")} == anchors


def test_a_run_that_has_just_begun_and_an_old_one(report, tmp_path):
    young, old = make_run(tmp_path / "young"), make_run(tmp_path / "old", images=2048)
    for path in (young / "log.jsonl", *young.glob("samples-*")):
        path.unlink()
    config = json.loads((old / "config.json").read_text())
    for name in ("changed", "environment", "headline", "started_at", "tuning"):
        config.pop(name, None)
    (old / "config.json").write_text(json.dumps(config))
    records = [json.loads(line) for line in (old / "log.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in r.items() if k != "peak_gib"} for r in records]
    (old / "log.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")
    page = report(young, old)
    assert "young: there is no log.jsonl yet" in page.text
    assert page.row("peak memory")[1][1:] == ["–", "not recorded"]
    page = report(young)
    for words in ("No evaluation yet", "no sample grid yet", "No progress was logged", "Not tuned"):
        assert words in page.text


def test_damaged_lines_values_and_grids_are_left_out_and_counted(report, tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "log.jsonl").open("ab") as log:
        log.write(b'{"images": 9000, "fake/loss": NaN, "generator/loss": 1e999, "x": "text"}\n')
        log.write(b'{"images": 9001, "fake/loss": null, "generator/loss": 1e300}\n')
        log.write(b'\xff\xfe\n[1]\n{"images": -1}\n{"images": 1e3}\n' + b"[" * 5000 + b"\n")
        log.write(b'{"images": 1' + b"0" * 4000 + b"}\n")
        log.write(b"\n\n")  # no damage
        log.write(b'{"images": 9002, "fake/lo')  # a line that the run is writing
    (run / "samples-0000002048.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (run / "samples-0000004096.png").write_bytes(png(np.zeros((6000, 6000), np.uint8)))
    (run / "samples-latest.png").write_bytes(b"not read")
    page = report(run)
    assert "6 damaged lines of log.jsonl left out" in page.text
    assert re.search(r"samples-0000002048\.png.*damaged", page.text)
    assert re.search(r"samples-0000004096\.png.*6000 x 6000", page.text)
    assert len(page.all("img")) == 3
    assert page.text.count("This grid cannot be read.") == 2


def test_a_log_in_any_order_and_grids_ahead_of_it(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", images=4096)
    (folder / "log.jsonl").write_text(
        '{"images": 300, "x": 1}\n{"images": 100, "A": 2, "FID": 3, "evaluation_s": 1}\n'
    )
    (run,) = runs.read_runs([str(folder)])
    assert [record["images"] for record in run.log] == [100, 300]
    assert run.evaluation_metrics() == ["FID", "A"]
    assert run.seen == 4096
    monkeypatch.setattr(runs, "MAX_METRICS", 4)
    with pytest.raises(UserError, match="more than 4 metrics"):
        runs.read_runs([str(folder)])


def test_the_best_is_not_the_last_and_rates_have_outliers(report, tmp_path):
    run = make_run(tmp_path / "run", best=0.4, options={"kimg": 2.0, "seed": 2})
    two = make_run(tmp_path / "two", best=0.5, options={"kimg": 2, "seed": 2.0})
    with (run / "log.jsonl").open("a") as log:
        for images, value in ((9000, 0.7), (9100, None)):
            evaluation = {"images": images, DISTANCE: value, "KID": 0.1, "evaluation_s": 1.0}
            log.write(json.dumps(evaluation) + "\n")
        log.write(json.dumps({"images": 9200, "img_per_s": 1e6}) + "\n")
    Image.new("RGB", (8, 8)).save(run / "samples-0000009000.png", "JPEG")
    page = report(run, two)
    assert "0.4best Fréchet distance (pixels), at 8.19 kimg" in page.text
    assert page.row("9.1")[1][1] == "not finite"
    assert page.row("median throughput, img/s")[1][1] == "512"
    assert page.row("kimg")[0] == page.row("seed")[0] == "", "2 and 2.0 are one value"
    assert re.search(
        r"samples-0000009000\.png.*left out|left out.*samples-0000009000\.png", page.text
    )
    described = {a["aria-label"] for a in page.all("svg") if a.get("role") == "img"}
    (kid,) = (label for label in described if label.startswith("KID against"))
    assert "teacher" not in kid


def test_what_has_no_effect_or_was_chosen_by_the_run_is_no_difference(report, tmp_path):
    """SiDA's options in a run of SiD, and a micro-batch that was left to the run."""
    options = {"adversarial_loss_scale": 0.01, "micro_batch": None}
    page = report(make_run(tmp_path / "run", options=options, changed={"micro_batch": 4}))
    assert "There are none." in page.text
    assert page.row("micro_batch")[1] == ["micro_batch", "none"]
    assert not any(cells[0] == "adversarial_loss_scale" for _, cells in page.rows if cells)


def test_a_large_grid_is_halved_until_it_fits(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600), np.uint8))
    kind, data = grids._encode(noise, 20_000, exact=True)
    assert kind == "jpeg"
    assert len(data) <= 20_000
    assert Image.open(io.BytesIO(data)).size == (150, 150)


def test_many_large_grids_and_a_long_log_stay_within_bounds(report, tmp_path, monkeypatch):
    monkeypatch.setattr("sid_fast.report.MAX_PAGE_BYTES", 300_000)
    run = make_run(tmp_path / "run", images=0, options={"kimg": 1000.0})
    noise = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8)
    for i in range(40):
        save_grid(run / f"samples-{i * 1000:010d}.png", noise, 4)
    with (run / "log.jsonl").open("a") as log:
        for i in range(700):
            log.write(json.dumps(progress(128 * i)) + "\n")
    page = report(run)
    frames = [int(a["data-images"]) for a in page.all("figure", "frame")]
    assert len(frames) == grids.MAX_POSITIONS
    assert (frames[0], frames[-1]) == (0, 39_000)
    sizes = [len(a["src"]) for a in page.all("img")]
    assert sum(sizes) < 1.4 * 300_000
    counts = [len(a["data-v"].split()) for a in page.all("g", "line")]
    assert max(counts) <= charts.MAX_POINTS
    assert (tmp_path / "page.html").stat().st_size < 1 << 20


def test_grids_of_few_bytes_stay_exact(report, tmp_path):
    run = make_run(tmp_path / "run", images=0)
    (image,) = report(run).all("img")
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/png;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    original = Image.open(run / "samples-0000000000.png")
    assert np.array_equal(np.array(shown), np.array(original))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "x.html"], "no run is given"),
        (["run"], "out is missing"),
        (["run", "--out", "x.png"], "x.png is not an HTML file"),
        (["run", "--out", "run"], "run is not an HTML file"),
        (["none", "--out", "x.html"], "none does not exist: give a run folder"),
        (["empty", "--out", "x.html"], "empty holds no run (it has no config.json)"),
        (["file", "--out", "x.html"], "file is a file: give a run folder"),
        (["run", "run/../run", "--out", "x.html"], "is given twice"),
        (["broken", "--out", "x.html"], "broken/config.json cannot be used"),
        (["list", "--out", "x.html"], "list/config.json is not the configuration of a run"),
        (["run"] * 13 + ["--out", "x.html"], "13 runs are more than the 12"),
        (["run\0", "--out", "x.html"], "run\ufffd does not exist"),
        (["run", "--out", "file/x.html"], "file/x.html cannot be written"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(
    run_command, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sid_fast.report.encode", lambda *_: pytest.fail("too late"))
    make_run(tmp_path / "run", images=0)
    for name, content in (("broken", "{"), ("list", "[]"), ("empty", None)):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "file").touch()
    before = set(tmp_path.iterdir())
    status, error = run_command("report", *arguments)
    assert status == 2
    assert error.count("\n") == 1
    assert words in error
    assert set(tmp_path.iterdir()) == before


def test_a_page_that_cannot_be_made_leaves_the_old_one(run_command, tmp_path):
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "run").mkdir()
    status, _ = run_command("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert status == 2
    assert (tmp_path / "page.html").read_text() == "old"


@pytest.mark.parametrize(
    ("low", "high"), [(0.2, 4), (0.35, 0.42), (1e-6, 1e3), (3, 3.1), (0, 1), (-0.5, 0.3), (7, 8)]
)
def test_axes_have_a_few_round_ticks(low, high):
    ticks = [charts.linear_ticks(low, high)] + ([charts.log_ticks(low, high)] if low > 0 else [])
    for each in ticks:
        assert 2 <= len(each) <= 7
        assert each == sorted(set(each))
        assert all(low * 0.999 - 1e-9 <= t <= high * 1.001 for t in each)


def test_the_script_knows_an_axis_that_cannot_be_logarithmic():
    """Before the first step a run has images at 0 alone."""
    drawn = charts.chart("x", [charts.Line("a", 0, [(0, 2.0)])], "kimg", log_x=True)
    assert re.search(r'data-x="[^"]* 0"', drawn)
    drawn = charts.chart("x", [charts.Line("a", 0, [(0, 2.0), (1, 1.0)])], "kimg", log_x=True)
    assert re.search(r'data-x="[^"]* 1"', drawn)


def test_a_chart_of_extreme_values_can_be_drawn():
    extremes = [(0.0, -1e38), (1.0, 0.0), (2.0, 1e38), (3.0, None), (4.0, 1e-38)]
    for points in (extremes, [(0.0, 0.0)], [(5.0, 7.0), (5.0, 7.0)], [(1.0, 1e-38), (2.0, 1e38)]):
        for log in (False, True):
            drawn = charts.chart("t", [charts.Line("a", 0, points)], "x", log_x=log, log_y=log)
            assert "nan" not in drawn
            assert "inf" not in drawn
            Page(drawn)
    assert charts.chart("t", [charts.Line("a", 0, [(0.0, None)])], "x") == ""


@pytest.mark.slow
def test_a_browser_shows_the_page_without_network(report, tmp_path):
    chromium = find_chromium()
    runs = [make_run(tmp_path / name, best=best) for name, best in (("sid", 0.4), ("sida", 0.3))]
    report(*runs)
    with Browser(chromium) as browser:
        browser.open(tmp_path / "page.html", 1280)
        shown = "[...document.querySelectorAll('.frame')].filter(f => f.offsetHeight)"
        images = f"{shown}.map(f => f.dataset.images).join()"
        assert browser.run(images) == "8192,8192"
        browser.press("ArrowLeft")  # nothing has the focus
        assert browser.run(images) == "6144,6144"
        browser.run("document.querySelector('.player input').focus()")
        browser.press("Home")
        assert browser.run(images) == "0,0"
        browser.press("ArrowRight")
        assert browser.run(images) == "2048,2048"
        assert browser.run("document.querySelector('.player output').textContent") == "2.05 kimg"
        browser.run("document.querySelector('[data-by=\"1\"]').click()")
        assert browser.run(images) == "4096,4096"
        point = browser.run(
            "(b => ({x: b.x + b.width / 2, y: b.y + b.height / 2}))"
            "(document.querySelector('.chart svg').getBoundingClientRect())"
        )
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", **point)
        assert re.match(
            r"\d.*: sid \d.*, sida \d",
            browser.run("document.querySelector('.readout').textContent"),
        )
        wide = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
        assert wide.height > 2000
        assert len(wide.getcolors(1 << 24)) > 100
        browser.open(tmp_path / "page.html", 400, dark=True)
        assert browser.run("document.documentElement.scrollWidth") <= 400  # no sideways scroll
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
        pdf = browser.pdf()
        assert pdf.startswith(b"%PDF")
        assert browser.requests
        assert {url.partition("?")[0] for url in browser.requests} == {
            (tmp_path / "page.html").as_uri()
        }
        assert browser.console == []
