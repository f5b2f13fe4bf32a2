"""The gallery: the outputs folder and nothing else; thumbnails; settings shown, and taken again."""

import io
import os

import pytest
from PIL import Image

from latentfm.errors import InputError
from latentfm.pictures import save_png
from latentfm.web.gallery import Gallery


def drawn(folder, name: str, size=(8, 8), **settings):
    return save_png(Image.new("RGB", size, "blue"), folder, name, {"prompt": "a cat", "seed": 7, "steps": 4, "guidance": 2.0} | settings)


def test_the_folder_is_the_gallery_newest_first(tmp_path):
    gallery = Gallery(tmp_path / "outputs")
    assert gallery.names() == []
    for age, name in enumerate(("new", "older", "oldest")):
        path = drawn(gallery.folder, name)
        os.utime(path, (1e9 - age, 1e9 - age))
    (gallery.folder / "notes.txt").write_text("x")
    (gallery.folder / "folder.png").mkdir()
    (gallery.folder / "link.png").symlink_to(path)
    assert gallery.names() == ["new.png", "older.png", "oldest.png"] and gallery.names(1) == ["new.png"]
    assert Gallery(gallery.folder).read("new.png") == (gallery.folder / "new.png").read_bytes()


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a/b.png", ".png", ".hidden.png", "x.txt", "link.png", "none.png", "x\0.png", "", "a\\b.png"]
)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    gallery = Gallery(tmp_path / "outputs")
    drawn(tmp_path, "x")
    drawn(gallery.folder, "mine")
    (gallery.folder / "link.png").symlink_to(tmp_path / "x.png")
    with pytest.raises(InputError, match="there is no picture"):
        gallery.read(name)


def test_thumbnails_are_small_and_follow_the_picture(tmp_path):
    gallery = Gallery(tmp_path)
    Image.effect_noise((900, 600), 80).convert("RGB").save(tmp_path / "large.png")
    first = gallery.small("large.png")
    assert Image.open(io.BytesIO(first)).size == (320, 213) and len(first) < (tmp_path / "large.png").stat().st_size / 5
    Image.effect_noise((600, 900), 80).convert("RGB").save(tmp_path / "large.png")
    assert Image.open(io.BytesIO(gallery.small("large.png"))).size == (213, 320)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(InputError):
        gallery.small("broken.png")


def test_settings_are_shown_without_the_servers_folders(served):
    folder = served.studio.gallery.folder
    drawn(folder, "shown", model="/home/someone/runs/mine/model", lora=["/home/someone/secret/style.safetensors"], lora_strength=[0.5])
    told = served.studio.details("shown.png")
    assert "a cat" in told and ">mine<" in told and "style.safetensors" in told and "0.5" in told and "someone" not in told
    assert 'href="pictures/shown.png"' in told
    Image.new("RGB", (8, 8)).save(folder / "plain.png")
    assert "carries no settings" in served.studio.details("plain.png")
    with pytest.raises(InputError):
        served.studio.details("../shown.png")


def test_a_pictures_settings_fill_the_form_and_name_nothing_that_is_not_here(served):
    from latentfm.web.reuse import again

    models, gallery = served.studio.models, served.studio.gallery
    picture, mask = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32), 255)
    paths = []
    for each in (picture, mask):
        data = io.BytesIO()
        each.save(data, "PNG")
        paths.append(str(gallery.keep_source(data.getvalue())))
    told = {"prompt": "a dog", "negative_prompt": "a cat", "seed": 2**62 + 1, "steps": 9, "guidance": 2.5, "solver": "heun", "width": 32,
            "height": 48, "strength": 0.4, "image": paths[0], "mask": paths[1],
            "model": str(models.folders[models.names()[0]])}  # fmt: skip
    found, remarks = again(told, served.studio)
    assert not remarks and found["seed"] == str(2**62 + 1) and found["size"] == "32x48" and found["keep"] is True
    assert (found["prompt"], found["negative"], found["solver"], found["strength"]) == ("a dog", "a cat", "heun", 0.4)
    assert found["model"] == models.names()[0] and found["canvas"]["background"].size == (512, 512)
    assert found["canvas"]["layers"][0].getchannel("A").getextrema() == (153, 153)
    found, remarks = again(told | {"guidance_rule": "autoguidance", "solver": "from elsewhere"}, served.studio)
    assert (found["guidance_rule"], found["solver"]) == ("cfg", "own")
    assert remarks == ["solver from elsewhere is not on this page", "guidance_rule autoguidance is not on this page"]
    elsewhere = told | {"image": "/etc/passwd", "mask": "/etc/shadow", "model": "/root/model", "lora": ["/root/x"], "shift": 3.0}
    found, remarks = again(elsewhere, served.studio)
    assert found["canvas"] is None and found["model"] == models.names()[0] and found["lora"] is None and len(remarks) == 4


def test_pictures_that_others_are_drawn_from_are_kept_within_bounds(tmp_path, monkeypatch):
    gallery = Gallery(tmp_path)
    monkeypatch.setattr("latentfm.web.gallery.SOURCE_BYTES", 30)
    paths = []
    for number in range(3):
        paths.append(gallery.keep_source(bytes([number]) * 10))
        os.utime(paths[-1], (number, number))
    assert gallery.keep_source(bytes([0]) * 10) == paths[0]  # used again
    own = paths[0].parent / "mine.png"
    own.write_bytes(b"not one of these" * 10)
    newest = gallery.keep_source(b"new picture")
    assert [path.exists() for path in (*paths, newest, own)] == [True, False, False, True, True]
    large = gallery.keep_source(b"larger than all" * 10)
    assert large.exists() and not newest.exists() and gallery.source(str(large)) == large and gallery.source(str(newest)) is None
