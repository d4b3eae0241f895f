"""benchmarks/attention_kl.py: its formulas against loops, a small run on a CPU, its message without a GPU."""

import csv
import importlib.util

import pytest
import torch
from conftest import ROOT

spec = importlib.util.spec_from_file_location(
    "attention_kl_benchmark", ROOT / "benchmarks" / "attention_kl.py"
)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def test_work_is_what_loops_count():
    flops = moved = 0
    for query in range(5):
        for _ in range(query + 1):
            flops += 2 * 16 + 2 * 32  # a product of each model
        moved += 2 * (2 * 16 + 2 * 32) + 4  # q and k of two bytes a number, and a float32
    assert benchmark.work("forward", 3, 2, 5, 16, 32, 2) == (6 * flops, 6 * moved)
    pairs = 15
    assert benchmark.work("forward and backward", 3, 2, 5, 16, 32, 2) == (
        6 * (2 * flops + pairs * 2 * 2 * 16), 6 * (2 * moved + 5 * 2 * 2 * 16)
    )


def test_on_a_cpu_it_compares_the_chunked_form_with_maps(tmp_path, capsys):
    file, threads = tmp_path / "out.csv", torch.get_num_threads()
    assert benchmark.main([
        "--device", "cpu", "--lengths", "33", "--heads", "16x32", "--attention-heads", "2", "--turns", "2",
        "--threads", str(threads), "--out", str(file),
    ]) == 0
    lines = list(csv.DictReader(file.open()))
    assert [(line["way"], line["pass"]) for line in lines] == [
        (way, name) for name in ("forward", "forward and backward") for way in ("chunked", "maps")
    ]
    assert all(
        float(line["ms"]) > 0 and float(line["gradient_apart"]) < 1e-4 and not line["of_roof"]
        for line in lines
    )
    assert "for a GPU: the same command" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert benchmark.main([]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "these timings need one" in err
