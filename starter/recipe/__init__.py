"""The recipe that makes the shipped models. A build-time tool: no run needs it.

python -m starter.recipe --quick --seed 1 --out /tmp/other-world
"""
