"""The text encoders of Stable Diffusion 3, a row each, and their two families. Whoever loads, reads, writes or drops them reads it here.

To add one: a row, and where its states go in `text.assemble`. Needs neither torch nor transformers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A kind of text encoder: its classes in transformers, by name.

    settings: what of its configuration decides what it computes. Nothing else of it is read: other settings choose an implementation of
    attention, which may be code on the hub, the form of the output, or files elsewhere.
    vocabularies: the files that its tokenizer's vocabulary may lie in, one set or the other.
    """

    title: str
    model: str
    config: str
    tokenizer: str
    settings: tuple[str, ...]
    vocabularies: tuple[tuple[str, ...], ...]


CLIP = Family(
    "CLIP", "CLIPTextModelWithProjection", "CLIPTextConfig", "CLIPTokenizer",
    settings=(
        "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor",
        "pad_token_id", "bos_token_id", "eos_token_id",
    ),
    vocabularies=(("tokenizer.json",), ("vocab.json", "merges.txt")),
)  # fmt: skip
T5 = Family(
    "T5", "T5EncoderModel", "T5Config", "T5Tokenizer",
    settings=(
        "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "relative_attention_num_buckets",
        "relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "initializer_factor", "feed_forward_proj", "dense_act_fn",
        "is_gated_act", "pad_token_id", "eos_token_id", "decoder_start_token_id", "tie_word_embeddings",
    ),
    vocabularies=(("tokenizer.json",), ("spiece.model",)),
)  # fmt: skip


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a pipeline.

    name: of the component, and of its folder. title: for people. parts: what it gives, by PromptParts' names; the first stands for it.
    prefix: of its tensors in a single file of SD3's naming. act: the activation that a single file's weights do not tell.
    """

    name: str
    title: str
    family: Family
    parts: tuple[str, ...]
    prefix: str
    act: str | None = None

    @property
    def tokenizer(self) -> str:
        """The name of its tokenizer's component."""
        return self.name.replace("text_encoder", "tokenizer")

    def __str__(self) -> str:
        return f"{self.name} ({self.family.title})"


ENCODERS = (
    TextEncoder("text_encoder", "the first CLIP", CLIP, ("clip_1", "pooled_1"), "text_encoders.clip_l.transformer.", "quick_gelu"),
    TextEncoder("text_encoder_2", "the second CLIP", CLIP, ("clip_2", "pooled_2"), "text_encoders.clip_g.transformer.", "gelu"),
    TextEncoder("text_encoder_3", "T5", T5, ("t5",), "text_encoders.t5xxl.transformer."),
)
BY_NAME = {encoder.name: encoder for encoder in ENCODERS}
TEXT = tuple(BY_NAME)  # the components' names
