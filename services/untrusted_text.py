"""What keeps documents and candidates from being more than text in a prompt.

    nonce_of(window, candidates) == "bakol"        # a word that none of them says, for <text-bakol> ... </text-bakol>
    defused("</s><|im_start|>system") == "<\\u2060/s><\\u2060|im_start|\\u2060>system"

An endpoint whose tokenizer we don't have encodes the whole prompt, and would take such spellings for control tokens of
its model. A word joiner (U+2060), which has no width and no meaning, is put behind the first character of every
spelling that a known family of chat templates uses, and before the `>` of `|>`. A reader sees the same text; no
tokenizer sees the token. Nothing else changes. services/frames.py uses all this; the rewriter restores what its model
copied.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from itertools import count

JOINER = "\u2060"

_NAMES = (
    r"s|bos|eos|pad|unk|mask|cls|sep|sop|eop|eod|eot|eom|think|thinking|answer|tool|tools|tool_calls?|tool_response|"
    r"tool_code|function_calls?|image|video|audio|img|im_start|im_end|file_sep|repo_name|n_img|"
    r"(?:start|end|begin)_of_\w{1,40}|\w{1,40}_token|fim_\w{1,20}|unused_?\d{1,6}|extra_id_\d{1,6}|"
    r"(?:special|reserved)_\w{1,40}|0x[0-9a-f]{2}"
)
"""In <...> and </...>: Llama 2, Mistral, Gemma, Qwen, DeepSeek, Cohere, GLM, T5, code models."""
_BRACKETED = (
    r"INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|ARGS|CALL_ID|THINK|MODEL_SETTINGS|PREFIX|"
    r"SUFFIX|MIDDLE|IMG|IMG_BREAK|IMG_END|AUDIO|BEGIN_AUDIO|BOS|EOS|EOT|CLS|SEP|PAD|UNK|[gs]?MASK|multimodal"
)
"""In [...] and [/...]: Mistral, GLM, Kimi, BERT."""
_SPELLING = re.compile(
    rf"<(?=[|｜]\S|</?SYS>>|/?(?:{_NAMES})>)"  # `<|...|>` of ChatML, Llama 3, gpt-oss; `<｜...｜>` of DeepSeek
    rf"|\[(?=/?(?:{_BRACKETED})\])"
    r"|(?<=\S)[|｜](?=>)",
    re.IGNORECASE,
)
_DEFUSED = re.compile(rf"(?<=[<\[|｜]){JOINER}")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_NONCE_LETTERS = 5
_DIGEST_BYTES = 64
_TRIES_A_LENGTH = 8
"""Words of a length that are tried before longer ones."""
_NO_LETTERS = bytes(set(range(256)) - set(range(ord("a"), ord("z") + 1)))
_SURROGATES = re.compile("[\ud800-\udfff]")
"""JSON can name a half of a character that UTF-8 can't."""


def defused(text: str) -> str:
    return _SPELLING.sub(rf"\g<0>{JOINER}", text)


def restored(text: str) -> str:
    """What a model copied from a defused text, as it stood in the document."""
    return _DEFUSED.sub("", text)


def mended(text: str) -> str:
    """Without halves of characters."""
    return _SURROGATES.sub("\ufffd", text)


def nonce_of(window: str, contents: Iterable[str]) -> str:
    """A word for the tags of a window's prompts, such as "bakol": the same for the same texts.

    It occurs in none of `contents`, nor in `window`: not in capitals, with accents or signs between its letters, or in
    other letters that a tokenizer may turn into these. So nobody can have written a tag with it. Takes some
    milliseconds per megabyte.
    """
    said = b" ".join(_letters(text) for text in (window, *contents))
    start = window.encode("utf-8", "surrogatepass")
    # A text of n letters says at most n words of one length: longer ones end the search.
    words = (_word(start + b"/%d" % n, num_letters=_NONCE_LETTERS + n // _TRIES_A_LENGTH) for n in count())
    return next(word for word in words if word.encode() not in said)


def _letters(text: str) -> bytes:
    plain = text if text.isascii() else unicodedata.normalize("NFKD", text.casefold()).casefold()
    return plain.lower().encode("ascii", "ignore").translate(None, _NO_LETTERS)


def _word(seed: bytes, *, num_letters: int) -> str:
    """Consonants and vowels in turn: tokenizers need few tokens for such words."""
    number = int.from_bytes(hashlib.blake2b(seed, digest_size=_DIGEST_BYTES).digest())
    letters = []
    for place in range(num_letters):
        choices = _VOWELS if place % 2 else _CONSONANTS
        number, chosen = divmod(number, len(choices))
        letters.append(choices[chosen])
    return "".join(letters)
