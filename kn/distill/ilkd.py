"""Intermediate-layer distillation (ILKD, eq. 2-5 of the paper), vanilla KD, and a Trainer that uses them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput

from kn.distill.attention_kl import attention_kl
from kn.distill.large_vocabulary import chunked_cross_entropy, chunked_logit_kd
from kn.kronecker import checks

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
    last: Tensor | None = None  # (b, t, d) what the head takes, where the loss was made without logits


def capture(model: nn.Module, hidden_point: str = "c_proj", head: bool = True, through: nn.Module | None = None, logits: bool = True, **inputs) -> Captured:
    """One forward pass of a GPT-2 or KnGPT2 that also returns what ILKD compares; works with every attention backend.

    `head=False` leaves out the output head (logits and loss are None): a teacher's logits are not part of eq. 5. `logits=False`
    gives a language model's loss without its logits where those would be large: they stand in memory for some tokens at a time.
    `through` is what wraps the model and must be called in its place (DistributedDataParallel). Raises ValueError for an unknown
    hidden_point, RuntimeError where a layer did not run exactly once.
    """
    _check_inputs(model, inputs)
    found = Captured(torch.empty(0), [], [], [], None, None, [block.attn.scaling for block in model.transformer.h])

    def keep(layer, query, key):
        found.q.append(query)
        found.k.append(key)

    with watched(model, hidden_point, lambda output: setattr(found, "embedding", output), keep, lambda layer, output: found.hidden.append(output)):
        if not head:
            output = model.transformer(**inputs)
        elif logits or inputs.get("labels") is None or not should_chunk_logits(model, inputs["labels"]):
            output = (through or model)(**inputs)
        else:
            hook = model.transformer.ln_f.register_forward_hook(lambda _m, _a, output: setattr(found, "last", output))
            try:
                (through or model)(**{k: v for k, v in inputs.items() if k != "labels"}, logits_to_keep=1)
            finally:
                hook.remove()
            output = CausalLMOutput(loss=chunked_cross_entropy(found.last, model.lm_head.weight, inputs["labels"]))
    if head:
        found.logits, found.loss = output.logits, output.loss
    return found


def _check_inputs(model: nn.Module, inputs: dict) -> None:
    """Refuse what the model would refuse deep inside, or read past its tables; values are looked at on a CPU only, a GPU would have to wait."""
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "transformer", None), "h"):
        raise TypeError(f"capture takes a GPT-2 or KnGPT2 with a head, got {type(model).__name__}")
    if "inputs_embeds" in inputs:
        return
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"input_ids is {checks.describe_value(ids)}: a tensor (batch, length) of whole numbers wanted")
    if not 0 < ids.shape[1] <= model.config.n_positions or not len(ids):
        raise ValueError(f"input_ids is {checks.describe_value(ids)}: 1 to {model.config.n_positions} tokens a row wanted")
    if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size:
        raise ValueError(f"input_ids holds {int(ids.min())} to {int(ids.max())}: the model's tokens are 0 to {model.config.vocab_size - 1}")
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        raise ValueError(f"attention_mask is {checks.describe_value(mask)}: a tensor of input_ids' shape {tuple(ids.shape)} wanted")
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape != (ids.shape if hasattr(model, "lm_head") else ids.shape[:1])):
        raise ValueError(f"labels is {checks.describe_value(labels)}: a tensor {tuple(ids.shape if hasattr(model, 'lm_head') else ids.shape[:1])} wanted")


@contextlib.contextmanager
def watched(model: nn.Module, hidden_point: str, embedding: Callable, attention: Callable, hidden: Callable):
    """While the model runs: embedding(output), and per layer attention(layer, q, k) and hidden(layer, output), with the shapes of Captured.

    ValueError for an unknown hidden_point; RuntimeError where a layer did not run exactly once.
    """
    if hidden_point not in HIDDEN_POINTS:
        raise ValueError(f"hidden_point {hidden_point!r} is unknown: allowed are {', '.join(HIDDEN_POINTS)}")
    blocks, heads, seen, hooks = model.transformer.h, model.config.n_head, [], []

    def split(layer, output):  # (b, t, 3·d)
        query, key, _ = output.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (b, h, t, e)
        attention(layer, query, key)

    def reached(layer, output):
        seen.append(layer)
        hidden(layer, output)

    hooks.append(model.transformer.drop.register_forward_pre_hook(lambda _m, args: embedding(args[0])))
    for layer, block in enumerate(blocks):
        hooks.append(block.attn.c_attn.register_forward_hook(lambda _m, _a, output, layer=layer: split(layer, output)))
        where = block.mlp.c_proj if hidden_point == "c_proj" else block
        hooks.append(where.register_forward_hook(lambda _m, _a, output, layer=layer: reached(layer, output)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if seen != list(range(len(blocks))):
        raise RuntimeError(f"saw {len(seen)} hidden outputs of {len(blocks)} layers: is gradient checkpointing on?")


def should_chunk_logits(model: nn.Module, labels: Tensor) -> bool:
    """Whether a language model's logits are so many that its losses are better made without them (kn.head)."""
    return hasattr(model, "lm_head") and bool(labels.numel() * model.config.vocab_size > LOGITS)


