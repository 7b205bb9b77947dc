"""Picks the engine that settings ask for. Called by each service's app.py; models load later, in `Engine.start`."""

from services.engine.base import Engine
from shared.errors import SettingsError
from shared.settings import EngineSettings


def build_engine(
    settings: EngineSettings, *, default_model: str = "", tokenizer: str = "", constrains: bool = False
) -> Engine:
    """`default_model` stands in for an empty `engine.model`; `tokenizer` is where to take it from if not the model's;
    `constrains`: samples will be held to patterns (see `Engine.can_constrain`), as an engine must know at its start.

    Raises SettingsError, with the key to change.
    """
    if not settings.model:
        settings = settings.model_copy(update={"model": default_model})
    if not settings.model:
        raise SettingsError("engine.model is empty: name a Hugging Face folder or name, or the endpoint's model")
    if settings.kind == "transformers":
        from services.engine.transformers import TransformersEngine

        return TransformersEngine(settings, tokenizer=tokenizer)
    if settings.kind == "vllm":
        from services.engine.vllm import VllmEngine

        return VllmEngine(settings, tokenizer=tokenizer, constrains=constrains)
    from services.engine.openai import OpenAIEngine

    return OpenAIEngine(settings, constrains=constrains)
