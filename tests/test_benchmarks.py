"""Benchmarks run: their figures are for docs/COST.md, not for tests."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_large_models_benchmark_on_its_smallest_size(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    large = pytest.importorskip("large")
    large.main("tiny", "cpu", "float32", None, None, 64, 64, 6, 2, 3, 1, 0, tmp_path / "large.json")
    report = json.loads((tmp_path / "large.json").read_text())
    names = [(row["cache"], row["what"]) for row in report["rows"]]
    work = ["generation alone", "generation, recorded", "one word, raw map", "one word", "3 words"]
    assert names == [(cache, name) for cache in ("prefix", "none") for name in work]
    assert all(row["seconds"] > 0 and row["peak GiB"] > 0 for row in report["rows"])
    assert len(large.markdown(report).splitlines()) == 2 + len(names) + 2
    shape = large.SHAPES["8b"]
    each = 4 * shape.width**2 + 3 * shape.width * shape.mlp
    assert 7e9 < shape.blocks * each + 2 * shape.vocabulary * shape.width < 8.5e9
