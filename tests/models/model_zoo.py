"""Off-the-shelf models with random weights and tiny configurations, each with a batch to learn.

Every entry gives a model and its loss on one fixed batch: on rank ``rank`` of ``ranks`` that
rank's share of it.  Classes of transformers are imported one by one, where they are used: the
import of the library costs seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, LAYERS, HEADS, INNER, VOCABULARY = 32, 2, 4, 64, 50
SAMPLES, TOKENS, CLASSES, PIXELS = 8, 6, 3, 32
DEVIATION = 0.15  # of the weights: the usual 0.02 is made for widths of 768

Loss = Callable[[nn.Module], Tensor]


class Entry(NamedTuple):
    """One model.

    Attributes:
        model: untrained, from a fixed seed, in training mode.
        batch: all samples, by the names of the arguments of the model's forward.
    """

    model: nn.Module
    batch: dict[str, Tensor]


def share(batch: dict[str, Tensor], rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """A rank's samples."""
    return {name: tensor.chunk(ranks)[rank] for name, tensor in batch.items()}


def loss_of(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss that the model gives, for any of the models here."""
    return net(**batch)["loss"]


def _ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape)


def gpt2() -> Entry:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=TOKENS + 2,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        initializer_range=DEVIATION,
        bos_token_id=1,
        eos_token_id=2,
    )
    ids = _ids(SAMPLES, TOKENS)
    return Entry(GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids})


def bert() -> Entry:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=TOKENS + 2,
        initializer_range=DEVIATION,
    )
    ids = _ids(SAMPLES, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0  # one sample is shorter
    return Entry(
        BertForMaskedLM(config), {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    )


def vit() -> Entry:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        image_size=PIXELS,
        patch_size=16,
        initializer_range=DEVIATION,
        num_labels=CLASSES,
    )
    return Entry(ViTForImageClassification(config), _images())


def resnet() -> Entry:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, WIDTH],
        depths=[1, 1],
        layer_type="bottleneck",
        num_labels=CLASSES,
    )
    return Entry(ResNetForImageClassification(config), _images())


def convnext() -> Entry:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        num_stages=2,
        hidden_sizes=[16, WIDTH],
        depths=[1, 1],
        # The default, 1e-6, would keep the blocks out of 20 steps' learning.
        layer_scale_init_value=0.5,
        initializer_range=DEVIATION,
        num_labels=CLASSES,
    )
    return Entry(ConvNextForImageClassification(config), _images())


def llama() -> Entry:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=TOKENS + 2,
        initializer_range=DEVIATION,
        bos_token_id=1,
        eos_token_id=2,
    )
    ids = _ids(SAMPLES, TOKENS)
    return Entry(LlamaForCausalLM(config), {"input_ids": ids, "labels": ids})


def t5() -> Entry:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
    )
    return Entry(
        T5ForConditionalGeneration(config),
        {"input_ids": _ids(SAMPLES, TOKENS), "labels": _ids(SAMPLES, TOKENS - 1)},
    )


def whisper() -> Entry:
    """The encoder, under the library's own classification head."""
    from transformers import WhisperConfig, WhisperForAudioClassification

    config = WhisperConfig(
        num_mel_bins=8,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        max_source_positions=TOKENS,
        classifier_proj_size=16,
        init_std=DEVIATION,
        num_labels=CLASSES,
        use_weighted_layer_sum=True,
    )
    features = torch.randn(SAMPLES, 8, 2 * TOKENS)
    return Entry(
        WhisperForAudioClassification(config), {"input_features": features, "labels": _classes()}
    )


class Seq2Seq(nn.Module):
    """torch's own encoder and decoder, which bring neither embeddings nor a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(
            WIDTH, HEADS, LAYERS, LAYERS, INNER, dropout=0.1, batch_first=True
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        seen = target[:, :-1]
        causal = nn.Transformer.generate_square_subsequent_mask(seen.shape[1])
        hidden = self.transformer(self.embedding(source), self.embedding(seen), tgt_mask=causal)
        logits = self.head(hidden)
        return {"logits": logits, "loss": F.cross_entropy(logits.mT, target[:, 1:])}


def torch_transformer() -> Entry:
    return Entry(Seq2Seq(), {"source": _ids(SAMPLES, TOKENS), "target": _ids(SAMPLES, TOKENS - 1)})


def _classes() -> Tensor:
    return torch.arange(SAMPLES) % CLASSES


def _images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(SAMPLES, 3, PIXELS, PIXELS), "labels": _classes()}


MAKERS: dict[str, Callable[[], Entry]] = {
    maker.__name__: maker
    for maker in (gpt2, bert, vit, resnet, convnext, llama, t5, whisper, torch_transformer)
}


@contextmanager
def without_torchvision() -> Iterator[None]:
    """transformers imports torchvision where it is there, for the processing of images, of which
    nothing is needed here; one that was built for another build of torch raises."""
    from transformers.utils import import_utils

    before = {name: sys.modules[name] for name in ["torchvision"] if name in sys.modules}
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    for is_there in (
        import_utils.is_torchvision_available,
        import_utils.is_torchvision_v2_available,
    ):
        is_there.cache_clear()  # another test may have had it asked
    try:
        yield
    finally:
        del sys.modules["torchvision"]
        sys.modules.update(before)


def make(name: str, seed: int = 0) -> Entry:
    """A model in training mode and its batch; both follow from the seed."""
    with torch.random.fork_rng(), without_torchvision():
        torch.manual_seed(seed)
        entry = MAKERS[name]()
    entry.model.train()
    return entry


def covered(found: Any, model: nn.Module) -> dict[str, int]:
    """Numbers of each parameter that are in a block, by the parameter's (first) name.

    Args:
        found: the blocks, as `find_layer_blocks` gives them.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    numbers: dict[str, int] = {}
    for block in found:
        layer = block.layer
        for own in layer.parameter_names(block.module):
            parameter = block.module.get_parameter(own)
            rows = layer.rows
            if own == getattr(layer, "bias", None):
                rows = layer.bias_rows
            part = parameter if rows is None else parameter[rows[0] : rows[1]]
            name = names[id(parameter)]
            numbers[name] = numbers.get(name, 0) + part.numel()
    return numbers
