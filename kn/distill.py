"""Intermediate-layer distillation (ILKD, eq. 2-5 of the paper), vanilla KD, and a Trainer that uses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput

from .attention import attention_kl

HIDDEN_POINTS = ("c_proj", "block")  # output of the second fully connected layer (text of §3.3), or of the block


LOGITS = 2**24  # from so many on (64 MB in float32) the loss is made without them


@dataclass
class Captured:
    """What eq. 2-5 compare, from one forward pass: batch b, length t, width d, heads h, head size e, vocabulary v."""

    embedding: Tensor  # (b, t, d) token + position, before dropout
    q: list[Tensor]  # per layer (b, h, t, e), after the projection, before softmax and dropout
    k: list[Tensor]  # per layer (b, h, t, e)
    hidden: list[Tensor]  # per layer (b, t, d)
    logits: Tensor | None  # (b, t, v), or (b, labels) of a classifier
    loss: Tensor | None  # cross-entropy, when labels were given
    scaling: list[float]  # per layer: the factor on q·k inside softmax


def capture(model: nn.Module, hidden_point: str = "c_proj", head: bool = True, through: nn.Module | None = None, logits: bool = True, **inputs) -> Captured:
    """One forward pass of a GPT-2 or KnGPT2 that also returns what ILKD compares; works with every attention backend.

    `head=False` leaves out the output head (logits and loss are None): a teacher's logits are not part of eq. 5. `logits=False`
    gives a language model's loss without its logits where those would be large: they stand in memory for some tokens at a time.
    `through` is what wraps the model and must be called in its place (DistributedDataParallel).
    """
    if hidden_point not in HIDDEN_POINTS:
        raise ValueError(f"hidden_point {hidden_point!r} is unknown: allowed are {', '.join(HIDDEN_POINTS)}")
    blocks, heads = model.transformer.h, model.config.n_head
    embedding, q, k, hidden, hooks = [], [], [], [], []

    def keep_qk(_module, _args, output):  # output (b, t, 3·d)
        query, key, _ = output.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (b, h, t, e)
        q.append(query)
        k.append(key)

    try:
        hooks.append(model.transformer.drop.register_forward_pre_hook(lambda _m, args: embedding.append(args[0])))
        for block in blocks:
            hooks.append(block.attn.c_attn.register_forward_hook(keep_qk))
            where = block.mlp.c_proj if hidden_point == "c_proj" else block
            hooks.append(where.register_forward_hook(lambda _m, _a, output: hidden.append(output)))
        if not head:
            output = model.transformer(**inputs)
        elif logits or inputs.get("labels") is None or not fusible(model, inputs["labels"]):
            output = (through or model)(**inputs)
        else:
            last: list[Tensor] = []
            hooks.append(model.transformer.ln_f.register_forward_hook(lambda _m, _a, output: last.append(output)))
            (through or model)(**{k: v for k, v in inputs.items() if k != "labels"}, logits_to_keep=1)
            output = CausalLMOutput(loss=next_token_loss(last[0], model.lm_head, inputs["labels"]))
    finally:
        for hook in hooks:
            hook.remove()
    if not len(q) == len(hidden) == len(blocks):
        raise RuntimeError(f"captured {len(q)} attention and {len(hidden)} hidden outputs of {len(blocks)} layers: is gradient checkpointing on?")
    return Captured(embedding[0], q, k, hidden, output.logits if head else None, output.loss if head else None, [block.attn.scaling for block in blocks])


def fusible(model: nn.Module, labels: Tensor) -> bool:
    """Whether a language model's logits are so many that its loss is better made without them (torch 2.13's chunked product and cross-entropy)."""
    return hasattr(F, "linear_cross_entropy") and hasattr(model, "lm_head") and labels.numel() * model.config.vocab_size > LOGITS


def next_token_loss(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each next token (labels (b, t), −100 is left out) from the last hidden states (b, t, d), without all logits at once."""
    weight = head.weight
    if torch.is_autocast_enabled(hidden.device.type):
        kind = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(kind), weight.to(kind)
    hidden, target = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear_cross_entropy(hidden, weight, target, ignore_index=-100, options=nn.LinearCrossEntropyOptions()).float()


def _wide(x: Tensor) -> Tensor:
    """float32, or float64 where it already is: losses are not computed in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def _mean_squared(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over elements of the positions that are valid (b, t)."""
    squared = (_wide(student) - _wide(teacher)).square()
    if valid is None:
        return squared.mean()
    return (squared.sum(-1) * valid).sum() / (valid.sum() * squared.shape[-1])


