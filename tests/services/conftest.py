"""Fixtures that tests of services share: a tiny random policy with its own tokenizer."""

from pathlib import Path

import pytest

TEXT = """The moon moves around the earth in about twenty-seven days. Water boils at a lower heat on high mountains.
A small river runs through the old town, and on market days the bridge is full of people who sell bread and apples.
Nobody knows who built the first tower; the second one was finished in the year 1421 by a builder from the north."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers, width 32, context 256, with a byte-level BPE of 300 tokens; EOS is id 0."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_tiny_model(folder)
    return folder


def build_tiny_model(folder: Path, *, seed: int = 0, width: int = 32) -> None:
    """The same shapes and tokenizer for every seed, other weights."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from tests.tiny_llama import tiny_llama

    torch.set_num_threads(1)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": width, "bos_token_id": None, "eos_token_id": 0}
    tiny_llama(300, seed=seed, **shape).save_pretrained(folder)
