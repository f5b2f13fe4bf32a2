"""Train the detector by which `latentfm evaluate` looks at the project's own art, and validate it on composed pictures.

    python scripts/emoji/build.py --work build/emoji fetch catalogue render       # the pictures of the things
    python scripts/emoji/detector.py --work build/emoji --out build/emoji/detector train
    python scripts/emoji/detector.py --work build/emoji --out build/emoji/detector validate  # then copy it to assets/detector

Pictures are composed as they are asked for: one to four things on white or a colour, in places and sizes of their own, things that it
knows beside things that it does not, at 128 or 64 pixels, blurred and with noise on them. What is validated on has other seeds, so other
compositions; and drawings of known things in the (style, thing) pairs that are held out of every training are told apart.
"""

import argparse
import json
import math
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from english import article, countable, counted
from PIL import Image
from render import render
from safetensors.torch import save_file
from scenes import COLOURS, PLACES
from sets import PLAIN, STYLES, Icon, read_catalogue
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from latentfm.evaluation import intervals
from latentfm.evaluation.detection import Detection
from latentfm.evaluation.emoji import CELLS, SIZE, CenterNet, EmojiDetector, tensors
from latentfm.evaluation.geneval import Asked, Thing, read_asked, verdict

# the art's names of what is known and, where it is another, the class: several looks of a thing are one class
THINGS = {
    "cat face": "cat", "dog face": "dog", "lion": None, "tiger face": "tiger", "fox": None, "panda": None, "elephant": None,
    "penguin": None, "owl": None, "frog": None, "turtle": None, "octopus": None, "crab": None, "butterfly": None, "snail": None,
    "whale": None, "fish": None, "duck": None, "bat": None, "honeybee": "bee", "sunflower": None, "rose": None, "tulip": None,
    "cactus": None, "mushroom": None, "banana": None, "lemon": None, "strawberry": None, "pineapple": None, "watermelon": None,
    "carrot": None, "broccoli": None, "eggplant": None, "pizza": None, "hamburger": None, "taco": None, "doughnut": None, "cookie": None,
    "ice cream": None, "birthday cake": "cake", "teapot": None, "automobile": "car", "bus": None, "bicycle": None, "airplane": None,
    "rocket": None, "sailboat": None, "helicopter": None, "tractor": None, "house": None, "castle": None, "umbrella": None,
    "snowman": None, "balloon": None, "trophy": None, "basketball": None, "guitar": None, "violin": None, "drum": None,
    "telephone": None, "television": None, "camera": None, "light bulb": None, "key": None, "hammer": None, "scissors": None,
    "crown": None, "top hat": None, "glasses": None, "backpack": None, "bell": None, "alarm clock": None, "chair": None,
    "cat": None, "black cat": "cat", "dog": None, "tiger": None, "spouting whale": "whale", "tropical fish": "fish",
    "brown mushroom": "mushroom", "shortcake": "cake", "oncoming automobile": "car", "oncoming bus": "bus", "small airplane": "airplane",
    "snowman without snow": "snowman", "camera with flash": "camera", "old key": "key", "long drum": "drum",
}  # fmt: skip
COLOURED = {
    "heart": ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black"),
    "circle": ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black"),
    "square": ("red", "orange", "yellow", "green", "blue", "purple", "brown"),
    "apple": ("red", "green"),
    "book": ("green", "blue", "orange"),
}
RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
STYLE_WEIGHTS = {style: 3 if style == PLAIN else 1 for style in STYLES}
WIDTHS = (48, 96, 128)
BATCH, RATE, STEPS = 48, 2e-3, 5000


def labels_of(icons: list[Icon]) -> dict[str, tuple[str, str | None]]:
    """The art's own name of each thing that is known: its class and colour. Other things of such a name ("broken heart") are neither known
    nor unknown."""
    known = {art: (ours or art, None) for art, ours in THINGS.items()}
    known |= {f"{colour} {thing}": (thing, colour) for thing, colours in COLOURED.items() for colour in colours}
    return {name: label for name, label in known.items() if any(icon.label == name for icon in icons)}


