"""The engine that runs vLLM, and the plugin that brings new weights into vLLM's own processes."""
