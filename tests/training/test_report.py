"""The HTML report: made from what a run writes, finished, broken off or still running."""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_mup.config import ConfigError
from megatron_mup.training.plot import POINTS, chart_svg, thinned
from megatron_mup.training.record import find_record, read_json_lines, read_tensorboard
from megatron_mup.training.report import write_report
from tests.runs import pretrain, words

VOID = {"meta", "br"}
RUN = "--train-iters 3 --eval-interval 3 --eval-iters 1 --log-interval 1 --save {0}/run --metrics-file {0}/log/m.jsonl"


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[2] / "tools" / "report.py"
    spec = importlib.util.spec_from_file_location("report_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a report, checkpoint, JSON lines and events, and its second start."""
    folder = tmp_path_factory.mktemp("finished")
    flags = words(RUN.format(folder), f"--tensorboard-dir {folder}/events")
    assert pretrain(flags).code == 0
    more = f"--load {folder}/run --train-iters 4 --html-report {folder}/r/page.html"
    outcome = pretrain([*flags, *more.split()])
    assert outcome.code == 0, outcome.err
    return folder


class Balanced(HTMLParser):
    """Fails where tags don't close in order, or where the page asks for something from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            local = value is None or value.startswith("#") or name.startswith("xmlns") or "://" not in value
            assert local, (tag, name, value)
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(file):
    page, parser = file.read_text(), Balanced()
    parser.feed(page)
    assert parser.open == []
    return page, parser.seen


def test_a_run_writes_its_report(finished):
    page, tags = checked(finished / "r" / "page.html")
    assert tags.count("svg") >= 6
    losses = read_json_lines(finished / "log" / "m.jsonl").curves["train/lm loss"]
    assert list(losses) == [1, 2, 3, 4]
    for text in (
        "iteration 4 of 4",
        f"<th>training loss</th><td>{losses[4]:.4f} nats per token</td>",
        "<th>validation loss</th>",
        "loss (nats per token)",
        "gradient norm before clipping",
        "train_iters: 3 → 4",
        "total:",
        "hidden_size: 32",
    ):
        assert text in page, text


def test_every_record_leads_to_the_same_curves(finished, tmp_path):
    by_checkpoint = find_record(finished / "run")
    assert by_checkpoint.source == finished / "log" / "m.jsonl"
    (tmp_path / "other.jsonl").write_text((finished / "log" / "m.jsonl").read_text())
    by_folder, by_events = find_record(tmp_path), read_tensorboard(finished / "events")
    assert by_folder.curves == by_checkpoint.curves
    assert by_events.curves.keys() == by_checkpoint.curves.keys()
    assert by_events.starts == by_checkpoint.starts
    for name, curve in by_events.curves.items():
        assert curve == pytest.approx(by_checkpoint.curves[name])


def test_an_older_record_takes_the_checkpoints_configuration(finished, tmp_path):
    lines = (finished / "log" / "m.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "m.jsonl").write_text("".join(line for line in lines if "run" not in json.loads(line)))
    (tmp_path / "iter_0000004").symlink_to(finished / "run" / "iter_0000004")
    (finished / "log" / "m.jsonl").rename(finished / "log" / "away")
    (finished / "events").rename(finished / "away")
    try:
        record = find_record(tmp_path)
    finally:
        (finished / "log" / "away").rename(finished / "log" / "m.jsonl")
        (finished / "away").rename(finished / "events")
    ((_, about),) = record.starts
    assert about["configuration"]["model"]["hidden_size"] == 32
    assert about["ranks"] == 1


def test_a_run_that_crashes_still_writes_it(tmp_path):
    """Its loss is NaN at once; there is no checkpoint."""
    outcome = pretrain(words(RUN.format(tmp_path), f"--html-report {tmp_path}/page.html --lr 1e30 --clip-grad 0"))
    assert outcome.code == 3
    page, _ = checked(tmp_path / "page.html")
    assert re.search(r"iteration [12] of 3", page)
    assert "total:" in page


def test_a_report_that_cannot_be_made_does_not_change_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_mup.training.report.write_report", lambda *_: 1 / 0)
    outcome = pretrain(words(RUN.format(tmp_path), f"--html-report {tmp_path}/page.html"))
    assert outcome.code == 0
    assert "--html-report" in outcome.out
    assert "division by zero" in outcome.out


def test_a_running_runs_torn_line(tmp_path, tool, capsys):
    (tmp_path / "m.jsonl").write_text('{"iteration": 1, "train/lm loss": 2.0}\n{"iteration": 2, "train/lm l')
    assert tool.main(["--load", str(tmp_path)]) == 0
    assert "1 curves up to iteration 1" in capsys.readouterr().out
    page, tags = checked(tmp_path / "report.html")
    assert tags.count("svg") == 1
    assert "the record doesn&#39;t hold it" in page
    (tmp_path / "m.jsonl").write_text("")
    assert tool.main(["--metrics-file", str(tmp_path / "m.jsonl"), "--title", "a < b"]) == 0
    page, _ = checked(tmp_path / "report.html")
    assert "a &lt; b" in page
    assert "Nothing is recorded yet" in page


def test_values_of_steps_done_again_replace_the_earlier(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text("".join(f'{{"iteration": {i}, "x": {v}}}\n' for i, v in ((1, 1), (2, 2), (3, 3), (2, 5), (4, 4))))
    assert read_json_lines(file).curves == {"x": {1: 1, 2: 5, 3: 3, 4: 4}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--load", "."], "neither the folder nor"),
        (["--metrics-file", "none.jsonl"], "can't be read"),
        (["--metrics-file", "bad.jsonl"], "line 1 is no record"),
        (["--tensorboard-dir", "."], "no event files"),
    ],
)
def test_mistakes(tmp_path, tool, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "bad.jsonl").write_text("hello\n")
    if "bad.jsonl" in arguments:
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert tool.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_it_needs_the_metrics_file():
    outcome = pretrain(words("--html-report x.html"))
    assert outcome.code == 2
    assert "--metrics-file" in outcome.err


def test_charts():
    svg = chart_svg("a & b", {"x": {1: 2.0}, "y": {1: 1.0, 2: 3.0}})
    texts = [node.text for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"a & b", "x", "y", "iteration"} <= set(texts)


@pytest.mark.parametrize("count", [1, POINTS, POINTS + 1, 7 * POINTS + 3])
def test_long_curves_are_averaged(count):
    places, values = np.arange(count) * 3 + 1, np.arange(count, dtype=float)
    x, y = thinned(places, values)
    assert len(x) == min(count, POINTS)
    assert np.allclose(x, 3 * y + 1)
    assert abs(y.mean() - values.mean()) < 1


def test_gaps_in_long_curves():
    places = np.array([*range(POINTS), 10**9])
    x, y = thinned(places, np.ones(len(places)))
    assert len(x) == 2
    assert np.isfinite(y).all()


def test_unreadable_configuration(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        '{"iteration": 0, "run": {"configuration": {"model": {"no_such": 1}}}}\n{"iteration": 1, "train/lm loss": 2}\n'
    )
    write_report(read_json_lines(tmp_path / "m.jsonl"), tmp_path / "page.html", "t")
    page, _ = checked(tmp_path / "page.html")
    assert "no_such" in page
    with pytest.raises(ConfigError):
        find_record(tmp_path / "nowhere")
