# SPDX-License-Identifier: Apache-2.0
"""Byte pairs against transformers' CLIPTokenizer, over a vocabulary of all bytes and a few merges."""

import json
import warnings

import foreign
import numpy as np
import pytest

from stvdm.models.tokenizers import BytePairTokenizer

GOLDEN = foreign.golden()["clip"]


@pytest.fixture(scope="module")
def tokenizer():
    return BytePairTokenizer(*foreign.byte_pairs(), max_tokens=19)


def test_captions_become_the_numbers_of_the_reference(tokenizer):
    with pytest.warns(UserWarning, match="Only the first are read"):
        tokens, mask = tokenizer(foreign.CAPTIONS)
    np.testing.assert_array_equal(tokens, GOLDEN["tokens"])
    np.testing.assert_array_equal(mask, GOLDEN["mask"])
    whole = [[tokenizer.start, *tokenizer.numbers(caption), tokenizer.end] for caption in foreign.CAPTIONS]
    assert whole == GOLDEN["whole"]


@pytest.mark.parametrize(
    ("word", "pieces"),
    [
        ("ball", ["b", "all</w>"]),
        ("al", ["a", "l</w>"]),  # (a, l) is in the list, (a, l</w>) is not
        ("ring", ["r", "in", "g</w>"]),  # i n was joined in training before r i
        ("rin", ["ri", "n</w>"]),
        ("Thorin's", ["th", "o", "ri", "n</w>", "'", "s</w>"]),
        ("on12", ["on</w>", "1</w>", "2</w>"]),
        ("\u00e9", ["\u00c3", "\u00a9</w>"]),  # two bytes
        ("e\u0301", ["\u00c3", "\u00a9</w>"]),  # the same letter, composed
        ("\u00a0\u2003 a\u3000", ["a</w>"]),
        ("<|endoftext|>", ["<|endoftext|>"]),
    ],
)
def test_pairs_are_joined_in_the_order_of_training(tokenizer, word, pieces):
    names = {number: piece for piece, number in tokenizer.vocabulary.items()}
    assert [names[number] for number in tokenizer.numbers(word)] == pieces


def test_a_long_caption_is_cut_and_still_ends(tokenizer):
    short = BytePairTokenizer(*foreign.byte_pairs(), max_tokens=4, pad=0)
    with pytest.warns(UserWarning, match="6 tokens, and the model reads 4") as said:
        tokens, mask = short(["on on on on", "on"])
    assert len(said) == 1
    with warnings.catch_warnings(action="error"):
        short(["on on on on on"])  # said once
    on = short.vocabulary["on</w>"]
    assert tokens.tolist() == [[short.start, on, on, short.end], [short.start, on, short.end, 0]]
    assert mask.tolist() == [[True] * 4, [True] * 3 + [False]]


def test_both_kinds_of_files_give_the_same(tmp_path, tokenizer):
    vocabulary, merges = foreign.byte_pairs()
    with pytest.raises(FileNotFoundError, match=r"expected vocab.json and merges.txt, or tokenizer.json"):
        BytePairTokenizer.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": merges}}))
    one = BytePairTokenizer.read(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    two = BytePairTokenizer.read(tmp_path)
    for caption in foreign.CAPTIONS:
        assert one.numbers(caption) == two.numbers(caption) == tokenizer.numbers(caption)
    assert one.vocabulary_size == 520


def test_a_vocabulary_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"without \['<\|endoftext\|>'\]"):
        BytePairTokenizer({"a": 0, "<|startoftext|>": 1}, [])
