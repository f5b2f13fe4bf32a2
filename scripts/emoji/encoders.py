"""The bundled model's text encoders: tokenizers and three small encoders, trained on the captions. Used by build.py.

- text_encoder: transformers' CLIPModel, with its contrastive loss.
- text_encoder_2: an open_clip CLIP, with open_clip's ClipLoss; its text tower is saved as transformers' class.
- text_encoder_3: a T5 encoder, trained so that a linear map of its mean output is the picture's latents.

With few pictures the MM-DiT learns by heart only as fast as the text features tell captions apart, so all three are trained
until they know the pictures: encoders that were hardly trained cost four times as many MM-DiT steps for a fifth of the quality.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from latentfm.data.mixture import Mixture
from latentfm.data.stream import Stream

LENGTH = 16  # tokens of both CLIP encoders; the T5 encoder has no limit of its own
CLIP_WIDTHS = (128, 192)
VISION_WIDTH, VISION_LAYERS = 128, 2  # of the CLIPs' image towers: patches of 16 pixels, only there to be contrasted with
T5_WIDTH = 320  # at least the sum of the CLIP widths: SD3 pads their concatenation up to it
VOCABULARY = 4096


class Pairs:
    """The training pictures and their captions: uint8 [N, 3, 64, 64] and N lists of strings."""

    def __init__(self, folder: Path):
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
        self.captions = [row["text"] for row in rows]
        arrays = [np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows]
        self.pictures = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    def batches(self, size: int, steps: int, seed: int) -> Iterator[tuple[list[int], list[str], random.Random]]:
        """Yields (indices, one drawn caption each, the step's generator); epochs are permutations."""
        stream = Stream(Mixture.plain(len(self.captions)), size, seed)
        for step in range(steps):
            rng = random.Random(f"{seed}/{step}")
            indices = [index for _, index, _ in stream.members(step)]
            yield indices, [rng.choice(self.captions[i]) for i in indices], rng

    def images(self, indices: list[int], rng: random.Random) -> Tensor:
        """Float pictures in [-1, 1], [B, 3, 64, 64], each shifted by up to 4 pixels on white."""
        padded = nn.functional.pad(self.pictures[indices], (4, 4, 4, 4), value=255)
        top, left = rng.randint(0, 8), rng.randint(0, 8)
        return padded[..., top : top + 64, left : left + 64].float() / 127.5 - 1


def clip_tokenizer(texts: list[str], pad_token: str):
    """A CLIPTokenizer with a byte-pair vocabulary of the captions; end-of-text is its highest id, as in CLIP."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    pieces = CLIPTokenizer()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer = pieces.backend_tokenizer.normalizer
    learner.pre_tokenizer = pieces.backend_tokenizer.pre_tokenizer
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(alphabet), initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [token for token in dict.fromkeys("".join(pair) for pair in merges) if token not in set(tokens)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=LENGTH)


def t5_tokenizer(texts: list[str], folder: Path):
    """A T5Tokenizer over a sentencepiece unigram model trained on the captions; writes spiece.model into `folder`."""
    import sentencepiece
    from transformers import T5Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "spiece"),
        vocab_size=VOCABULARY,
        model_type="unigram",
        character_coverage=1.0,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    vocabulary = [(spm.id_to_piece(i), spm.get_score(i)) for i in range(spm.get_piece_size())]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=256)
    for text in texts[:: max(1, len(texts) // 200)]:
        if tokenizer(text).input_ids != [*spm.encode(text), 1]:
            raise RuntimeError(f"the T5 tokenizer and its sentencepiece model disagree on {text!r}")
    return tokenizer


def train(module: nn.Module, losses: Iterator[Callable[[], Tensor]], steps: int, rate: float, label: str) -> None:
    """AdamW with warm-up and cosine decay in bf16 autocast; prints the loss and speed every 50 steps."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    began = time.monotonic()
    for step, loss_of in enumerate(losses):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            pace = (step + 1) / (time.monotonic() - began)
            print(f"{label} step {step + 1}/{steps} loss {loss.item():.4f} {pace:.2f} steps/s", flush=True)


def spread_tokens(embedding: nn.Embedding) -> None:
    """Initialise word vectors far apart (CLIP's own standard deviation is 0.02).

    With so few pictures the contrastive loss is content with a handful of directions; words that start near each other
    stay there, and an MM-DiT cannot tell a thousand concepts apart by them.
    """
    nn.init.normal_(embedding.weight, std=0.5)


def clip_text_settings(width: int, tokenizer) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 32,
        "max_position_embeddings": LENGTH,
        "projection_dim": width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def distinctness(features: Tensor) -> float:
    """Participation ratio of features [N, D]: about how many directions tell the N texts apart, from 1 to D."""
    spectrum = torch.linalg.svdvals((features - features.mean(dim=0)).float()).square()
    return (spectrum.sum().square() / spectrum.square().sum()).item()


def report_distinctness(label: str, tower: nn.Module, tokenizer, pairs: Pairs) -> None:
    """Prints the distinctness of the pooled features of every twelfth picture's name."""
    with torch.no_grad():
        pooled = tower(tokens_of(tokenizer, [captions[0] for captions in pairs.captions[::12]], LENGTH))[0]
    print(f"{label}: the pooled features tell captions apart in about {distinctness(pooled):.1f} directions", flush=True)


def tokens_of(tokenizer, texts: list[str], length: int) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def train_clip(pairs: Pairs, out: Path, steps: int, batch: int, seed: int) -> None:
    """Train text_encoder with transformers' CLIPModel and write it with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection

    width = CLIP_WIDTHS[0]
    texts = sorted({caption for captions in pairs.captions for caption in captions})
    tokenizer = clip_tokenizer(texts, pad_token="<|endoftext|>")
    torch.manual_seed(seed)
    text = clip_text_settings(width, tokenizer) | {"hidden_act": "quick_gelu"}
    vision = {"hidden_size": VISION_WIDTH, "intermediate_size": 4 * VISION_WIDTH, "num_hidden_layers": VISION_LAYERS}
    vision |= {"num_attention_heads": VISION_WIDTH // 32, "image_size": 64, "patch_size": 16, "projection_dim": width}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    spread_tokens(model.text_model.embeddings.token_embedding)

    def losses():
        for indices, captions, rng in pairs.batches(batch, steps, seed):
            images, ids = pairs.images(indices, rng), tokens_of(tokenizer, captions, LENGTH)
            yield lambda images=images, ids=ids: model(input_ids=ids, pixel_values=images, return_loss=True).loss

    train(model, losses(), steps, 5e-4, "clip")
    tower = CLIPTextModelWithProjection(model.config.text_config)
    state = {k: v for k, v in model.state_dict().items() if k.startswith(("text_model.", "text_projection."))}
    tower.load_state_dict(state, strict=True)
    report_distinctness("clip", tower.eval(), tokenizer, pairs)
    tower.half().save_pretrained(out / "text_encoder")
    tokenizer.save_pretrained(out / "tokenizer")


def train_open_clip(pairs: Pairs, out: Path, steps: int, batch: int, seed: int) -> None:
    """Train text_encoder_2 as the text tower of an open_clip model with open_clip's loss; write it in transformers' form."""
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    from latentfm.interchange.open_clip import open_clip_text_to_transformers

    width = CLIP_WIDTHS[1]
    texts = sorted({caption for captions in pairs.captions for caption in captions})
    tokenizer = clip_tokenizer(texts, pad_token="!")
    torch.manual_seed(seed)
    model = CLIP(
        embed_dim=width,
        vision_cfg=CLIPVisionCfg(layers=VISION_LAYERS, width=VISION_WIDTH, head_width=32, patch_size=16, image_size=64),
        text_cfg=CLIPTextCfg(context_length=LENGTH, vocab_size=len(tokenizer), width=width, heads=width // 32, layers=4),
    )
    spread_tokens(model.token_embedding)
    loss_function = ClipLoss()

    def losses():
        for indices, captions, rng in pairs.batches(batch, steps, seed):
            images, ids = pairs.images(indices, rng), tokens_of(tokenizer, captions, LENGTH)
            yield lambda images=images, ids=ids: loss_function(*model(images, ids))

    train(model, losses(), steps, 5e-4, "open_clip")
    tower = open_clip_text_to_transformers(model)
    ids = tokens_of(tokenizer, texts[:64], LENGTH)
    with torch.no_grad():
        difference = (model.eval().encode_text(ids) - tower(ids).text_embeds).abs().max().item()
    if difference > 1e-4:
        raise RuntimeError(f"the converted open_clip text tower differs by {difference}")
    report_distinctness("open_clip", tower, tokenizer, pairs)
    tower.config.pad_token_id = tokenizer.pad_token_id
    tower.half().save_pretrained(out / "text_encoder_2")
    tokenizer.save_pretrained(out / "tokenizer_2")


def train_t5(pairs: Pairs, latents: Tensor, out: Path, steps: int, batch: int, seed: int) -> None:
    """Train a T5 encoder until a linear map of its mean output predicts the pictures' latents [N, C, H, W]; write it.

    That map is what a flow network has to know at t = 0, where its velocity is the mean of the pictures a caption allows
    minus the noise. Padding is not masked, because SD3 does not mask it: the encoder learns to live with 16 to 160 tokens.
    Now and then a word is dropped, so that no single one carries everything.
    """
    from transformers import T5Config, T5EncoderModel

    texts = sorted({caption for captions in pairs.captions for caption in captions})
    tokenizer = t5_tokenizer(texts, out / "tokenizer_3")
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=64, d_ff=2 * T5_WIDTH, num_layers=3, num_heads=5,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    encoder = T5EncoderModel(config)
    head = nn.Linear(T5_WIDTH, latents[0].numel())
    nn.init.zeros_(head.weight)
    targets = (latents - latents.mean(dim=0)).flatten(1)
    variance = targets.square().mean()

    def unexplained(texts: list[str], indices: list[int], length: int) -> Tensor:
        """Mean squared error over the latents' variance: 1 for an encoder that says nothing, 0 for one that knows all."""
        ids = tokens_of(tokenizer, texts, length)
        hidden = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return (head(hidden.mean(dim=1)).float() - targets[indices]).square().mean() / variance

    def losses():
        for indices, captions, rng in pairs.batches(batch, steps, seed):
            kept = [" ".join(w for w in c.split() if rng.random() > 0.05) or c for c in captions]
            (length,) = rng.choices((LENGTH, 64, 160), weights=(0.9, 0.07, 0.03))
            yield lambda kept=kept, indices=indices, length=length: unexplained(kept, indices, length)

    train(nn.ModuleList([encoder, head]), losses(), steps, 1e-3, "t5")
    encoder.eval()
    with torch.no_grad():
        some = list(range(0, len(targets), 12))
        shares = [1 - unexplained([pairs.captions[i][0] for i in some], some, length).item() for length in (LENGTH, 256)]
    print(f"t5: its mean output explains {shares[0]:.0%} of the latents' variance, {shares[1]:.0%} padded to 256", flush=True)
    encoder.half().save_pretrained(out / "text_encoder_3")
    tokenizer.save_pretrained(out / "tokenizer_3")
