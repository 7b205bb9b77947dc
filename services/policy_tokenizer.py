"""Loads tokenizers by name and compares them, for services that count in the policy's tokens: rewriter and judge.

Blocking and slow (it imports transformers): call it from a thread.
"""

from typing import Any

from shared.errors import SettingsError

_PROBE = "The naïve fox:\n\n\t3,141 — “jumps” over 犬, 🦊.  def f(x): return x**2"


def load_tokenizer(source: str, *, setting: str) -> Any:
    """The tokenizer of a folder or a Hugging Face name; `setting` is where a wrong `source` was given."""
    if not source:
        raise SettingsError(f"{setting} is empty: name the folder or model whose tokenizer to use")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise SettingsError(f"{setting} = {source!r} has no tokenizer that can be loaded: {exc}") from exc


def same_tokens(first: Any, second: Any) -> bool:
    """Whether a token id means the same to both: equal vocabularies that cut a probe text alike."""
    return bool(
        first.get_vocab() == second.get_vocab()
        and first.encode(_PROBE, add_special_tokens=False) == second.encode(_PROBE, add_special_tokens=False)
    )


def beginning_of_text(tokenizer: Any) -> int | None:
    """The BOS token id of a tokenizer that puts one before every text, else None."""
    ids = tokenizer.encode("a")
    return int(ids[0]) if ids and ids[0] == tokenizer.bos_token_id else None
