"""Where a local engine finds the words of a verdict in the tokens of an answer."""

import pytest

from services.engine.base import WordOdds
from services.engine.words import WordTokens
from services.tokenizer import TokenCodec, from_transformers
from tests.services.subject_tokenizers import TOKENIZERS, save_tokenizer

WORDS = ("A", "B")


@pytest.fixture(
    scope="module", params=[kind for kind in TOKENIZERS if kind != "word level"]
)  # that one keeps no spaces
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenCodec:
    folder = tmp_path_factory.mktemp("tokenizer")
    return TokenCodec(from_transformers(save_tokenizer(TOKENIZERS[request.param](), folder)))


def odds_in(codec: TokenCodec, answer: str, words: tuple[str, ...] = WORDS) -> tuple[WordOdds, ...]:
    """Of an answer after a question; token t in place p has the log-prob -p - t / 1000."""
    prompt, token_ids = tuple(codec.encode("Which?")), tuple(codec.encode_continuation(answer))
    tokens = WordTokens(codec, words)
    listed = {
        place: {watched: -place - watched / 1000 for watched in tokens.token_ids} for place in range(len(token_ids))
    }
    text = codec.continuation(prompt, token_ids).text
    assert text == answer
    return tokens.odds(prompt, token_ids, text=text, log_probs=listed)


@pytest.mark.parametrize("answer", ["Verdict: A", "Verdict: B\n", "**B**", " A", "A", "the moon: A."])
def test_a_word_is_found_where_it_stands_after_its_space(codec: TokenCodec, answer: str) -> None:
    (odds,) = odds_in(codec, answer)
    assert odds.start == max(answer.find("A"), answer.find("B"))
    assert len(odds.log_probs) == 2
    assert odds.log_probs[0] != odds.log_probs[1]


@pytest.mark.parametrize("answer", ["BAD NEWS", "it is CAB", "The moon", ""])
def test_parts_of_other_words_are_none(codec: TokenCodec, answer: str) -> None:
    assert odds_in(codec, answer) == ()


def test_every_place_counts_and_the_order_is_that_of_the_text(codec: TokenCodec) -> None:
    assert [odds.start for odds in odds_in(codec, "A or B? Verdict: A")] == [0, 5, 17]


def test_words_that_begin_alike_are_not_told_apart(codec: TokenCodec) -> None:
    assert odds_in(codec, "Verdict: A", ("A", "A")) == ()
