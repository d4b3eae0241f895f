"""Intermediate-layer knowledge distillation (ILKD, eq. 2-5 of the paper) and vanilla KD.

    eq. 2   embedding      mean squared error of the embeddings
    eq. 3   attention      Σ over layers of KL(student ‖ teacher) of the attention (attention_kl.py)
    eq. 4   hidden         Σ over layers of the mean squared error of the hidden states
    eq. 5   loss = α1·embedding + α2·attention + α3·hidden + α4·cross-entropy"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kn.distill.attention_kl import attention_kl
from kn.distill.capture import Captured, capture_hooks
from kn.kronecker import checks

Alphas = tuple[float, float, float, float]


def ilkd_loss(
    student: Captured, teacher: Captured, alphas: Alphas, attention_mask: Tensor | None = None,
    direction: str = "student_teacher",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 5 from what kn.capture returned for both models: (scalar loss, its four terms before weighting).
    attention_mask (b, t) is 1 on real tokens. Raises TypeError for other than Captured, ValueError for models
    of different depth or width, a mask of another shape, α4 ≠ 0 without labels, or alphas that are all 0."""
    for name, captured in (("student", student), ("teacher", teacher)):
        if not isinstance(captured, Captured):
            raise TypeError(f"{name} is {checks.describe_value(captured)}: expected the result of kn.capture")
    terms = _IlkdTerms(student, teacher.scaling, alphas, attention_mask, direction)
    if not any(alphas):
        raise ValueError("alphas are all 0: there is nothing to learn from, at least one must be positive")
    terms.add_embedding(teacher.embedding)
    for layer, (q, k, hidden) in enumerate(zip(teacher.q, teacher.k, teacher.hidden, strict=True)):
        terms.add_attention(layer, q, k)
        terms.add_hidden(layer, hidden)
    return terms.total()


def streaming_ilkd_loss(
    student: Captured, teacher: nn.Module, alphas: Alphas, direction: str = "student_teacher",
    hidden_point: str = "c_proj", head: bool = False, **inputs,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """ilkd_loss (eq. 5) while the teacher runs without gradients: each layer is compared and freed at once.
    The hidden states in `student` are freed as well. Returns the loss, its terms, and the teacher's logits if
    head, else its last hidden states. Raises ValueError as ilkd_loss does."""
    scaling = [block.attn.scaling for block in teacher.transformer.h]
    terms = _IlkdTerms(student, scaling, alphas, inputs.get("attention_mask"), direction)

    def add_and_free_hidden(layer: int, hidden: Tensor) -> None:
        terms.add_hidden(layer, hidden)
        student.hidden[layer] = None

    callbacks = map(torch.enable_grad(), (terms.add_embedding, terms.add_attention, add_and_free_hidden))
    with torch.no_grad(), capture_hooks(teacher, hidden_point, *callbacks):
        output = (teacher if head else teacher.transformer)(**inputs)
    return *terms.total(), output.logits if head else output.last_hidden_state


class _IlkdTerms:
    """The terms of eq. 5, summed layer by layer; teacher_scaling: its factor on q·k in each layer."""

    def __init__(
        self, student: Captured, teacher_scaling: list[float], alphas: Alphas, attention_mask: Tensor | None,
        direction: str,
    ):
        if not isinstance(alphas, tuple | list) or len(alphas) != 4:
            terms, got = "embedding, attention, hidden, cross-entropy", checks.describe_value(alphas)
            raise ValueError(f"alphas needs four numbers ({terms}), got {got}")
        for index, alpha in enumerate(alphas):
            checks.require_nonnegative(f"alphas[{index}]", alpha)
        shape = tuple(student.embedding.shape[:2])
        if attention_mask is not None and getattr(attention_mask, "shape", None) != shape:
            got = checks.describe_value(attention_mask)
            raise ValueError(f"attention_mask is {got}: expected a tensor {shape}")
        if student.loss is None and alphas[3]:
            remedy = "pass labels to capture or set it to 0"
            raise ValueError(f"alphas[3] weighs the cross-entropy, but the student saw no labels: {remedy}")
        if (layers := len(student.q)) != len(teacher_scaling):
            depths = f"the student has {layers} layers, the teacher {len(teacher_scaling)}"
            raise ValueError(f"ILKD compares layer by layer: {depths}")
        self.student, self.teacher_scaling, self.alphas = student, teacher_scaling, alphas
        self.mask, self.direction = attention_mask, direction
        self.valid = None if attention_mask is None else attention_mask.to(student.embedding.device).float()
        zero = student.embedding.new_zeros(())
        self.terms = dict.fromkeys(("embedding", "attention", "hidden"), zero)
        self.terms["cross_entropy"] = zero if student.loss is None else student.loss

    def add_embedding(self, teacher: Tensor) -> None:
        """Eq. 2, teacher (b, t, d)."""
        self.terms["embedding"] = _mse(self.student.embedding, teacher, self.valid)

    def add_attention(self, layer: int, q: Tensor, k: Tensor) -> None:
        """One layer of eq. 3, the teacher's q and k (b, h, t, e)."""
        s, scaling = self.student, (self.student.scaling[layer], self.teacher_scaling[layer])
        kl = attention_kl(s.q[layer], s.k[layer], q, k, *scaling, self.mask, self.direction)
        self.terms["attention"] = self.terms["attention"] + kl

    def add_hidden(self, layer: int, hidden: Tensor) -> None:
        """One layer of eq. 4, the teacher's hidden (b, t, d)."""
        self.terms["hidden"] = self.terms["hidden"] + _mse(self.student.hidden[layer], hidden, self.valid)

    def total(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 5, and its terms before weighting."""
        weighted = [a * term for a, term in zip(self.alphas, self.terms.values(), strict=True) if a]
        embedding = self.student.embedding  # keeps the graph where no term counts
        return sum(weighted, start=embedding.new_zeros(()) if weighted else 0.0 * embedding.sum()), self.terms


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mse(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """Mean squared error of (b, t, d) over the positions where valid (b, t) is 1 (none: 0), or all."""
    if student.shape != teacher.shape:
        shapes = f"the student's is {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
        raise ValueError(f"ILKD compares tensors of one shape: {shapes}")
    squared = (_upcast(student) - _upcast(teacher)).square()
    if valid is None:
        return squared.mean()
    return (squared.sum(-1) * valid).sum() / (valid.sum().clamp(min=1) * squared.shape[-1])


def vanilla_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, valid: Tensor | None = None, temperature: float = 2.0
) -> Tensor:
    """Hinton's knowledge distillation, T²·KL(teacher ‖ student) of softened logits (…, classes).

    Mean over positions, or those where valid (…) is 1 (none: 0). Raises ValueError for logits of two shapes.
    """
    checks.require_nonnegative("temperature", temperature, positive=True)
    logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    s, t = (tuple(checks.require_float_tensor(name, x).shape) for name, x in logits.items())
    if s != t:
        raise ValueError(f"logits must have one shape: the student's are {s}, the teacher's {t}")
    log_p_s, log_p_t = (F.log_softmax(_upcast(x) / temperature, -1) for x in logits.values())
    kl = (log_p_t.exp() * (log_p_t - log_p_s)).sum(-1) * temperature**2
    return kl.mean() if valid is None else (kl * valid).sum() / valid.sum().clamp(min=1)
