"""The comparisons of `headwater audit`: pure functions that return contradictions as sentences.

A window's state in the database is compared with what another process wrote at another time: the cursor and the number
of windows (collector, at reading), the evidence (trainer, before it marks the ledger), the rows of steps, the stream.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from cli.audit_sources import Account, Testimony, Window
from shared.checkpoint_state import Evidence, FinishedWindow
from shared.ledger import DROPPED, READING, SCORED, TRAINED
from shared.records import NON_FINITE


def windows_read(account: Account) -> int:
    """The number expected from cursors and numbers of windows; a document without any row counts once."""
    sizes = (max(row.num_windows for row in rows) for rows in account.documents.values())
    end = sum(account.cursors.values())
    below = sum(place[2] < account.cursors.get(place[:2], 0) for place in account.documents)
    return sum(sizes) + end - below


def positions(account: Account) -> Iterator[str]:
    """Documents below the cursor without a row, rows beyond it, skipped epochs."""
    read: dict[tuple[int, int], set[int]] = {place: set() for place in account.cursors}
    for part, epoch, position in account.documents:
        read.setdefault((part, epoch), set()).add(position)
    for (part, epoch), found in sorted(read.items()):
        end = account.cursors.get((part, epoch), 0)
        where = f"part {part}, epoch {epoch} was read up to position {end - 1}"
        if not end:
            where = f"part {part}, epoch {epoch} has no cursor"
        yield from (f"document {part}.{epoch}.{n} has no row: {where}" for n in range(end) if n not in found)
        yield from (f"document {part}.{epoch}.{n} has rows: {where}" for n in sorted(found) if n >= end)
    for part in sorted({part for part, _ in read}):
        epochs = sorted(epoch for one, epoch in read if one == part)
        if epochs != list(range(len(epochs))):
            yield f"part {part} was read in epochs {epochs}: one was skipped"


def windows(account: Account) -> Iterator[str]:
    for (part, epoch, position), rows in account.documents.items():
        name = f"{part}.{epoch}.{position}"
        numbers = {row.num_windows for row in rows}
        if len(numbers) > 1:
            yield f"document {name}: its rows disagree on how many windows it has, {sorted(numbers)}"
        found, size = {row.window for row in rows}, max(numbers)
        yield from (f"window {name}.{n} has no row: its document has {size}" for n in range(size) if n not in found)
        yield from (f"window {name}.{n} has a row: its document has {size}" for n in sorted(found) if n >= size)


def states(account: Account) -> Iterator[str]:
    known = (READING, SCORED, TRAINED, DROPPED)
    yield from (f"window {name} is {row.state!r}" for name, row in account.windows.items() if row.state not in known)


def lines(testimony: Testimony, account: Account) -> Iterator[str]:
    """Lines that are damaged, missing or doubled, and checkpoints on disk that disagree with them."""
    yield from testimony.damaged
    number, step = 0, 0
    for line in testimony.lines:
        if line.number <= number:
            why = "one was copied, or the checkpoint was deleted and its windows with it"
            yield f"checkpoint number {line.number} has a second line (step {line.step}): {why}"
        elif line.number > number + 1:
            missing = number + 1 if line.number == number + 2 else f"{number + 1} to {line.number - 1}"
            yield f"the evidence of checkpoint number {missing}, between steps {step} and {line.after}, is missing"
        elif line.after != step:
            yield f"the evidence of step {line.step} continues step {line.after}, the line before it ends at {step}"
        number, step = line.number, line.step
    yield from _disagreeing_states(testimony, account)


def _disagreeing_states(testimony: Testimony, account: Account) -> Iterator[str]:
    by_step = {line.step: line for line in testimony.lines}
    newest = max(testimony.states, default=0)
    for step, state in sorted(testimony.states.items()):
        line = by_step.get(step)
        if line is None:
            if step != newest or account.in_state(TRAINED).keys() & state.finished.keys():
                yield f"checkpoint step-{step:08d} has no line: the evidence of step {step} is missing"
        elif line != state.evidence:
            yield f"checkpoint step-{step:08d} and the evidence of step {step} disagree"


def in_two_checkpoints(testimony: Testimony) -> Iterator[str]:
    """Windows finished by two checkpoints, and stream entries that two windows came from."""
    documents: dict[str, int] = {}
    entries: dict[str, str] = {}
    for line in testimony.lines:
        for document, finished in line.finished.items():
            if document in documents:
                both = f"{documents[document]} and {line.step}"
                yield f"window {document} was finished by two checkpoints, of steps {both}"
            elif finished.entry_id in entries:
                yield f"windows {entries[finished.entry_id]} and {document} came from one entry, {finished.entry_id}"
            documents.setdefault(document, line.step)
            entries.setdefault(finished.entry_id, document)


def unproved(account: Account, testimony: Testimony) -> Iterator[str]:
    """Windows that the database calls trained and no checkpoint contains."""
    finished_step = account.finished_step
    if finished_step is not None and finished_step > testimony.newest_step:
        yield f"the trainer finished at step {finished_step}, the newest checkpoint is of {testimony.newest_step}"
    for name, row in account.in_state(TRAINED).items():
        step = row.trained_step
        if step is None or step > testimony.newest_step:
            yield f"window {name} is marked trained at step {step}, the newest checkpoint is of {testimony.newest_step}"
        elif name not in testimony.finished:
            yield f"window {name} is marked trained at step {step}, no checkpoint contains it"


def unskipped(account: Account) -> Iterator[str]:
    """Windows dropped for a loss that was not finite, and no skipped step had them."""
    for name, row in account.in_state(DROPPED).items():
        if row.reason == NON_FINITE and name not in account.skipped:
            yield f"window {name} is dropped as {NON_FINITE}, no skipped step had it"


def unmarked(account: Account, testimony: Testimony) -> Iterator[str]:
    """Windows that a checkpoint finished and the database does not."""
    for line in testimony.lines:
        is_settled = testimony.is_settled(line, account)
        for document, finished in line.finished.items():
            row = account.windows.get(document)
            if row is None:
                yield f"window {document} is in the checkpoint of step {line.step} and has no row"
            elif is_settled or row.state not in (READING, SCORED):
                yield from _disagreement(row, finished, line)


def _disagreement(row: Window, finished: FinishedWindow, line: Evidence) -> Iterator[str]:
    says = f"the checkpoint of step {line.step} says"
    if row.state != TRAINED:
        state = f"{row.state} ({row.reason})" if row.reason else row.state
        yield f"window {row} is {state}, {says} {TRAINED}"
    elif row.trained_step != finished.step:
        yield f"window {row} is marked trained at step {row.trained_step}, {says} step {finished.step}"
    elif row.num_pairs != finished.num_pairs:
        yield f"window {row} is marked as giving {row.num_pairs} pairs, {says} {finished.num_pairs}"


def steps(account: Account, testimony: Testimony) -> Iterator[str]:
    newest = testimony.newest_step
    owed = newest in testimony.states and testimony.states[newest].row is not None
    for step in range(1, max([*account.steps, newest], default=0) + 1):
        if step not in account.steps and not (owed and step == newest):
            yield f"step {step} has no row"


def pairs(account: Account, testimony: Testimony) -> Iterator[str]:
    """Steps with another number of pairs than their windows have, windows of a step that their checkpoint can't have,
    and windows that gave more than they have."""
    given: Counter[int] = Counter()
    for line in testimony.lines:
        for name, finished in line.finished.items():
            given[finished.step] += finished.num_pairs
            if not line.after < finished.step <= line.step:
                span = f"the checkpoint of step {line.step}, which begins after step {line.after}"
                yield f"window {name} is in update {finished.step} by {span}"
    last = testimony.lines[-1].step if testimony.lines else 0
    for step, row in account.steps.items():
        if step <= last and row.num_pairs != given[step]:
            yield f"step {step} took {row.num_pairs} pairs by its row, {given[step]} by the checkpoints"
    for name, finished in testimony.finished.items():
        window = account.windows.get(name)
        if window is not None and 0 < window.num_chunks < finished.num_pairs:
            yield f"window {name} gave {finished.num_pairs} pairs, it has {window.num_chunks} scored chunks"


def versions(account: Account) -> Iterator[str]:
    if not account.versions:
        if account.steps:
            yield f"no weight version has a row, and {len(account.steps)} steps were taken"
        return
    first, last = min(account.versions), max(account.versions)
    yield from (f"weight version {n} has no row" for n in range(first, last) if n not in account.versions)
    if account.versions[first] != 0:
        step = account.versions[first]
        yield f"weight version {first} of step {step} is the first with a row: the one before the first step has none"
    for step, row in account.steps.items():
        published = account.versions.get(row.weight_version)
        if published is None:
            yield f"step {step} ended with weight version {row.weight_version}, which has no row"
        elif published > step:
            yield f"step {step} ended with weight version {row.weight_version}, which is of step {published}"
    if account.finished_step not in (None, *account.versions.values()):
        yield f"the trainer finished at step {account.finished_step}, and no weight version of that step has a row"
    named = {row.weight_version: name for name, row in account.windows.items() if row.weight_version is not None}
    for version, name in named.items():
        if version not in account.versions:
            yield f"window {name} was sampled under weight version {version}, which has no row"


def left_over(account: Account) -> Iterator[str]:
    """Windows in flight although the trainer finished because the source had ended."""
    for name, row in account.in_state(READING, SCORED).items():
        if account.source_ended_at is not None and row.read_at <= account.source_ended_at:
            yield f"window {name} is {row.state}, though the source had ended when the trainer finished"


def abandoned(reading: Mapping[str, Window], *, leased: Collection[int]) -> Iterator[str]:
    """Windows being read in parts that no collector leases, while some collector works. Else they are in flight."""
    for name, row in reading.items():
        if leased and row.part not in leased:
            yield f"window {name} is being read, and no collector leases part {row.part}"
