"""The loader's arrays of the samples say what the samples say."""

import pickle

import numpy as np
import pytest

from latentfm.data.sources import Sample, Share
from latentfm.data.table import SampleTable, Texts, choose

SAMPLES = (
    Sample(None, ("a", "", "ü b\n"), "x/ü.png"),
    Sample(None, ("b",), "x/2.png", share=Share("r", 1.0, True)),
    Sample(None, ("a", "c", "a"), "y", (1.0, 2.0, 7.0)),
)


@pytest.mark.parametrize("texts", [["a", "", "ü\0漢字", " "], [""], []])
def test_texts_come_back(texts):
    held = Texts.of(texts)
    assert len(held) == len(texts) and [held[number] for number in range(len(held))] == texts


def test_the_table_has_the_samples_and_each_text_once():
    table = pickle.loads(pickle.dumps(SampleTable.of(SAMPLES)))  # as another process gets it
    assert len(table) == 3 and [table.ids[i] for i in range(3)] == ["x/ü.png", "x/2.png", "y"]
    assert sorted(table.texts[i] for i in range(len(table.texts))) == ["", "a", "b", "c", "ü b\n"]
    assert table.prior.tolist() == [False, True, False]
    for index, sample in enumerate(SAMPLES):
        for u in np.linspace(0, 1, 101)[:-1].tolist():
            bounds = np.cumsum(sample.caption_weights) / sum(sample.caption_weights) if sample.caption_weights else None
            assert table.texts[table.caption(index, u)] == sample.captions[choose(u, len(sample.captions), bounds)]


def test_a_choice_is_made_by_weight_and_never_beyond_the_last():
    bounds = np.cumsum([1.0, 2.0, 7.0]) / 10.0
    assert [choose(u, 3, bounds) for u in (0.0, 0.09, 0.1, 0.29, 0.31, 0.999)] == [0, 0, 1, 1, 2, 2]
    assert [choose(u, 3, None) for u in (0.0, 0.33, 0.34, 0.99, 1.0)] == [0, 0, 1, 2, 2]
    assert choose(1.0, 3, bounds * (1 - 1e-16)) == 2


def test_the_digest_sees_ids_captions_weights_and_their_order():
    changed = [
        SAMPLES, SAMPLES[::-1], SAMPLES[:2], (Sample(None, ("a", "", "ü c\n"), "x/ü.png"), *SAMPLES[1:]),
        (*SAMPLES[:2], Sample(None, ("a", "c", "a"), "y", (1.0, 2.0, 6.0))), (Sample(None, SAMPLES[0].captions, "x/u.png"), *SAMPLES[1:]),
    ]  # fmt: skip
    assert len({SampleTable.of(samples).digest() for samples in changed}) == len(changed)
    assert SampleTable.of(SAMPLES).digest() == SampleTable.of(list(SAMPLES)).digest()
