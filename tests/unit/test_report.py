"""The report measures what it says: its checkpoint, against raw pixels and the run's untrained network."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

import main_pretrain
from data.sources.base import ArraySource, Subset
from data.worker import BadImagesError
from engine import precision as device
from engine.run import Run
from models import assemble_framework, framework_options
from models.parts.backbones import build_backbone
from tools import demo, report
from tools.parts.report import charts, looks, measure, page, pictures
from tools.parts.report.score_table import COLUMNS
from tools.parts.run_files import open_run_files
from utils.checkpoints import file as checkpoint
from utils.cli import make_parser, parse
from utils.config.load import ConfigError, load_config
from utils.config.schema import declare
from utils.config.sections import section_options
from utils.randomness import keyed_seed

TINY = """
NAME: tiny
MODEL:
  NAME: moco_v2
  BACKBONE: {NAME: resnet8, STEM: cifar_stride2}
  MOCO_V2: {QUEUE_SIZE: 128, OUT_DIM: 16, TEMPERATURE: 0.2, BASE_MOMENTUM: 0.9}
DATA: {DATASET: digits, IMG_SIZE: 8, NUM_WORKERS: 0}
AUG: {RECIPE: digits}
OPTIM: {NAME: adamw, BASE_LR: 2e-3}
TRAIN: {EPOCHS: 1, BATCH_SIZE: 128, PRECISION: auto}
KNN: {EVERY_EPOCHS: 1, K: [20]}
LOG: {TENSORBOARD: false}
"""


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DRAWS", 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrain for an epoch of 11 steps and return the yaml; the run is in output/tiny/default beside it."""
    root = tmp_path_factory.mktemp("report")
    (root / "tiny.yaml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main_pretrain.py", *flags_of(root / "tiny.yaml")])
        assert main_pretrain.main() == 0
    return root / "tiny.yaml"


def flags_of(cfg: Path) -> list[str]:
    return ["--cfg", str(cfg), "--output", str(cfg.parent / "output"), "--device", "cpu"]


def open_run(cfg: Path, tag: str = "default") -> Run:
    flags = {"OUTPUT": str(cfg.parent / "output"), "TAG": tag, "DEVICE": "cpu"}
    tree = load_config(declare(framework_options()), [cfg], (), flags)
    return Run(tree, Path(tree.OUTPUT) / tree.NAME / tree.TAG, torch.device("cpu"))


def rows_of(run: Run) -> dict[str, dict[str, dict[str, float]]]:
    return json.loads((run.folder / "report.json").read_text())["rows"]