class Art:
    """The drawings: by style those of known things (label, RGBA), and those of others."""

    def __init__(self, icons: list[Icon], large: Path | None, others: int, held_out: bool = False):
        self.names = labels_of(icons)
        self.labels = list(dict.fromkeys(self.names.values()))  # in the order of THINGS and COLOURED
        self.known: dict[str, list[tuple[int, Image.Image]]] = {style: [] for style in STYLES}
        self.other: dict[str, list[Image.Image]] = {style: [] for style in STYLES}
        rng, words = random.Random("others"), {word for name, _ in self.labels for word in (name.split()[-1], f"{name.split()[-1]}s")}
        for icon in rng.sample(icons, len(icons)):
            wanted = icon.label in self.names
            if not wanted and words & set(re.findall(r"[a-z-]+", icon.label)):
                continue
            if icon.held_out != held_out or not (wanted or (len(self.other[icon.style]) < others and icon.group in (0, 3, 4, 5, 6, 7))):
                continue
            if large is None:
                image = render(icon.svg, SIZE)
            else:
                image = Image.open(large / f"{icon.stem}.png").convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            if wanted:
                self.known[icon.style].append((self.labels.index(self.names[icon.label]), image))
            else:
                self.other[icon.style].append(image)


def with_articles(*nouns: str) -> str:
    return " and ".join(map(article, nouns))


def prompts(labels: list[tuple[str, str | None]]) -> list[dict]:
    """The prompts of this art in GenEval's tasks, as lines of its metadata.jsonl."""
    rng, rows = random.Random("prompts"), []
    plain = [name for name, colour in labels if colour is None]
    several = [name for name in plain if countable(name)]
    coloured = [(name, colour) for name, colour in labels if colour is not None]

    def add(tag: str, prompt: str, include: list[dict], exclude: list[dict] | None = None) -> None:
        rows.append({"tag": tag, "prompt": prompt, "include": include, **({"exclude": exclude} if exclude else {})})

    for name in plain:
        add("single_object", article(name), [{"class": name, "count": 1}])
    for name, colour in coloured:
        add("colors", article(f"{colour} {name}"), [{"class": name, "count": 1, "color": colour}])
    for number in range(36):
        one, other = rng.sample(plain, 2)
        add("two_object", with_articles(one, other), [{"class": one, "count": 1}, {"class": other, "count": 1}])
        name, many = rng.choice(several), 2 + number % 3
        add("counting", counted(name, many), [{"class": name, "count": many}], [{"class": name, "count": many + 1}])
        one, other = rng.sample(plain, 2)
        relation, words = list(RELATIONS.items())[number % 4]
        asked = [{"class": other, "count": 1}, {"class": one, "count": 1, "position": [relation, 0]}]
        add("position", f"{article(one)} {words} {article(other)}", asked)
        (one, colour), (other, second) = rng.sample(coloured, 2)
        while one == other or colour == second:
            (one, colour), (other, second) = rng.sample(coloured, 2)
        asked = [{"class": one, "count": 1, "color": colour}, {"class": other, "count": 1, "color": second}]
        add("color_attr", with_articles(f"{colour} {one}", f"{second} {other}"), asked)
    order = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    return sorted(rows, key=lambda row: order.index(row["tag"]))


def paste(canvas: Image.Image, image: Image.Image, x: float, y: float, side: int) -> tuple[float, ...]:
    """The box of what is seen of a drawing that is laid on the canvas, its middle at (x, y), in pixels."""
    small = image.convert("RGBa").resize((side, side), Image.Resampling.BILINEAR).convert("RGBA")
    left, top = round(x - side / 2), round(y - side / 2)
    canvas.alpha_composite(small.crop((max(0, -left), max(0, -top), side, side)), (max(0, left), max(0, top)))
    seen = small.getchannel("A").point(lambda value: 255 * (value > 40)).getbbox() or (0, 0, side, side)
    return tuple(max(0, min(SIZE - 1e-3, edge + at)) for edge, at in zip(seen, (left, top) * 2))


