# SPDX-License-Identifier: Apache-2.0
"""CLIP's tokenizer: byte-level pair encoding (Sennrich et al. 2016, arXiv:1508.07909), from its two published files.

    words -> bytes, each written as one letter, the last with "</w>" -> the pair that was merged first in training is
    joined, until no pair is in the list

    tokenizer = BytePairTokenizer.read("clip-vit-base-patch32")       # a folder with vocab.json and merges.txt
    tokens_BS, mask_BS = tokenizer(["a red ball bounces to the right", ""])

Text is put into Unicode's form NFC and lower case, white space becomes one blank, as in transformers' CLIPTokenizer.
(OpenAI's own also mends broken encodings and HTML by a package of its own; that changes few captions.)
"""

from __future__ import annotations

import functools
import itertools
import json
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath

START, END = "<|startoftext|>", "<|endoftext|>"
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_WORD_END = "</w>"


class BytePairTokenizer:
    """Captions to numbers: start, pieces of words, end, padding; longer captions are cut and still end in the end.

    Args:
      vocabulary: piece -> number, the start and the end among them.
      merges: pairs of pieces, those that were merged first in training first.
      max_tokens: S, the start and the end included.
      pad: what fills up; None: the end, as CLIP of OpenAI (Stable Diffusion 2 takes 0).

    Raises:
      ValueError: for a vocabulary without the start or the end.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        *,
        max_tokens: int = 77,
        pad: int | None = None,
    ) -> None:
        missing = [piece for piece in (START, END) if piece not in vocabulary]
        if missing or max_tokens < 2:
            raise ValueError(
                f"a vocabulary of {len(vocabulary)} pieces without {missing}, max_tokens={max_tokens}: expected CLIP's "
                f"vocab.json, with {START} and {END}, and room for both."
            )
        self.vocabulary = dict(vocabulary)
        self.max_tokens = max_tokens
        self.start, self.end = vocabulary[START], vocabulary[END]
        self.pad = self.end if pad is None else pad
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._pieces = functools.lru_cache(maxsize=1 << 16)(self._merge)
        self._warned = False

    @classmethod
    def read(cls, folder: epath.PathLike, *, max_tokens: int = 77, pad: int | None = None) -> BytePairTokenizer:
        """The tokenizer of a folder: vocab.json and merges.txt, or tokenizer.json that holds both.

        Raises:
          FileNotFoundError: if the folder has neither.
        """
        source = epath.Path(folder).expanduser()
        both, one = (source / "vocab.json", source / "merges.txt"), source / "tokenizer.json"
        if all(path.exists() for path in both):
            vocabulary = json.loads(both[0].read_text())
            lines = [line for line in both[1].read_text().split("\n") if line and not line.startswith("#version")]
        elif one.exists():
            model = json.loads(one.read_text())["model"]
            vocabulary, lines = model["vocab"], model["merges"]
        else:
            raise FileNotFoundError(
                f"{source}: expected vocab.json and merges.txt, or tokenizer.json; they lie beside CLIP's weights, so "
                "copy them from there."
            )
        pairs = [line.split(" ") if isinstance(line, str) else line for line in lines]
        return cls(vocabulary, [(one, other) for one, other in pairs], max_tokens=max_tokens, pad=pad)

    @property
    def vocabulary_size(self) -> int:
        """Rows of an embedding for these pieces."""
        return 1 + max(self.vocabulary.values())

    def numbers(self, caption: str) -> list[int]:
        """The pieces of a caption, without start and end, however many."""
        found: list[int] = []
        for word in _words(caption):
            if word in (START, END):
                found.append(self.vocabulary[word])
            else:
                found += self._pieces(word)
        return found

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_BS int32, mask_BS bool): padded to max_tokens, the mask True from the start to the end."""
        tokens_BS = np.full((len(captions), self.max_tokens), self.pad, np.int32)
        mask_BS = np.zeros(tokens_BS.shape, bool)
        for row, mask, caption in zip(tokens_BS, mask_BS, captions, strict=True):
            pieces = self.numbers(caption)
            if len(pieces) > self.max_tokens - 2 and not self._warned:
                self._warned = True
                warnings.warn(self.problem(caption) + " Only the first are read.", stacklevel=2)
            numbers = [self.start, *pieces[: self.max_tokens - 2], self.end]
            row[: len(numbers)] = numbers
            mask[: len(numbers)] = True
        return tokens_BS, mask_BS

    def problem(self, caption: str) -> str:
        """Why a caption is not read to its end; "" if it is."""
        num_tokens = 2 + len(self.numbers(caption))
        if num_tokens > self.max_tokens:
            return f"prompt {caption!r}: {num_tokens} tokens, and the model reads {self.max_tokens}; shorten it."
        return ""

    def _merge(self, word: str) -> list[int]:
        pieces = [_LETTERS[byte] for byte in word.encode("utf-8")]
        pieces[-1] += _WORD_END
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            joined: list[str] = []
            i = 0
            while i < len(pieces):
                if i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == best:
                    joined.append(pieces[i] + pieces[i + 1])
                    i += 2
                else:
                    joined.append(pieces[i])
                    i += 1
            pieces = joined
        return [self.vocabulary.get(piece, self.end) for piece in pieces]


def _letters() -> list[str]:
    """One visible letter for each byte: those of Latin-1 that are visible stand for themselves, others from U+0100."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    table = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


_LETTERS = _letters()


def _kind(letter: str) -> str:
    """ "L" letter, "N" number, " " white space, "" anything else, as Unicode says."""
    category = unicodedata.category(letter)[0]
    if category in "LN":
        return category
    return " " if letter.isspace() and letter not in "\x1c\x1d\x1e\x1f" else ""


def _words(caption: str) -> Iterator[str]:
    """The words of a caption: the special ones, English contractions, runs of letters, single digits, runs of the rest.

    In this order, at each place; white space parts and vanishes.
    """
    text = "".join(letter.lower() for letter in unicodedata.normalize("NFC", caption))  # a last sigma stays a sigma
    i = 0
    while i < len(text):
        kind, end = _kind(text[i]), i + 1
        fixed = next((word for word in (START, END, *_CONTRACTIONS) if text.startswith(word, i)), None)
        if fixed is not None:
            end = i + len(fixed)
        elif kind != "N":
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != " ":
            yield text[i:end]
        i = end