def _wide(x: Tensor) -> Tensor:
    """float32, or float64 where it already is: losses are not computed in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def _mean_squared(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over elements of the positions that are valid (b, t)."""
    if student.shape != teacher.shape:
        raise ValueError(f"ILKD compares tensors of one shape: the student's is {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}")
    squared = (_wide(student) - _wide(teacher)).square()
    if valid is None:
        return squared.mean()
    return (squared.sum(-1) * valid).sum() / (valid.sum() * squared.shape[-1])


def ilkd_loss(student: Captured, teacher: Captured, alphas: tuple[float, float, float, float], attention_mask: Tensor | None = None,
              direction: str = "student_teacher") -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Eq. 5: α1·embedding (eq. 2) + α2·attention (eq. 3) + α3·hidden states (eq. 4) + α4·cross-entropy.

    Returns the scalar loss and its four terms before weighting, as tensors. attention_mask (b, t) is 1 on real
    tokens. Raises TypeError for what kn.capture did not return, ValueError for models of different depth, for α4 ≠ 0 without labels
    and for alphas that are all 0.
    """
    for name, captured in (("student", student), ("teacher", teacher)):
        if not isinstance(captured, Captured):
            raise TypeError(f"{name} is {checks.describe_value(captured)}: what kn.capture returns wanted")
    terms = Terms(student, alphas, attention_mask, direction)
    if not any(alphas):
        raise ValueError("alphas are all 0: there is nothing to learn from, at least one must be positive")
    if len(student.q) != len(teacher.q):
        raise ValueError(f"ILKD compares layer by layer: the student has {len(student.q)} layers, the teacher {len(teacher.q)}")
    terms.compare_embedding(teacher.embedding)
    for layer, (q, k, hidden) in enumerate(zip(teacher.q, teacher.k, teacher.hidden, strict=True)):
        terms.compare_attention(layer, q, k, teacher.scaling[layer])
        terms.compare_hidden(layer, hidden)
    return terms.total()


def streaming_ilkd_loss(student: Captured, teacher: nn.Module, alphas: tuple[float, float, float, float], direction: str = "student_teacher", hidden_point: str = "c_proj",
                 head: bool = False, **inputs) -> tuple[Tensor, dict[str, Tensor], Tensor]:  # fmt: skip
    """ilkd_loss with the teacher run here, without gradients: what each of its layers gives is compared at once and let go, and the student's hidden state with it.

    Returns the loss, its terms, and with `head` the teacher's logits, else its last hidden states. Raises ValueError as ilkd_loss does.
    """
    terms, layers = Terms(student, alphas, inputs.get("attention_mask"), direction), len(teacher.transformer.h)
    if len(student.q) != layers:
        raise ValueError(f"ILKD compares layer by layer: the student has {len(student.q)} layers, the teacher {layers}")

    def attention(layer, q, k):
        with torch.enable_grad():
            terms.compare_attention(layer, q, k, teacher.transformer.h[layer].attn.scaling)

    def hidden(layer, output):
        with torch.enable_grad():
            terms.compare_hidden(layer, output)
        student.hidden[layer] = None

    with torch.no_grad(), watched(teacher, hidden_point, torch.enable_grad()(terms.compare_embedding), attention, hidden):
        output = (teacher if head else teacher.transformer)(**inputs)
    return *terms.total(), output.logits if head else output.last_hidden_state


class Terms:
    """The terms of eq. 5, gathered layer by layer; ValueError for other than four alphas, or for α4 ≠ 0 without labels."""

    def __init__(self, student: Captured, alphas: tuple[float, float, float, float], attention_mask: Tensor | None, direction: str):
        if not isinstance(alphas, tuple | list) or len(alphas) != 4:
            raise ValueError(f"alphas needs four numbers (embedding, attention, hidden, cross-entropy), got {checks.describe_value(alphas)}")
        for at, alpha in enumerate(alphas):
            checks.require_nonnegative(f"alphas[{at}]", alpha)
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.shape != student.embedding.shape[:2]):
            raise ValueError(f"attention_mask is {checks.describe_value(attention_mask)}: a tensor {tuple(student.embedding.shape[:2])} wanted")
        if student.loss is None and alphas[3]:
            raise ValueError("alphas[3] weighs the cross-entropy, but the student saw no labels: pass labels to capture or set it to 0")
        self.student, self.alphas, self.mask, self.direction = student, alphas, attention_mask, direction
        self.valid = None if attention_mask is None else attention_mask.to(student.embedding.device).float()
        zero = student.embedding.new_zeros(())
        self.terms = {"embedding": zero, "attention": zero, "hidden": zero, "cross_entropy": zero if student.loss is None else student.loss}

    def compare_embedding(self, teacher: Tensor) -> None:
        """Eq. 2."""
        self.terms["embedding"] = _mean_squared(self.student.embedding, teacher, self.valid)

    def compare_attention(self, layer: int, q: Tensor, k: Tensor, scaling: float) -> None:
        """One layer of eq. 3."""
        s = self.student
        self.terms["attention"] = self.terms["attention"] + attention_kl(s.q[layer], s.k[layer], q, k, s.scaling[layer], scaling, self.mask, self.direction)

    def compare_hidden(self, layer: int, hidden: Tensor) -> None:
        """One layer of eq. 4."""
        self.terms["hidden"] = self.terms["hidden"] + _mean_squared(self.student.hidden[layer], hidden, self.valid)

    def total(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 5, and its terms before weighting."""
        weighted = [alpha * term for alpha, term in zip(self.alphas, self.terms.values(), strict=True) if alpha]
        return sum(weighted, start=self.student.embedding.new_zeros(())), self.terms


