"""The engine for any OpenAI-compatible endpoint, through the official client, which also does the retries."""

from services.engine.openai.engine import OpenAIEngine

__all__ = ["OpenAIEngine"]
