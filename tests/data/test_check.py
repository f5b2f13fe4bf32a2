"""The check of a dataset: each thing that can be wrong is made, and must be found by name; the rest against oracles."""

import hashlib
import html.parser
import io
import json
import threading
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from latentfm.data.buckets import Buckets, DataPlan
from latentfm.data.check.captions import limits_of, load_tokenizers
from latentfm.data.check.duplicates import exact_groups, near_groups, ones
from latentfm.data.check.findings import check, contact_sheet, quotas
from latentfm.data.check.page import NAMES_SHOWN, page
from latentfm.data.check.pictures import survey
from latentfm.data.images import Transform, load
from latentfm.data.sources import Dataset, Place, Sample, Share, read_folder
from latentfm.errors import InputError
from latentfm.interchange.components import load_text_encoders

PLAN = DataPlan(Buckets.make(64, 64, 8, 5, 2.0, 128), 4, 1.0, 4, {8: 1.0})


def picture(seed, width=64, height=64):
    """Eight by eight random colours, smoothed."""
    colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def put(folder, name, image, caption="a red apple", **options):
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **options)
    (folder / name).with_suffix(".txt").write_text(caption)


@pytest.fixture(scope="module")
def encoder(tiny_folder):
    return load_tokenizers(tiny_folder)


def findings_of(folder, encoder, plan=PLAN):
    return check(read_folder(folder), plan, encoder)[0]


def odd(found):
    return {row["kind"]: row["names"] for row in found["odd"]}


# Pictures


def test_each_odd_picture_is_named_for_what_it_is(tmp_path, encoder):
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path / "p", "animated.gif", picture(1), save_all=True, append_images=[picture(2)])
    put(tmp_path / "p", "cmyk.jpg", picture(3).convert("CMYK"))
    put(tmp_path / "p", "deep.png", Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)))
    put(tmp_path / "p", "palette.png", picture(4).convert("P"))
    put(tmp_path / "p", "transparent.png", picture(5).convert("RGBA").rotate(30))
    put(tmp_path / "p", "adobe.png", picture(6), icc_profile=b"\0" * 128 + b"Adobe RGB (1998)")
    put(tmp_path / "p", "srgb.png", picture(7), icc_profile=b"\0" * 128 + b"sRGB IEC61966-2.1")
    put(tmp_path / "p", "rotated.jpg", picture(8, 96, 48), exif=exif)
    put(tmp_path / "p", "tiny.png", picture(9, 20, 20))
    put(tmp_path / "p", "small.png", picture(10, 50, 50))
    put(tmp_path / "p", "plain.png", picture(11))
    found = findings_of(tmp_path / "p", encoder)
    assert odd(found) == {
        "animated": ["animated.gif"], "CMYK": ["cmyk.jpg"], "deep": ["deep.png"], "palette": ["animated.gif", "palette.png"],
        "transparent": ["transparent.png"], "ICC": ["adobe.png"], "rotated": ["rotated.jpg"], "tiny": ["tiny.png"],
        "enlarged": ["small.png"],
    }  # fmt: skip
    assert found["dropped"] == 0 and found["used"] == found["pictures"] == 11
    tall = next(row for row in found["buckets"] if row["worst"] == "rotated.jpg")
    assert tall["height"] > tall["width"]


