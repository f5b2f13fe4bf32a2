"""Whatever comes over the wire: each malformed request is a clear refusal, and the next one works."""

import io
import json
import re
import struct
import zlib

import httpx
import pytest
from PIL import Image, PngImagePlugin
from web.calling import FILE, call, generate, sent

pytestmark = pytest.mark.slow


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that unfolds to side x side pixels."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * (side + 1)) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png(size=(32, 32), **more) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, "blue").save(data, "PNG", **more)
    return data.getvalue()


REFUSED = {
    "a long prompt": ({"prompt": "x" * 501}, "501 characters; the most that is taken here is 500"),
    "a prompt of a megabyte": ({"prompt": "x" * 2**20}, "1,048,576 characters"),
    "a number for a prompt": ({"prompt": 3}, "prompt 3 is not a text"),
    "an object for a prompt": ({"prompt": {"a": 1}}, "is not a text"),
    "a list for a prompt": ({"prompt": ["a"]}, "is not a text"),
    "nothing for a prompt": ({"prompt": None}, "is not a text"),
    "a number for a negative": ({"negative": 5}, "negative 5 is not a text"),
    "many steps": ({"steps": "21"}, "steps 21 is more than 20"),
    "no steps": ({"steps": "0"}, "steps 0"),
    "steps below none": ({"steps": -3}, "steps -3"),
    "a sweep without an end": ({"steps": "1..999999999"}, "give whole numbers"),
    "steps by a word": ({"steps": "many"}, "give whole numbers"),
    "steps by a list": ({"steps": [1, 2]}, "is not a number"),
    "an infinite step": ({"steps": "inf"}, "give whole numbers"),
    "guidance by a word": ({"guidance": "high"}, "give numbers"),
    "guidance of nan": ({"guidance": "nan"}, "is not a strength"),
    "guidance below none": ({"guidance": "-1"}, "is not a strength"),
    "guidance beyond": ({"guidance": 1e9}, "is not a strength"),
    "many pictures": ({"count": 7}, "the number of pictures 7 is more than 6"),
    "many by a sweep": ({"count": 3, "guidance": "1,2,3"}, "the number of pictures 9 is more than 6"),
    "no pictures": ({"count": 0}, "count 0 is not a whole number of at least 1"),
    "half a picture": ({"count": 1.5}, "count 1.5 is not a whole number"),
    "a yes for a count": ({"count": True}, "count True is not a whole number"),
    "a huge count": ({"count": 10**30}, "is more than 6"),
    "a large picture": ({"size": "264"}, "size 264 pixels is more than 256"),
    "a huge picture": ({"size": "999999x999999"}, "999,999 pixels"),
    "an odd size": ({"size": "33"}, "does not fit this model"),
    "a size by words": ({"size": "64x"}, "is no size"),
    "a size of nothing": ({"size": "0"}, "does not fit this model"),
    "a size by a list": ({"size": [64, 64]}, "is not a text"),
    "an unknown solver": ({"solver": "ddim"}, "does not exist"),
    "an unknown schedule": ({"schedule": "x"}, "does not exist"),
    "a schedule by a number": ({"schedule": 1}, "is not a text"),
    "an unknown rule": ({"guidance_rule": "x"}, "does not exist"),
    "a rule that needs a second model": ({"guidance_rule": "autoguidance"}, "does not exist"),
    "a seed below none": ({"seed": -1}, "seed -1"),
    "a seed beyond": ({"seed": 2**64}, "seed"),
    "a seed by a word": ({"seed": "lucky"}, "seed 'lucky'"),
    "a path for a model": ({"model": "/etc"}, "no model '/etc'"),
    "a way out for a model": ({"model": "../../secret"}, "no model"),
    "a number for a model": ({"model": 1}, "model 1 is not a text"),
    "a path for a LoRA": ({"lora": "/etc/passwd"}, "no LoRA '/etc/passwd'"),
    "a strength beyond": ({"lora_strength": 1e6}, "lora_strength"),
    "a strength of a word": ({"lora_strength": "full"}, "lora_strength 'full' needs lora"),
    "a mask alone": ({"mask": {"path": "/etc/passwd"}}, "mask"),
    "a path for a picture": ({"image": {"path": "/etc/passwd"}}, "image is no file that was sent here"),
    "a text for a picture": ({"image": "/etc/passwd"}, "image is no file"),
    "a file of Gradio's kind": ({"image": {"path": "/etc/passwd"} | FILE}, "no file that was sent here"),
    "an address for a picture": ({"image": {"path": "http://localhost/"} | FILE}, "no file that was sent here"),
    "a folder for a picture": ({"image": {"path": "."}}, "image is no file that was sent here"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_malformed_request_is_refused_clearly_and_the_next_works(served, what, capfd):
    values, said = REFUSED[what]
    kind, answer = generate(served.url, **values)
    assert kind == "error"
    assert re.search(said, answer["error"]) and "Traceback" not in capfd.readouterr().err
    assert generate(served.url)[0] == "complete"


RAW = {
    "no JSON": b"{",
    "nothing": b"",
    "a number": b"1",
    "a list": b"[1, 2]",
    "an object without data": b'{"date": []}',
    "data that is no list": b'{"data": 5}',
    "NaN, which is no JSON": b'{"data": [NaN]}',
    "bytes that are no UTF-8": b'{"data": ["\xff\xfe"]}',
    "nested deeply": b'{"data": [' + b"[" * 50_000 + b"]" * 50_000 + b"]}",
    "too many values": b'{"data": ' + json.dumps(["a"] * 40).encode() + b"}",
}


@pytest.mark.parametrize("what", RAW)
def test_what_is_no_request_is_refused_and_the_next_works(served, what):
    kind, _ = call(served.url, None, raw=RAW[what])
    assert kind == "error" or 400 <= int(kind) < 600 and int(kind) != 404
    assert generate(served.url)[0] == "complete"


PICTURES = {
    "a bomb": (bomb(20_000), "pixels is more than|exceeds limit"),
    "a smaller bomb": (bomb(7_000), "49,000,000 pixels is more than 40,000,000"),
    "no picture": (b"hello", "not a picture"),
    "an empty file": (b"", "empty|not a picture|no file"),
    "a cut picture": (png((400, 400))[:200], "cannot read"),
    "a page": (b"<html><script>alert(1)</script></html>", "not a picture"),
    "a postscript program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
}


@pytest.mark.parametrize("what", PICTURES)
def test_a_picture_that_is_none_or_too_large_is_refused_before_it_is_decoded(served, what):
    data, said = PICTURES[what]
    kind, answer = generate(served.url, image=sent(served.url, data))
    assert kind == "error" and re.search(said, answer["error"])
    assert generate(served.url)[0] == "complete"


@pytest.mark.parametrize("spelling", ["{}", "/{}", "{uploads}/../{name}", "{uploads}/link.png", "file://{}"])
def test_no_picture_of_the_server_can_be_drawn_from(served, tmp_path, spelling):
    secret = served.uploads.parent / f"{tmp_path.name}.png"
    secret.write_bytes(png())
    (served.uploads / "link.png").unlink(missing_ok=True)
    (served.uploads / "link.png").symlink_to(secret)
    path = spelling.format(secret, uploads=served.uploads, name=secret.name)
    for image in ({"path": path}, {"path": path} | FILE, {"path": path, "url": path} | FILE):
        kind, answer = generate(served.url, image=image)
        assert kind == "error" and "no file that was sent here" in answer["error"]
    secret.unlink()


def test_what_is_sent_in_is_bounded(serving):
    small = serving(upload=100_000)
    answer = httpx.post(f"{small.url}/gradio_api/upload", files={"files": ("p.png", b"x" * 200_000)}, timeout=60)
    assert answer.status_code == 413
    answer = httpx.post(f"{small.url}/gradio_api/call/generate", content=b"x" * 500_000, timeout=60)
    assert answer.status_code == 413


def test_a_picture_on_its_side_is_turned_upright(served):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    picture = Image.new("RGB", (64, 32), "blue")
    picture.paste("red", (0, 0, 32, 32))
    data = io.BytesIO()
    picture.save(data, "JPEG", exif=exif)
    kind, pictures = generate(served.url, image=sent(served.url, data.getvalue(), "p.jpg"))
    assert kind == "complete"
    source = Image.open(pictures[0][0]["settings"]["image"])
    assert source.size == (32, 64) and source.getpixel((16, 4))[0] > 200


def test_words_that_a_browser_or_a_terminal_would_obey_are_shown_inert(served, capfd):
    prompt = '<img src=x onerror="alert(1)"> \x1b[31mred\x1b[0m {{7*7}} ${value} </script>'
    kind, answer = generate(served.url, prompt=prompt)
    name = answer[0][0]["name"]
    assert kind == "complete" and answer[0][0]["settings"]["prompt"] == prompt and "<" not in name and "\x1b" not in name
    shown = served.studio.details(name) + served.studio.tiles(10)
    assert "<img src=x" not in shown and "\x1b" not in shown and "&lt;img src=x onerror=" in shown
    odd = PngImagePlugin.PngInfo()
    odd.add_itxt("latentfm", json.dumps({"prompt": "<script>1</script>", "model": "<b>x</b>", "solver": "<i>"}))
    named = served.studio.gallery.folder / '<svg onload="1">.png'
    named.write_bytes(png(pnginfo=odd))
    shown = served.studio.details(named.name) + served.studio.tiles(10)
    assert "<script>" not in shown and "<svg" not in shown and "<b>x" not in shown and "<i>" not in shown
    kind, answer = generate(served.url, prompt="<b>" + "\x1b[2J" * 200)
    assert kind == "error" and "\x1b" not in answer["error"]
    assert "\x1b[" not in "".join(capfd.readouterr())
