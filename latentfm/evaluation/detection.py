"""What finds things in pictures: a detector's answers, and any zero-shot detector of transformers by its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from latentfm.errors import InputError
from latentfm.evaluation.features import fingerprint
from latentfm.files import reading
from latentfm.words import shown

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from latentfm.evaluation.features import Clip

OVERLAP = 0.5  # of two boxes of one class: above it (intersection over union) the less sure one is the same thing
# GenEval's (Ghosh et al. 2023, evaluate_images.py)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOUR_SENTENCES = ("a photo of a {colour} {thing}", "a photo of a {colour}-colored {thing}", "a photo of a {colour} object")


@dataclass(frozen=True)
class Detection:
    """A thing in a picture: box (left, top, right, bottom) in pixels, score in [0, 1], colour where it is known."""

    label: str
    box: tuple[float, float, float, float]
    score: float
    colour: str | None = None


class Detector(Protocol):
    """What `latentfm evaluate` asks of a detector.

    fingerprint: tells its weights and settings from any others. tells_colours: whether its detections have colours.
    """

    name: str
    fingerprint: str
    tells_colours: bool

    def check(self, classes: Sequence[str]) -> None:
        """Raises InputError for a class that cannot be found."""

    def detect(self, pictures: "Sequence[Image.Image]", classes: Sequence[str]) -> list[list[Detection]]:
        """The things of `classes` in each picture, the surest first."""


class ZeroShotDetector:
    """A detector of transformers' that is told by words what to find: OWL-ViT, OWLv2, Grounding DINO and their like.

    threshold: the least score. clip: what tells the colours, of the boxes cut out, by GenEval's sentences (it has masks instead of boxes).
    Boxes of one class that overlap by more than OVERLAP count once.
    """

    def __init__(self, folder: Path, threshold: float = 0.3, device: "torch.device | str" = "cpu", clip: "Clip | None" = None):
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        if not (folder / "config.json").is_file():
            raise InputError(f"--detector {shown(folder)} has no config.json; give a folder of a transformers zero-shot detector, or emoji")
        with reading(f"--detector {shown(folder)}", "give a folder of a transformers zero-shot object detector, with its processor"):
            self.model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.model.to(device).eval()
        self.name, self.threshold = f"{type(self.model).__name__} {folder}, scores above {threshold:g}", threshold
        self.clip, self.tells_colours, self.fingerprint = clip, clip is not None, fingerprint(folder)

    def check(self, classes: Sequence[str]) -> None:
        """Nothing: any words will do."""

    def detect(self, pictures: "Sequence[Image.Image]", classes: Sequence[str]) -> list[list[Detection]]:
        """The things of `classes` in each picture, the surest first."""
        import torch
        from torchvision.ops import batched_nms

        sentence = "a photo of a {}" if self.model.config.model_type.startswith("owl") else "{}"
        texts = {sentence.format(name): name for name in classes}
        found = []
        with torch.no_grad():
            for picture in pictures:
                inputs = self.processor(text=[list(texts)], images=picture.convert("RGB"), return_tensors="pt").to(self.model.device)
                sizes, labels = [(picture.height, picture.width)], [list(texts)]
                (said,) = self.processor.post_process_grounded_object_detection(
                    self.model(**inputs), threshold=self.threshold, target_sizes=sizes, text_labels=labels
                )
                every = zip(said["text_labels"], said["scores"].cpu(), said["boxes"].cpu(), strict=True)
                rows = [(texts[text], score, box) for text, score, box in every if text in texts]
                names = [name for name, _, _ in rows]
                scores = torch.tensor([float(score) for _, score, _ in rows])
                boxes = torch.stack([box for _, _, box in rows]).float() if rows else torch.zeros(0, 4)
                kept = batched_nms(boxes, scores, torch.tensor([classes.index(name) for name in names], dtype=torch.long), OVERLAP)
                things = [Detection(names[i], tuple(boxes[i].tolist()), float(scores[i])) for i in kept.tolist()]
                found.append([self.coloured(picture, thing) for thing in things] if self.clip else things)
        return found

    def coloured(self, picture: "Image.Image", thing: Detection) -> Detection:
        """The thing with the colour that CLIP gives to what is in its box."""
        left, top, right, bottom = (round(edge) for edge in thing.box)
        crop = picture.convert("RGB").crop((left, top, max(right, left + 1), max(bottom, top + 1)))
        sentences = [text.format(colour=colour, thing=thing.label) for colour in COLOURS for text in COLOUR_SENTENCES]
        alike = (self.clip.images([crop]) @ self.clip.texts(sentences).T).view(len(COLOURS), -1).mean(dim=1)
        return Detection(thing.label, thing.box, thing.score, COLOURS[int(alike.argmax())])
