"""KroneckerModel, the mixin of KnGPT2 and KnLlama, and the parameter count of Table 3."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kn.kronecker import KroneckerEmbedding, KroneckerHead, KroneckerLinear
from kn.kronecker.layers import KroneckerLayer, is_conv1d
from kn.models import loading, model_card
from kn.models.fold import FoldablePart, foldable

if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object  # the class that follows the mixin is a PreTrainedModel

OTHER_FILES = {"subfolder", "gguf_file", "state_dict", "variant"}  # arguments of from_pretrained


class KroneckerModel(_Base):
    """Mixin before a transformers model class whose weight matrices become Kronecker products (eq. 1).

    A family sets
      blocks_path, embedding_path   module paths in its base model
      target_modules                {path in a block: (side that shares an entry of A, number of fused maps)}
      out_proj                      the target module that spec.out_proj switches
      foldable_parts                the sublayers that fold.py may make narrow
    and stands before the stock class, which becomes `dense_class`."""

    blocks_path: str
    embedding_path: str
    target_modules: dict[str, tuple[str, int]]
    out_proj: str
    foldable_parts: tuple[type[FoldablePart], ...] = ()
    dense_class: type[nn.Module]
    _beside: tuple = (None, None)  # the tokenizer and the card's results, while a model is saved

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.dense_class = next(base for base in cls.__mro__ if not issubclass(base, KroneckerModel))

    def post_init(self):
        base = self.base_model
        if base is self or not isinstance(base, KroneckerModel):  # else base's own post_init did it
            self._install_factors(base)
        if self.config.spec.head == "tied" and hasattr(self, "lm_head"):
            self.lm_head = KroneckerHead(base.get_submodule(self.embedding_path))
            # apart until transformers ties them below, or while it loads it takes missing ones for loaded
            for name, factor in list(self.lm_head.named_parameters()):
                setattr(self.lm_head, name, nn.Parameter(torch.empty_like(factor)))
            path = f"{self.base_model_prefix}.{self.embedding_path}"
            self._tied_weights_keys = {"lm_head.A": f"{path}.A", "lm_head.B": f"{path}.B"}
        if self.can_generate():  # transformers finds none in the class name; its warning breaks the graph
            self.loss_type = "ForCausalLM"
        super().post_init()  # ties and initialises; transformers calls post_init at the end of its __init__

    def _install_factors(self, base: nn.Module) -> None:
        """Replace the chosen layers and the embedding by uninitialised Kronecker or narrow ones, in place."""
        spec, blocks = self.config.spec, base.get_submodule(self.blocks_path)
        shapes = spec.factor_shapes(len(blocks), self.target_modules, self.out_proj)
        if self.config.folded:
            for index, part, factor in foldable(blocks, shapes, self.foldable_parts):
                part.install(blocks[index], factor)
                for path in part.paths:
                    shapes.pop(f"{index}.{path}", None)
        for name, (b_shape, rank) in shapes.items():
            dense, num_fused = blocks.get_submodule(name), self.target_modules[name.partition(".")[2]][1]
            n, m = dense.weight.shape if is_conv1d(dense) else dense.weight.shape[::-1]
            try:
                layer = KroneckerLinear(n, m, b_shape, rank, dense.bias is not None, num_fused)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            blocks.set_submodule(name, layer.to(dense.weight.dtype))
        if spec.embedding:
            dense, factor = base.get_submodule(self.embedding_path), spec.embedding_factor or spec.factor
            embedding = KroneckerEmbedding(dense.num_embeddings, dense.embedding_dim, factor)
            base.set_submodule(self.embedding_path, embedding.to(dense.weight.dtype))

    def _init_weights(self, module):
        # GPT-2 would rescale c_proj.weight
        compressed_mlp = isinstance(getattr(module, "c_proj", None), KroneckerLinear)
        if isinstance(module, (KroneckerLinear, KroneckerEmbedding)):
            module.reset_parameters(self.config.initializer_range)
        elif not isinstance(module, KroneckerHead) and not compressed_mlp:
            super()._init_weights(module)

    def _get_resized_embeddings(self, old_embeddings, *args, **kwargs):
        if not isinstance(old_embeddings, KroneckerEmbedding):
            return super()._get_resized_embeddings(old_embeddings, *args, **kwargs)
        rows = nn.Embedding.from_pretrained(old_embeddings.A.detach(), freeze=False)  # a token is a row of A
        rows = super()._get_resized_embeddings(rows, *args, **kwargs)
        old_embeddings.A = nn.Parameter(rows.weight.detach())
        old_embeddings.num_embeddings = rows.num_embeddings
        return old_embeddings

    def _get_resized_lm_head(self, old_lm_head, *args, **kwargs):
        if isinstance(old_lm_head, KroneckerHead):
            return KroneckerHead(self.base_model.get_submodule(self.embedding_path))  # already resized
        return super()._get_resized_lm_head(old_lm_head, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        """transformers' from_pretrained; a local folder is checked first (loading.validate_checkpoint).
        Only safetensors are read from it, unless `use_safetensors=False` is given."""
        local = isinstance(folder, str | os.PathLike) and os.path.isfile(os.path.join(folder, "config.json"))
        if not local or OTHER_FILES & set(kwargs) or not kwargs.setdefault("use_safetensors", True):
            return super().from_pretrained(folder, *args, **kwargs)
        loading.validate_checkpoint(folder)
        with loading.one_line_load_errors(folder):
            return super().from_pretrained(folder, *args, **kwargs)

    @torch.no_grad()
    def fold(self):
        """The same model for inference, compressed layers narrow: at factor 2 half their work and KV cache.
        Class and logits stay the same, up to rounding; what cannot be narrow exactly stays as it is: fold.py.
        Raises ValueError for a folded model, and where nothing can be narrow."""
        if self.config.folded:
            raise ValueError("this model is folded already")
        blocks, state = self.base_model.get_submodule(self.blocks_path), dict(self.state_dict())
        blocks_path = next(name for name, module in self.named_modules() if module is blocks)
        shapes = self.config.spec.factor_shapes(len(blocks), self.target_modules, self.out_proj)
        for index, part, factor in foldable(blocks, shapes, self.foldable_parts):
            prefix = f"{blocks_path}.{index}."
            replaced = tuple(f"{prefix}{path}." for path in part.paths)
            state = {name: value for name, value in state.items() if not name.startswith(replaced)}
            folded_state = part.folded_state_dict(blocks[index], factor)
            state |= {prefix + name: value for name, value in folded_state.items()}
        config = copy.deepcopy(self.config)
        config.folded = True
        folded = model_like(self, type(self), config)
        folded.load_state_dict(state)
        return folded.eval()

    def _get_static_cache_init_shape(self):
        """None for a folded model: a static cache's layers become as wide as their first keys and values."""
        return None if self.config.folded else super()._get_static_cache_init_shape()

    def to_dense(self):
        """A stock transformers model, logits equal up to rounding. Raises ValueError for a folded model."""
        if self.config.folded:
            raise ValueError("to_dense needs the model before fold(): narrow layers cannot be widened again")
        config = convert_config(self.config, self.dense_class.config_class)
        dense, state = model_like(self, self.dense_class, config), dict(self.state_dict())
        for name, module in self.named_modules():
            if isinstance(module, KroneckerLayer):  # every Kronecker product multiplied out
                del state[f"{name}.A"], state[f"{name}.B"]
                weight = module.weight.detach()  # (out, in)
                weight = weight.T if is_conv1d(dense.get_submodule(name)) else weight
                state[f"{name}.weight"] = weight.contiguous()
        dense.load_state_dict(state)
        return dense

    def save_pretrained(
        self, save_directory, is_main_process=True, *args, tokenizer=None, evaluation=None, **kwargs
    ):
        """As transformers, with the tokenizer if given and a card that shows `evaluation` {metric: value}."""
        outer = self._beside
        self._beside = tokenizer or outer[0], evaluation or outer[1]
        try:
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
            if self.should_save_on_this_rank(is_main_process):
                self._write_beside(save_directory)
        finally:
            self._beside = outer

    def push_to_hub(self, *args, tokenizer=None, evaluation=None, **kwargs):
        """transformers' push_to_hub, with the tokenizer if given and a card as save_pretrained's."""
        self._beside = tokenizer, evaluation
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            del self._beside

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        self._write_beside(working_dir)  # transformers has just put its own card there
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _write_beside(self, folder) -> None:
        tokenizer, evaluation = self._beside
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        model_card.write(self, folder, count_parameters(self), evaluation)