def compose(art: Art, rng: random.Random, unknown: float = 0.25) -> tuple[Image.Image, list[tuple[int, tuple[float, ...]]]]:
    """(a picture, (label, box) of each known thing in it): a function of the generator's state."""
    (style,) = rng.choices(STYLES, weights=[STYLE_WEIGHTS[style] * bool(art.known[style]) for style in STYLES])
    ground = (255, 255, 255) if rng.random() < 0.7 else rng.choice(list(COLOURS.values()))
    canvas = Image.new("RGBA", (SIZE, SIZE), (*ground, 255))
    places = [((64, 64, 128),), *PLACES.values()]
    (chosen,) = rng.choices(places, weights=(4, 2, 1, 1, 2, 2, 1, 2, 2))
    same = rng.choice(art.known[style]) if rng.random() < 0.5 else None  # things are counted
    found = []
    for x, y, side in chosen:
        side = round(side * rng.uniform(0.8, 1.1 if len(chosen) > 1 or side < 100 else 1.0))
        room = 4 if len(chosen) > 1 else max(2, (SIZE - side) // 2)
        x, y = x + rng.uniform(-room, room), y + rng.uniform(-room, room)
        if art.other[style] and rng.random() < unknown:
            paste(canvas, rng.choice(art.other[style]), x, y, side)
            continue
        label, image = same or rng.choice(art.known[style])
        found.append((label, paste(canvas, image, x, y, side)))
    return canvas.convert("RGB"), found


def worn(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures as a model may draw them: some at half the size, some blurred, lighter or darker, all with some noise."""
    at = torch.rand(4, generator=generator)
    if at[0] < 0.6:
        side = 64 if at[1] < 0.6 else int(56 + 64 * at[1])
        pictures = F.interpolate(F.interpolate(pictures, size=(side, side), mode="area"), size=(SIZE, SIZE), mode="bicubic")
    count = len(pictures)
    gain = 1 + 0.15 * torch.randn(count, 1, 1, 1, generator=generator)
    shift = 0.05 * torch.randn(count, 3, 1, 1, generator=generator)
    coarse = torch.randn(count, 3, 16, 16, generator=generator) * 0.1 * torch.rand(count, 1, 1, 1, generator=generator)
    fine = torch.randn(pictures.shape, generator=generator) * 0.08 * torch.rand(count, 1, 1, 1, generator=generator)
    coarse = F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")
    return (1 - (1 - pictures) * gain + shift + coarse + fine).clamp(-1, 1)


def batch_of(art: Art, step: int, size: int = BATCH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pictures, heat [B, labels, 8, 8] that is 1 at the things' cells and less around them, boxes [B, 4, 8, 8], cells with a thing)."""
    rng = random.Random(f"detector/{step}")
    made = [compose(art, rng) for _ in range(size)]
    heat, boxes = torch.zeros(size, len(art.labels), CELLS, CELLS), torch.zeros(size, 4, CELLS, CELLS)
    there, cells = torch.zeros(size, CELLS, CELLS, dtype=torch.bool), torch.arange(CELLS, dtype=torch.float32)
    for number, (_, things) in enumerate(made):
        for label, (left, top, right, bottom) in things:
            x, y = ((low + high) / 2 / SIZE * CELLS for low, high in ((left, right), (top, bottom)))
            column, row = int(x), int(y)
            spread = torch.exp(-((cells[None] - column) ** 2 + (cells[:, None] - row) ** 2) / (2 * 0.6**2))
            heat[number, label] = torch.maximum(heat[number, label], spread)
            boxes[number, :, row, column] = torch.tensor([x - column, y - row, (right - left) / SIZE, (bottom - top) / SIZE])
            there[number, row, column] = True
    pictures = worn(tensors([image for image, _ in made]), torch.Generator().manual_seed(step))
    return pictures, heat, boxes, there


class Batches(Dataset):
    """`batch_of` by the number of the step."""

    def __init__(self, art: Art):
        self.art = art

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return batch_of(self.art, step)


def loss_of(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """CenterNet's: the focal loss of Gaussian peaks (its eq. 1), and the boxes' mean absolute error."""
    pictures, heat, boxes, there = batch
    logits, given = network(pictures)
    sure = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    right = heat == 1
    focal = torch.where(right, (1 - sure) ** 2 * sure.log(), (1 - heat) ** 4 * sure**2 * (1 - sure).log())
    apart = (given.float() - boxes).abs().sum(dim=1)[there].mean()
    return -focal.sum() / right.sum() + 2 * apart


def train(art: Art, out: Path, steps: int) -> None:
    """Trains, from the last checkpoint on if there is one, and writes OUT/{model.safetensors, config.json}."""
    torch.manual_seed(0)
    network = CenterNet(len(art.labels), WIDTHS)
    averaged = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.02)
    out.mkdir(parents=True, exist_ok=True)
    kept, first = out / "checkpoint.pt", 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, first = state["averaged"], state["step"]
    network.to(memory_format=torch.channels_last).train()
    began = time.monotonic()
    batches = DataLoader(Batches(art), batch_size=None, sampler=range(first, steps), num_workers=2)
    for step, batch in zip(range(first, steps), batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.01)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(network, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        with torch.no_grad():
            for name, value in network.state_dict().items():
                averaged[name].lerp_(value, 1 - min(0.998, (step + 1) / (step + 20)))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}, {(time.monotonic() - began) / (step + 1 - first):.2f} s a step", flush=True)
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged, "step": step + 1}
            torch.save(state, out / "checkpoint.partial")
            (out / "checkpoint.partial").replace(kept)
            write(averaged, art, WIDTHS, out)


def write(weights: dict[str, Tensor], art: Art, widths: Sequence[int], out: Path) -> None:
    """Writes what EmojiDetector.load reads, in half precision."""
    save_file({name: value.half().contiguous() for name, value in weights.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({"widths": widths, "labels": art.labels}, indent=1) + "\n")


def shown(art: Art, style: str, things: list[Thing], rng: random.Random, ground: tuple[int, int, int]) -> Image.Image | None:
    """A picture of exactly these things in one style, in the order of their places; None where the style lacks one."""
    drawings = []
    for thing in things:
        known = [image for label, image in art.known[style] if art.labels[label] == (thing.name, thing.colour)]
        if not known:
            return None
        drawings += [known[0]] * thing.count
    upright = any(thing.position and thing.position[0] in ("above", "below") for thing in things)
    places = PLACES[{1: "one", 2: "down" if upright else "across", 3: "three", 4: "four"}[len(drawings)]]
    if any(thing.position and thing.position[0] in ("left of", "above") for thing in things):
        drawings.reverse()
    canvas = Image.new("RGBA", (SIZE, SIZE), (*ground, 255))
    for image, (x, y, side) in zip(drawings, places, strict=True):
        paste(canvas, image, x + rng.uniform(-3, 3), y + rng.uniform(-3, 3), round(side * rng.uniform(0.85, 1.05)))
    return canvas.convert("RGB")


def spoiled(asked: Asked, rng: random.Random, labels: list[tuple[str, str | None]]) -> list[Thing]:
    """Things that are not what is asked for: turned round, one more or less, of another colour, or another one."""
    things = list(asked.include)
    if asked.task == "position":
        relation = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[things[1].position[0]]
        return [things[0], Thing(things[1].name, 1, None, (relation, 0))]
    if asked.task == "counting":
        return [Thing(things[0].name, rng.choice([n for n in (1, 2, 3, 4) if n != things[0].count]))]
    which = rng.randrange(len(things))
    old = things[which]
    same = [label for label in labels if label[0] == old.name and label[1] != old.colour]
    name, colour = rng.choice(same if old.colour else [label for label in labels if label[0] not in {thing.name for thing in things}])
    things[which] = Thing(name, 1, colour)
    return things


def looks(pictures: list[Image.Image], wear: bool) -> list[Image.Image]:
    """The pictures as they are, or `worn`, BATCH at a time."""
    if not wear:
        return pictures
    made = []
    for start in range(0, len(pictures), BATCH):
        as_drawn = worn(tensors(pictures[start : start + BATCH]), torch.Generator().manual_seed(start))
        made += [Image.fromarray(((each.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()) for each in as_drawn]
    return made


def validate(art: Art, held_out: Art, out: Path) -> dict:
    """How often verdicts on composed pictures are as they should be, by task, style and wear; which labels are taken for which others."""
    detector = EmojiDetector.load(out)
    verdicts: dict[str, list[bool]] = defaultdict(list)
    confusion, totals, mistakes = Counter(), Counter(), []

    def found(pictures: list[Image.Image]) -> Iterator[list[Detection]]:
        for start in range(0, len(pictures), BATCH):
            yield from detector.detect(pictures[start : start + BATCH], detector.classes)

    for style in STYLES:
        cases = []
        for number, asked in enumerate(read_asked(out / "prompts.jsonl")):
            rng = random.Random(f"validation/{style}/{number}")
            ground = (255, 255, 255) if rng.random() < 0.7 else rng.choice(list(COLOURS.values()))
            for right, things in ((True, list(asked.include)), (False, spoiled(asked, rng, art.labels))):
                picture = shown(art, style, things, rng, ground)
                cases += [(asked, right, picture)] if picture is not None else []
        for wear in (False, True):
            for (asked, right, _), things in zip(cases, found(looks([picture for *_, picture in cases], wear)), strict=True):
                said, wrong = verdict(asked, things)
                wearing = "worn" if wear else "clean"
                for name in ("all", asked.task, f"style {style}", "shown" if right else "not shown"):
                    verdicts[f"{name}, {wearing}"].append(said == right)
                if said != right and not wear:
                    mistakes.append(f"{style}: '{asked.prompt}' {'is' if right else 'is not'} shown: {wrong or 'right'}")
    for name, drawings in (("known drawing", art), ("held-out drawing", held_out)):
        alone = [each for style in STYLES for each in drawings.known[style]]
        pictures = []
        for _, image in alone:
            canvas = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 255))
            paste(canvas, image, 64, 64, 110)
            pictures.append(canvas.convert("RGB"))
        for wear in (False, True):
            for (label, _), things in zip(alone, found(looks(pictures, wear)), strict=True):
                seen = " + ".join(" ".join(filter(None, (thing.colour, thing.label))) for thing in things) or "nothing"
                truth = " ".join(filter(None, reversed(art.labels[label])))
                verdicts[f"{name} alone, {'worn' if wear else 'clean'}"].append(seen == truth)
                totals[truth] += 1
                if seen != truth:
                    confusion[f"{name}: {truth} -> {seen}"] += 1
    return {
        "verdicts": {name: intervals.share(good, range(len(good))) for name, good in sorted(verdicts.items())},
        "confusion": dict(confusion.most_common()), "looked at": sum(totals.values()), "mistakes": mistakes[:60],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--out", type=Path, default=Path("build/emoji/detector"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("what", choices=("train", "validate"))
    given = parser.parse_args()
    icons, _ = read_catalogue(given.work / "catalogue.jsonl.gz")
    if given.what == "train":
        train(Art(icons, given.work / "pictures" / "large", others=150), given.out, given.steps)
        return
    art = Art(icons, given.work / "pictures" / "large", others=0)
    rows = prompts(art.labels)
    (given.out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = validate(art, Art(icons, None, others=0, held_out=True), given.out)
    (given.out / "validation.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for name, each in found["verdicts"].items():
        print(f"{name}: {each['value']:.2%} ({each['low']:.2%} to {each['high']:.2%}) of {each['of']:,}")
    print(*(f"{name} ({number})" for name, number in list(found["confusion"].items())[:30]), sep="\n")


if __name__ == "__main__":
    main()
