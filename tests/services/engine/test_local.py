"""What an engine makes of text without running a model."""

from pathlib import Path

import pytest

from services.engine.local import LocalModel
from shared.errors import EngineError
from tests.services.chat_families import FAMILIES, TokenizerEngine, save_family, started


class Scoring(TokenizerEngine):
    def scored(self, *labels: str) -> list[tuple[int, ...]]:
        self._model = LocalModel(None, len(self._tokens.tokenizer), 256, frozenset())
        return self._encode_scored(labels)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_label_has_the_tokens_that_it_has_after_a_prompt(name: str, tmp_path: Path) -> None:
    """Llama 2's tokenizer puts one more space before a text than the label has after "Verdict:"."""
    engine = Scoring(save_family(name, tmp_path))
    with pytest.raises(EngineError, match="is still starting"):
        engine.encode_content(" A")
    engine._codec = started(tmp_path)._codec
    before, after = engine.encode("7:"), engine.encode("7: A")
    assert after[: len(before)] == before
    assert engine.scored(" A") == [tuple(after[len(before) :])]


@pytest.mark.parametrize("name", FAMILIES)
def test_our_own_text_has_control_tokens_and_contents_have_none(name: str, tmp_path: Path) -> None:
    engine = started(save_family(name, tmp_path))
    for spelling in FAMILIES[name].special:
        (control,) = engine.encode(spelling)[-1:]
        assert control in engine.added_ids
        assert not engine.added_ids & set(engine.encode_content(spelling))
        assert engine.letters(engine.encode_content("x" + spelling)).lstrip() in (f"x{spelling}", f" x{spelling}")
