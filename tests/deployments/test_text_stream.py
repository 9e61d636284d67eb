"""Text that comes token by token is the text of all tokens, up to the first stop string."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.text_stream import TextStream
from tests.support.checkpoints import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer().backend_tokenizer


def pieces_of(tokenizer: Any, tokens: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stops)
    pieces = [stream.add(token) for token in tokens]
    return [*pieces, stream.end()], stream.is_stopped


@settings(max_examples=300)
@given(text=st.text(max_size=40))
def test_the_pieces_of_a_text_are_the_text(tokenizer: Any, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    pieces, _ = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


@settings(max_examples=300)
@given(tokens=st.lists(st.integers(0, 299), max_size=40))
def test_the_pieces_of_any_tokens_are_what_the_tokenizer_says(tokenizer: Any, tokens: list[int]) -> None:
    pieces, _ = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


@settings(max_examples=500)
@given(text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
def test_nothing_of_the_first_stop_string_is_given_out(tokenizer: Any, text: str, stops: list[str]) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    pieces, stopped = pieces_of(tokenizer, tokens, tuple(stops))
    # A token is a letter here: the first is the one that is complete first, of those the longest.
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stopped == bool(found)
    assert "".join(pieces) == text[: min(found)[1] if found else len(text)]


def test_text_comes_as_soon_as_it_is_certain(tokenizer: Any) -> None:
    tokens = tokenizer.encode("xyz", add_special_tokens=False).ids
    assert pieces_of(tokenizer, tokens)[0][:3] == ["x", "y", "z"]
    assert pieces_of(tokenizer, tokens, ("yq",))[0] == ["x", "", "yz", ""]


def test_bytes_that_are_no_character_raise_nothing() -> None:
    from tokenizers import Tokenizer, decoders, models

    # As Llama 2 has them: 256 bytes, and words whose space is a letter of its own.
    vocabulary = {**{f"<0x{byte:02X}>": byte for byte in range(256)}, "\u2581a": 256, "b": 257, "\u2581": 258}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    random = Random(0)
    for _ in range(1000):
        tokens = [random.choice([random.randrange(128, 256), 10, 0xE2, 256, 257]) for _ in range(12)]
        pieces, _ = pieces_of(made, tokens)
        # A byte that was given out may turn out to be part of something that is no character; what is one stays.
        text, whole = "".join(pieces), made.decode(tokens)
        assert (text.count("a"), text.count("b")) == (whole.count("a"), whole.count("b"))
