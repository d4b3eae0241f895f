"""The tests behind the headline numbers can fail: each mutation of the code turns the named test red."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MUTATIONS = {  # what goes wrong: (file, as it is, as it must not be, the test that has to notice)
    "KL swapped": (
        "distill/attention_kl.py",
        'if direction == "student_teacher":',
        'if direction != "student_teacher":',
        "distill/test_attention_kl.py::test_values_and_gradients_against_loops",
    ),
    "mask dropped from the attention": (
        "distill/attention_kl.py",
        "padded = None if valid is None else",
        "padded = None if True else",
        "distill/test_attention_kl.py::test_values_and_gradients_against_loops",
    ),
    "mask dropped from the losses": (
        "distill/ilkd.py",
        "valid = None if attention_mask is None else",
        "valid = None if True else",
        "distill/test_ilkd.py::test_ilkd_terms_against_naive_loops",
    ),
    "gradient of the wrong sign": (
        "distill/attention_kl.py",
        "s.sub_(mean).mul_(p_s) if",
        "s.sub_(mean).mul_(-p_s) if",
        "distill/test_attention_kl.py::test_values_and_gradients_against_loops",
    ),
    "gradient without its expectation, on a GPU": (
        "distill/attention_kl_triton.py",
        "return p * ((s - t) - mean[:, None]) * LN2",
        "return p * (s - t) * LN2",
        "distill/test_attention_kl_triton.py::test_in_the_interpreter",
    ),
    "labels that are left out counted": (
        "distill/large_vocabulary.py",
        "known = target != IGNORE_INDEX",
        "known = target >= IGNORE_INDEX",
        "distill/test_large_vocabulary.py::test_next_token_loss",
    ),
    "head tied to the teacher's": (
        "compression.py",
        "    student.config.provenance = provenance",
        "    student.config.provenance = provenance\n    student.lm_head = getattr(model, 'lm_head', None)",
        "models/test_gpt2.py::test_head_is_dense_untied_and_cloned",
    ),
    "wrong layers": (
        "models/config.py",
        '"odd": "1::2"',
        '"odd": "::2"',
        "models/test_gpt2.py::test_what_is_compressed",
    ),
    "factors transposed in the start": (
        "kronecker/nearest.py",
        "permute(0, 2, 1, 3).reshape(m1 * n1",
        "permute(2, 0, 1, 3).reshape(m1 * n1",
        "kronecker/test_kronecker.py::test_residual_is_the_tail_of_the_spectrum",
    ),
    "factors transposed in the layer": (
        "kronecker/layers.py",
        '"prik,prjl->pijkl"',
        '"prik,prjl->pjikl"',
        "kronecker/test_kronecker.py::test_layer_forward_and_gradients",
    ),
    "perplexity over unshifted tokens": (
        "suite/evaluate.py",
        "logits[:, :-1].float()",
        "logits[:, 1:].float()",
        "suite/test_evaluate.py::test_perplexity_is_that_of_a_loop_over_positions",
    ),
    "predictions in sorted order": (
        "suite/evaluate.py",
        "classes[index] = label",
        "classes[order.index(index)] = label",
        "suite/test_evaluate.py::test_predictions_come_back_in_the_rows_order_whatever_the_padding",
    ),
    "MNLI without its mismatched set": (
        "data/glue.py",
        "for key in sets) / len(sets)",
        "for key in ('matched',))",
        "data/test_glue.py::test_mnli_averages_matched_and_mismatched",
    ),
    "intervals not paired by seed": (
        "report/statistics.py",
        "(left[seed], right[seed]) for seed in left",
        "(left[seed], max(right.values())) for seed in left",
        "report/test_report.py::test_ratio_is_compared_by_logarithms_and_pairs_by_seed",
    ),
}


@pytest.fixture(scope="module")
def warm():
    """A process with torch and transformers imported that forks a pytest per folder: quicker."""
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("forks.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    yield process
    process.stdin.close()
    process.wait()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_turns_its_test_red(warm, tmp_path, name):
    file, right, wrong, test = MUTATIONS[name]
    shutil.copytree(ROOT / "kn", tmp_path / "kn", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = tmp_path / "kn" / file
    assert source.read_text().count(right) == 1, f"{right!r} is not in kn/{file} any more: adapt the mutation"
    source.write_text(source.read_text().replace(right, wrong))
    warm.stdin.write(json.dumps([str(tmp_path), test]) + "\n")
    warm.stdin.flush()
    status, output = json.loads(warm.stdout.readline())
    assert status == 1 and f"FAILED tests/{test}" in output, output[
        -2000:
    ]  # 1: a test failed; anything else is no verdict


def test_without_a_mutation_the_test_is_green(warm):
    """So that red means the mutation, not the way it is run."""
    warm.stdin.write(
        json.dumps([str(ROOT), "kronecker/test_kronecker.py::test_residual_is_the_tail_of_the_spectrum"])
        + "\n"
    )
    warm.stdin.flush()
    status, output = json.loads(warm.stdout.readline())
    assert status == 0, output[-2000:]
