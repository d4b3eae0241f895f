"""KroneckerModel, the mixin of KnGPT2 and KnLlama, and the parameter count of Table 3."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kn.kronecker import KroneckerEmbedding, KroneckerHead, KroneckerLinear
from kn.kronecker.layers import KRONECKER_MODULES, is_conv1d
from kn.models import loading, model_card
from kn.models.config import FactorShapes
from kn.models.fold import Parts, fold, install_narrow

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _PreTrainedModel
else:
    _PreTrainedModel = object  # the class that follows the mixin is one

OTHER_FILES = {"subfolder", "gguf_file", "state_dict", "variant"}  # arguments of from_pretrained


class KroneckerModel(_PreTrainedModel):
    """Mixin before a transformers model class whose weight matrices become Kronecker products (eq. 1).

    Builds the factors from the configuration, initialises, resizes, loads, saves, folds and goes back to
    dense. A family sets
      blocks_path, embedding_path   module paths in its base model
      target_modules                {path in a block: (side that shares an entry of A, number of fused maps)}
      out_proj                      the target module that spec.out_proj switches
      foldable_parts                the sublayers that fold.py may make narrow
      dense_class                   the stock class
    """

    blocks_path: str
    embedding_path: str
    target_modules: dict[str, tuple[str, int]]
    out_proj: str
    foldable_parts: Parts = ()
    dense_class: type[nn.Module]

    def post_init(self):
        base = self.base_model
        if base is self or not isinstance(base, KroneckerModel):  # else base's own post_init did it
            self._install_factors(base)
        if self.config.spec.head == "tied" and hasattr(self, "lm_head"):
            self.lm_head = KroneckerHead(base.get_submodule(self.embedding_path))
            # transformers shares the factors below; while it loads they must be apart, or it takes missing
            # ones for loaded
            for name, factor in list(self.lm_head.named_parameters()):
                setattr(self.lm_head, name, nn.Parameter(torch.empty_like(factor)))
            path = f"{self.base_model_prefix}.{self.embedding_path}"
            self._tied_weights_keys = {"lm_head.A": f"{path}.A", "lm_head.B": f"{path}.B"}
        if self.can_generate():
            # transformers reads it off the class name, finds none in GPT2LMHeadModel, and its warning breaks
            # the graph
            self.loss_type = "ForCausalLM"
        super().post_init()  # ties and initialises; transformers calls post_init at the end of its __init__

    def _install_factors(self, base: nn.Module) -> None:
        """Replace the chosen layers and the embedding by uninitialised Kronecker or narrow ones, in place."""
        spec, blocks = self.config.spec, base.get_submodule(self.blocks_path)
        shapes = self.factor_shapes(len(blocks))
        narrow = install_narrow(blocks, shapes, self.foldable_parts) if self.config.folded else set()
        for name, (b_shape, rank) in shapes.items():
            if name in narrow:
                continue
            index, _, path = name.partition(".")
            dense = blocks[int(index)].get_submodule(path)
            n, m = dense.weight.shape if is_conv1d(dense) else dense.weight.shape[::-1]
            try:
                num_fused = self.target_modules[path][1]
                layer = KroneckerLinear(n, m, b_shape, rank, dense.bias is not None, num_fused)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            blocks[int(index)].set_submodule(path, layer.to(dense.weight.dtype))
        if spec.embedding:
            dense, factor = base.get_submodule(self.embedding_path), spec.embedding_factor or spec.factor
            embedding = KroneckerEmbedding(dense.num_embeddings, dense.embedding_dim, factor)
            base.set_submodule(self.embedding_path, embedding.to(dense.weight.dtype))

    def factor_shapes(self, n_layer: int) -> FactorShapes:
        """{"layer.path": (B's shape, rank)} of every block matrix that the configuration compresses."""
        sides = {path: side for path, (side, _) in self.target_modules.items()}
        return self.config.spec.factor_shapes(n_layer, sides, self.out_proj)

    def _init_weights(self, module):
        if isinstance(module, (KroneckerLinear, KroneckerEmbedding)):
            module.reset_parameters(self.config.initializer_range)
            return
        # GPT-2 would rescale c_proj.weight
        compressed_mlp = isinstance(getattr(module, "c_proj", None), KroneckerLinear)
        if not compressed_mlp and not isinstance(module, KroneckerHead):
            super()._init_weights(module)

    def _get_resized_embeddings(
        self, old_embeddings, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True
    ):
        resize = super()._get_resized_embeddings
        if not isinstance(old_embeddings, KroneckerEmbedding):
            return resize(old_embeddings, new_num_tokens, pad_to_multiple_of, mean_resizing)
        rows = nn.Embedding.from_pretrained(old_embeddings.A.detach(), freeze=False)  # a token is a row of A
        rows = resize(rows, new_num_tokens, pad_to_multiple_of, mean_resizing)
        old_embeddings.A = nn.Parameter(rows.weight.detach())
        old_embeddings.num_embeddings = rows.num_embeddings
        return old_embeddings

    def _get_resized_lm_head(self, old_lm_head, new_num_tokens=None, transposed=False, mean_resizing=True):
        if isinstance(old_lm_head, KroneckerHead):
            return KroneckerHead(self.base_model.get_submodule(self.embedding_path))  # already resized
        return super()._get_resized_lm_head(old_lm_head, new_num_tokens, transposed, mean_resizing)

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        """transformers' from_pretrained; a local folder is checked first (loading.validate_checkpoint).

        Only safetensors are read from it, unless `use_safetensors=False` is given.
        """
        local = isinstance(folder, str | os.PathLike) and os.path.isfile(os.path.join(folder, "config.json"))
        if not local or OTHER_FILES & set(kwargs) or not kwargs.setdefault("use_safetensors", True):
            return super().from_pretrained(folder, *args, **kwargs)
        loading.validate_checkpoint(folder)
        with loading.one_line_load_errors(folder):
            return super().from_pretrained(folder, *args, **kwargs)

    def fold(self):
        """The same model for inference with exactly narrower compressed layers: see fold.py."""
        return fold(self)

    def to_dense(self):
        """A stock transformers model, logits equal up to rounding. Raises ValueError for a folded model."""
        if self.config.folded:
            raise ValueError("to_dense needs the model before fold(): narrow layers cannot be widened again")
        own = ("kronecker", "folded", "provenance", "model_type", "architectures")
        fields = {k: v for k, v in self.config.to_dict().items() if k not in own}
        config = self.dense_class.config_class(**fields)
        config._attn_implementation = self.config._attn_implementation
        with torch.device(self.device):
            dense = self.dense_class(config).to(self.dtype)
        dense.load_state_dict(dense_state_dict(self, dense))
        if self.can_generate():
            dense.generation_config = copy.deepcopy(self.generation_config)
        return dense.train(self.training)

    def save_pretrained(self, save_directory, *args, tokenizer=None, evaluation=None, **kwargs):
        """transformers' save_pretrained, the tokenizer if given, and a model card.

        `evaluation` {metric: value} becomes the card's table of results.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(save_directory)
        model_card.write(self, save_directory, count_parameters(self), evaluation)


def dense_state_dict(model: KroneckerModel, dense: nn.Module) -> dict[str, Tensor]:
    """State dict for `dense`, every Kronecker product multiplied out, for Conv1D as (in, out)."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, KRONECKER_MODULES):
            del state[f"{name}.A"], state[f"{name}.B"]
            weight = module.weight.detach()  # (out, in)
            if is_conv1d(dense.get_submodule(name)):
                weight = weight.T
            state[f"{name}.weight"] = weight.contiguous()
    return state


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters {"total", "without_head"}: with and without an untied output head (Table 3).

    A tied head is counted once, in both.
    Raises TypeError for anything but a transformers model.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"count_parameters takes a model of transformers, got {type(model).__name__}")
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = {id(p) for p in model.get_input_embeddings().parameters()}
    untied = 0 if head is None else sum(p.numel() for p in head.parameters() if id(p) not in embedding)
    return {"total": total, "without_head": total - untied}
