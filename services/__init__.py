"""The services: rollout, rewriter, judge (FastAPI apps) and the collector, the only caller of the three."""