def vanilla_kd_loss(student_logits: Tensor, teacher_logits: Tensor, valid: Tensor | None = None, temperature: float = 2.0) -> Tensor:
    """Hinton's T²·KL(teacher ‖ student) of softened logits (…, classes), mean over positions (those where `valid`); ValueError for logits of two shapes."""
    checks.require_nonnegative("temperature", temperature, positive=True)
    if checks.require_float_tensor("student_logits", student_logits).shape != checks.require_float_tensor("teacher_logits", teacher_logits).shape:
        raise ValueError(f"logits of one shape wanted: the student's are {tuple(student_logits.shape)}, the teacher's {tuple(teacher_logits.shape)}")
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
    """transformers' Trainer with the loss of a Distillation (eq. 5, or vanilla KD); logs every term apart under its name.

    Raises ValueError for an unknown method, or where method and teacher do not go together.
    """

    def __init__(self, *args, distillation: Distillation = Distillation(), teacher: nn.Module | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if distillation.method not in ("none", "ilkd", "vanilla"):
            raise ValueError(f"distillation method {distillation.method!r} is unknown: allowed are none, ilkd, vanilla")
        if (teacher is None) != (distillation.method == "none"):
            raise ValueError(f"distillation method {distillation.method!r} and {'no' if teacher is None else 'a'} teacher do not go together")
        self.sums: dict[str, Tensor] = {}
        self.distillation, self.count = distillation, 0
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
            bare = self.accelerator.unwrap_model(model)
            chunked = bool(how.logit_term) and not return_outputs and "labels" in inputs and should_chunk_logits(bare, inputs["labels"])
            output = capture(bare, how.hidden_point, through=model, logits=bool(how.logit_term and not chunked) or return_outputs, **inputs)
            asked = {k: v for k, v in inputs.items() if k != "labels"}
            loss, terms, target = streaming_ilkd_loss(output, self.teacher, how.alphas, how.direction, how.hidden_point, bool(how.logit_term and not chunked), **asked)
            if how.logit_term:
                if chunked:
                    terms["logits"] = chunked_logit_kd(output.last, bare.lm_head.weight, target, self.teacher.lm_head.weight, inputs.get("attention_mask"), how.temperature)
                else:
                    terms["logits"] = self._logit_kd(output.logits, target, inputs)
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
