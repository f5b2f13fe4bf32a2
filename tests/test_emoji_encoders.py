"""What the bundled model's text encoders learn from, and that their training goes on where it was interrupted."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts" / "emoji"))
import encoders
import pairs as learning
from encoders import Drawing, from_patches
from pairs import PARTS, Pairs, contrast


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    for number, part in enumerate(PARTS):
        (tmp_path / part).mkdir()
        rows = [{"file_name": f"{i}.png", "text": [f"{part} {i}", f"a {part} {i}"]} for i in range(number + 2)]
        (tmp_path / part / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for i in range(number + 2):
            Image.new("RGB", (128, 128), (40 * number, 10 * i, 0)).save(tmp_path / part / f"{i}.png")
    return Pairs(tmp_path, [[f"word {i}", f"other word {i}", f"what word {i} is"] for i in range(80)])


def test_pairs_are_pictures_with_their_own_captions_in_the_shares_said(pairs: Pairs) -> None:
    drawn = {part: 0 for part in PARTS}
    for step in range(60):
        indices, captions, rng = pairs.batch(20, step, seed=1)
        images = pairs.images(indices, rng)
        assert images.shape == (20, 3, 64, 64)
        for index, caption, image in zip(indices, captions, images, strict=True):
            assert caption in pairs.captions[index]
            part, number = caption.removeprefix("a ").split()
            shade = torch.tensor([40 * list(PARTS).index(part), 10 * int(number), 0]) / 127.5 - 1
            torch.testing.assert_close(image[:, 32, 32], shade.float())
            drawn[part] += 1
    for part, share in PARTS.items():
        assert drawn[part] / 1200 == pytest.approx(share, abs=0.05)
    assert pairs.batch(20, 7, 1)[:2] == pairs.batch(20, 7, 1)[:2] != pairs.batch(20, 8, 1)[:2]


def test_texts_of_a_batch_mean_the_same_by_twos(pairs: Pairs) -> None:
    texts = pairs.same_meaning(random.Random(0))
    one, other = texts[: learning.MEANINGS], texts[learning.MEANINGS :]
    assert all(a != b and a.split(" is")[0].split()[-1] == b.split(" is")[0].split()[-1] for a, b in zip(one, other, strict=True))
    assert {"plain 0", "scenes 3", "what word 5 is"} <= set(pairs.texts())


def test_the_contrast_is_least_where_each_finds_its_own() -> None:
    own = torch.eye(8)
    assert contrast(torch.cat([own, own])) < 1e-4 < 1 < contrast(torch.cat([own, own.roll(1, 0)]))


def test_patches_are_put_where_they_belong() -> None:
    whole = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    cells = [whole[:, :, i : i + 2, j : j + 2].flatten(1) for i in range(0, 8, 2) for j in range(0, 8, 2)]
    assert torch.equal(from_patches(torch.stack(cells, dim=1), whole[0].shape), whole)


def test_a_drawing_begins_as_nothing_and_can_learn_one() -> None:
    torch.manual_seed(0)
    drawing, hidden = Drawing(torch.Size((2, 8, 8))), torch.randn(3, 5, encoders.T5_WIDTH)
    wanted = torch.randn(3, 2, 8, 8)
    assert drawing(hidden).abs().max() < 0.1
    optimizer = torch.optim.Adam(drawing.parameters(), lr=1e-3)
    for _ in range(60):
        loss = (drawing(hidden) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_training_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    def trained(out: Path, stop: int | None = None) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Linear(4, 4)

        def loss_at(step: int) -> torch.Tensor:
            if step == stop:
                raise Stopped
            return module(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean()

        encoders.train(module, loss_at, 12, 1e-2, out)
        return module

    monkeypatch.setattr(encoders.Run, "due", lambda run: True)
    whole = trained(tmp_path / "whole")
    with pytest.raises(Stopped):
        trained(tmp_path / "broken", stop=7)
    assert torch.equal(trained(tmp_path / "broken").weight, whole.weight)
