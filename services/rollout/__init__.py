"""The rollout service: continuations sampled from the policy, under the newest weights."""
