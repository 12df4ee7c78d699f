"""A small study and its rows, for tests."""

from pathlib import Path

from tools.parts.study.study import EVALUATION, Study, read_study

HEAD = "title: T\ndataset: mnist5k\nminutes: 1\nseeds: [0, 1]\n"
CLAIM = (
    HEAD
    + "claims: [{first: a, second: b, measure: linear, gain: 0.4, source: a paper}]\n"
    + "entries: {a: {cfg: c}, b: {cfg: c}}"
)


def study_of(tmp_path: Path, text: str) -> Study:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return read_study(path)


def row(entry: str, seed: int, knn: float) -> dict[str, object]:
    return {
        "recipe": entry, "seed": seed, "knn20": knn, "knn200": knn - 1, "linear": knn + 1, "epochs": 3,
        "cpu_seconds": 60.0, "wall_seconds": 90.0, "peak_mib": 512.0, "evaluation": EVALUATION, "commit": "abc", "machine": "M",
    }  # fmt: skip
