"""The classifier criterion on tiny real models; expected values come from a forward pass without padding."""

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from services.judge.classifier import Classifier
from services.judge.criteria import CriterionError, JudgedChunk
from services.judge.verdicts import CallCount
from shared import metrics
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, OverloadedError, SettingsError
from shared.judge_settings import CriterionSettings
from tests.services.judge.judges import chunk_of, make_window
from tests.services.subject_tokenizers import byte_level

TEXTS = (" the moon", " moves around the earth in about seven days", "", " and so on and so on")
PREFIX = "The moon moves"
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
TWO: dict[str, Any] = {"num_labels": 2, "id2label": {0: "toxic", 1: "clean"}, "label2id": {"toxic": 0, "clean": 1}}


def tokenizer(*, pads: bool = True) -> PreTrainedTokenizerFast:
    """`<s> text </s>` in bytes and a few merges; <unk> is no token of a text."""
    core: Tokenizer = byte_level(adds_bos=False)
    core.add_special_tokens(["<pad>"])
    ids = [(name, core.token_to_id(name)) for name in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    pad = {"pad_token": "<pad>"} if pads else {}
    made: Any = PreTrainedTokenizerFast  # its constructor has no types
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | pad
    found: PreTrainedTokenizerFast = made(tokenizer_object=core, **named)
    return found


def saved(folder: Path, kind: str, *, pads: bool = True, **options: Any) -> str:
    torch.manual_seed(3)
    words = tokenizer(pads=pads)
    shape = SHAPE | {"vocab_size": len(words)} | options
    classes: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # no types here either
        "llama": (LlamaForSequenceClassification, LlamaConfig, {"num_key_value_heads": 1, "pad_token_id": None}),
        "language model": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
        "roberta": (RobertaForSequenceClassification, RobertaConfig, {"pad_token_id": words.pad_token_id}),
        "bert": (BertForSequenceClassification, BertConfig, {"pad_token_id": words.pad_token_id}),
    }
    model, config, own = classes[kind]
    if kind == "roberta":
        shape["max_position_embeddings"] += words.pad_token_id + 1  # its positions begin after the padding's id
    made = model(config(**own, **shape))
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def chunk(*texts: str, prefix: str = PREFIX) -> JudgedChunk:
    return chunk_of(make_window(*texts, prefix=prefix))


def scored(
    model: str, chunks: Sequence[JudgedChunk], *, engine: dict[str, Any] | None = None, **criterion: Any
) -> list[list[float | None]]:
    """All at once."""

    async def score() -> list[list[float | None]]:
        settings = CriterionSettings(model=model, **criterion)
        classifier = Classifier("style", settings, EngineSettings(**(engine or {})), max_prefix_characters=8_000)
        await classifier.start()
        try:
            found = [classifier.score(one, seed=0, count=CallCount("style")) for one in chunks]
            return [scores.values for scores in await asyncio.gather(*found)]
        finally:
            await classifier.close()

    return asyncio.run(score())


@torch.inference_mode()
def logits(model: str, texts: Sequence[str], *, prefix: str = PREFIX, max_tokens: int = 64) -> list[torch.Tensor]:
    """One forward pass for each text, of the last tokens of the prefix that fit; bytes are encoded alike in pieces."""
    module, words = AutoModelForSequenceClassification.from_pretrained(model).eval(), tokenizer()
    found = []
    for text in texts:
        begins, told = (words(piece, add_special_tokens=False)["input_ids"] for piece in (prefix, text))
        told = told[: max_tokens - 2]
        begins = begins[max(0, len(begins) + len(told) - (max_tokens - 2)) :]
        ids = torch.tensor([[words.bos_token_id, *begins, *told, words.eos_token_id]])
        found.append(module(input_ids=ids).logits[0])
    return found


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_a_score_is_the_probability_of_the_label(kind: str, tmp_path: Path) -> None:
    model = saved(tmp_path, kind, **TWO)
    expected = [row.softmax(-1) for row in logits(model, TEXTS)]
    for label, place in (("toxic", 0), ("clean", 1)):
        (found,) = scored(model, [chunk(*TEXTS)], label=label)
        assert found == pytest.approx([float(row[place]) for row in expected], abs=1e-5)
    assert max(found) - min(found) > 0.05  # type: ignore[type-var, operator]


@pytest.mark.parametrize("pads", [True, False])
def test_one_output_becomes_a_sigmoid_around_the_mean_of_the_chunk(pads: bool, tmp_path: Path) -> None:
    """Several chunks share batches, and each has its own mean."""
    model = saved(tmp_path, "llama", pads=pads, num_labels=1)
    found = scored(model, [chunk(*TEXTS), chunk(*TEXTS[:2])], scale=0.5)
    outputs = torch.stack([row[0] for row in logits(model, TEXTS)])
    for values, of_chunk in zip(found, (outputs, outputs[:2]), strict=True):
        assert values == pytest.approx(torch.sigmoid((of_chunk - of_chunk.mean()) / 0.5).tolist(), abs=1e-5)


def test_several_labels_at_once_have_a_probability_each(tmp_path: Path) -> None:
    model = saved(tmp_path, "bert", problem_type="multi_label_classification", **TWO)
    (found,) = scored(model, [chunk(*TEXTS)], label="toxic")
    assert found == pytest.approx([float(row[0].sigmoid()) for row in logits(model, TEXTS)], abs=1e-5)


