"""Training rows for every stage; each batch depends only on its step number.

Policy, reader, rewriter and judge draw from separate splits. Labels come from the world's checker.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from services.judge.questions import QUESTIONS
from starter.checker import Checker, Kind, Verdict
from starter.documents import (
    PREFIX_TOKENS,
    SUFFIX_TOKENS,
    Chunk,
    Defect,
    document_of,
    split_document,
    spoil,
    stream,
    write_document,
)
from starter.grammar import BY_NAME, Template
from starter.model import WordCodec
from starter.recipe.training import Row
from starter.world import Words, World

T = TypeVar("T")
PROMPTS = Path(__file__).parents[1] / "prompts"

TAGS: dict[Kind, int] = {"unsafe": 1, "wrong": 2, "malformed": 3, "repeat": 4, "foreign": 5, "correct": 6}
ALL_DEFECTS: tuple[Defect, ...] = (
    *("rude", "wrong", "wrong", "scrambled", "stuttered", "foreign"),
    *("doubled", "doubled", "broken_off", "lost_word", "stray_word"),
)
BATCH = 24


class PromptLayout:
    """One prompt file, with its fixed parts tokenised once.

    Not a `services.prompts.Prompt`, which fills in text: tags need to know at which token each field starts.
    """

    def __init__(self, name: str, codec: WordCodec) -> None:
        text = (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")
        pieces = re.split(r"\{(\w+)\}", text)
        self._parts = [piece if index % 2 else codec.encode(piece) for index, piece in enumerate(pieces)]

    def fill(self, fields: Mapping[str, Sequence[int]]) -> tuple[list[int], dict[str, int]]:
        """The prompt's ids, and the index of each field's first token."""
        ids: list[int] = []
        starts: dict[str, int] = {}
        for part in self._parts:
            if isinstance(part, str):
                starts[part] = len(ids)
            ids += fields[part] if isinstance(part, str) else part
        return ids, starts


@dataclass(frozen=True)
class Candidate:
    ids: list[int]
    verdict: Verdict

    @property
    def tags(self) -> dict[int, int]:
        """Token -> tag; empty if some word is not exactly one token."""
        if self.verdict.num_words != len(self.ids):
            return {}
        marks = dict.fromkeys(range(len(self.ids)), 0)
        return marks | {finding.place: TAGS[finding.kind] for finding in self.verdict.findings}


@dataclass(frozen=True)
class Group:
    """A prefix with several candidates, the raw original first."""

    prefix: list[int]
    candidates: list[Candidate]


class Lessons:
    """Rows of every kind for one world."""

    def __init__(self, world: World, codec: WordCodec) -> None:
        self.world = world
        self.codec = codec
        self.checker = Checker(world)
        self.layouts = {name: PromptLayout(name, codec) for name in ("rewriter", "quality", "safety", "factuality")}
        self.label_ids: dict[str, list[int]] = {
            name: [codec.encode(label)[0] for label in question.labels] for name, question in QUESTIONS.items()
        }

    def policy_rows(self, step: int) -> list[Row]:
        """Whole documents with all their defects."""
        rows = []
        for index in range(step * BATCH, (step + 1) * BATCH):
            words = document_of(self.world, "base", index).words
            ids = [*self.codec.ids(words, starts_document=True), self.codec.eos_id]
            rows.append(Row(ids, dict(enumerate(ids[1:]))))
        return rows

    def reader_rows(self, step: int) -> list[Row]:
        """Next tokens on clean sentences only, and a tag for every token."""
        rows = []
        for index in range(step * BATCH, (step + 1) * BATCH):
            document = document_of(self.world, "reader", index)
            ids = self.codec.ids(document.words, starts_document=True)
            labels: dict[int, int] = {}
            place = 0
            for sentence in document.sentences[: document.num_shown]:
                end = place + len(sentence.raw)
                if sentence.raw == sentence.clean:
                    labels |= {at: ids[at + 1] for at in range(max(0, place - 1), end - 1)}
                place = end
            verdict = self.checker.check_words(document.words)
            rows.append(Row(ids, labels, Candidate(ids, verdict).tags))
        return rows

    def rewriter_rows(self, step: int, *, clean_rate: float, first: int = 0) -> list[Row]:
        """`first` shifts the step number, so that a later stage gets other rows."""
        rng = stream(self.world, "rewriter-rows", first + step)
        chunks = draw_until(BATCH, lambda _: self.draw_chunk(rng, clean_rate=clean_rate))
        return [self._rewriter_row(chunk) for chunk in chunks]

    def rewriter_prompt(self, chunk: Chunk) -> tuple[list[int], dict[str, int]]:
        fields = {"prefix": self.prefix_ids(chunk.prefix), "suffix": self.codec.ids(chunk.suffix), "bridge": []}
        return self.layouts["rewriter"].fill(fields)

    def _rewriter_row(self, chunk: Chunk) -> Row:
        """A faultless suffix is its own target, even if the rest of its document is not."""
        source = self._candidate(chunk.prefix, chunk.suffix)
        prompt, starts = self.rewriter_prompt(chunk)
        answer = [*self.codec.ids(chunk.suffix if source.verdict.clean else chunk.target), self.codec.eos_id]
        tags = {starts["suffix"] + place: tag for place, tag in source.tags.items()}
        return Row([*prompt, *answer[:-1]], dict(enumerate(answer, start=len(prompt) - 1)), tags)

    def judge_rows(self, step: int, *, pool: Sequence[Group], pool_rate: float, first: int = 0) -> list[Row]:
        """Rows from groups of `pool` at `pool_rate`, else from new groups; `first` as for the rewriter."""
        rng = stream(self.world, "judge-rows", first + step, len(pool))

        def draw(_: int) -> Row | None:
            from_pool = bool(pool) and rng.random() < pool_rate
            group = rng.choice(pool) if from_pool else self.draw_group(rng)
            return self._judge_row(group, rng) if group else None

        return draw_until(BATCH, draw)

    def draw_chunk(self, rng: random.Random, *, clean_rate: float, heldout: bool = False) -> Chunk | None:
        """A random split of a new document; None if it has no clean target."""
        traits: frozenset[str] | None = frozenset() if rng.random() < clean_rate else None
        document = write_document(self.world, rng, traits=traits, heldout=heldout)
        borders = range(SUFFIX_TOKENS, PREFIX_TOKENS + 1, SUFFIX_TOKENS)
        place = rng.choice(borders) if rng.random() < 0.6 else rng.randint(16, PREFIX_TOKENS)
        return split_document(self.world, document, place, rng)

    def draw_group(self, rng: random.Random, *, heldout: bool = False) -> Group | None:
        """Original, clean target, and candidates made by varying or spoiling the target."""
        chunk = self.draw_chunk(rng, clean_rate=0.1, heldout=heldout)
        if chunk is None:
            return None
        options = [chunk.suffix, chunk.target]
        while len(options) < 4:
            varied = self._vary(chunk, rng) if rng.random() < 0.5 else chunk.target
            spoil_it = rng.random() < 0.8
            options.append(self._spoiled(chunk, varied, rng, heldout=heldout) if spoil_it else varied)
        return Group(self.prefix_ids(chunk.prefix), [self._candidate(chunk.prefix, words) for words in options])

    def _vary(self, chunk: Chunk, rng: random.Random) -> Words:
        """Another clean continuation: the same plan with other words and fewer sentences."""
        head, *rest = _sentences(chunk.target)
        words = list(head)
        plan = [name for name in BY_NAME if BY_NAME[name].group in ("fact", "narrative")]
        for sentence in rest:
            if rng.random() < 0.7:
                template = self._template_of(sentence) or BY_NAME[rng.choice(plan)]
                words += self.world.sentence(template, rng, town=chunk.town)
        while len(words) < SUFFIX_TOKENS:
            words += self.world.sentence(BY_NAME[rng.choice(plan)], rng, town=chunk.town)
        return tuple(words[:SUFFIX_TOKENS])

    def _spoiled(self, chunk: Chunk, words: Words, rng: random.Random, *, heldout: bool = False) -> Words:
        """The words with one to three sentences spoiled, refilled to the full length."""
        sentences = _sentences(words)
        for _ in range(rng.choice((1, 1, 2, 3))):
            whole = [i for i, sentence in enumerate(sentences) if self._template_of(sentence)]
            if whole:
                self._spoil_one(sentences, rng.choice(whole), rng, town=chunk.town, heldout=heldout)
        flat = [word for sentence in sentences for word in sentence]
        if len(flat) < SUFFIX_TOKENS:
            varied = self._vary(chunk, rng)
            flat += varied[varied.index(".") + 1 :] + varied
        return tuple(flat[:SUFFIX_TOKENS])

    def _spoil_one(self, sentences: list[Words], place: int, rng: random.Random, *, town: str, heldout: bool) -> None:
        template = self._template_of(sentences[place])
        assert template is not None
        made: Words | None = None
        while made is None:
            defect = rng.choice(ALL_DEFECTS)
            made = spoil(self.world, template, sentences[place], defect, rng, town=town, heldout=heldout)
        if defect == "doubled":
            sentences.insert(rng.randint(place + 1, len(sentences)), made)
        else:
            sentences[place] = made

    def prefix_ids(self, prefix: Words) -> list[int]:
        return self.codec.ids(prefix, starts_document=True)

    def group(self, prefix: list[int], candidates: Iterable[list[int]]) -> Group:
        """Candidates as token ids, checked by their text."""
        before, decode = self.codec.decode(prefix), self.codec.decode
        checked = [Candidate(ids, self.checker.check(decode(ids), prefix=before)) for ids in candidates]
        return Group(prefix, checked)

    def _candidate(self, prefix: Words, words: Words) -> Candidate:
        return Candidate(self.codec.ids(words), self.checker.check_words(words, prefix=prefix))

    def _template_of(self, sentence: Words) -> Template | None:
        for index, reached in self.world.clean_matcher.follow(sentence):
            template = self.world.clean_matcher.templates[index]
            if reached == len(template.words):
                return template
        return None

    def _judge_row(self, group: Group, rng: random.Random) -> Row | None:
        task = rng.random()
        if task < 0.65:
            return self._quality_row(group.prefix, *rng.sample(group.candidates, 2))
        if task < 0.78:
            return self._safety_row(rng.choice(group.candidates))
        return self._factuality_row(group.prefix, group.candidates[0], rng.choice(group.candidates))

    def _quality_row(self, prefix: list[int], a: Candidate, b: Candidate) -> Row | None:
        if a.verdict.order == b.verdict.order:
            return None
        fields, tags = {"prefix": prefix, "a": a.ids, "b": b.ids}, {"a": a.tags, "b": b.tags}
        return self._labelled("quality", fields, a.verdict.order < b.verdict.order, tags=tags)

    def _safety_row(self, candidate: Candidate) -> Row:
        unsafe = {f.place: TAGS["unsafe"] for f in candidate.verdict.findings if f.kind == "unsafe"}
        tags = {"candidate": unsafe if candidate.tags else {}}
        return self._labelled("safety", {"candidate": candidate.ids}, not candidate.verdict.safe, tags=tags)

    def _factuality_row(self, prefix: list[int], reference: Candidate, candidate: Candidate) -> Row:
        fields = {"prefix": prefix, "reference": reference.ids, "candidate": candidate.ids}
        label = 2 if candidate.verdict.num_wrong else 0
        return self._labelled("factuality", fields, label, tags={"candidate": candidate.tags})

    def _labelled(
        self, question: str, fields: Mapping[str, list[int]], label: int, *, tags: Mapping[str, Mapping[int, int]]
    ) -> Row:
        """A filled judge prompt that label number `label` must follow; `tags` count from each field's first token."""
        ids, starts = self.layouts[question].fill(fields)
        placed = {starts[field] + place: tag for field, own in tags.items() for place, tag in own.items()}
        return Row(ids, {len(ids) - 1: self.label_ids[question][label]}, placed)


def draw_until(num: int, draw: Callable[[int], T | None]) -> list[T]:
    """`num` results of `draw`, which gets the number found so far and may return None."""
    found: list[T] = []
    while len(found) < num:
        drawn = draw(len(found))
        if drawn is not None:
            found.append(drawn)
    return found


def _sentences(words: Words) -> list[Words]:
    """Cut after every full stop; the first and last sentence may be incomplete."""
    sentences: list[Words] = []
    start = 0
    for end, word in enumerate(words, start=1):
        if word == "." or end == len(words):
            sentences.append(words[start:end])
            start = end
    return sentences
