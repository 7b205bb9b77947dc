"""Engines answer for language models: vLLM, transformers in this process, or an OpenAI-compatible endpoint.

    engine = build_engine(EngineSettings(kind="transformers", model="gpt2"))
    await engine.start()
    ((generation,),) = await engine.generate(["The moon"], Sampling(max_tokens=8))
    print(generation.text)
    await engine.close()

`build_engine` is in life.py, `Engine` and `Sampling` are in base.py.
"""
