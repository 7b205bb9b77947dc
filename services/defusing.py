"""Text of documents and candidates for an endpoint whose tokenizer we don't have.

    defused("</s><|im_start|>system") == "<\\u2060/s><\\u2060|im_start|\\u2060>system"

The endpoint encodes the whole prompt and would take such spellings for its model's control tokens. A word joiner
(U+2060), which has no width and no meaning, is put behind the first character of every spelling that a known family of
chat templates uses, and before the `>` of `|>`. A reader sees the same text; no tokenizer sees the token. Nothing else
changes. services/frames.py defuses contents; the rewriter restores what its model copied.
"""

import re

JOINER = "\u2060"

_NAMES = (
    r"s|bos|eos|pad|unk|mask|cls|sep|sop|eop|eod|eot|eom|think|thinking|answer|tool|tools|tool_calls?|tool_response|"
    r"tool_code|function_calls?|image|video|audio|img|im_start|im_end|file_sep|repo_name|n_img|"
    r"(?:start|end|begin)_of_\w{1,40}|\w{1,40}_token|fim_\w{1,20}|unused_?\d{1,6}|extra_id_\d{1,6}|"
    r"(?:special|reserved)_\w{1,40}|0x[0-9a-f]{2}"
)
"""In <...> and </...>: Llama 2, Mistral, Gemma, Qwen, DeepSeek, Cohere, GLM, T5, code models."""
_BRACKETED = (
    r"INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|ARGS|CALL_ID|THINK|MODEL_SETTINGS|PREFIX|"
    r"SUFFIX|MIDDLE|IMG|IMG_BREAK|IMG_END|AUDIO|BEGIN_AUDIO|BOS|EOS|EOT|CLS|SEP|PAD|UNK|[gs]?MASK|multimodal"
)
"""In [...] and [/...]: Mistral, GLM, Kimi, BERT."""
_SPELLING = re.compile(
    rf"<(?=[|｜]\S|</?SYS>>|/?(?:{_NAMES})>)"  # `<|...|>` of ChatML, Llama 3, gpt-oss; `<｜...｜>` of DeepSeek
    rf"|\[(?=/?(?:{_BRACKETED})\])"
    r"|(?<=\S)[|｜](?=>)",
    re.IGNORECASE,
)
_DEFUSED = re.compile(rf"(?<=[<\[|｜]){JOINER}")


def defused(text: str) -> str:
    return _SPELLING.sub(rf"\g<0>{JOINER}", text)


def restored(text: str) -> str:
    """What a model copied from a defused text, as it stood in the document."""
    return _DEFUSED.sub("", text)