def test_report_of_a_run(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *flags_of(trained)])
    before = (open_run(trained).folder / "status.json").read_bytes()
    assert report.main() == 0
    run = open_run(trained)
    shown = capsys.readouterr().out
    assert "\ntrained backbone " in shown  # a row is a line
    for name in ("report.md", "views.png", "learning_curve.png", "neighbours.png"):
        assert str(run.folder / name) in shown
    for name in ("views.png", "learning_curve.png", "neighbours.png"):
        with Image.open(run.folder / name) as image:
            assert min(image.size) > 100
    assert (run.folder / "status.json").read_bytes() == before  # reading a run is not running it
    rows = rows_of(run)
    assert list(rows) == ["raw pixels", "random backbone", "trained backbone"]
    for row in rows.values():
        assert list(row) == list(COLUMNS)
        assert all(0 <= cell["mean"] <= 100 for cell in row.values())
        assert row["labels1"]["std"] > 0
        assert row["labels1"]["mean"] < row["labels10"]["mean"] < row["linear"]["mean"]
        assert f"{row['labels10']['mean']:.1f} ± {row['labels10']['std']:.1f}" in shown
    assert rows["trained backbone"] != rows["random backbone"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
COUNT = """<script>addEventListener('load', () => {
const all = [...document.images], bad = all.filter(i => !i.complete || !i.naturalWidth);
document.body.innerHTML = `found ${all.length} pictures, ${bad.length} broken,`
+ ` ${document.querySelectorAll('svg').length} charts, too wide ${document.body.scrollWidth > innerWidth}`;
});</script>"""


@pytest.fixture(scope="module")
def pages(trained: Path) -> Path:
    """Write the page of one run, and of it beside itself, and return the folder of the run."""
    folder = open_run(trained).folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "DRAWS", 3)
        for words in ([folder], [folder, folder, "--html", folder / "two.html"]):
            patch.setattr(sys, "argv", ["report.py", *map(str, words), "--device", "cpu"])
            assert report.main() == 0
    return folder


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
@pytest.mark.parametrize("name", ["report.html", "two.html"])
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_the_page(pages: Path, tmp_path: Path, name: str, width: int) -> None:
    """No error on the console, every picture decodes, no sideways scrolling on a narrow screen."""
    assert CHROMIUM is not None
    text = (pages / name).read_text()
    (tmp_path / name).write_text(text.replace("</body>", COUNT + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--window-size={width},2000", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", f"file://{tmp_path / name}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown.stderr
    found = re.search(r"found (\d+) pictures, 0 broken, (\d+) charts, too wide false", shown.stdout)
    assert found, shown.stdout[-500:]
    assert int(found[1]) == text.count("<img ") > 60
    assert int(found[2]) >= 8


def test_the_page_is_one_small_file_that_needs_no_network(pages: Path) -> None:
    for name in ("report.html", "two.html"):
        text = (pages / name).read_text()
        assert len(text) < 3e6
        assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|<script", text)
        assert "prefers-color-scheme: dark" in text


def test_the_page_says_what_was_run(pages: Path, trained: Path) -> None:
    text = (pages / "report.html").read_text()
    for words in ("moco_v2", "resnet8", "digits", "raw pixels", "MODEL.MOCO_V2.QUEUE_SIZE"):
        assert words in text
    assert "MODEL.SYNCO." not in text  # keys of other methods say nothing
    assert f"torch {torch.__version__}" in text  # from run.json
    assert "side by side" in (pages / "two.html").read_text()


def test_a_key_that_a_flag_changed_is_marked(trained: Path) -> None:
    cfg = open_run(trained).cfg
    files = open_run_files(open_run(trained).folder)
    files.starts[:] = [{"command": ["main_pretrain.py", "--cfg", str(trained)]}]
    recipe, rows = report.changed_keys(cfg, files)
    assert recipe == str(trained)
    marked = {key for key, _, _, by_flag in rows if by_flag}
    assert "DEVICE" in marked
    assert "MODEL.NAME" not in marked


def test_events_stand_at_their_epochs(tmp_path: Path) -> None:
    config = "MODEL: {NAME: synco, SYNCO: {WARMUP_EPOCHS: 4}}\nSCHEDULE: {WARMUP_EPOCHS: 1}\n"
    (tmp_path / "config.yaml").write_text(config)
    rows = [{"step": step, "epoch": step / 10, "loss": 1.0} for step in range(10, 80, 10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.json").write_text('{"starts": [{"step": 0}, {"step": 35}]}')
    files = open_run_files(tmp_path)
    made = page.RunPage(files, "t")
    expected = [
        (1.0, "warm-up of the rate ends"),
        (4.0, "synthetic negatives join"),
        (4.0, "restart"),
    ]
    assert files.events() == expected
    (loss,) = page.charts([made])
    assert all(name in loss.svg for _, name in expected)


def test_ticks_are_round_and_enclose() -> None:
    assert charts.nice_ticks(0, 10) == [0, 5, 10]
    assert charts.nice_ticks(5, 5)[0] <= 5 <= charts.nice_ticks(5, 5)[-1]
    ticks = charts.nice_ticks(0.013, 0.021)
    assert ticks[0] <= 0.013
    assert ticks[-1] >= 0.021


def test_names_cannot_break_the_page() -> None:
    line = charts.Line("<b>", [(0, 1.0), (1, float("nan")), (2, 3.0)], 0, dots=True)
    svg = charts.line_chart("<i>", [line], [(1, "<u>")], [("<s>", 2.0)]).svg
    assert not re.search("<[bius]>", svg)
    assert "nan" not in svg


def test_attention_is_that_of_the_last_block() -> None:
    vit = build_backbone("deit_tiny", img_size=32, patch_size=8).eval()
    attention = vit.blocks[-1].attn
    with torch.no_grad():
        # keys that grow with one token's mark: the class token then looks at that token only
        attention.qkv.weight.zero_()
        attention.qkv.bias.zero_()
    images = torch.randn(2, 3, 32, 32)
    flat = looks.attention_maps(vit, images)
    assert flat.shape == (2, 4, 4)
    assert flat.max() < 1e-3  # all keys alike: no token stands out
    with torch.no_grad():
        attention.qkv.weight.normal_()
    maps = looks.attention_maps(vit, images)
    assert maps.amin() == 0
    assert torch.allclose(maps.flatten(1).amax(1), torch.ones(2))
    seen = []
    attention.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    attention.fused_attn = False
    with torch.no_grad():
        vit(images)
    own = seen[0].mean(1)[:, 0, 1:].unflatten(1, (4, 4))
    own = own - own.amin((1, 2), keepdim=True)
    assert torch.allclose(maps, own / own.amax((1, 2), keepdim=True), atol=1e-4)


def test_a_resnet_has_no_attention() -> None:
    backbone = build_backbone("resnet8", stem="cifar")
    assert looks.attention_maps(backbone, torch.zeros(1, 3, 8, 8)) is None


def test_a_map_shows_the_classes_apart() -> None:
    labels = torch.arange(40) % 2
    features = torch.randn(40, 8) * 0.01 + labels[:, None] * torch.ones(8) - 0.5
    svg = looks.feature_map_chart("m", features, labels, 0).svg
    places = re.findall(r'class="f(\d)" cx="([\d.]+)"', svg)
    left, right = ([float(x) for c, x in places if c == k] for k in "01")
    assert max(left) < min(right) or max(right) < min(left)


def test_a_folder_that_is_no_run_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(ValueError, match="is no folder of a run"):
        report.main()


def test_the_random_row_is_the_run_before_its_first_step(trained: Path) -> None:
    cfg = open_run(trained).cfg
    torch.manual_seed(keyed_seed("model", cfg.SEED))  # start_run
    options = section_options(cfg.MODEL.BACKBONE)
    del options["target_drop_path"]
    framework = assemble_framework(
        "moco_v2", section_options(cfg.MODEL.MOCO_V2), options, img_size=8
    )
    built = measure.build_online(cfg).state_dict()
    for name, tensor in framework.online.backbone.state_dict().items():
        assert torch.equal(built[name], tensor)


def test_the_trained_row_is_the_checkpoint(trained: Path) -> None:
    run = open_run(trained)
    path = checkpoint.newest_valid(run.folder).path
    state = checkpoint.load(path)
    for name, tensor in state["framework"].items():
        if name.startswith("online.backbone.layer1") and name.endswith("weight"):
            tensor.zero_()
    torch.save(state, trained.parent / "changed.pt")
    train, val = (report.open_split(run.cfg.DATA, split) for split in ("train", "val"))
    found = []
    for file in (path, trained.parent / "changed.pt"):
        found.append(measure.representations(run, train, val, file)[0])
    for name in ("raw pixels", "random backbone"):
        assert torch.equal(found[0][name].bank, found[1][name].bank)
        assert torch.equal(found[0][name].queries, found[1][name].queries)
    accuracies = [measure.knn_accuracy(*splits["trained backbone"], 10, (20,)) for splits in found]
    assert accuracies[0] != accuracies[1]


def test_the_flags_of_a_main_that_mean_nothing_here_are_refused(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *flags_of(trained), "--eval"])
    with pytest.raises(ValueError, match="--eval"):
        report.main()


LAYOUTS = {"folder": "photos", "imagefolder": "photos/train/{}"}


@pytest.mark.parametrize("dataset", list(LAYOUTS))
def test_images_without_labels_or_test_split_get_a_report(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dataset: str,
) -> None:
    """No labels: no accuracies, but pictures. Labels and no val/: a part of the images asks."""
    monkeypatch.chdir(tmp_path)
    for index in range(30):
        folder = Path(LAYOUTS[dataset].format("ab"[index % 2]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (index * 8, 255 * (index % 2), 0)).save(folder / f"{index}.png")
    yaml = TINY.replace("digits, IMG_SIZE: 8", f"{dataset}, PATH: photos, IMG_SIZE: 16")
    yaml = yaml.replace("128, PRECISION", "8, PRECISION").replace(
        "EVERY_EPOCHS: 1", "EVERY_EPOCHS: 0"
    )
    Path("tiny.yaml").write_text(yaml)
    monkeypatch.setattr(sys, "argv", ["main_pretrain.py", *flags_of(Path("tiny.yaml"))])
    assert main_pretrain.main() == 0
    for index in range(0, 30, 5):  # training would leave them out
        path = Path(LAYOUTS[dataset].format("ab"[index % 2])) / f"{index}.png"
        path.write_bytes(path.read_bytes()[:40])
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["report.py", "output/tiny/default", "--device", "cpu"])
    assert report.main() == 0
    shown = capsys.readouterr().out
    labelled = dataset == "imagefolder"
    # without the six that cannot be read
    words = "19 training images, 5" if labelled else "18 training images without labels, 6"
    assert f"{words} others of them as queries" in shown
    assert ("\ntrained backbone" in shown) == labelled
    text = Path("output/tiny/default/report.html").read_text()
    assert ("What the features are worth" in text) == labelled
    assert ("Green: the same class" in text) == labelled
    assert text.count('class="tile query"') > 10
    assert ("tile same" in text) == labelled
    with Image.open("output/tiny/default/neighbours.png") as image:
        assert image.width > 1000


def test_the_curve_and_its_baselines_are_of_one_k(trained: Path, tmp_path: Path) -> None:
    """A run that never measured k = 20 has baselines for the k that it did, at its temperature."""
    shutil.copytree(open_run(trained).folder, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("knn20_", "knn5_"))
    opts = ["KNN.TEMPERATURE", "3.0"]
    (run,) = report.open_runs([tmp_path / "run"], None, opts, {"DEVICE": "cpu"})
    measured = report.measure(run)
    assert measured.curve == "knn5"
    usual = {}
    for name in ("raw pixels", "random backbone"):
        found = measure.knn_accuracy(*measured.splits[name], 10, (5, 20), temperature=3.0)
        assert measured.levels[name] == found["knn5_top1"] != found["knn20_top1"]
        assert measured.scores[name]["knn"] == (found["knn20_top1"], None)
        usual[name] = measure.knn_accuracy(*measured.splits[name], 10, (5, 20))
    assert any(usual[name]["knn5_top1"] != measured.levels[name] for name in usual)
    assert any((usual[n]["knn20_top1"], None) != measured.scores[n]["knn"] for n in usual)
    made = report.run_page(measured, 2)
    panel = page.charts([made])[1]
    assert "k = 5" in panel.title
    # a title may hold the name of a folder that is no UTF-8; the page's own folder may be new
    page.write_page(tmp_path / "new" / "page.html", [replace(made, title="caf\udce9")], "")
    assert "caf\\udce9" in (tmp_path / "new" / "page.html").read_text()
    assert "random backbone" in panel.svg


def test_the_learning_curve_names_its_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    row = '{"step": 1, "epoch": %d, "loss": 2.0, "knn20_top1": 50.0}'
    (tmp_path / "metrics.jsonl").write_text("\n".join(row % epoch for epoch in (1, 20)))
    events = [(4.0, "synthetic negatives join"), (99.0, "too late")]
    pictures.save_learning_curve(tmp_path / "c.png", tmp_path, "knn20", {}, events)
    for axes in pyplot.gcf().axes:
        assert [text.get_text() for text in axes.texts] == ["synthetic negatives join"]
        assert axes.texts[0].xy[0] == 4.0


def test_names_of_levels_that_are_close_keep_apart() -> None:
    line = charts.Line("run", [(0, 0.0), (1, 100.0)], 0)
    svg = charts.line_chart("t", [line], (), [("high", 50.0), ("low", 49.0), ("far", 10.0)]).svg
    places = {
        name: float(y) for y, name in re.findall(r'y="([\d.]+)" text-anchor="end">(\w+)', svg)
    }
    assert places["low"] - places["high"] > 12


def test_no_checkpoint_is_one_clear_error(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"absent holds no checkpoint.*main_pretrain\.py"):
        report.measure(open_run(trained, "absent"))


def test_separable_features_score_full_marks() -> None:
    labels = torch.arange(60) % 3
    features = torch.eye(3)[labels] + 0.01 * torch.randn(60, 3)
    split = measure.Split(features[:45], labels[:45], features[45:], labels[45:])
    scores = measure.evaluate(split, 3, seed=0, temperature=0.07)
    assert {column: cell[0] for column, cell in scores.items()} == dict.fromkeys(COLUMNS, 100.0)


def test_too_few_images_for_a_column_leave_it_empty() -> None:
    labels = torch.arange(12) % 3
    split = measure.Split(torch.randn(12, 4), labels, torch.randn(12, 4), labels)
    scores = {"raw pixels": measure.evaluate(split, 3, seed=0, temperature=0.07)}
    assert scores["raw pixels"]["labels10"] is None
    assert scores["raw pixels"]["labels1"] is not None
    assert " -" in report.terminal_table(scores)


def test_tables_are_aligned_and_mark_the_best() -> None:
    low = {"knn": (9.0, None), "linear": (50.0, None), "labels10": (40.0, 1.5), "labels1": None}
    high = {
        "knn": (100.0, None),
        "linear": (50.0, None),
        "labels10": (39.0, 11.5),
        "labels1": (12.0, 0.5),
    }
    scores = {"raw pixels": low, "trained backbone": high}
    terminal = report.terminal_table(scores).splitlines()
    assert len({len(line) for line in terminal}) == 1
    assert "100.0*" in terminal[2]
    markdown = report.markdown_table(scores).splitlines()
    assert len({len(line) for line in markdown}) == 1
    assert markdown[1].replace("-", "") == "|  | : | : | : | : |"
    assert "**40.0 ± 1.5**" in markdown[2]
    assert "**12.0 ± 0.5**" in markdown[3]
    assert "**50.0**" in markdown[2]  # a tie: both
    assert "**50.0**" in markdown[3]


def test_raw_pixels_are_levels_and_small() -> None:
    levels = torch.rand(2, 3, 48, 48)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    flat = measure.raw_pixels((levels - mean) / std)
    assert flat.shape == (2, 3 * 32 * 32)
    small = torch.rand(2, 3, 8, 8)
    assert torch.allclose(measure.raw_pixels((small - mean) / std), small.flatten(1), atol=1e-6)


def test_pixels_of_grey_images_count_once_and_are_centred(trained: Path) -> None:
    run = open_run(trained)
    train, val = (report.open_split(run.cfg.DATA, split) for split in ("train", "val"))
    split = measure.pixel_split(run, train, val)
    levels = train.images[:, 0].flatten(1) / 255
    assert split.queries.shape == (len(val), 64)
    assert torch.allclose(split.bank, levels - levels.mean(0), atol=1e-5)


def test_principal_components_keep_what_varies() -> None:
    plane = torch.randn(50, 2) @ torch.randn(2, 6)
    plane -= plane.mean(0)
    labels = torch.zeros(50, dtype=torch.int64)
    reduced = measure.principal(measure.Split(plane, labels, plane[:5], labels[:5]), 2)
    assert reduced.bank.shape == (50, 2)
    assert torch.allclose(reduced.bank @ reduced.queries.T, plane @ plane[:5].T, atol=1e-3)


def test_channels_that_differ_are_all_kept() -> None:
    assert measure._is_grey(torch.rand(4, 1, 25).expand(4, 3, 25).flatten(1))
    assert not measure._is_grey(torch.rand(4, 75))


def test_neighbours_are_framed_by_class(tmp_path: Path) -> None:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    source = ArraySource("made up", images, torch.tensor([0, 0, 1, 1]), ["a", "b"])
    found = pictures.nearest(torch.eye(4), torch.tensor([[1.0, 0.5, 0.2, 0.1]]), 3)
    assert found.tolist() == [[0, 1, 2]]
    # a second network, side by side with the first, finds the images the other way round
    both = {"trained": found, "random": found.flip(1)}
    pictures.save_neighbours(tmp_path / "n.png", source, torch.tensor([1]), source, both)
    with Image.open(tmp_path / "n.png") as image:
        band, middle = 2 * pictures._LINE + pictures._GAP, image.height - 40
        row = [image.getpixel((x, middle)) for x in range(image.width)]
        ink = image.crop((0, 0, image.width, band)).convert("L").point(lambda v: 255 * (v < 128))
        middle = image.width // 2
        halves = [ink.crop((x, pictures._LINE, x + middle, band)) for x in (0, middle)]
    frames = [a for a, b in itertools.pairwise(row) if a != b and a not in ((255,) * 3, (0,) * 3)]
    query, right, wrong = [pictures._QUERY] * 2, [pictures._RIGHT] * 4, [pictures._WRONG] * 2
    assert frames == query + right + wrong + query + wrong + right
    assert all(half.getbbox() for half in halves)  # a caption, and the name of each network


def test_queries_cover_the_classes_and_the_seed_decides() -> None:
    labels = torch.tensor([0] * 90 + [1] * 5 + [2] * 5)
    chosen = pictures.pick_queries(labels, 4, seed=3)
    assert sorted(labels[chosen[:3]].tolist()) == [0, 1, 2]
    assert len(set(chosen.tolist())) == 4
    assert torch.equal(chosen, pictures.pick_queries(labels, 4, seed=3))


def test_metrics_survive_a_torn_line(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "epoch": 0.5, "loss": 2.0}',
        '{"step": 2, "epoch": 1.0, "knn20_top1": 50.0}',
        '{"ste',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert pictures.read_metrics(tmp_path, "loss") == ([0.5], [2.0])
    assert pictures.read_metrics(tmp_path, "knn20_top1") == ([1.0], [50.0])


def test_without_matplotlib_there_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "metrics.jsonl").write_text("")
    assert not pictures.save_learning_curve(tmp_path / "curve.png", tmp_path, "knn20")
    assert len(caplog.messages) == 1
    assert "pip install matplotlib" in caplog.messages[0]


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_a_demo_needs_no_standard_error(tmp_path: Path, redirection: str) -> None:
    flags = f"--output {tmp_path} --nope"  # its first script refuses the flag
    command = ["bash", "-c", f'exec "$0" -u -m tools.demo {flags} {redirection}', sys.executable]
    assert subprocess.run(command, cwd=Path(demo.__file__).parents[1], timeout=120).returncode == 2


def test_a_demo_goes_on_with_the_newest_tag(tmp_path: Path) -> None:
    assert demo.choose_tag(tmp_path, fresh=False) == "demo1"
    for name in ("demo1", "demo10", "demo2", "demo-x"):
        (tmp_path / name).mkdir()
    assert demo.choose_tag(tmp_path, fresh=False) == "demo10"
    assert demo.choose_tag(tmp_path, fresh=True) == "demo11"


def test_the_user_chooses_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert demo.environment(demo.THREADS)["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= int(demo.environment(demo.THREADS)["OMP_NUM_THREADS"]) <= demo.THREADS


def test_idle_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if chosen:
            monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
        parse(make_parser(""), [])
        assert os.environ["OMP_WAIT_POLICY"] == expected


@pytest.mark.parametrize(
    ("native", "amx", "expected"),
    [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")],
)
def test_auto_is_bf16_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, amx: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert device.resolve_precision("auto", torch.device("cpu")) == expected


def test_auto_on_a_processor_that_torch_cannot_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert device.resolve_precision("auto", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, supported: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert device.resolve_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("name", "native", "warned"),
    [
        ("fp32", False, None),
        ("bf16", True, None),
        ("bf16", False, "emulates bf16; fp32 or auto is two to three times faster"),
        ("fp16", True, "fp16 is slow on a CPU; fp32 or auto is not"),
    ],
)
def test_a_named_precision_stands(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    native: bool,
    warned: str | None,
) -> None:
    monkeypatch.setattr("engine.precision.cpu_has_bf16", lambda: native)
    assert device.resolve_precision(name, torch.device("cpu")) == name
    assert len(caplog.messages) == (warned is not None)
    assert (warned or "") in caplog.text


def test_a_run_computes_in_what_auto_became(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def dtype_of(cfg: CfgNode) -> torch.dtype:
        run = Run(cfg, tmp_path, torch.device("cpu"))
        with run.autocast():
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    cfg = load_config(declare(framework_options()), (), ("TRAIN.PRECISION", "auto"))
    monkeypatch.setattr("engine.precision.cpu_has_bf16", lambda: True)
    assert dtype_of(cfg) is torch.bfloat16
    monkeypatch.setattr("engine.precision.cpu_has_bf16", lambda: False)
    assert dtype_of(cfg) is torch.float32


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"PRECISION.*'bf15' is not one of auto, fp32, bf16, fp16"
    ):
        load_config(declare(framework_options()), (), ("TRAIN.PRECISION", "bf15"))


def test_rows_and_images_stay_together_where_some_cannot_be_read(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(trained)
    path = checkpoint.newest_valid(run.folder).path
    train, val = (report.open_split(run.cfg.DATA, split) for split in ("train", "val"))
    whole, _, _ = measure.representations(run, train, val, path)

    class Damaged(Subset):
        def load(self, index: int) -> Tensor:
            if index in (3, 7):
                raise OSError("truncated")
            return super().load(index)

    damaged = Damaged(train, np.arange(len(train)))
    splits, bank, queries = measure.representations(run, damaged, val, path)
    kept = [index for index in range(len(train)) if index not in (3, 7)]
    assert len(bank) == len(kept)
    assert len(queries) == len(val)
    assert torch.equal(bank.load(3), train.load(4))
    for name in ("random backbone", "trained backbone"):
        assert torch.allclose(splits[name].bank, whole[name].bank[kept], atol=1e-5)
    assert torch.equal(splits["raw pixels"].bank_labels, train.labels[kept])
    monkeypatch.setattr(report, "open_images", lambda cfg: report.Images(damaged, val, True))
    counted = f"{len(train) - 2:,} training and {len(val):,} test images"
    assert report.measure(run).title.endswith(counted)
    with pytest.raises(BadImagesError):  # a test image is not left out
        measure.representations(run, train, Damaged(val, np.arange(len(val))), path)
