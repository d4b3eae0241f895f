"""transformers' Trainer with the losses of eq. 2-5: cross-entropy alone, ILKD, or vanilla KD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from kn.distill.capture import capture, should_chunk_logits
from kn.distill.ilkd import streaming_ilkd_loss, vanilla_kd_loss
from kn.distill.large_vocabulary import chunked_logit_kd

LossAndTerms = tuple[Tensor, dict[str, Tensor], Any]  # loss, its terms before weighting, the model's output


@dataclass(frozen=True)
class DistillationConfig:
    """Distillation method, "none" (cross-entropy), "ilkd" (eq. 5) or "vanilla" (logits), and its settings."""

    method: str = "none"
    alphas: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.1)
    direction: str = "student_teacher"
    hidden_point: str = "c_proj"
    logit_term: float = 0.0  # reading "vanilla KD" for KnGPT2: weight of a logit KL added to eq. 5
    kd_weight: float = 0.5  # of vanilla KD against the cross-entropy
    temperature: float = 2.0


class _CrossEntropyLoss:
    """The model's own loss."""

    def __init__(self, config: DistillationConfig, teacher: nn.Module | None, unwrap: Callable):
        self.config, self.teacher, self.unwrap = config, teacher, unwrap

    def __call__(self, model: nn.Module, inputs: dict, return_outputs: bool) -> LossAndTerms:
        output = model(**inputs)
        return output.loss, {"cross_entropy": output.loss}, output

    def logit_kd(self, student_logits: Tensor, teacher_logits: Tensor, inputs: dict) -> Tensor:
        """Vanilla KD over real tokens (b, t, v); a classifier's logits (b, labels) have no padding."""
        mask = inputs.get("attention_mask") if student_logits.ndim == 3 else None
        valid = None if mask is None else mask.float()
        return vanilla_kd_loss(student_logits, teacher_logits, valid, self.config.temperature)


class _VanillaKDLoss(_CrossEntropyLoss):
    """(1 − kd_weight)·cross-entropy + kd_weight·vanilla KD."""

    def __call__(self, model: nn.Module, inputs: dict, return_outputs: bool) -> LossAndTerms:
        output = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(**_without_labels(inputs)).logits
        terms = {"cross_entropy": output.loss, "logits": self.logit_kd(output.logits, teacher_logits, inputs)}
        weight = self.config.kd_weight
        return (1 - weight) * output.loss + weight * terms["logits"], terms, output


class _ILKDLoss(_CrossEntropyLoss):
    """Eq. 5 + logit_term·vanilla KD; large logits are made in chunks unless the caller wants the outputs."""

    def __call__(self, model: nn.Module, inputs: dict, return_outputs: bool) -> LossAndTerms:
        config, teacher, student = self.config, self.teacher, self.unwrap(model)
        has_logit_term, labels = bool(config.logit_term), inputs.get("labels")
        may_chunk = has_logit_term and not return_outputs and labels is not None
        chunked = may_chunk and should_chunk_logits(student, labels)
        needs_logits = has_logit_term and not chunked
        captured = capture(
            student, config.hidden_point, wrapper=model, logits=needs_logits or return_outputs, **inputs
        )
        loss, terms, teacher_output = streaming_ilkd_loss(  # its logits if needs_logits, else hidden states
            captured, teacher, config.alphas, config.direction, config.hidden_point, needs_logits,
            **_without_labels(inputs),
        )
        if chunked:
            terms["logits"] = chunked_logit_kd(
                captured.last_hidden_state, student.lm_head.weight, teacher_output, teacher.lm_head.weight,
                inputs.get("attention_mask"), config.temperature,
            )
        elif has_logit_term:
            terms["logits"] = self.logit_kd(captured.logits, teacher_output, inputs)
        if has_logit_term:
            loss = loss + config.logit_term * terms["logits"]
        return loss, terms, captured


_LOSSES = {"none": _CrossEntropyLoss, "ilkd": _ILKDLoss, "vanilla": _VanillaKDLoss}


def _without_labels(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name != "labels"}


class DistillTrainer(Trainer):
    """Trainer with the loss of a DistillationConfig (eq. 5 or vanilla KD); logs every term under its name.

    Raises ValueError for an unknown method, or where method and teacher do not go together.
    """

    def __init__(
        self, *args, distillation: DistillationConfig = DistillationConfig(),
        teacher: nn.Module | None = None, **kwargs,
    ):
        super().__init__(*args, **kwargs)
        method = distillation.method
        if method not in _LOSSES:
            raise ValueError(f"distillation method {method!r} is unknown: allowed are {', '.join(_LOSSES)}")
        if (teacher is None) != (method == "none"):
            got = "no" if teacher is None else "a"
            raise ValueError(f"distillation method {method!r} and {got} teacher do not go together")
        self.term_sums: dict[str, Tensor] = {}  # since the last log
        self.steps_summed = 0
        self.model_accepts_loss_kwargs = False  # every loss here is a mean over the batch
        if method == "ilkd" and not distillation.alphas[3] and not distillation.logit_term:
            self._freeze_unreached()
        if teacher is not None:
            teacher = teacher.eval().requires_grad_(False).to(self.args.device)
            if self.args.bf16 and self.args.device.type == "cuda":
                teacher = teacher.to(torch.bfloat16)  # what autocast would multiply in anyway
        self.training_loss = _LOSSES[method](distillation, teacher, self.accelerator.unwrap_model)

    def _freeze_unreached(self) -> None:
        """Freeze head and last norm, which only cross-entropy reaches: DDP would wait for their gradients."""
        # a tied head's parameters are the embedding's, which eq. 2 trains
        embedding = {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        head = getattr(self.model, "lm_head", None) or self.model.score
        for parameter in (*head.parameters(), *self.model.transformer.ln_f.parameters()):
            parameter.requires_grad_(id(parameter) in embedding)

    def floating_point_ops(self, inputs):
        """Not counted: Trainer walks over all modules for it at every step, 2.5 of 54 ms at mini's size."""
        return 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            loss, terms, output = self.training_loss(model, inputs, return_outputs)
            self.steps_summed += 1
            for name, value in terms.items():
                self.term_sums[name] = self.term_sums.get(name, 0.0) + value.detach()
        else:
            output = model(**inputs)
            loss = output.loss
        return (loss, output) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.steps_summed:
            for name, total in self.term_sums.items():
                logs = {**logs, name: float(self.accelerator.reduce(total / self.steps_summed, "mean"))}
            self.term_sums, self.steps_summed = {}, 0
        super().log(logs, *args, **kwargs)
