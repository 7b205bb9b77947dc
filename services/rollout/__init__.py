"""The rollout service: continuations sampled from the policy, always under the newest weights.

    curl -H "Authorization: Bearer $HEADWATER_TOKEN" -H 'Content-Type: application/json' \\
        -d '{"token_ids": [1, 52, 17, 98, 4], "starts": [2, 4], "num_rollouts": 4, "max_suffix_tokens": 128}' \\
        http://127.0.0.1:8001/v1/rollouts

A request is served by app.py. New weights arrive on a thread of their own: watcher.py sees the announcement,
weight_copy.py fetches and verifies the version, and the engine switches.
"""