def ilkd_loss(student: Captured, teacher: Captured, alphas: tuple[float, float, float, float], attention_mask: Tensor | None = None,
              direction: str = "student_teacher") -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Eq. 5: α1·embedding (eq. 2) + α2·attention (eq. 3) + α3·hidden states (eq. 4) + α4·cross-entropy.

    Returns the scalar loss and its four terms before weighting, as tensors. attention_mask (b, t) is 1 on real
    tokens. Raises ValueError for models of different depth or for α4 ≠ 0 without labels.
    """
    if len(alphas) != 4:
        raise ValueError(f"alphas needs four numbers (embedding, attention, hidden, cross-entropy), got {alphas}")
    if len(student.q) != len(teacher.q):
        raise ValueError(f"ILKD compares layer by layer: the student has {len(student.q)} layers, the teacher {len(teacher.q)}")
    if student.loss is None and alphas[3]:
        raise ValueError("alphas[3] weighs the cross-entropy, but the student saw no labels: pass labels to capture or set it to 0")
    valid = None if attention_mask is None else attention_mask.to(student.embedding.device).float()
    layers = zip(student.q, student.k, teacher.q, teacher.k, student.scaling, teacher.scaling, strict=True)
    terms = {
        "embedding": _mean_squared(student.embedding, teacher.embedding, valid),
        "attention": sum(attention_kl(*layer, attention_mask=attention_mask, direction=direction) for layer in layers),
        "hidden": sum(_mean_squared(s, t, valid) for s, t in zip(student.hidden, teacher.hidden, strict=True)),
        "cross_entropy": student.loss if student.loss is not None else student.embedding.new_zeros(()),
    }
    return sum(alpha * term for alpha, term in zip(alphas, terms.values(), strict=True) if alpha), terms


def vanilla_kd_loss(student_logits: Tensor, teacher_logits: Tensor, valid: Tensor | None = None, temperature: float = 2.0) -> Tensor:
    """Hinton's T²·KL(teacher ‖ student) of softened logits (…, classes), mean over positions (those where `valid`)."""
    s = F.log_softmax(_wide(student_logits) / temperature, -1)
    t = F.log_softmax(_wide(teacher_logits) / temperature, -1)
    rows = (t.exp() * (t - s)).sum(-1) * temperature**2
    return rows.mean() if valid is None else (rows * valid).sum() / valid.sum()


@dataclass(frozen=True)
class Distillation:
    """How a run distils: method "none" (cross-entropy), "ilkd" (eq. 5) or "vanilla" (logits), and its readings."""

    method: str = "none"
    alphas: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.1)
    direction: str = "student_teacher"
    hidden_point: str = "c_proj"
    logit_term: float = 0.0  # reading "vanilla KD" for KnGPT2: weight of a logit KL added to eq. 5
    kd_weight: float = 0.5
    temperature: float = 2.0


class DistillTrainer(Trainer):
    """transformers' Trainer with the loss of a Distillation; logs every term apart under its name."""

    def __init__(self, *args, distillation: Distillation = Distillation(), teacher: nn.Module | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if distillation.method not in ("none", "ilkd", "vanilla"):
            raise ValueError(f"distillation method {distillation.method!r} is unknown: allowed are none, ilkd, vanilla")
        if (teacher is None) != (distillation.method == "none"):
            raise ValueError(f"distillation method {distillation.method!r} and {'no' if teacher is None else 'a'} teacher do not go together")
        self.distillation, self.sums, self.count = distillation, {}, 0
        self.model_accepts_loss_kwargs = False  # every loss here is a mean over the batch
        if distillation.method == "ilkd" and not distillation.alphas[3] and not distillation.logit_term:
            used = {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}  # a tied head's are the embedding's
            for unused in (getattr(self.model, "lm_head", None) or self.model.score, self.model.transformer.ln_f):  # no term reaches them; several processes would wait for their gradients
                for parameter in unused.parameters():
                    parameter.requires_grad_(id(parameter) in used)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device) if teacher is not None else None
        if teacher is not None and self.args.bf16 and self.args.device.type == "cuda":
            self.teacher = self.teacher.to(torch.bfloat16)  # what autocast would multiply in anyway

    def floating_point_ops(self, inputs):
        """Not counted: Trainer walks over all modules for it at every step, 2.5 of 54 ms at mini's size."""
        return 0

    def _logit_kd(self, student, teacher, inputs):
        if student.ndim == 2:  # classifier
            return vanilla_kd_loss(student, teacher, None, self.distillation.temperature)
        mask = inputs.get("attention_mask")
        return vanilla_kd_loss(student, teacher, None if mask is None else mask.float(), self.distillation.temperature)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        how = self.distillation
        if how.method == "none" or not model.training:
            output = model(**inputs)
            loss, terms = output.loss, {"cross_entropy": output.loss}
        elif how.method == "vanilla":
            output = model(**inputs)
            with torch.no_grad():
                target = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            soft = self._logit_kd(output.logits, target, inputs)
            loss, terms = (1 - how.kd_weight) * output.loss + how.kd_weight * soft, {"cross_entropy": output.loss, "logits": soft}
        else:
            output = capture(self.accelerator.unwrap_model(model), how.hidden_point, through=model, logits=bool(how.logit_term) or return_outputs, **inputs)
            with torch.no_grad():
                teacher_inputs = {k: v for k, v in inputs.items() if k != "labels"}
                target = capture(self.teacher, how.hidden_point, bool(how.logit_term), **teacher_inputs)
            loss, terms = ilkd_loss(output, target, how.alphas, inputs.get("attention_mask"), how.direction)
            if how.logit_term:
                terms["logits"] = self._logit_kd(output.logits, target.logits, inputs)
                loss = loss + how.logit_term * terms["logits"]
        if model.training:
            self.count += 1
            for name, value in terms.items():
                self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        return (loss, output) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.count:
            means = {name: self.accelerator.reduce(value / self.count, "mean") for name, value in self.sums.items()}  # over all processes
            logs = {**logs, **{name: float(value) for name, value in means.items()}}
            self.sums, self.count = {}, 0
        super().log(logs, *args, **kwargs)