def test_huge_pictures_are_named(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr("latentfm.data.check.pictures.HUGE", 64 * 64)
    put(tmp_path / "p", "a.png", picture(1, 65, 64))
    put(tmp_path / "p", "b.png", picture(2, 64, 64))
    assert odd(findings_of(tmp_path / "p", encoder)) == {"huge": ["a.png"]}


def test_what_cannot_be_used_is_named_with_its_reason(tmp_path, encoder):
    folder = tmp_path / "p"
    put(folder, "good.jpg", picture(1, 200, 200))
    for name, data in (("empty.png", b""), ("cut.jpg", (folder / "good.jpg").read_bytes()[:-900]), ("text.png", b"not a picture")):
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a blue car")
    put(folder, "masked.png", picture(2))
    Image.new("L", (32, 32), 255).save(folder / "masked.mask.png")
    put(folder, "black.png", picture(3))
    Image.new("L", (64, 64), 0).save(folder / "black.mask.png")
    picture(4).save(folder / "lonely.png")
    found = findings_of(folder, encoder)
    reasons = {row["name"]: row["reason"] for row in found["unusable"]}
    assert reasons.keys() == {"empty.png", "cut.jpg", "text.png", "masked.png", "black.png"}
    assert "the file is empty" in reasons["empty.png"] and "truncated" in reasons["cut.jpg"] and "not a picture" in reasons["text.png"]
    assert "the mask" in reasons["masked.png"] and "32 x 32" in reasons["masked.png"] and "is black" in reasons["black.png"]
    assert found["problems"] == [{"reason": "picture without a caption", "names": ["lonely.png"]}]
    assert found["used"] == 1 and found["dropped"] == 6
    assert sum(row["pictures"] for row in found["buckets"]) == 1


def test_a_dataset_without_a_usable_picture_has_findings_too(tmp_path, encoder):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a red apple")
    found = findings_of(tmp_path, encoder)
    assert found["used"] == 0 and found["sizes"] == {} and found["steps_an_epoch"] == 0
    assert "Left out" in page(found, [[] for _ in PLAN.buckets.shapes])


def in_places(count, log=None):
    """Samples whose pictures come from a place that logs each read."""
    data = io.BytesIO()
    picture(0).save(data, "PNG")

    def read(number):
        def fetch():
            if log is not None:
                log.append((number, threading.current_thread().name))
            return data.getvalue()

        return fetch

    return [Sample(Place(f"{i}", read(i)), ("x",), f"{i}") for i in range(count)]


def test_a_source_that_is_read_in_order_is_read_in_order_by_one_and_not_far_ahead():
    log, done = [], []

    def advance():
        done.append(len(log))

    found = survey(in_places(40, log), PLAN.buckets, 4, advance, workers=3)
    assert [number for number, _ in log] == list(range(40)) and len({thread for _, thread in log}) == 1
    assert all(reads - number <= 2 * 3 for number, reads in enumerate(done))  # pictures in memory
    assert found.usable.all() and (found.sizes == 64).all()


def test_the_survey_is_the_same_for_any_number_of_workers(tmp_path):
    for i in range(20):
        put(tmp_path / "p", f"{i:02d}.png", picture(i, 40 + i, 60 - i))
    one, four = (survey(read_folder(tmp_path / "p").samples, PLAN.buckets, 4, workers=n) for n in (1, 4))
    for name in ("usable", "sizes", "digests", "hashes", "colours"):
        assert np.array_equal(getattr(one, name), getattr(four, name)), name
    assert one.digests[3].tobytes() == hashlib.sha256((tmp_path / "p" / "03.png").read_bytes()).digest()
    assert one.sizes.tolist() == [[40 + i, 60 - i] for i in range(20)]


# Buckets


def test_the_bucket_table_is_what_the_buckets_say(tmp_path, encoder):
    sizes = [(int(w), int(h)) for w, h in np.random.default_rng(3).integers(30, 160, (30, 2))]
    for i, size in enumerate(sizes):
        put(tmp_path / "p", f"{i:02d}.png", picture(i, *size))
    found = findings_of(tmp_path / "p", encoder)
    assert sum(row["pictures"] for row in found["buckets"]) == 30
    for index, row in enumerate(found["buckets"]):
        mine = [i for i, bucket in enumerate(PLAN.buckets.of(sizes)[0]) if bucket == index]
        crops = PLAN.buckets.of([sizes[i] for i in mine])[1]
        assert row["pictures"] == len(mine) and row["share"] == pytest.approx(len(mine) / 30, abs=1e-4)
        assert row["mean_crop"] == pytest.approx(np.mean(crops), abs=1e-4) and row["worst_crop"] == pytest.approx(max(crops), abs=1e-4)
        assert row["worst"] == f"{mine[int(np.argmax(crops))]:02d}.png"
        assert row["enlarged"] == sum(row["width"] > sizes[i][0] or row["height"] > sizes[i][1] for i in mine)
        assert row["steps_an_epoch"] == len(mine) / 4 and row["left_out"] == 0
    assert found["steps_an_epoch"] == 7.5
    histogram = found["aspects"]
    assert sum(row["pictures"] for row in histogram) == 30 and histogram[8]["from"] < 1 < histogram[8]["to"]
    for row in histogram:
        assert row["pictures"] == sum((row["from"] or 0) <= w / h < (row["to"] or 1e9) for w, h in sizes)


def test_pictures_that_lose_too_much_are_left_out_worst_first(tmp_path, encoder):
    for name, size in (("wide.png", (256, 64)), ("wider.png", (400, 64)), ("square.png", (64, 64))):
        put(tmp_path / "p", name, picture(1, *size))
    plan = DataPlan(PLAN.buckets, 4, 0.4, 4, {8: 1.0})
    found = findings_of(tmp_path / "p", encoder, plan)
    assert [row["name"] for row in found["left_out"]] == ["wider.png", "wide.png"]
    assert found["left_out"][1]["crop"] == pytest.approx(PLAN.buckets.of([(256, 64)])[1].item(), abs=1e-4)
    assert found["used"] == 1 and found["dropped"] == 2 and [row["left_out"] for row in found["buckets"]] == [0, 0, 0, 0, 2]
    assert findings_of(tmp_path / "p", encoder)["dropped"] == 0


def test_steps_follow_the_rates_of_the_sources(tmp_path, encoder):
    samples = [
        Sample(place.path, place.captions, f"{name}/{i}", share=Share(name, rate, name == "b"))
        for name, rate, number in (("a", 3.0, 8), ("b", 0.25, 12))
        for i, place in enumerate(in_places(number))
    ]
    found = check(Dataset("two", tuple(samples), ()), PLAN, encoder)[0]
    assert [(row["name"], row["pictures"], row["draws_an_epoch"], row["regularisation"]) for row in found["sources"]] == [
        ("a", 8, 24.0, False), ("b", 12, 3.0, True)
    ]  # fmt: skip
    assert found["steps_an_epoch"] == 27 / 4


# Captions


def test_lengths_and_what_is_cut_are_those_of_the_encoders(tmp_path, encoder, tiny_folder):
    long = "a small brown dog in the park under a yellow sun " * 3
    texts = ["a red apple", "two green trees under a yellow sun", long, ""]
    for i, text in enumerate(texts):
        put(tmp_path / "p", f"{i}.png", picture(i), text)
    put(tmp_path / "p", "4.png", picture(4), "a red apple")
    found = findings_of(tmp_path / "p", encoder, DataPlan(PLAN.buckets, 4, 1.0, 4, {8: 1.0, 256: 1.0}))
    assert found["captions"] == 5 and found["distinct_captions"] == 4
    whole = load_text_encoders(tiny_folder, 48, 40)
    assert [(row["encoder"], row["limit"]) for row in found["tokens"]] == [
        ("text_encoder (CLIP)", 16), ("text_encoder_2 (CLIP)", 16), ("text_encoder_3 (T5)", 8), ("text_encoder_3 (T5)", 256)
    ]  # fmt: skip
    for row, (index, limit) in zip(found["tokens"], limits_of(encoder, (8, 256)), strict=True):
        lengths = sorted(len(whole.tokenizers[index](text.strip()).input_ids) for text in texts)
        assert row["lengths"]["min"] == lengths[0] and row["lengths"]["max"] == lengths[-1]
        assert row["lengths"]["median"] == np.median(lengths) and row["captions"] == 4
        lost = whole.lost_text(index, [text.strip() for text in texts], limit)
        assert row["truncated"] == len(lost) == sum(length > limit for length in lengths)
        assert {item["caption"]: item["lost"] for item in row["worst"]} == dict(lost)
        assert [item["tokens"] for item in row["worst"]] == sorted((n for n in lengths if n > limit), reverse=True)
    assert found["tokens"][0]["worst"][0]["name"] == "2.png" and found["tokens"][0]["worst"][0]["lost"].endswith("yellow sun")
    assert found["truncated"] == max(row["truncated"] for row in found["tokens"]) > 0
    assert found["empty_captions"] == ["3.png"]
    assert found["shared_captions"] == {
        "captions": 1, "most": [{"caption": "a red apple", "pictures": 2, "names": ["0.png", "4.png"]}]
    }  # fmt: skip


def test_an_encoder_that_is_not_there_has_no_row(tmp_path):
    from tiny import tiny_pipeline

    encoder = load_tokenizers(tiny_pipeline(tmp_path / "model", with_t5=False))
    assert [index for index, _ in limits_of(encoder, (8,))] == [0, 1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no text_encoder"):
        load_tokenizers(tmp_path / "empty")


# Duplicates


def brute_force(hashes, colours):
    groups = [{i} for i in range(len(hashes))]
    for i in range(len(hashes)):
        for j in range(i):
            alike = bin(int(hashes[i]) ^ int(hashes[j])).count("1") <= 3
            if alike and np.abs(colours[i].astype(int) - colours[j].astype(int)).max() <= 10:
                first, second = (next(group for group in groups if k in group) for k in (i, j))
                if first is not second:
                    first |= second
                    groups.remove(second)
    return sorted(sorted(group) for group in groups if len(group) > 1)


@pytest.mark.parametrize("seed", range(6))
def test_near_duplicates_are_those_of_all_pairs(seed):
    """Hashes of few families with up to five bits changed anywhere, and colours that agree or do not."""
    rng = np.random.default_rng(seed)
    families = rng.integers(0, 2**63, 12, np.uint64)
    hashes = families[rng.integers(0, 12, 150)]
    for i in range(150):
        for bit in rng.choice(64, rng.integers(0, 6), replace=False):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    colours = rng.integers(0, 3, (150, 1)).astype(np.uint8) * 100 + rng.integers(0, 8, (150, 48)).astype(np.uint8)
    found = near_groups(hashes, colours)
    assert found == brute_force(hashes, colours) and found


def test_bits_are_counted():
    values = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64, endpoint=False)
    assert ones(values).tolist() == [bin(value).count("1") for value in values.tolist()]
    assert ones(np.array([0, 2**64 - 1], np.uint64)).tolist() == [0, 64]
    assert near_groups(np.zeros(0, np.uint64), np.zeros((0, 48), np.uint8)) == [] == exact_groups(np.zeros((0, 32), np.uint8))


def test_many_pictures_of_one_hash_are_no_matter_of_all_pairs():
    """As of empty pictures: all pairs would fill the memory, and take hours of larger sets."""
    count = 5000
    colours = np.random.default_rng(0).integers(0, 256, (count, 48), np.uint8)
    colours[7] = colours[4999]
    tracemalloc.start()
    assert near_groups(np.zeros(count, np.uint64), colours) == [[7, 4999]]
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_copies_are_found_byte_for_byte_or_by_their_looks(tmp_path, encoder):
    folder = tmp_path / "p"
    for i in range(30):
        put(folder, f"{i:02d}.png", picture(i, 120, 90))
    (folder / "copy.png").write_bytes((folder / "03.png").read_bytes())
    (folder / "copy.txt").write_text("x")
    put(folder, "smaller.jpg", picture(4, 120, 90).resize((100, 75)), quality=70)
    red, blue = (Image.composite(Image.new("RGB", (64, 64), colour), Image.new("RGB", (64, 64), "white"), Image.linear_gradient("L")
                                 .resize((64, 64))) for colour in ("red", "blue"))  # fmt: skip
    put(folder, "red.png", red)
    put(folder, "blue.png", blue)
    found = findings_of(folder, encoder)
    assert found["exact_duplicates"] == [["03.png", "copy.png"]] and found["near_duplicates"] == [["04.png", "smaller.jpg"]]


# The contact sheet and the page


def test_the_sheet_shows_the_pixels_that_are_trained_worst_crops_first(tmp_path, encoder):
    sizes = [(64 + 9 * i, 64) for i in range(8)] + [(64, 64 + 9 * i) for i in range(1, 4)]
    for i, size in enumerate(sizes):
        put(tmp_path / "p", f"{i:02d}.png", picture(i, *size), f"caption {i}")
    dataset = read_folder(tmp_path / "p")
    findings, placed = check(dataset, PLAN, encoder)
    sheet = contact_sheet(placed, 100)
    assert sorted(crop.name for crops in sheet for crop in crops) == [f"{i:02d}.png" for i in range(len(sizes))]
    for (width, height), crops in zip(PLAN.buckets.shapes, sheet, strict=True):
        assert [crop.lost for crop in crops] == sorted((crop.lost for crop in crops), reverse=True)
        for crop in crops:
            assert np.array_equal(np.asarray(crop.image), load(tmp_path / "p" / crop.name, Transform(height, width)))
            assert crop.size == sizes[int(crop.name[:2])] and crop.caption == f"caption {int(crop.name[:2])}"
            assert crop.lost == PLAN.buckets.of([crop.size])[1].item() and crop.scale == max(width / crop.size[0], height / crop.size[1])
    few = contact_sheet(placed, 4)
    assert [len(crops) for crops in few] == quotas([len(crops) for crops in sheet], 4) and sum(map(len, few)) == 4
    assert all([crop.name for crop in some] == [crop.name for crop in crops[: len(some)]] for some, crops in zip(few, sheet, strict=True))


def test_places_on_the_sheet_are_given_in_turn():
    assert quotas([10, 0, 1, 10], 7) == [3, 0, 1, 3] and quotas([5, 5, 5], 2) == [1, 1, 0]
    assert quotas([2, 1], 9) == [2, 1] and quotas([], 3) == []


class Tags(html.parser.HTMLParser):
    """Raises unless every tag is closed; collects the texts and what attributes point to."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_complete_in_itself_and_shows_texts_as_they_are(tmp_path, encoder):
    text = '<script>alert("&amp;")</script> & a red apple <img src=http://x/y>' + " on a white plate" * 20
    for i in range(3):
        put(tmp_path / "p", f"{i} <i>&.png", picture(i), text)
    dataset = read_folder(tmp_path / "p")
    findings, placed = check(dataset, PLAN, encoder)
    made = page(findings, contact_sheet(placed, 2))
    tags = Tags()
    tags.feed(made)
    assert not tags.open and len(tags.links) == 2 and all(link.startswith("data:image/jpeg;base64,") for link in tags.links)
    assert text in "".join(tags.texts) and "0 <i>&.png" in tags.texts and "<script" not in made and "@import" not in made
    for title in ("Left out", "Sizes", "Width to height", "Buckets", "Caption lengths in tokens", "Duplicates", "Crops"):
        assert title in tags.texts


def test_a_long_list_is_shortened_on_the_page_and_whole_in_the_findings(encoder):
    samples = tuple(Sample(Place(f"{i}", lambda: b""), ("x",), f"picture-{i}.") for i in range(NAMES_SHOWN + 50))
    found = check(Dataset("many", samples, ()), PLAN, encoder)[0]
    assert len(found["unusable"]) == NAMES_SHOWN + 50 == len(json.loads(json.dumps(found))["unusable"])
    made = page(found, [[] for _ in PLAN.buckets.shapes])
    assert f"picture-{NAMES_SHOWN - 1}." in made and f"picture-{NAMES_SHOWN}." not in made and "and 50 more" in made
