"""TrainingArguments that DistillTrainer cannot honour, and second derivatives, are refused in one line."""

import pytest
import torch
from conftest import tiny_gpt2
from transformers import TrainingArguments

import kn
from kn.distill import DistillationConfig, DistillTrainer, chunked_cross_entropy, chunked_logit_kd
from kn.kronecker.autograd import column_factor_linear, row_factor_linear

IDS = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in IDS.tolist()]


def trainer(folder, method="ilkd", arguments=None, **others):
    options = {"report_to": "none", "use_cpu": True, "max_steps": 1, "logging_steps": 1} | (arguments or {})
    others |= {"distillation": DistillationConfig(method), "train_dataset": DATA}
    others["teacher"] = None if method == "none" else tiny_gpt2(seed=1)
    return DistillTrainer(model=tiny_gpt2(), args=TrainingArguments(str(folder), **options), **others)


@pytest.mark.parametrize("method", ["none", "ilkd", "vanilla"])
@pytest.mark.parametrize(("field", "value"), [("label_smoothing_factor", 0.1), ("use_liger_kernel", True)])
def test_arguments_that_change_another_loss_are_refused(tmp_path, method, field, value):
    with pytest.raises(ValueError, match=f"^DistillTrainer cannot honour {field}={value}: leave it out$"):
        trainer(tmp_path, method, {field: value})


def test_what_the_hooks_would_miss_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cannot honour compute_loss_func=<function .+: leave it out$"):
        trainer(tmp_path, compute_loss_func=lambda *_: 0)
    with pytest.raises(ValueError, match="^DistillTrainer cannot honour torch_compile=True: leave it out$"):
        trainer(tmp_path, arguments={"torch_compile": True})
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="^DistillTrainer cannot honour n_gpu=2: leave it out$"):
        trainer(tmp_path)


@pytest.mark.parametrize("method", ["none", "ilkd", "vanilla"])
def test_neftune_s_noise_reaches_every_loss(tmp_path, method):
    losses = []
    for alpha in (None, 5.0):
        made = trainer(tmp_path, method, {"neftune_noise_alpha": alpha})
        made.train()
        losses.append(made.state.log_history[0]["loss"])
    assert losses[0] != losses[1]


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


FUNCTIONS = ["mean", "sum", "none", "teacher_student", "chunked", "logits", "column", "row"]


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_are_refused(name, power):
    """They were silently those of a constant gradient."""
    x, weight = leaf(2, 5, 4), leaf(7, 4)
    if name == "chunked":
        loss = chunked_cross_entropy(x, weight, torch.randint(0, 7, (2, 5)))
    elif name == "logits":
        loss = chunked_logit_kd(x, weight, leaf(2, 5, 4), leaf(7, 4))
    elif name == "column":
        loss = column_factor_linear(x, leaf(1, 3, 4), leaf(1, 2))
    elif name == "row":
        loss = row_factor_linear(x, leaf(3, 2), leaf(1, 2))
    else:
        x, others = leaf(1, 2, 5, 4), [leaf(1, 2, 5, 4) for _ in range(3)]
        reduction = name if name in ("mean", "sum", "none") else "mean"
        direction = name if name == "teacher_student" else "student_teacher"
        loss = kn.attention_kl(x, *others, direction=direction, reduction=reduction)
    loss = (loss**power).sum() + x.square().sum()  # other terms do not hide it
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="^differentiated twice a function marked"):
        gradient.square().sum().backward()


def test_small_layers_are_twice_differentiable():
    """Those that build A ⊗ B, or stay below the custom backward, are plain operations."""
    for b_shape in ((2, 1), (1, 2), (2, 2)):
        layer = kn.KroneckerLinear(4, 6, b_shape).double()
        assert torch.autograd.gradgradcheck(layer, leaf(3, 4))
