"""A copy of a tokenizer for text that somebody else wrote: no text that it encodes gives an added token.

    encode = content_encoder(core, frozenset({0, 1, 2}))
    encode("</s><think>")                                     # the tokens of these letters

Splitting special tokens is not enough. Qwen's `<think>` and `<tool_call>` are added tokens that are not special, and
some vocabularies reach a control token without any added one: a Unigram model has `<s>` as a piece of its own. So the
copy has no added tokens, and the tokens that they had in the model's vocabulary can't be reached. services/tokenizer.py
makes it.
"""

import json
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tokenizers import Tokenizer as Core


def content_encoder(core: Core, control_ids: frozenset[int]) -> Callable[[str], list[int]]:
    """Takes about a second of CPU for 150,000 tokens. What it returns may be called from several threads."""
    files = json.loads(core.to_str())
    barred = _barred(files, control_ids)
    files |= {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    files["model"] = _without(barred, files["model"])
    copy = Core.from_str(json.dumps(files))

    def encode(text: str) -> list[int]:
        token_ids = copy.encode_batch_fast([text], add_special_tokens=False)[0].ids
        # Only a model whose unknown token is its end-of-text still gives one: then the unknown word is left out.
        return [token_id for token_id in token_ids if token_id not in control_ids]

    return encode


def _barred(files: Mapping[str, Any], control_ids: Collection[int]) -> set[int]:
    """Control tokens and added ones, without runs of white space (GPT-NeoX has such) and the token for unknown words:
    these are text."""
    unknown = files["model"].get("unk_token")
    added = {
        token["id"]
        for token in files["added_tokens"]
        if token["content"] != unknown and (token["special"] or not token["content"].isspace())
    }
    return {*added, *control_ids}


def _without(barred: Collection[int], model: Mapping[str, Any]) -> dict[str, Any]:
    """The model with the barred tokens under names that no text has. Ids stay, and so do letters: without them a text
    would have gaps."""
    hidden = secrets.token_hex(16)
    if isinstance(model["vocab"], list):  # Unigram: [token, score] by id
        rows = [
            [f"{hidden}{place}" if place in barred and place != model["unk_id"] else token, score]
            for place, (token, score) in enumerate(model["vocab"])
        ]
        return {**model, "vocab": rows}
    gone = {
        token
        for token, token_id in model["vocab"].items()
        if token_id in barred and token != model.get("unk_token") and len(token) > 1
    }
    named = {f"{hidden}{token_id}" if token in gone else token: token_id for token, token_id in model["vocab"].items()}
    if "merges" not in model:
        return {**model, "vocab": named}
    return {**model, "vocab": named, "merges": _merges_without(gone, model)}


def _merges_without(gone: Collection[str], model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model that neither make nor use one of these tokens."""
    inside = len(model.get("continuing_subword_prefix") or "")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    return [
        (first, second)
        for first, second in pairs
        if first not in gone and second not in gone and first + second[inside:] not in gone
    ]
