"""What every engine with a tokenizer of its own asks of a prompt before it reaches the model."""

from services.engine.base import Prompt
from services.engine.tokenizer import Tokenizer
from services.engine.trunks import Tokens
from shared.errors import PromptError


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, *, vocab_size: int) -> Tokens:
    """Its tokens, none of them outside the vocabulary (PromptError). May be empty."""
    token_ids = tuple(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise PromptError(f"token ids must lie in 0..{vocab_size - 1}, got {min(token_ids)}..{max(token_ids)}")
    return token_ids


def check_room(token_ids: Tokens, *, room: int, max_tokens: int, engine: str) -> Tokens:
    """`token_ids`, if there are any and `room` more fit into the model's `max_tokens`; PromptError otherwise."""
    if not token_ids:
        raise PromptError("the prompt is empty: the model needs at least one token to continue")
    if len(token_ids) + room > max_tokens:
        raise PromptError(
            f"the prompt has {len(token_ids)} tokens and needs room for {room} more, "
            f"but {engine} takes {max_tokens} in all"
        )
    return token_ids
