"""The bundled model's text encoders: tokenizers and three small encoders, trained on the captions. Used by build.py.

- text_encoder: transformers' CLIPModel, with its contrastive loss.
- text_encoder_2: an open_clip CLIP, with open_clip's ClipLoss; its text tower is saved as transformers' class.
- text_encoder_3: a T5 encoder, trained so that a linear map of its mean output is the picture's latents.

With few pictures the MM-DiT learns by heart only as fast as the text features tell captions apart, so all three are trained
until they know the pictures: encoders that were hardly trained cost four times as many MM-DiT steps for a fifth of the quality.
All three also learn from WordNet which words mean the same, so that a word that no caption has may still be understood.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from goes_on import Run
from pairs import PARTS, VISION_SIZE, Pairs, contrast
from torch import Tensor, nn

LENGTH = 24  # tokens of both CLIP encoders; the T5 encoder has no limit of its own
CLIP_WIDTHS = (128, 192)
VISION_WIDTH, VISION_LAYERS = 128, 2  # of the CLIPs' image towers: patches of 16 pixels, only there to be contrasted with
T5_WIDTH = 320  # at least the sum of the CLIP widths: SD3 pads their concatenation up to it
VOCABULARY = 4096
MEANT = 0.2  # the weight of what words mean
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


def train(module: nn.Module, loss_at: Callable[[int], Tensor], steps: int, rate: float, out: Path) -> None:
    """AdamW with warm-up and cosine decay in bf16 autocast, resuming from out/checkpoints; prints the loss and speed every 50 steps.

    The module is on DEVICE while it learns, and on the CPU before and after.
    """
    module.to(DEVICE)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    run = Run(module, optimizer, out / "checkpoints", {"steps": steps, "rate": rate})
    began = time.monotonic()
    for step in range(run.start, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            pace = (step + 1 - run.start) / (time.monotonic() - began)
            print(f"{out.name} step {step + 1}/{steps} loss {loss.item():.4f} {pace:.2f} steps/s", flush=True)
        if run.due() or step + 1 == steps:
            run.save(step + 1)
    module.cpu()


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
    texts = pairs.texts()
    tokenizer = clip_tokenizer(texts, pad_token="<|endoftext|>")
    torch.manual_seed(seed)
    text = clip_text_settings(width, tokenizer) | {"hidden_act": "quick_gelu"}
    vision = {"hidden_size": VISION_WIDTH, "intermediate_size": 4 * VISION_WIDTH, "num_hidden_layers": VISION_LAYERS}
    vision |= {"num_attention_heads": VISION_WIDTH // 32, "image_size": VISION_SIZE, "patch_size": 16, "projection_dim": width}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    spread_tokens(model.text_model.embeddings.token_embedding)

    def loss_at(step: int) -> Tensor:
        indices, captions, rng = pairs.batch(batch, step, seed)
        images, ids = pairs.images(indices, rng).to(DEVICE), tokens_of(tokenizer, captions, LENGTH).to(DEVICE)
        words = model.text_model(tokens_of(tokenizer, pairs.same_meaning(rng), LENGTH).to(DEVICE)).pooler_output
        return model(input_ids=ids, pixel_values=images, return_loss=True).loss + MEANT * contrast(model.text_projection(words))

    train(model, loss_at, steps, 5e-4, out / "clip")
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
    texts = pairs.texts()
    tokenizer = clip_tokenizer(texts, pad_token="!")
    torch.manual_seed(seed)
    model = CLIP(
        embed_dim=width,
        vision_cfg=CLIPVisionCfg(layers=VISION_LAYERS, width=VISION_WIDTH, head_width=32, patch_size=16, image_size=64),
        text_cfg=CLIPTextCfg(context_length=LENGTH, vocab_size=len(tokenizer), width=width, heads=width // 32, layers=4),
    )
    spread_tokens(model.token_embedding)
    loss_function = ClipLoss()

    def loss_at(step: int) -> Tensor:
        indices, captions, rng = pairs.batch(batch, step, seed)
        images, ids = pairs.images(indices, rng).to(DEVICE), tokens_of(tokenizer, captions, LENGTH).to(DEVICE)
        words = model.encode_text(tokens_of(tokenizer, pairs.same_meaning(rng), LENGTH).to(DEVICE))
        return loss_function(*model(images, ids)) + MEANT * contrast(words)

    train(model, loss_at, steps, 5e-4, out / "open_clip")
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


def from_patches(patches: Tensor, shape: torch.Size) -> Tensor:
    """[B, *shape] of shape [C, H, W], put together of its P x P patches, given row by row as [B, P P, C h w]."""
    side = math.isqrt(patches.shape[1])
    cells = patches.unflatten(2, (shape[0], shape[1] // side, shape[2] // side)).unflatten(1, (side, side))
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(-1, *shape)


class Drawing(nn.Module):
    """Text features [B, L, T5_WIDTH] -> latents [B, *shape]: each of P x P patches asks the words, as an MM-DiT's tokens do."""

    def __init__(self, shape: torch.Size, side: int = 4):
        super().__init__()
        self.shape = shape
        self.queries = nn.Parameter(torch.randn(side**2, T5_WIDTH))
        self.attention = nn.MultiheadAttention(T5_WIDTH, 5, batch_first=True)
        self.norm, self.wide = nn.LayerNorm(T5_WIDTH), nn.Linear(T5_WIDTH, 4 * T5_WIDTH)
        self.out = nn.Linear(4 * T5_WIDTH, shape.numel() // side**2)
        nn.init.zeros_(self.out.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        found, _ = self.attention(self.queries.expand(len(hidden), -1, -1), hidden, hidden, need_weights=False)
        return from_patches(self.out(nn.functional.gelu(self.wide(self.norm(found)))), self.shape)


def train_t5(pairs: Pairs, latents: Tensor, out: Path, steps: int, batch: int, seed: int) -> None:
    """Train a T5 encoder until `Drawing` predicts the pictures' latents [N, C, H, W] from its output; write it.

    That prediction is what a flow network has to know at t = 0, where its velocity is the mean of the pictures a caption allows
    minus the noise. Padding is not masked, because SD3 does not mask it: the encoder learns to live with 24 to 160 tokens.
    Now and then a word is dropped, so that no single one carries everything.
    """
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer(pairs.texts(), out / "tokenizer_3")
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=64, d_ff=2 * T5_WIDTH, num_layers=3, num_heads=5,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    encoder, head = T5EncoderModel(config), Drawing(latents[0].shape)
    mean = latents.float().mean(dim=0)
    variance = (latents[:: max(1, len(latents) // 2000)].float() - mean).square().mean()

    def hidden_of(texts: list[str], length: int) -> Tensor:
        ids = tokens_of(tokenizer, texts, length).to(encoder.device)
        return encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state

    def unexplained(texts: list[str], indices: list[int], length: int) -> Tensor:
        """Mean squared error over the latents' variance: 1 for an encoder that says nothing, 0 for one that knows all."""
        wanted = (latents[indices].float() - mean).to(encoder.device)
        return (head(hidden_of(texts, length)).float() - wanted).square().mean() / variance

    def loss_at(step: int) -> Tensor:
        indices, captions, rng = pairs.batch(batch, step, seed)
        kept = [" ".join(w for w in c.split() if rng.random() > 0.05) or c for c in captions]
        (length,) = rng.choices((LENGTH, 64, 160), weights=(0.9, 0.07, 0.03))
        return unexplained(kept, indices, length) + MEANT * contrast(hidden_of(pairs.same_meaning(rng), LENGTH).mean(dim=1))

    train(nn.ModuleList([encoder, head]), loss_at, steps, 1e-3, out / "t5")
    encoder.eval()
    with torch.no_grad():
        for part, found in zip(PARTS, pairs.parts, strict=True):
            some = list(found)[:: max(1, len(found) // 300)]
            shares = [1 - unexplained([pairs.captions[i][0] for i in some], some, length).item() for length in (LENGTH, 256)]
            print(f"t5: of {part}, its output explains {shares[0]:.0%} of the latents' variance, {shares[1]:.0%} padded to 256", flush=True)
    encoder.half().save_pretrained(out / "text_encoder_3")
    tokenizer.save_pretrained(out / "tokenizer_3")
