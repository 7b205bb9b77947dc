"""The rewriter: a teacher model's better version of each suffix, in the policy's tokens.

item = {"start": 21, "end": 33, "max_suffix_tokens": 16}
httpx.post("http://127.0.0.1:8002/v1/rewrites", headers={"Authorization": "Bearer TOKEN"},
           json={"text": "The Moon orbits Earth in 70 days.", "items": [item]}).json()
# {"rewrites": [{"text": " in 27 days.", "token_ids": [...], "finish_reason": "stop", "refusal": ""}]}
"""
