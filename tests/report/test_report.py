"""Reports of made-up run folders: with tools/report.py as a user runs it, and each odd run in this process."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml
from matplotlib.image import imread as read_png
from matplotlib.lines import Line2D

from pretrain.errors import UserError
from pretrain.model import layout
from pretrain.report.picture import Picture
from pretrain.report.runs import read_runs
from pretrain.report.style import RC
from pretrain.report.traces import running_mean, thinned
from pretrain.report.weight_panels import by_layer, panel_of
from pretrain.report.weight_pictures import weight_pictures
from pretrain.report.weight_series import read_weights
from pretrain.report.write import write_report

TOOL = Path(__file__).parents[2] / "tools" / "report.py"
START = 1_750_000_000.0  # unix seconds of the first row
BLOCK = {"self_attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
TVR = {"name": "tvr", "target_std": 0.01, "ratio_threshold": 1.2, "interval_steps": 50}
LIR = {"name": "lir", "initializer_range": 0.006}


def config(name: str = "tiny", steps: int = 400, layers: int = 2, methods: list[dict] | None = None) -> dict:
    return {
        "name": name,
        "steps": steps,
        "model": {"family": "llama", "hidden_size": 256, "num_hidden_layers": layers},
        "data": {"seq_len": 256, "global_batch_size": 16},
        "optim": {"lr": 1e-3, "grad_clip": 1.0},
        "methods": [LIR, TVR] if methods is None else methods,
    }


def llama_weights(layers: int) -> dict[str, int]:
    """Return the layer of each weight, from 1 (0 outside the blocks)."""
    names = {
        f"model.layers.{layer}.{part}.{role}_proj.weight": layer + 1
        for layer in range(layers)
        for part, roles in BLOCK.items()
        for role in roles
    }
    return {"model.embed_tokens.weight": 0, **names, "lm_head.weight": 0}


def run_rows(run: dict, names: dict[str, int] | None = None, seed: int = 0) -> list[dict]:
    """Return the rows of an uninterrupted run: a falling noisy loss, and weights that grow as under AdamW until TVR acts."""
    noise = random.Random(seed)
    steps, tvr = run["steps"], any(method["name"] == "tvr" for method in run["methods"])
    names = llama_weights(run["model"]["num_hidden_layers"]) if names is None else names
    variance = {name: 0.006**2 / max(layer, 1) if tvr else 0.02**2 for name, layer in names.items()}
    rows: list[dict] = [{"kind": "event", "step": 0, "event": "started"}]
    for step in range(10, steps + 1, 10):
        done = step / steps
        decay = 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        mean_loss = 3.2 + 6.5 * math.exp(-9 * done) + 1.1 * math.exp(-1.5 * done)
        rows.append(
            {
                "kind": "train",
                "step": step,
                "tokens": step * 4096,
                "loss": mean_loss + noise.gauss(0, 0.05),
                "grad_norm": (0.4 + 4 * math.exp(-40 * done)) * math.exp(noise.gauss(0, 0.25)),
                "lr": run["optim"]["lr"] * decay,
                "tokens_per_s": noise.gauss(8000, 150),
                "step_time_s": 0.5,
                "data_wait": abs(noise.gauss(0, 0.01)),
                "mfu": None,
                "memory_bytes": 123,
            }
        )
        for name, layer in names.items():
            variance[name] += 1.6e-2 / steps * decay**2 * (1 + 0.6 * math.log(layer + 1)) * noise.uniform(0.6, 1.4)
        if step % 50 == 0:
            held = {name for name, layer in names.items() if tvr and layer and variance[name] > 0.012**2}
            weights = {name: {"std": variance[name] ** 0.5, "mean": 0.0, "rescaled": name in held} for name in names}
            rows.append({"kind": "weights", "step": step, "weights": weights})
            variance |= dict.fromkeys(held, 0.01**2)
        if step % max(100, steps // 2000 * 100) == 0:
            loss = mean_loss + 0.05
            rows.append({"kind": "eval", "step": step, "loss": loss, "perplexity": math.exp(loss)})
    return [row | {"time": START + 0.5 * row["step"]} for row in rows]


def write_run(folder: Path, run: dict, rows: list[dict], status: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(run))
    (folder / "status.json").write_text(
        json.dumps(status or {"status": "finished", "step": run["steps"], "reason": ""})
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Page(HTMLParser):
    """A page as a browser parses it: tags left open, resources to load, table rows, tiles and pictures."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.rows: list[list[str]] = []
        self.tiles: dict[str, str] = {}
        self.pictures: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [
            value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "data") and value
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "svg":
            self.pictures.append(dict(attributes)["aria-label"] or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "dt":
            self._tile = data
        if self.open and self.open[-1] == "dd":
            self.tiles[self._tile] = data


def report(*folders: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Run the command of a user."""
    command = [sys.executable, str(TOOL), *map(str, folders), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def drawn(*folders: Path, out: Path) -> Page:
    """Return the page of a report that must succeed without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(folders, out)
    return Page(out)


def ink(png: Path) -> float:
    """Return the share of the picture that is not background."""
    pixels = read_png(png)[..., :3]
    return float((pixels < 0.97).any(axis=-1).mean())


def colors(png: Path, *wanted: str) -> list[int]:
    """Return how many pixels have each of the colours, given as hexadecimal RGB."""
    pixels = (read_png(png)[..., :3] * 255).round().astype(int)
    return [int((pixels == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).sum()) for color in wanted]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """Return the report of a TVR run and its baseline: its folder and the page."""
    folder = tmp_path_factory.mktemp("two")
    tvr, baseline = config("tiny_tvr"), config("tiny_baseline", steps=300, methods=[])
    folders = [
        write_run(folder / "runs" / run["name"], run, run_rows(run, seed=seed))
        for seed, run in enumerate((tvr, baseline))
    ]
    done = report(*folders, out=folder / "report.html")
    assert (done.returncode, done.stderr) == (0, "")
    written = {Path(line) for line in done.stdout.splitlines()}
    assert written == {folder / "report.html", *(folder / "report_png").iterdir()}
    return folder, Page(folder / "report.html")


def test_page_is_one_well_formed_file_that_loads_nothing(two_runs):
    _, page = two_runs
    assert page.open == []
    assert [target for target in page.loads if not target.startswith("#")] == []
    for loader in ("<script", "<link", "<img", "<iframe", "@import", "<!ENTITY", "<!DOCTYPE svg"):
        assert loader not in page.source
    assert set(re.findall(r"url\((.)", page.source)) == {"#"}
    ids = re.findall(r'\bid="([^"]+)"', page.source)
    targets = {target[1:] for target in page.loads} | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert targets <= set(ids)


def test_every_picture_is_in_the_page_and_beside_it(two_runs):
    folder, page = two_runs
    names = {path.name for path in (folder / "report_png").iterdir()}
    weights = {"weight_std.png", "weight_std_tiny_tvr.png", "weight_std_tiny_baseline.png"}
    assert names == {"loss.png", "grad_norm.png", "learning_rate.png", "throughput.png"} | weights
    assert len(page.pictures) == len(names)
    for name in names:
        assert 0.01 < ink(folder / "report_png" / name) < 0.5, name
    assert "No activations were logged." in page.text


def test_runs_keep_their_colors_in_every_picture(two_runs):
    folder, _ = two_runs
    for name in ("loss", "weight_std", "grad_norm", "learning_rate", "throughput"):
        assert min(colors(folder / "report_png" / f"{name}.png", "#2563b8", "#dd7a1c")) > 100, name


def test_tvr_target_is_drawn_only_where_tvr_acts(two_runs):
    folder, page = two_runs
    accent = "#d1242f"
    assert colors(folder / "report_png" / "weight_std_tiny_tvr.png", accent)[0] > 1000
    assert colors(folder / "report_png" / "weight_std_tiny_baseline.png", accent)[0] == 0
    assert "rescales" in page.text


def test_comparison_table_agrees_with_the_rows(two_runs):
    folder, page = two_runs
    head, *body = page.rows
    assert head == ["run", "steps", "tokens", "train loss", "validation loss", "perplexity", "tokens/s", "wall time"]
    assert [row[0] for row in body] == ["tiny_tvr", "tiny_baseline"]
    for row in body:
        logged = [json.loads(line) for line in (folder / "runs" / row[0] / "metrics.jsonl").read_text().splitlines()]
        train = [entry for entry in logged if entry["kind"] == "train"]
        last_eval = [entry for entry in logged if entry["kind"] == "eval"][-1]
        rates = sorted(entry["tokens_per_s"] for entry in train)
        median = (rates[(len(rates) - 1) // 2] + rates[len(rates) // 2]) / 2
        assert row[1] == {"tiny_tvr": "400", "tiny_baseline": "300"}[row[0]]
        assert row[2] == {"tiny_tvr": "1.64M", "tiny_baseline": "1.23M"}[row[0]]
        assert row[3] == f"{train[-1]['loss']:.4f}"
        assert row[4] == f"{last_eval['loss']:.4f}"
        assert row[5] == f"{last_eval['perplexity']:.2f}"
        assert row[6] == f"{round(median / 10) / 100:g}k"
        assert row[7] == {"tiny_tvr": "3 min 20 s", "tiny_baseline": "2 min 30 s"}[row[0]]


def test_single_run_shows_status_methods_and_figures(tmp_path):
    run = config("half <b>done</b>", steps=400)
    rows = [row for row in run_rows(run) if row["step"] <= 250]
    status = {"status": "preempted", "step": 253, "reason": "stopped by SIGTERM after saving"}
    page = drawn(write_run(tmp_path / "run", run, rows, status), out=tmp_path / "deep" / "down" / "page.html")
    assert "<b>" not in page.source
    assert page.tiles["steps"] == "250 of 400"
    assert page.tiles["tokens"] == "1.02M"
    assert page.tiles["validation loss"] == f"{[row for row in rows if row['kind'] == 'eval'][-1]['loss']:.4f}"
    for line in (
        "half <b>done</b>",
        "preempted at step 253: stopped by SIGTERM after saving",
        "LIR: initializer range 0.006",
        "TVR: interval steps 50, ratio threshold 1.2, target std 0.01",
    ):
        assert line in page.text
    assert (tmp_path / "deep" / "down" / "page_png" / "weight_std.png").exists()


@pytest.mark.slow
def test_resumed_run_looks_like_one_that_was_never_stopped(tmp_path):
    run = config()
    rows = run_rows(run)
    smooth = write_run(tmp_path / "smooth" / "tiny", run, rows)
    lost = [row | {"loss": 99.0} if row["kind"] in ("train", "eval") else row for row in rows if row["step"] <= 390]
    off_beat = {"kind": "eval", "step": 385, "loss": 99.0, "perplexity": 1e9}
    resumed = {"kind": "event", "step": 200, "event": "resumed"}
    kept = [row for row in lost if row["step"] <= 200 and row["kind"] == "event"]
    kept += [row for row in rows if row["step"] <= 200 and row["kind"] != "event"]
    gone = [row for row in lost if row["step"] > 200] + [off_beat]
    again = [row for row in rows if row["step"] > 200]
    broken = write_run(tmp_path / "broken" / "tiny", run, [*kept, *gone, resumed, *again])
    one, two = tmp_path / "smooth.html", tmp_path / "broken.html"
    page = drawn(broken, out=two)
    assert "resumed from step 200" in page.text
    assert page.tiles["train loss"] == drawn(smooth, out=one).tiles["train loss"]
    for name in ("loss", "weight_std", "grad_norm", "throughput"):
        assert (tmp_path / "broken_png" / f"{name}.png").read_bytes() == (
            tmp_path / "smooth_png" / f"{name}.png"
        ).read_bytes(), name


def test_wall_time_leaves_out_the_time_a_run_was_down(tmp_path):
    run = config()
    down_s = 86_400
    rows = run_rows(run)
    first = [row for row in rows if row["step"] <= 200]
    resumed = {"kind": "event", "step": 200, "event": "resumed", "time": START + 100 + down_s}
    second = [row | {"time": row["time"] + down_s} for row in rows if row["step"] > 200]
    page = drawn(write_run(tmp_path / "tiny", run, [*first, resumed, *second]), out=tmp_path / "page.html")
    assert page.tiles["wall time"] == "3 min 20 s"


def test_run_without_weights_or_evaluation_says_so(tmp_path):
    run = config()
    rows = [row for row in run_rows(run) if row["kind"] in ("train", "event")]
    page = drawn(write_run(tmp_path / "tiny", run, rows), out=tmp_path / "page.html")
    assert "No weights were logged." in page.text
    assert "No evaluation was logged for tiny." in page.text
    assert (page.tiles["validation loss"], page.tiles["perplexity"]) == ("–", "–")
    assert not (tmp_path / "page_png" / "weight_std.png").exists()


@pytest.mark.slow
def test_diverged_run_is_drawn_and_its_loss_called_not_finite(tmp_path):
    run = config()
    rows = run_rows(run)
    for row in rows:
        if row["kind"] == "train" and row["step"] > 300:
            row |= {"loss": None, "grad_norm": None}
        if row["kind"] == "weights" and row["step"] > 300:
            row["weights"] = {name: {"std": None, "mean": None, "rescaled": False} for name in llama_weights(2)}
    diverged = write_run(tmp_path / "diverged", run, rows)
    healthy = write_run(tmp_path / "healthy", run | {"name": "healthy"}, run_rows(run))
    assert drawn(diverged, out=tmp_path / "page.html").tiles["train loss"] == "not finite"
    assert drawn(healthy, diverged, out=tmp_path / "both.html").rows[2][3] == "not finite"


@pytest.mark.slow
def test_run_that_logged_a_single_row_is_drawn(tmp_path):
    run = config()
    rows = [row for row in run_rows(run) if row["step"] <= 10]
    page = drawn(write_run(tmp_path / "tiny", run, rows, {"status": "running", "step": 10}), out=tmp_path / "page.html")
    assert page.tiles["steps"] == "10 of 400"


@pytest.mark.slow
def test_gpt2_weights_find_their_roles_and_unknown_names_are_listed(tmp_path):
    run = config("gpt2", layers=2)
    run["model"]["family"] = "gpt2"
    parts = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight", "attn.c_attn.bias")
    names = {f"transformer.h.{layer}.{part}": layer + 1 for layer in range(2) for part in parts}
    names |= {"transformer.wte.weight": 0, "transformer.wpe.weight": 0, "model.new.gate_of_doom.weight": 0}
    page = drawn(write_run(tmp_path / "gpt2", run, run_rows(run, names)), out=tmp_path / "page.html")
    for panel in ("qkv · fused", "o · output", "up · MLP", "down · MLP", "position · positions", "bias", "other"):
        assert f">{panel}<" in page.source, panel
    assert "shown under other: model.new.gate_of_doom.weight." in page.text


def test_weight_path_drops_to_the_target_of_its_layer_at_each_rescale(tmp_path):
    name, other = "model.layers.3.mlp.down_proj.weight", "model.layers.3.mlp.up_proj.weight"
    run = config(methods=[TVR | {"scale_with_depth": True, "exclude": [other]}])
    logged = [{"std": 0.004, "rescaled": False}, {"std": 0.007, "rescaled": True}, {"std": 0.0055, "rescaled": False}]
    rows = [{"kind": "weights", "step": 50 * n, "weights": {name: v, other: v}} for n, v in enumerate(logged, start=1)]
    rows.append({"kind": "train", "step": 150, "tokens": 1, "loss": 1.0})
    held, left = read_weights(read_runs([write_run(tmp_path / "tiny", run, rows)])[0])
    assert (held.role, held.layer, held.target.tolist()) == ("down", 4, pytest.approx([0.005] * 3))
    assert [threshold.tolist() for threshold in held.thresholds] == [pytest.approx([0.006] * 3)]
    steps, std = held.path()
    assert steps.tolist() == [50, 100, 100, 150]
    assert std == pytest.approx([0.004, 0.007, 0.005, 0.0055])
    assert (left.held, left.thresholds) == (False, ())
    assert left.path()[0].tolist() == [50, 100, 150]


def test_weights_of_an_older_file_are_drawn_like_those_of_a_new_one(tmp_path):
    run = config()
    rows = run_rows(run)
    older = [{key: value for key, value in row.items() if key != "weights"} | row.get("weights", {}) for row in rows]
    assert older != rows
    folders = [write_run(tmp_path / name / "tiny", run, given) for name, given in (("new", rows), ("old", older))]
    new, old = (read_weights(read_runs([folder])[0]) for folder in folders)
    assert len(new) == len(llama_weights(2))
    for ours, theirs in zip(new, old, strict=True):
        assert (ours.name, ours.role, ours.layer) == (theirs.name, theirs.role, theirs.layer)
        np.testing.assert_array_equal(ours.steps, theirs.steps)
        np.testing.assert_array_equal(ours.values, theirs.values)
        np.testing.assert_array_equal(ours.rescaled, theirs.rescaled)


def test_targets_that_the_rows_hold_count_more_than_the_options(tmp_path):
    name = "model.layers.3.mlp.down_proj.weight"
    run = config(methods=[TVR | {"target_std": None, "relative_target": 0.3, "target_warmup_steps": 100}])
    limits = {"target": 0.004, "threshold": 0.006, "lower_threshold": 0.002}
    logged = [
        {"std": 0.004, "rescaled": False},  # a row of the monitor alone
        {"std": 0.007, "rescaled": True, **limits},
        {"std": 0.0055, "rescaled": False, **limits, "target": 0.005},
    ]
    rows = [{"kind": "weights", "step": 50 * n, "weights": {name: values}} for n, values in enumerate(logged, start=1)]
    rows.append({"kind": "train", "step": 150, "tokens": 1, "loss": 1.0})
    folder = write_run(tmp_path / "tiny", run, rows)
    (held,) = read_weights(read_runs([folder])[0])
    np.testing.assert_array_equal(held.target, [np.nan, 0.004, 0.005])
    np.testing.assert_array_equal(held.thresholds, [[np.nan, 0.006, 0.006], [np.nan, 0.002, 0.002]])
    assert held.path()[1].tolist() == [0.004, 0.007, 0.004, 0.0055]
    assert "TVR target" in drawn(folder, out=tmp_path / "page.html").source


def every_name() -> list[str]:
    """Return a weight of each module and kind in the layout."""
    gpt2 = ("attn.", "ln_", "mlp.c_")
    blocks = [f"{'transformer.h' if part.startswith(gpt2) else 'model.layers'}.0.{part}" for part in layout._IN_BLOCK]
    return [f"{module}.{kind}" for module in (*blocks, *layout._OUTSIDE) for kind in layout._KINDS]


def weight_run(folder: Path, logged: dict[str, list[dict]], name: str = "tiny") -> Path:
    """Write a run that logged these values of these weights at steps 50, 100, ..."""
    count = max(map(len, logged.values()))
    rows = [
        {"kind": "weights", "step": 50 * (n + 1), "weights": {weight: values[n] for weight, values in logged.items()}}
        for n in range(count)
    ]
    rows.append({"kind": "train", "step": 50 * count, "tokens": 1, "loss": 1.0})
    return write_run(folder, config(name, methods=[]), rows)


def weight_pictures_of(*folders: Path) -> list[Picture]:
    with matplotlib.rc_context(RC):
        return weight_pictures(read_runs(folders))


def titles(picture: Picture) -> list[str]:
    return [axes.get_title(loc="left") for axes in picture.figure.axes]


def lines(picture: Picture) -> list[Line2D]:
    return [line for axes in picture.figure.axes for line in axes.lines if len(line.get_xdata())]


def test_every_role_of_the_layout_has_a_panel(tmp_path):
    names = every_name()
    roles = {layout.role_and_layer(name)[0] for name in names}
    assert roles >= {*layout.MATRIX_ROLES, "embed", "head", "norm", "bias", "scale", "alpha", "beta", "query"}
    values = [{"std": 0.1 + 0.01 * n, "mean": 1.0 + n, "rescaled": False} for n in range(3)]
    folder = weight_run(tmp_path / "tiny", dict.fromkeys(names, values))
    weights = read_weights(read_runs([folder])[0])
    others = {weight.name for weight in weights if panel_of(weight) == "other"}
    # Factors of weights that are no matrices, which no method has.
    assert {layout.role_and_layer(name)[0] for name in others} <= {"scale"}
    assert {layout.role_and_layer(name.replace("_scale", ""))[0] for name in others} == {"norm", "query"}
    pictures = weight_pictures_of(folder)
    shown = [title.split(" · ")[0] for picture in pictures for title in titles(picture)]
    assert roles - {"scale"} == set(shown) - {"other"}
    assert sum(len(lines(picture)) for picture in pictures) == len(names)
    assert all(name in pictures[-1].caption for name in others)


def test_role_that_the_report_has_no_panel_for_is_shown_under_other(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.report.weight_series.role_and_layer", lambda name: ("novel", 1))
    folder = weight_run(tmp_path / "tiny", {"model.layers.0.novel.weight": [{"std": 0.1, "rescaled": False}] * 2})
    page = drawn(folder, out=tmp_path / "page.html")
    assert ">other<" in page.source
    assert "shown under other: model.layers.0.novel.weight." in page.text


def test_factors_are_drawn_by_their_mean_in_the_panel_of_their_matrix(tmp_path):
    alpha, gains = "model.layers.1.mlp.up_proj.weight_scale", "model.layers.0.self_attn.q_proj.weight_scale"
    one_gain, norm = "model.norm.weight", "model.layers.0.input_layernorm.weight"
    means = [22.8, 20.0, 17.5]
    one_number = [{"std": 0.0, "mean": mean, "rescaled": False} for mean in means]
    vector = [{"std": 0.3, "mean": mean, "rescaled": False} for mean in means]
    matrix = [{"std": 0.02, "mean": 0.0, "rescaled": True, "target": 0.01, "threshold": 0.012}] * 3
    logged = {alpha: one_number, gains: vector, one_gain: one_number, "model.layers.1.mlp.up_proj.weight": matrix}
    run = weight_run(tmp_path / "factors", logged, "factors")
    std, mean = weight_pictures_of(run)
    assert titles(std) == ["up · MLP"]
    assert titles(mean) == ["norm · gains", "q · factor", "up · factor"]
    assert [line.get_ydata().tolist() for line in lines(mean)] == [means] * 3
    for axes in mean.figure.axes:
        low, high = axes.get_ylim()
        assert 15 < low < 17.5
        assert 22.8 < high < 25
    plain = weight_run(tmp_path / "plain", {norm: vector, "model.layers.1.mlp.up_proj.weight": matrix}, "plain")
    assert [picture.name for picture in weight_pictures_of(plain)] == ["weight_std"]
    both = {picture.name: picture for picture in weight_pictures_of(run, plain)}
    assert list(both) == [
        *("weight_std", "weight_std_factors", "weight_std_plain"),
        *("weight_mean", "weight_mean_factors", "weight_mean_plain"),
    ]
    assert len(both["weight_mean"].figure.axes[0].lines) == 2  # the vector beside the other run's single number
    assert "norm · gains" in titles(both["weight_std"])
    assert "weight_mean" in {path.stem for path in write_report([run, plain], tmp_path / "page.html")}


def test_factor_that_diverged_or_never_moves_is_drawn(tmp_path):
    name = "lm_head.weight_scale"
    nothing = {"std": None, "mean": None, "rescaled": False}
    for label, values in {"diverged": [nothing], "frozen": [{"std": 0.0, "mean": 0.0, "rescaled": False}]}.items():
        folder = weight_run(tmp_path / label, {name: values * 2}, label)
        page = drawn(folder, out=tmp_path / f"{label}.html")
        assert ">head · factor<" in page.source
        low, high = by_layer(read_weights(read_runs([folder])[0]), from_zero=False).axes[0].get_ylim()
        assert low < 0 < high


def test_thinning_keeps_every_spike_and_the_running_mean_is_a_mean():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[[17, 54_321]] = 9.0, -9.0
    kept_x, kept_y = thinned(x, y, points=500)
    assert len(kept_x) <= 500
    assert {(17.0, 9.0), (54_321.0, -9.0)} <= set(zip(kept_x, kept_y, strict=True))
    noisy = np.random.default_rng(0).normal(size=300)
    noisy[40] = np.nan
    naive = [np.nanmean(noisy[max(n - 3, 0) : n + 4]) for n in range(300)]
    assert running_mean(noisy) == pytest.approx(naive)


@pytest.mark.slow
def test_six_runs_with_awkward_names_and_depths_fit_on_a_page(tmp_path):
    folders = []
    for seed, layers in enumerate((1, 2, 2, 2, 2, 32)):
        run = config("same $name$" if seed < 2 else f"{'a rather long name ' * 3}{seed}", steps=100, layers=layers)
        folders.append(write_run(tmp_path / f"{seed}" / "run", run, run_rows(run, seed=seed)))
    page = drawn(*folders, out=tmp_path / "page.html")
    labels = [row[0] for row in page.rows[1:]]
    assert len(set(labels)) == 6
    assert labels[:2] == list(map(str, folders[:2]))
    assert len(list((tmp_path / "page_png").iterdir())) == len(page.pictures) == 11


def test_line_cut_short_at_the_end_is_left_out(tmp_path):
    run = config()
    folder = write_run(tmp_path / "tiny", run, [row for row in run_rows(run) if row["step"] <= 300])
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 310, "tok')
    assert drawn(folder, out=tmp_path / "page.html").tiles["steps"] == "300 of 400"


LINES_THAT_ARE_NO_ROW = (
    b'{"kind": "train", "step": 3',
    b"[1, 2]",
    b'{"kind": "train"}',
    b'{"kind": 1, "step": 2}',
    b"\xff",
)


@pytest.mark.parametrize("line", LINES_THAT_ARE_NO_ROW)
def test_corrupt_line_elsewhere_is_named(tmp_path, line):
    run = config(steps=50)
    folder = write_run(tmp_path / "tiny", run, run_rows(run))
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[2] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError, match=re.escape(f"{path}, line 3 is corrupt")):
        read_runs([folder])


def test_missing_and_broken_files_are_named(tmp_path):
    folder = write_run(tmp_path / "tiny", config(), [{"kind": "event", "step": 0, "event": "started"}])
    (tmp_path / "empty").mkdir()
    config_file, status_file, metrics = (folder / name for name in ("config.yaml", "status.json", "metrics.jsonl"))

    def refusal(of: Path) -> str:
        with pytest.raises(UserError) as caught:
            read_runs([of])
        return str(caught.value)

    assert f"no run folder {tmp_path / 'nowhere'}" in refusal(tmp_path / "nowhere")
    assert f"{tmp_path / 'empty' / 'config.yaml'} is missing" in refusal(tmp_path / "empty")
    assert f"{metrics} holds no train row" in refusal(folder)
    status_file.write_text("{")
    assert f"{status_file} is not valid JSON" in refusal(folder)
    status_file.unlink()
    metrics.unlink()
    assert f"{metrics} is missing" in refusal(folder)
    config_file.write_text("a: [1")
    assert f"{config_file} is not valid YAML" in refusal(folder)
    config_file.write_text("- a")
    assert f"{config_file} holds list" in refusal(folder)


def test_mistakes_end_with_exit_code_2_and_one_paragraph(tmp_path):
    run, page = config(steps=50), tmp_path / "page.html"
    folder = write_run(tmp_path / "tiny", run, run_rows(run))
    (tmp_path / "file").write_text("")
    for message, done in (
        ("there is no run folder", report(tmp_path / "nowhere", out=page)),
        ("is given more than once", report(folder, folder, out=page)),
        ("can tell at most 6 apart", report(*[folder] * 7, out=page)),
        ("cannot be written", report(folder, out=tmp_path / "file" / "page.html")),
    ):
        assert done.returncode == 2
        assert message in done.stderr
        assert (done.stderr.count("\n"), done.stdout) == (1, "")
        assert not page.exists()


@pytest.mark.slow
def test_same_runs_give_the_same_bytes(tmp_path):
    run = config(steps=100)
    folder = write_run(tmp_path / "tiny", run, run_rows(run))
    pages = [drawn(folder, out=tmp_path / f"{n}" / "page.html").source for n in range(2)]
    assert pages[0] == pages[1]
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
