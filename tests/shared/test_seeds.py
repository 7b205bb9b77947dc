"""Seeds are a run's for life: these values must not change (or `FORM` rises with them)."""

from shared.records import WindowKey
from shared.seeds import derive_seed, question_seed, seed_of, share_of, shuffle_seed

KEY = WindowKey(part=1, epoch=2, position=3, window=4)


def test_values_of_a_window_and_of_a_block() -> None:
    assert seed_of(7, KEY, "judge") == 1042828015
    assert share_of(KEY, "record") == 0.9592121127061546
    assert shuffle_seed(7, 1, 2, 3) == 7778973726949860582
    assert shuffle_seed(7, 1, 2, 3, 1) == 10634112607297618417


def test_values_within_a_request() -> None:
    assert question_seed(7, 0, "quality") == 1220120220
    assert derive_seed(7, 128, bits=48) == 207613015620372
    assert derive_seed(7, bits=56) == 321687799940968
    assert derive_seed(7, 3, bits=64) == 5802179756183503145