def test_the_candidate_alone_is_seen_where_the_prefix_is_not(tmp_path: Path) -> None:
    """An empty candidate then has nothing to score."""
    model = saved(tmp_path, "bert", **TWO)
    (found,) = scored(model, [chunk(*TEXTS)], label="toxic", sees_prefix=False)
    expected: list[float | None] = [float(row.softmax(-1)[0]) for row in logits(model, TEXTS, prefix="")]
    expected[TEXTS.index("")] = None
    assert found == pytest.approx(expected, abs=1e-5)


def cut() -> float:
    return metrics.REGISTRY.get_sample_value("headwater_judge_cut_candidates_total", {"criterion": "style"}) or 0.0


def test_the_prefix_gives_way_to_the_candidate_and_a_cut_candidate_is_counted(tmp_path: Path) -> None:
    """62 of the 64 tokens are text."""
    model = saved(tmp_path, "roberta", **TWO)
    prefix, before = "one two three. " * 30, cut()
    texts = (" four", "x" * 62, "y" * 63 + " five")
    (found,) = scored(model, [chunk(*texts, prefix=prefix)], label="toxic")
    expected = [float(row.softmax(-1)[0]) for row in logits(model, texts, prefix=prefix)]
    assert found == pytest.approx(expected, abs=1e-5)
    assert cut() - before == 1


def test_control_tokens_in_a_text_stay_text(tmp_path: Path) -> None:
    """`</s>` becomes four characters or so: the score is that of a text whose spelling is encoded so."""
    model = saved(tmp_path, "llama", num_labels=1)
    texts = (" a</s><pad>", " a")
    (found,) = scored(model, [chunk(*texts)])
    words = tokenizer()
    spelled = words(PREFIX + texts[0], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not {words.eos_token_id, words.pad_token_id} & set(spelled)
    with torch.inference_mode():
        ids = torch.tensor([[words.bos_token_id, *spelled, words.eos_token_id]])
        first = AutoModelForSequenceClassification.from_pretrained(model).eval()(input_ids=ids).logits[0, 0]
    gap = float(first - logits(model, texts[1:])[0][0])
    assert found[0] == pytest.approx(float(torch.sigmoid(torch.tensor(gap / 2))), abs=1e-5)


def test_small_batches_give_the_same_scores(tmp_path: Path) -> None:
    model = saved(tmp_path, "bert", **TWO)
    chunks = [chunk(*TEXTS), chunk(*reversed(TEXTS))]
    small = scored(model, chunks, label="toxic", engine={"max_batch_tokens": 64})
    assert small[0] == pytest.approx(scored(model, chunks, label="toxic")[0], abs=1e-5)
    assert small[1] == pytest.approx(list(reversed(small[0])), abs=1e-5)


def test_a_candidate_whose_output_is_no_number_is_unscored(tmp_path: Path) -> None:
    """The embedding of `~` is not a number."""
    model = saved(tmp_path, "bert", **TWO)
    module, place = BertForSequenceClassification.from_pretrained(model), tokenizer().convert_tokens_to_ids("~")
    with torch.no_grad():
        module.bert.embeddings.word_embeddings.weight[place] = float("nan")
    module.save_pretrained(model)
    (found,) = scored(model, [chunk(" a", " ~")], label="toxic")
    assert found[0] == pytest.approx(float(logits(model, [" a"])[0].softmax(-1)[0]), abs=1e-5)
    assert found[1] is None
    with pytest.raises(CriterionError, match="no finite output"):
        scored(model, [chunk(" ~", "~")], label="toxic")


@pytest.mark.parametrize(
    ("kind", "options", "label", "words"),
    [
        (
            "bert",
            TWO,
            "",
            r"style\.label is empty, but the model has several classes: set it to one of 'toxic', 'clean'$",
        ),
        ("bert", TWO, "rude", r"style\.label = 'rude' is no class of the model: set it to one of 'toxic', 'clean'$"),
        ("bert", {"num_labels": 1}, "rude", r"style\.label = 'rude', but the model has one output: leave the label"),
        ("language model", {}, "", r"style\.model = .* is no trained classifier: its weights lack 'score\.weight'$"),
    ],
)
def test_what_can_not_score_is_refused_in_a_sentence(
    kind: str, options: dict[str, Any], label: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=words):
        scored(saved(tmp_path, kind, **options), [], label=label)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"style\.model = .*can't be loaded as a sequence classifier"):
        scored(str(tmp_path), [])


def test_a_full_queue_refuses_and_a_closed_classifier_fails_what_waits(tmp_path: Path) -> None:
    """All while the model is being loaded. A cancelled job leaves its place to another."""

    async def fill() -> None:
        settings = CriterionSettings(model=saved(tmp_path, "bert", **TWO), label="toxic")
        classifier = Classifier("style", settings, EngineSettings(max_queued_requests=1), max_prefix_characters=8)
        with pytest.raises(EngineError, match="has not started"):
            await classifier.score(chunk(" a"), seed=0, count=CallCount("style"))
        loading = asyncio.ensure_future(classifier.start())
        await asyncio.sleep(0)
        first = asyncio.ensure_future(classifier.score(chunk(" a"), seed=0, count=CallCount("style")))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match=r"1 chunks wait .*max_queued_requests allows no more"):
            await classifier.score(chunk(" b"), seed=0, count=CallCount("style"))
        first.cancel()
        await asyncio.sleep(0)
        second = asyncio.ensure_future(classifier.score(chunk(" b"), seed=0, count=CallCount("style")))
        await asyncio.sleep(0)
        await classifier.close()
        with pytest.raises(EngineError, match="is closed"):
            await second
        await loading

    asyncio.run(fill())


def test_torch_is_not_loaded_before_the_start() -> None:
    code = "import sys, services.judge.classifier; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
