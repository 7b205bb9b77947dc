"""World 0 with its checker and tokenizer. Tiny models run fastest on one thread."""

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from starter.checker import Checker
from starter.model import build_tokenizer
from starter.world import World


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world() -> World:
    return World(0)


@pytest.fixture(scope="session")
def checker(world: World) -> Checker:
    return Checker(world)


@pytest.fixture(scope="session")
def tokenizer(world: World) -> PreTrainedTokenizerFast:
    return build_tokenizer(world)