def convert_config(config: PreTrainedConfig, config_class: type[PreTrainedConfig], **changes) -> Any:
    """A `config_class` with the fields of the stock architecture from `config`, and `changes`."""
    own = ("kronecker", "folded", "provenance", "model_type", "architectures")
    return config_class(**{k: v for k, v in config.to_dict().items() if k not in own}, **changes)


def model_like(model: Any, model_class: type[nn.Module], config: PreTrainedConfig) -> Any:
    """A model of random weights with model's device, dtype, mode, attention and generation settings."""
    config._attn_implementation = model.config._attn_implementation
    with torch.device(model.device):
        built = model_class(config).to(model.dtype)
    if built.can_generate():
        built.generation_config = copy.deepcopy(model.generation_config)
    return built.train(model.training)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters {"total", "without_head"}: with and without an untied output head (Table 3).

    A tied head is counted once, in both. Raises TypeError for anything but a transformers model."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"count_parameters takes a model of transformers, got {type(model).__name__}")
    total, head = sum(p.numel() for p in model.parameters()), model.get_output_embeddings()
    embedding = {id(p) for p in model.get_input_embeddings().parameters()}
    untied = 0 if head is None else sum(p.numel() for p in head.parameters() if id(p) not in embedding)
    return {"total": total, "without_head": total - untied}
