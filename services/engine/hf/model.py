"""A causal language model with its forward passes: prefill, step, score. Called in inference mode by one thread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from services.engine.base import Tokens, TokenScore
from services.engine.hf.prefill import Branch, PrefilledPrompt, RowCache, pack, plan_branches
from services.engine.local import LocalModel, end_token_ids
from shared import metrics
from shared.engine_settings import EngineSettings
from shared.errors import EngineError

MAX_LOGITS = 64 * 1024 * 1024
"""Per forward pass: 256 MB in float32."""


@dataclass(frozen=True)
class CausalModel(LocalModel):
    device: torch.device
    max_batch_tokens: int

    def prefill(self, prompts: Sequence[Tokens]) -> dict[Tokens, PrefilledPrompt]:
        """Keys, values and next-token logits of every distinct prompt; shared tokens are computed once."""
        found: dict[Tokens, PrefilledPrompt] = {}
        stems: dict[Tokens, PrefilledPrompt] = {}
        for branches in plan_branches(prompts):
            lengths = [len(branch.token_ids) for branch in branches]
            for run in pack(lengths, max_tokens=self.max_batch_tokens, max_rows=self._max_prefill_rows(branches)):
                self._run_together(branches[run.start : run.stop], found, stems)
        return found

    def step(self, token_ids: Tensor, rows: RowCache) -> Tensor:
        """Next-token logits (R, V) float32 after one more token (R,) on each row."""
        return self._forward(token_ids[:, None], rows)[:, -1]

    def _forward(self, token_ids: Tensor, rows: RowCache | None, **options: Any) -> Tensor:
        """Logits (R, T, V) float32 for T more tokens (R, T) on each row; `rows` is None for rows that begin here."""
        num_new = token_ids.shape[1]
        if rows:
            # Padding on the right needs no mask: causal attention never looks at it.
            mask = rows.mask(num_new)
            options["attention_mask"] = mask if mask is None or num_new == 1 else mask.long()
            options |= {"position_ids": rows.positions(num_new), "past_key_values": rows.cache}
        logits: Tensor = self.module(input_ids=token_ids, use_cache=True, **options).logits
        return logits.float()

    def score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[list[TokenScore]]:
        """For each (prompt, continuation) one score per token of the continuation."""
        prefilled = self.prefill([prompt for prompt, _ in pairs])
        next_token = {prompt: torch.log_softmax(known.logits, dim=-1) for prompt, known in prefilled.items()}
        best = {prompt: log_probs.max(dim=-1) for prompt, log_probs in next_token.items()}
        scores = [
            [TokenScore(float(next_token[prompt][given[0]]), int(best[prompt].indices), float(best[prompt].values))]
            for prompt, given in pairs
        ]
        longer = sorted(
            (index for index, (_, continuation) in enumerate(pairs) if len(continuation) > 1),
            key=lambda index: (-sum(map(len, pairs[index])), pairs[index][0]),
        )
        lengths = [sum(map(len, pairs[index])) for index in longer]
        longest = max((len(pairs[index][1]) for index in longer), default=1)
        max_rows = max(1, MAX_LOGITS // (longest * self.vocab_size))
        for run in pack(lengths, max_tokens=self.max_batch_tokens, max_rows=max_rows):
            chosen = longer[run.start : run.stop]
            rest = self._score_rest([(prefilled[pairs[index][0]], pairs[index][1]) for index in chosen])
            for index, found in zip(chosen, rest, strict=True):
                scores[index].extend(found)
        return scores

    def _max_prefill_rows(self, branches: Sequence[Branch]) -> int:
        """Every row gets logits at all positions that any row needs, which costs memory."""
        return max(1, MAX_LOGITS // (len(_logit_positions(branches)) * self.vocab_size))

    def _run_together(
        self, branches: Sequence[Branch], found: dict[Tokens, PrefilledPrompt], stems: dict[Tokens, PrefilledPrompt]
    ) -> None:
        """Run branches of one level; adds their prompts to `found`, and the branches to `stems` for the next level."""
        branches = sorted(branches, key=lambda branch: branch.stem)  # equal stems are copied once if neighbours
        new = _pad([branch.token_ids[len(branch.stem) :] for branch in branches], self.device)
        positions = _logit_positions(branches)
        wanted = torch.tensor(positions, device=self.device)
        rows = RowCache([stems[branch.stem] for branch in branches], room=new.shape[1]) if branches[0].stem else None
        fresh = DynamicCache()
        logits = self._forward(new, rows, past_key_values=fresh, logits_to_keep=wanted)
        metrics.engine_prompt_tokens_total.inc(sum(len(branch.token_ids) - len(branch.stem) for branch in branches))
        column = {position: index for index, position in enumerate(positions)}
        for row, branch in enumerate(branches):
            layers = rows.layers_of(row) if rows else [(keys[row], values[row]) for keys, values, *_ in fresh]
            own = {
                prompt: PrefilledPrompt(layers, len(prompt), logits[row, column[len(prompt) - len(branch.stem) - 1]])
                for prompt in {*branch.prompts, branch.token_ids}
            }
            stems[branch.token_ids] = own[branch.token_ids]
            found.update((prompt, own[prompt]) for prompt in branch.prompts)

    def _score_rest(self, pairs: Sequence[tuple[PrefilledPrompt, Tokens]]) -> list[list[TokenScore]]:
        """Scores of all but the first token of each continuation."""
        inputs = _pad([continuation[:-1] for _, continuation in pairs], self.device)
        targets = _pad([continuation[1:] for _, continuation in pairs], self.device)
        rows = RowCache([prompt for prompt, _ in pairs], room=inputs.shape[1])
        log_probs = torch.log_softmax(self._forward(inputs, rows), dim=-1)
        metrics.engine_prompt_tokens_total.inc(sum(len(continuation) - 1 for _, continuation in pairs))
        given = log_probs.gather(-1, targets[..., None])[..., 0].tolist()
        best, best_ids = (part.tolist() for part in log_probs.max(dim=-1))
        return [
            [TokenScore(given[row][i], best_ids[row][i], best[row][i]) for i in range(len(continuation) - 1)]
            for row, (_, continuation) in enumerate(pairs)
        ]


def _logit_positions(branches: Sequence[Branch]) -> list[int]:
    """Last tokens of prompts and branches, counted from the end of the stem."""
    return sorted({len(end) - len(one.stem) - 1 for one in branches for end in (*one.prompts, one.token_ids)})


def load_model(settings: EngineSettings) -> CausalModel:
    """Load `engine.model` onto its device. EngineError gives the reason."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise EngineError("engine.device = 'cuda', but torch sees no CUDA device: use 'auto' or 'cpu'")
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu")
    try:
        module = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise EngineError(f"engine.model {settings.model!r} can't be loaded: {exc}") from exc
    module = cast(Any, module).to(device).eval()
    config = module.config.get_text_config(decoder=True)
    if any("attention" not in kind for kind in getattr(config, "layer_types", None) or []):
        raise EngineError(f"engine.model {settings.model!r} has layers without attention: use another engine.kind")
    return CausalModel(
        module=module,
        device=device,
        vocab_size=config.vocab_size,
        max_tokens=getattr(config, "max_position_embeddings", None) or 2**31,
        eos_token_ids=end_token_ids(getattr(module, "generation_config", None), module.config),
        max_batch_tokens=settings.max_batch_tokens,
    )


def _pad(rows: Sequence[Tokens], device: torch.device) -> Tensor:
    """(R, longest) int64, padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *([0] * (width - len(row)))] for row in rows], device=device)
