# SPDX-License-Identifier: Apache-2.0
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stvdm.models.text_encoders import TextEncoder, WordTokenizer, collect_words

CAPTIONS = ("A red ball bounces.", "a Blue square moves to the left", "")


@pytest.fixture(scope="module")
def encoder():
    """A small encoder whose every parameter is drawn at random, and its jitted function of (tokens, mask)."""
    module = TextEncoder(vocabulary_size=9, width=12, num_layers=2, num_heads=3, max_tokens=6)
    boxed = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 6), np.int32), np.ones((1, 6), bool))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), nn.unbox(boxed))
    return jax.jit(lambda tokens, mask: module.apply(params, tokens, mask))


def test_words_are_collected_once_in_lower_case_and_sorted():
    assert collect_words(CAPTIONS) == (
        "a", "ball", "blue", "bounces", "left", "moves", "red", "square", "the", "to",
    )  # fmt: skip
    assert collect_words(["Don't panic, Ürsel: 2 x-rays!"]) == ("2", "don't", "panic", "rays", "x", "ürsel")


def test_captions_come_back_from_their_numbers():
    tokenizer = WordTokenizer(collect_words(CAPTIONS), max_tokens=9)
    tokens_BS, mask_BS = tokenizer(CAPTIONS)
    assert tokens_BS.dtype == np.int32 and mask_BS.dtype == bool
    for caption, tokens, mask in zip(CAPTIONS, tokens_BS, mask_BS, strict=True):
        real = tokens[mask]
        assert real[0] == 1 and (tokens[~mask] == 0).all() and mask.sum() == 1 + len(caption.split())
        assert " ".join(tokenizer.words[i - 3] for i in real[1:]) == caption.lower().rstrip(".")


def test_the_empty_caption_still_has_its_start():
    tokens_BS, mask_BS = WordTokenizer(("ball",), max_tokens=3)([""])
    np.testing.assert_array_equal(tokens_BS, [[1, 0, 0]])
    np.testing.assert_array_equal(mask_BS, [[True, False, False]])


def test_unknown_words_are_named_and_numbered_two():
    tokenizer = WordTokenizer(("a", "ball"), max_tokens=6)
    assert tokenizer.problem("a PURPLE ball, a purple cat") == (
        "prompt 'a PURPLE ball, a purple cat': the model never saw the words 'purple', 'cat'; it knows 2: a, ball."
    )
    assert tokenizer.problem("a ball") == ""
    np.testing.assert_array_equal(tokenizer(["a purple ball"])[0], [[1, 3, 2, 4, 0, 0]])
    assert tokenizer.vocabulary_size == 5


def test_long_captions_are_cut_with_one_warning():
    tokenizer = WordTokenizer(("a", "b", "c"), max_tokens=3)
    with pytest.warns(UserWarning, match=r"'a b c' has 4 tokens.*max_tokens=3"):
        tokens_BS, _ = tokenizer(["a b c"])
    np.testing.assert_array_equal(tokens_BS, [[1, 3, 4]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["a b c"])


def test_padding_says_nothing_and_is_zero(encoder):
    tokens = jnp.array([[1, 4, 5, 6, 7, 8], [1, 4, 5, 3, 3, 3]])
    mask = jnp.array([[True] * 6, [True] * 3 + [False] * 3])
    text = encoder(tokens, mask)
    np.testing.assert_array_equal(text[1, 3:], 0)
    np.testing.assert_allclose(text[1], encoder(tokens.at[1, 3:].set(8), mask)[1], atol=1e-6)
    np.testing.assert_allclose(text[1:, :3], encoder(tokens[1:, :3], mask[1:, :3]), atol=1e-5)


def test_every_word_hears_every_word_and_their_order(encoder):
    mask = jnp.ones((1, 4), bool)
    text = encoder(jnp.array([[1, 4, 5, 6]]), mask)
    assert (jnp.abs(text - encoder(jnp.array([[1, 4, 5, 7]]), mask)).max(axis=-1) > 1e-3).all()
    swapped = encoder(jnp.array([[1, 5, 4, 6]]), mask)
    assert jnp.abs(text - swapped)[0, 0].max() > 1e-3, "'red left of blue' is not 'blue left of red'"


@pytest.mark.slow
def test_it_learns_which_words_belong_together():
    """ "red grows and blue sinks": from the feature of a colour, what that colour does. A bag of words knows half."""
    random = np.random.default_rng(0)
    colours, deeds, fillers = np.arange(3, 9), np.arange(9, 15), np.arange(15, 18)
    encoder = TextEncoder(vocabulary_size=18, width=32, num_layers=2, num_heads=2, max_tokens=12)

    def captions(num):
        tokens, where, does = np.zeros((num, 12), np.int32), np.zeros(num, int), np.zeros(num, int)
        shuffled_colours, shuffled_deeds = (
            random.permuted(np.tile(some, (num, 1)), axis=1) for some in (colours, deeds)
        )
        for row in range(num):
            words, asked = [1], random.integers(2)
            for i in range(2):
                colour, deed = shuffled_colours[row, i], shuffled_deeds[row, i]
                words += [*random.choice(fillers, random.integers(0, 3)), colour, random.choice(fillers), deed]
                if i == asked:
                    where[row], does[row] = words.index(colour), deed - deeds[0]
            tokens[row, : len(words)] = words
        return tokens, where, does

    def logits(params, tokens, where):
        text = encoder.apply({"params": params["encoder"]}, tokens, tokens != 0)
        return text[jnp.arange(len(tokens)), where] @ params["head"]

    def loss(params, tokens, where, does):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, tokens, where), does).mean()

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(loss)(params, *batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    tokens, where, does = captions(4_000)
    params = {
        "encoder": nn.unbox(encoder.init(jax.random.key(0), tokens[:1], tokens[:1] != 0))["params"],
        "head": jnp.zeros((32, len(deeds))),
    }
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)
    for _ in range(400):
        rows = random.integers(3_200, size=64)
        params, state = step(params, state, (tokens[rows], where[rows], does[rows]))
    right = logits(params, tokens[3_200:], where[3_200:]).argmax(-1) == does[3_200:]
    assert right.mean() > 0.9


def test_errors_teach(encoder):
    with pytest.raises(ValueError, match=r"change \['Ball', 'a b'\]"):
        WordTokenizer(("a", "Ball", "a b"), max_tokens=3)
    with pytest.raises(ValueError, match=r"each once; change \['a'\]"):
        WordTokenizer(("a", "b", "a"), max_tokens=3)
    with pytest.raises(ValueError, match="max_tokens=0"):
        WordTokenizer(("a",), max_tokens=0)
    with pytest.raises(ValueError, match="7 tokens.*max_tokens=6"):
        encoder(jnp.zeros((1, 7), jnp.int32), jnp.ones((1, 7), bool))
    with pytest.raises(ValueError, match="width=10.*num_heads=6"):
        TextEncoder(5, 10, 1, 3, 4).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool))
