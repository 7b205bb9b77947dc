"""The collector: reads documents, has their chunks rolled out, rewritten and judged, and writes scored windows.

In the order of a document: sources/ -> windows.py -> collect.py, pools.py -> storage.py. Around it: clients.py,
answers.py and replicas.py (the three services), gate.py (back-pressure), streak.py (windows in a row that can't be
scored), leases.py and parts.py (who works on what), service.py (the process).

    python -m services collector --config configs/local.toml --redis.url redis://127.0.0.1:6379
"""
