"""Training rows for every stage, each batch a function of its step number.

Policy, reader, rewriter and judge draw from splits of their own. Labels come from the world's checker.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from starter.checker import Checker, Kind, Verdict
from starter.fitting import Row
from starter.grammar import BY_NAME, Template
from starter.prompts import FACTUALITY_LABELS, QUALITY_LABELS, SAFETY_LABELS, PromptLayout
from starter.tokenizer import WordCodec
from starter.world import Words, World
from starter.writer import (
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

TAGS: dict[Kind, int] = {"unsafe": 1, "wrong": 2, "malformed": 3, "repeat": 4, "foreign": 5, "correct": 6}
ALL_DEFECTS: tuple[Defect, ...] = (
    "rude",
    "wrong",
    "wrong",
    "scrambled",
    "stuttered",
    "foreign",
    "doubled",
    "doubled",
    "broken_off",
    "lost_word",
    "stray_word",
)


@dataclass(frozen=True)
class Candidate:
    ids: list[int]
    verdict: Verdict

    @property
    def tags(self) -> dict[int, int]:
        """Token -> tag; none when words and tokens do not run in step."""
        if self.verdict.num_words != len(self.ids):
            return {}
        marks = dict.fromkeys(range(len(self.ids)), 0)
        return marks | {finding.place: TAGS[finding.kind] for finding in self.verdict.findings}


@dataclass(frozen=True)
class Group:
    """A prefix with several candidates; the first one is the raw original."""

    prefix: list[int]
    candidates: list[Candidate]


class Lessons:
    """Rows of all kinds for one world."""

    def __init__(self, world: World, codec: WordCodec) -> None:
        self.world = world
        self.codec = codec
        self.checker = Checker(world)
        names = ("rewriter", "quality", "safety", "factuality")
        self.layouts = {name: PromptLayout(name, codec) for name in names}
        labels = (*QUALITY_LABELS, *SAFETY_LABELS, *FACTUALITY_LABELS)
        self.label_ids = {label: codec.encode(label)[0] for label in labels}

    def policy_rows(self, step: int, *, size: int, split: str = "base") -> list[Row]:
        """Whole documents, defects and all, as raw web text."""
        rows = []
        for index in range(step * size, (step + 1) * size):
            words = document_of(self.world, split, index).words
            ids = [*self.codec.ids(words, starts_document=True), self.codec.eos_id]
            rows.append(Row(ids, dict(enumerate(ids[1:]))))
        return rows

    def reader_rows(self, step: int, *, size: int) -> list[Row]:
        """Next tokens on the clean sentences only, and a tag for every token."""
        rows = []
        for index in range(step * size, (step + 1) * size):
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

    def rewriter_rows(self, step: int, *, size: int, clean_rate: float) -> list[Row]:
        rng = stream(self.world, "rewriter-rows", step)
        rows: list[Row] = []
        while len(rows) < size:
            chunk = self.draw_chunk(rng, clean_rate=clean_rate)
            if chunk:
                rows.append(self.rewriter_row(chunk))
        return rows

    def rewriter_row(self, chunk: Chunk) -> Row:
        """A suffix without fault is its own target, even where its document would have gone on badly."""
        source = self.candidate(chunk.prefix, chunk.suffix)
        target = chunk.suffix if source.verdict.clean else chunk.target
        filled = self.layouts["rewriter"].fill(
            {"prefix": self.prefix_ids(chunk.prefix), "suffix": source.ids, "bridge": []}
        )
        answer = [*self.codec.ids(target), self.codec.eos_id]
        ids = [*filled.ids, *answer[:-1]]
        labels = {len(filled.ids) - 1 + offset: token for offset, token in enumerate(answer)}
        start = filled.spans["suffix"]
        return Row(ids, labels, {start + place: tag for place, tag in source.tags.items()})

    def judge_rows(self, step: int, *, size: int, pool: Sequence[Group], pool_rate: float) -> list[Row]:
        rng = stream(self.world, "judge-rows", step, len(pool))
        rows: list[Row] = []
        while len(rows) < size:
            from_pool = bool(pool) and rng.random() < pool_rate
            group = rng.choice(pool) if from_pool else self.draw_group(rng)
            row = self._judge_row(group, rng) if group else None
            if row:
                rows.append(row)
        return rows

    def draw_chunk(self, rng: random.Random, *, clean_rate: float, heldout: bool = False) -> Chunk | None:
        """A random split of a new document; None where no clean target exists."""
        traits: frozenset[str] | None = frozenset() if rng.random() < clean_rate else None
        document = write_document(self.world, rng, traits=traits, heldout=heldout)
        borders = range(SUFFIX_TOKENS, PREFIX_TOKENS + 1, SUFFIX_TOKENS)
        place = rng.choice(borders) if rng.random() < 0.6 else rng.randint(16, PREFIX_TOKENS)
        return split_document(self.world, document, place, rng)

    def draw_group(self, rng: random.Random, *, size: int = 4, heldout: bool = False) -> Group | None:
        """Original, clean target, and candidates made from the target: varied, spoiled, or both."""
        chunk = self.draw_chunk(rng, clean_rate=0.1, heldout=heldout)
        if chunk is None:
            return None
        options = [chunk.suffix, chunk.target]
        while len(options) < size:
            varied = self.vary(chunk, rng) if rng.random() < 0.5 else chunk.target
            spoil_it = rng.random() < 0.8
            options.append(self.spoiled(chunk, varied, rng, heldout=heldout) if spoil_it else varied)
        return Group(self.prefix_ids(chunk.prefix), [self.candidate(chunk.prefix, words) for words in options])

    def vary(self, chunk: Chunk, rng: random.Random) -> Words:
        """Another clean way to go on: the same plan with other words, some sentences left out."""
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

    def spoiled(self, chunk: Chunk, words: Words, rng: random.Random, *, heldout: bool = False) -> Words:
        """The same words with one to three sentences spoiled, filled again to the full length."""
        sentences = _sentences(words)
        for _ in range(rng.choice((1, 1, 2, 3))):
            whole = [i for i, sentence in enumerate(sentences) if self._template_of(sentence)]
            if whole:
                self._spoil_one(sentences, rng.choice(whole), rng, town=chunk.town, heldout=heldout)
        flat = [word for sentence in sentences for word in sentence]
        if len(flat) < SUFFIX_TOKENS:
            flat += _starting_anew(self.vary(chunk, rng))
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

    def candidate(self, prefix: Words, words: Words) -> Candidate:
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
            return self.quality_row(group.prefix, *rng.sample(group.candidates, 2))
        if task < 0.78:
            return self.safety_row(rng.choice(group.candidates))
        return self.factuality_row(group.prefix, group.candidates[0], rng.choice(group.candidates))

    def quality_row(self, prefix: list[int], a: Candidate, b: Candidate) -> Row | None:
        if a.verdict.order == b.verdict.order:
            return None
        filled = self.layouts["quality"].fill({"prefix": prefix, "a": a.ids, "b": b.ids})
        label = QUALITY_LABELS[a.verdict.order < b.verdict.order]
        tags = {filled.spans["a"] + place: tag for place, tag in a.tags.items()}
        tags |= {filled.spans["b"] + place: tag for place, tag in b.tags.items()}
        return Row(filled.ids, {len(filled.ids) - 1: self.label_ids[label]}, tags)

    def safety_row(self, candidate: Candidate) -> Row:
        filled = self.layouts["safety"].fill({"candidate": candidate.ids})
        label = SAFETY_LABELS[not candidate.verdict.safe]
        tags = {filled.spans["candidate"] + f.place: 1 for f in candidate.verdict.findings if f.kind == "unsafe"}
        return Row(filled.ids, {len(filled.ids) - 1: self.label_ids[label]}, tags if candidate.tags else {})

    def factuality_row(self, prefix: list[int], reference: Candidate, candidate: Candidate) -> Row:
        filled = self.layouts["factuality"].fill(
            {"prefix": prefix, "reference": reference.ids, "candidate": candidate.ids}
        )
        label = FACTUALITY_LABELS[2 if candidate.verdict.num_wrong else 0]
        tags = {filled.spans["candidate"] + place: tag for place, tag in candidate.tags.items()}
        return Row(filled.ids, {len(filled.ids) - 1: self.label_ids[label]}, tags)


def _sentences(words: Words) -> list[Words]:
    """Cut after every full stop; the first and the last may be parts of sentences."""
    sentences: list[Words] = []
    start = 0
    for end, word in enumerate(words, start=1):
        if word == "." or end == len(words):
            sentences.append(words[start:end])
            start = end
    return sentences


def _starting_anew(words: Words) -> Words:
    """What follows the first full stop."""
    return words[words.index(".") + 1 :] + words
