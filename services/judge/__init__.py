"""The judge: scores the candidates of a chunk by the configured criteria.

item = {"start": 8, "end": 22, "candidates": [{"text": " orbits Earth."}, {"text": " is is is is"}]}
httpx.post("http://127.0.0.1:8003/v1/judgements", headers={"Authorization": "Bearer TOKEN"},
           json={"text": "The Moon orbits Earth.", "items": [item]}).json()
# {"judgements": [{"rewards": [0.9, 0.1], "scores": {"quality": [0.9, 0.1]}, ...}], ...}
"""
