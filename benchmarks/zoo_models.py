"""Architectures of timm, torchvision and transformers as their users make them, with random weights and few layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORDS = 100
_TEXT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "vocab_size": WORDS, "num_labels": 10, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_IMAGE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": 64, "patch_size": 16, "num_labels": 10,
}  # fmt: skip
_STAGES = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 2, 1], "num_labels": 10}
_SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64, "num_labels": 10}
_LLAMA = _TEXT | {"num_key_value_heads": 2}
_GPT2 = {
    "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "vocab_size": WORDS, "num_labels": 10, "pad_token_id": 0,
}  # fmt: skip
_OPT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128, "vocab_size": WORDS,
    "num_labels": 10, "max_position_embeddings": 64, "word_embed_proj_dim": 64, "pad_token_id": 0,
}  # fmt: skip
_DISTIL = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": WORDS, "num_labels": 10, "pad_token_id": 0,
}  # fmt: skip
_XLNET = {
    "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "vocab_size": WORDS, "num_labels": 10, "pad_token_id": 0,
}  # fmt: skip
_WAVE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "num_labels": 10,
    "conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
}  # fmt: skip
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": _TEXT,
    "RobertaForSequenceClassification": _TEXT,
    "DistilBertForSequenceClassification": _DISTIL,
    "AlbertForSequenceClassification": _TEXT | {"embedding_size": 32},
    "ElectraForSequenceClassification": _TEXT | {"embedding_size": 32},
    "DebertaV2ForSequenceClassification": _TEXT
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "ModernBertForSequenceClassification": _TEXT | {"global_attn_every_n_layers": 2, "local_attention": 8},
    "FNetForSequenceClassification": {name: value for name, value in _TEXT.items() if name != "num_attention_heads"},
    "XLNetForSequenceClassification": _XLNET,
    "GPT2ForSequenceClassification": _GPT2,
    "OPTForSequenceClassification": _OPT,
    "LlamaForSequenceClassification": _LLAMA,
    "Qwen2ForSequenceClassification": _LLAMA,
    "Gemma2ForSequenceClassification": _LLAMA | {"head_dim": 16},
    "ViTForImageClassification": _IMAGE,
    "BeitForImageClassification": _IMAGE,
    "CLIPForImageClassification": {"vision_config": _IMAGE, "num_labels": 10},
    "Dinov2ForImageClassification": _IMAGE,
    "SwinForImageClassification": _SWIN,
    "Swinv2ForImageClassification": _SWIN,
    "ConvNextForImageClassification": _STAGES,
    "ConvNextV2ForImageClassification": _STAGES,
    "SegformerForImageClassification": _STAGES,
    "SegformerForSemanticSegmentation": _STAGES | {"decoder_hidden_size": 32},
    "PoolFormerForImageClassification": _STAGES,
    "Wav2Vec2ForSequenceClassification": _WAVE,
}


_BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_MINI = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_SMALL = {"n_embd": 768, "n_layer": 12, "n_head": 12}
OF_SIZE: dict[str, tuple[str, dict[str, Any]]] = {
    "MiniLM-L6": ("BertForSequenceClassification", _TEXT | _MINI | {"max_position_embeddings": 512}),
    "BERT-base": ("BertForSequenceClassification", _TEXT | _BERT | {"max_position_embeddings": 512}),
    "GPT-2": ("GPT2ForSequenceClassification", _GPT2 | _SMALL | {"n_positions": 512}),
}
"""As they are used, but for their tables: class and config."""


def _listed(file: str) -> list[str]:
    return Path(__file__).with_name(file).read_text().splitlines()


NAMES = [*_listed("zoo.txt"), *(f"transformers {name}" for name in TRANSFORMERS)]
"""Library, name and, of images that may have any size, after @ theirs."""
SIZED = [
    f"transformers {name}@{tokens}"
    for name, counts in {"MiniLM-L6": (8, 32, 128), "BERT-base": (8, 32), "GPT-2": (1,)}.items()
    for tokens in counts
]
"""After @ the tokens of a text."""
CHAINS = _listed("zoo_chains.txt")
"""Those that are small enough for an interpreter of kernels."""
LATENCIES = _listed("zoo_latency.txt")
"""Those whose latency is measured."""


def made(name: str) -> tuple[nn.Module, Tensor]:
    """The model in eval mode and four inputs, both always the same."""
    torch.manual_seed(0)
    library, _, rest = name.partition(" ")
    makers: dict[str, Callable[[str], tuple[nn.Module, Tensor]]] = {
        "timm": _timm, "torchvision": _torchvision, "transformers": _transformers,
    }  # fmt: skip
    model, inputs = makers[library](rest)
    _settle(model, inputs)
    return model, inputs


def _timm(name: str) -> tuple[nn.Module, Tensor]:
    import timm

    name, _, size = name.partition("@")
    given = {"num_classes": 10} | ({"img_size": int(size)} if size else {})
    try:
        model = timm.create_model(name, **given)
    except TypeError:  # takes images of any size
        model = timm.create_model(name, num_classes=10)
    return model, _images(int(size or model.default_cfg["input_size"][-1]))


def _torchvision(name: str) -> tuple[nn.Module, Tensor]:
    import torchvision

    name, _, size = name.partition("@")
    return torchvision.models.get_model(name, num_classes=10), _images(int(size))


class _Logits(nn.Module):
    def __init__(self, model: nn.Module, *, words: bool) -> None:
        super().__init__()
        self.model, self.words = model, words

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(*(() if self.words else (x,)), **self._given(x)).logits
        return logits

    def _given(self, x: Tensor) -> dict[str, Tensor]:
        words = x.long()
        return {"input_ids": words, "attention_mask": (words != 0).long()} if self.words else {}


def _transformers(name: str) -> tuple[nn.Module, Tensor]:
    import transformers

    name, _, tokens = name.partition("@")
    name, fields = OF_SIZE.get(name) or (name, TRANSFORMERS[name])
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**fields))
    if "Wav2Vec2" in name:
        return _Logits(model, words=False), torch.randn(4, 4000)
    words = "Image" not in name and "Segmentation" not in name
    if not words:
        return _Logits(model, words=False), _images(64)
    inputs = torch.randint(3, WORDS, (4, int(tokens or 12))).float()
    if not name.startswith(("FNet", "Gemma2")):  # these see no mask
        inputs[1, 8:] = inputs[3, 5:] = 0
    return _Logits(model, words=True), inputs


def _images(size: int) -> Tensor:
    """Smooth ones with noise."""
    coarse = nn.functional.interpolate(torch.randn(4, 3, 8, 8), size=(size, size), mode="bilinear")
    return coarse + 0.3 * torch.randn(4, 3, size, size)


@torch.no_grad()
def _settle(model: nn.Module, inputs: Tensor) -> None:
    """Give norms, biases and scales of branches numbers as trained ones are, and norms the statistics of `inputs`."""
    model.eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.abs().max() >= 1e-3:
            continue
        if parameter.abs().max() > 1e-2:
            parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape))
        elif "bias" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape))
        else:
            parameter.copy_(0.3 + 0.5 * torch.rand(parameter.shape))
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(inputs)
    model.eval()
