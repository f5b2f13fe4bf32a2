"""What pictures are looked at with: transformers' real classes on tiny random weights, the art's own detector on composed pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny import clip_tokenizer

from latentfm.errors import InputError
from latentfm.evaluation.detection import COLOURS, ZeroShotDetector
from latentfm.evaluation.emoji import CELLS, CenterNet, EmojiDetector, found_in, tensors
from latentfm.evaluation.features import Clip, Inception, VisionModel

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}


def shapes(number: int = 3) -> list[Image.Image]:
    pictures = []
    for each in range(number):
        picture = Image.new("RGB", (40, 48), (255, 255, 255))
        ImageDraw.Draw(picture).ellipse((4 + 5 * each, 6, 30, 40), fill=(60 * each, 200 - 60 * each, 90))
        pictures.append(picture)
    return pictures


def words(tokenizer) -> dict:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {**TEXT, "vocab_size": len(tokenizer), **ids}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(16, "<|endoftext|>")
    CLIPModel(CLIPConfig(text_config=words(tokenizer), vision_config=VISION, projection_dim=12)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def owl_folder(tmp_path_factory) -> Path:
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor

    folder = tmp_path_factory.mktemp("owl")
    torch.manual_seed(1)
    tokenizer = clip_tokenizer(16, "<|endoftext|>")
    model = OwlViTForObjectDetection(OwlViTConfig(text_config=words(tokenizer), vision_config=VISION, projection_dim=16))
    with torch.no_grad():
        for parameter in model.class_head.parameters():
            parameter.normal_(0, 1)  # so that classes and places differ
        model.box_head.dense2.weight.zero_()
        model.box_head.dense2.bias.copy_(torch.tensor([0.0, 0.0, 3.0, 3.0]))  # and boxes overlap
    model.save_pretrained(folder)
    images = OwlViTImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    OwlViTProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_clip_is_transformers_own(clip_folder):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    ours, pictures, texts = Clip(clip_folder), shapes(), ["a red apple", "the moon and seven stars above a dark sea " * 9]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    inputs = AutoTokenizer.from_pretrained(clip_folder)(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=16)
    inputs |= AutoImageProcessor.from_pretrained(clip_folder)(pictures, return_tensors="pt")
    with torch.no_grad():
        said = model(**inputs)
    assert torch.allclose(ours.images(pictures), said.image_embeds, atol=1e-6)
    assert torch.allclose(ours.texts(texts), said.text_embeds, atol=1e-6)
    assert VisionModel(clip_folder).features(pictures).shape == (3, 12)


def test_a_fingerprint_is_of_what_decides_the_answers(clip_folder, tmp_path):
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    (copy / "README.md").write_text("of no account")
    assert Clip(copy).fingerprint == Clip(clip_folder).fingerprint == VisionModel(copy).fingerprint
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(settings | {"do_normalize": False}))
    assert Clip(copy).fingerprint != Clip(clip_folder).fingerprint


def test_dinov2_is_its_pooled_output(tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    images = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**images(shapes(), return_tensors="pt")).pooler_output
    assert torch.allclose(VisionModel(tmp_path).features(shapes()), expected, atol=1e-5)
    with pytest.raises(InputError, match="Dinov2Model, which reads no text"):
        Clip(tmp_path)


@pytest.mark.slow
def test_inception_is_torchvisions_before_its_last_layer(tmp_path):
    from safetensors.torch import save_file
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    model = inception_v3(weights=None, init_weights=False, transform_input=False).eval()
    save_file(model.state_dict(), tmp_path / "inception.safetensors")
    found = Inception(tmp_path / "inception.safetensors").features(shapes(2))
    pixels = [torch.from_numpy(np.array(each.resize((299, 299), 2))).permute(2, 0, 1) / 127.5 - 1 for each in shapes(2)]
    with torch.no_grad():
        assert torch.allclose(model(torch.stack(pixels)), model.fc(found), atol=1e-5)


def test_what_is_no_model_of_pictures_is_refused(tmp_path, tiny_folder):
    with pytest.raises(InputError, match="--clip .*nowhere does not exist"):
        Clip(tmp_path / "nowhere")
    with pytest.raises(InputError, match="--features .* has no preprocessor_config.json"):
        VisionModel(tiny_folder / "text_encoder")
    with pytest.raises(InputError, match="--detector .* has no config.json"):
        ZeroShotDetector(tmp_path)
    with pytest.raises(InputError, match="--detector .* give a folder of a transformers zero-shot object detector"):
        ZeroShotDetector(tiny_folder / "text_encoder")
    (tmp_path / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="weights.safetensors"):
        Inception(tmp_path / "weights.safetensors")


def test_a_zero_shot_detector_is_the_model_and_overlaps_count_once(owl_folder, clip_folder):
    from torchvision.ops import box_iou
    from transformers import OwlViTForObjectDetection, OwlViTProcessor

    classes = ["cat", "dog", "apple"]
    detector = ZeroShotDetector(owl_folder, threshold=0.4, clip=Clip(clip_folder))
    found = detector.detect(shapes(), classes)
    model, processor = OwlViTForObjectDetection.from_pretrained(owl_folder).eval(), OwlViTProcessor.from_pretrained(owl_folder)
    seen = 0
    for picture, things in zip(shapes(), found, strict=True):
        inputs = processor(text=[[f"a photo of a {name}" for name in classes]], images=picture, return_tensors="pt")
        with torch.no_grad():
            scores = model(**inputs).logits.sigmoid()[0].amax(dim=1)
        assert things[0].score == pytest.approx(scores.max().item(), abs=1e-5)
        assert all(thing.score > 0.4 and thing.colour in COLOURS for thing in things)
        assert [thing.score for thing in things] == sorted((thing.score for thing in things), reverse=True)
        for name in classes:
            boxes = torch.tensor([thing.box for thing in things if thing.label == name]).view(-1, 4)
            assert (box_iou(boxes, boxes).fill_diagonal_(0) <= 0.5).all()
        seen += (scores > 0.4).sum().item() - len(things)
    assert seen > 0 and {thing.label for things in found for thing in things} <= set(classes)


def test_the_answer_of_the_grid_is_boxes():
    logits, boxes = torch.full((1, 3, CELLS, CELLS), -9.0), torch.zeros(1, 4, CELLS, CELLS)
    logits[0, 1, 2, 6], boxes[0, :, 2, 6] = 3.0, torch.tensor([0.5, 0.0, 0.25, 0.5])
    logits[0, 0, 2, 5] = 1.0  # beside a surer one
    logits[0, 2, 7, 0], boxes[0, :, 7, 0] = 2.0, torch.tensor([0.0, 0.5, 0.1, 0.1])
    ((one, other),) = found_in(logits, boxes)
    assert one[0] == 1 and one[1] == pytest.approx(torch.tensor(3.0).sigmoid().item())
    assert one[2] == pytest.approx((6.5 / 8 - 0.125, 0.25 - 0.25, 6.5 / 8 + 0.125, 0.5)) and other[0] == 2


def test_the_emoji_detector_learns_where_and_what(tmp_path):
    """Two shapes of two colours, in few steps of the loss that trains the real one: what it finds is what was composed."""
    import sys

    sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "emoji"))
    import random

    import detector as script
    from safetensors.torch import save_file

    labels = [("disc", "red"), ("disc", "blue"), ("bar", None)]

    class Shapes(script.Art):
        def __init__(self):
            self.labels, self.other = labels, {style: [] for style in script.STYLES}
            drawn = []
            for number, fill in enumerate(((220, 40, 40, 255), (40, 60, 220, 255), (30, 150, 60, 255))):
                image = Image.new("RGBA", (128, 128))
                pen = ImageDraw.Draw(image)
                (pen.ellipse if number < 2 else pen.rectangle)((8, 8, 120, 120) if number < 2 else (8, 44, 120, 84), fill=fill)
                drawn.append((number, image))
            self.known = {style: drawn for style in script.STYLES}

    torch.manual_seed(0)
    art, network = Shapes(), CenterNet(3, (16, 16, 32))
    optimizer = torch.optim.AdamW(network.parameters(), lr=8e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=160)
    for step in range(160):
        loss = script.loss_of(network, script.batch_of(art, step, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    script.write(network.state_dict(), art, (16, 16, 32), tmp_path)
    ours = EmojiDetector.load(tmp_path)
    right, rng = 0, random.Random("test")
    for _ in range(40):
        picture, things = script.compose(art, rng)
        (found,) = ours.detect([picture.resize((96, 96))], ours.classes)
        at = [((thing.label, thing.colour), np.array(thing.box) * 128 / 96) for thing in found]
        right += len(found) == len(things) and all(
            any(name == labels[label] and np.abs(place - np.array(box)).max() < 12 for name, place in at) for label, box in things
        )
    assert right >= 30
    assert ours.features([picture]).shape == (1, 32)
    ours.check(["disc", "bar"])
    with pytest.raises(InputError, match="knows no 'disk' .did you mean 'disc'"):
        ours.check(["disk"])
    save_file({"trunk.0.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="reinstall latentfm"):
        EmojiDetector.load(tmp_path)


def test_the_shipped_detector_knows_what_its_prompts_ask_for():
    from latentfm.bundled import detector_folder
    from latentfm.evaluation.geneval import TASKS, read_asked

    asked, detector = read_asked(detector_folder() / "prompts.jsonl"), EmojiDetector.load(detector_folder())
    detector.check([thing.name for each in asked for thing in (*each.include, *each.exclude)])
    assert {each.task for each in asked} == set(TASKS)
    colours = {thing.colour for each in asked for thing in each.include} - {None}
    assert colours <= {colour for _, colour in detector.labels}
    assert json.loads((detector_folder() / "config.json").read_text())["labels"] and tensors(shapes()).shape == (3, 3, 128, 128)
