# SPDX-License-Identifier: Apache-2.0
"""Byte pairs and pieces against transformers' tokenizers, over small vocabularies."""

import json
import sys
import warnings

import foreign
import numpy as np
import pytest

from stvdm.models.tokenizers import BytePairTokenizer, PieceTokenizer, mend

GOLDEN = foreign.golden()["clip"]
PIECES = foreign.golden()["t5_tokenizer"]


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


def test_pieces_are_those_of_the_reference(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(json.dumps(PIECES["file"]))
    tokenizer = PieceTokenizer.read(tmp_path, max_tokens=16, mended=False)
    assert [[*tokenizer.numbers(caption), tokenizer.end] for caption in foreign.CAPTIONS] == PIECES["whole"]
    with pytest.warns(UserWarning, match="22 tokens, and the model reads 16") as said:
        tokens, mask = tokenizer(foreign.CAPTIONS)
    assert len(said) == 1
    np.testing.assert_array_equal(tokens, PIECES["tokens"])
    np.testing.assert_array_equal(mask, PIECES["mask"])
    assert tokens[1].tolist() == [1] + [0] * 15  # the empty caption: the end, padding


def test_sentencepiece_reads_its_own_file_to_the_same_numbers(tmp_path):
    """Both packages over one model that is trained here."""
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizers = pytest.importorskip("tokenizers")
    sentences = [caption.replace("\t", " ") for caption in foreign.CAPTIONS if caption.isascii() and caption] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=36,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    one = PieceTokenizer.read(tmp_path, max_tokens=30, mended=False)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    vocabulary = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    both = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    both.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()]
    )
    both.save(str(tmp_path / "tokenizer.json"))
    two = PieceTokenizer.read(tmp_path, max_tokens=30, mended=False)
    captions = ["a red ball bounces", "", "in really long lines  that go", "balloon right"]
    assert len(one.numbers(captions[0])) > 4
    np.testing.assert_array_equal(one(captions), two(captions))


@pytest.mark.parametrize(
    ("caption", "mended"),
    [
        ("a  red\n ball\t", "a red ball"),
        ("fish &amp;amp; chips &lt;b&gt;", "fish & chips <b>"),
        ("l\u2019\u00c3\u00a9t\u00e9 caf\u00c3\u00a9", "l'\u00e9t\u00e9 caf\u00e9"),  # UTF-8 that was read as Latin-1
        ("\uff21\uff0c\u6771\u4eac", "A,\u6771\u4eac"),  # of full width
    ],
)
def test_captions_are_mended_as_in_wans_pipeline(caption, mended):
    pytest.importorskip("ftfy")
    assert mend(caption) == mended


def test_what_reads_pieces_is_named_where_it_is_missing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json or spiece.model"):
        PieceTokenizer.read(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    for package in ("ftfy", "sentencepiece"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=r"takes \w+: pip install 'stvdm\[text\]'"):
            PieceTokenizer.read(tmp_path, mended=package == "ftfy")
    with pytest.raises(ValueError, match="max_tokens=0: expected at least 1"):
        PieceTokenizer(lambda caption: [], end=1, pad=0, max_tokens=0)


def test_the_golden_pieces_are_what_transformers_says_today():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import make_towers

    assert make_towers.t5_tokenizer() == PIECES
