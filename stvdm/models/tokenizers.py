# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of published towers, from the files that lie beside their weights.

    tokenizer = BytePairTokenizer.read("clip-vit-base-patch32")       # a folder with vocab.json and merges.txt
    tokenizer = PieceTokenizer.read("umt5-xxl", max_tokens=512)       # with tokenizer.json or spiece.model
    tokens_BS, mask_BS = tokenizer(["a red ball bounces to the right", ""])

**CLIP**: byte-level pair encoding (Sennrich et al. 2016, arXiv:1508.07909).

    words -> bytes, each written as one letter, the last with "</w>" -> the pair that was merged first in training is
    joined, until no pair is in the list

Text is put into Unicode's form NFC and lower case, white space becomes one blank, as in transformers' CLIPTokenizer.
(OpenAI's own also mends broken encodings and HTML by a package of its own; that changes few captions.)

**T5 and UMT5**: the likeliest pieces under a unigram model (Kudo 2018, arXiv:1804.10959). Its files are read by the
packages that they were written for, `tokenizers` or `sentencepiece` (extra ``text``).
"""

from __future__ import annotations

import functools
import html
import itertools
import json
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
        return _filled(self, captions, (self.start,))

    def problem(self, caption: str) -> str:
        """Why a caption is not read to its end; "" if it is."""
        return _too_long(self, caption, 2)

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


class PieceTokenizer:
    """Captions to numbers: pieces, end, padding; longer captions are cut and still end in the end.

    Args:
      numbers: the pieces of a caption, without the end, however many.
      end: the number that every caption ends in, also "".
      pad: what fills up.
      max_tokens: S, the end included.

    Raises:
      ValueError: if there is no room for the end.
    """

    def __init__(self, numbers: Callable[[str], list[int]], *, end: int, pad: int, max_tokens: int = 512) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: expected at least 1, the end of every caption.")
        self.numbers, self.end, self.pad, self.max_tokens = numbers, end, pad, max_tokens
        self._warned = False

    @staticmethod
    def is_in(folder: epath.PathLike) -> bool:
        """Whether a folder holds files that `read` reads."""
        return any((epath.Path(folder) / name).exists() for name in ("tokenizer.json", "spiece.model"))

    @classmethod
    def read(cls, folder: epath.PathLike, *, max_tokens: int = 512, mended: bool = True) -> PieceTokenizer:
        """The tokenizer of a folder: tokenizer.json, else spiece.model.

        Args:
          mended: captions are passed through `mend` first, as in Wan's pipeline.

        Raises:
          FileNotFoundError: if the folder has neither.
          ImportError: if a package that this takes is not installed.
          ValueError: for the files of another tokenizer.
        """
        source = epath.Path(folder).expanduser()
        if not cls.is_in(source):
            raise FileNotFoundError(
                f"{source}: expected tokenizer.json or spiece.model; they lie beside the weights of T5, or in a folder "
                "`tokenizer` beside theirs, so copy them from there."
            )
        try:
            if mended:
                mend("")  # a package that is missing is missed now, and not at the first caption
            numbers, end, pad = _pieces_of(source)
        except ImportError as error:
            raise ImportError(
                f"{source}: to read captions as T5 does takes {error.name}: pip install 'stvdm[text]'"
            ) from error
        if end is None or pad is None or min(end, pad) < 0:
            raise ValueError(f"{source}: a vocabulary without </s> or <pad>; expected that of a T5 or UMT5.")
        made = (lambda caption: numbers(mend(caption))) if mended else numbers
        return cls(made, end=end, pad=pad, max_tokens=max_tokens)

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_BS int32, mask_BS bool): padded to max_tokens, the mask True to the end of the caption."""
        return _filled(self, captions, ())

    def problem(self, caption: str) -> str:
        """Why a caption is not read to its end; "" if it is."""
        return _too_long(self, caption, 1)


def mend(caption: str) -> str:
    """A caption as Wan's pipeline cleans it: broken encodings mended by ftfy, HTML's names read, blanks made single."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())


def _pieces_of(folder: epath.Path) -> tuple[Callable[[str], list[int]], int | None, int | None]:
    """How the files of a folder read a caption, the number of its end, and what pads."""
    if (folder / "tokenizer.json").exists():
        import tokenizers

        pieces = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text())
        pieces.no_padding()
        pieces.no_truncation()
        end, pad = pieces.token_to_id("</s>"), pieces.token_to_id("<pad>")
        return lambda caption: pieces.encode(caption, add_special_tokens=False).ids, end, pad
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=(folder / "spiece.model").read_bytes())
    return model.encode, model.eos_id(), model.pad_id()


def _filled(
    tokenizer: BytePairTokenizer | PieceTokenizer, captions: Sequence[str], before: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_BS, mask_BS): ``before``, pieces, the end, padding; the first caption that is cut is told of."""
    tokens_BS = np.full((len(captions), tokenizer.max_tokens), tokenizer.pad, np.int32)
    mask_BS = np.zeros(tokens_BS.shape, bool)
    for row, mask, caption in zip(tokens_BS, mask_BS, captions, strict=True):
        pieces = tokenizer.numbers(caption)
        room = tokenizer.max_tokens - len(before) - 1
        if len(pieces) > room and not tokenizer._warned:
            tokenizer._warned = True
            warnings.warn(tokenizer.problem(caption) + " Only the first are read.", stacklevel=3)
        numbers = [*before, *pieces[:room], tokenizer.end]
        row[: len(numbers)] = numbers
        mask[: len(numbers)] = True
    return tokens_BS, mask_BS


def _too_long(tokenizer: BytePairTokenizer | PieceTokenizer, caption: str, num_special: int) -> str:
    num_tokens = num_special + len(tokenizer.numbers(caption))
    if num_tokens > tokenizer.max_tokens:
        return f"prompt {caption!r}: {num_tokens} tokens, and the model reads {tokenizer.max_tokens}; shorten it."
    return ""


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
