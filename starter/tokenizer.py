"""One tokenizer for all models of a world: every world word one token, any other text byte by byte.

It adds no BOS or EOS of its own. A document starts directly with its first word; EOS ends documents and rewrites.
"""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from starter.grammar import TEMPLATES
from starter.world import World

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PROMPT_WORDS = (
    *("Prefix", "Suffix", "Rewrite", "A", "B", "Better", "Text", "Reference", "Safety", "Hallucination", "Verdict"),
    *("safe", "unsafe", "none", "possible", "definite"),
)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose vocabulary is specials, all bytes, and whole words with and without a space."""
    openers = _sentence_openers(world)
    pieces = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"Ġ{word}" for word in [*world.words(), *PROMPT_WORDS]]
    pieces += [*openers, *PROMPT_WORDS]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )


class WordCodec:
    """Fast way between world words and token ids; the same ids as encoding the joined text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self._inner = {piece[1:]: index for piece, index in vocabulary.items() if piece.startswith("Ġ")}
        self._inner["."] = vocabulary["."]
        self._first = {piece: index for piece, index in vocabulary.items() if not piece.startswith("Ġ")}
        self.pad_id, self.eos_id = vocabulary[PAD], vocabulary[EOS]

    def ids(self, words: Sequence[str], *, starts_document: bool = False) -> list[int]:
        ids = [self._inner[word] for word in words]
        if starts_document and words:
            ids[0] = self._first[words[0]]
        return ids

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first EOS, other special tokens left out."""
        kept: list[int] = []
        for index in ids:
            if index == self.eos_id:
                break
            kept.append(index)
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))


def _sentence_openers(world: World) -> list[str]:
    first = {template.words[0] for template in TEMPLATES}
    fixed = {word for word in first if not word.startswith("$")}
    slots = {word for name in first if name.startswith("$") for word in world.slots[name[1:]]}
    return sorted(fixed | slots)
