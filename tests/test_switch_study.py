"""The text of the study of attention kinds: what its questions ask for, and how far back that is."""

from __future__ import annotations

import numpy as np

from benchmarks.switch_study import (
    ARMS,
    FILLER,
    KEYS,
    LENGTH,
    PAIRS,
    SETTINGS,
    VALUES,
    WEIGHTINGS,
    WINDOW,
    configuration,
    make_text,
)


def test_every_question_has_one_note_before_it() -> None:
    """Read anew from the tokens alone."""
    text = make_text(64, 3)
    assert text.tokens_BS.shape == (64, LENGTH + 1)
    assert text.tokens_BS.max() < FILLER + KEYS + VALUES + KEYS * VALUES
    far, near = np.zeros_like(text.far_BS), np.zeros_like(text.near_BS)
    for row, tokens in enumerate(text.tokens_BS.tolist()):
        notes: dict[int, tuple[int, int]] = {}
        asked = []
        for place, token in enumerate(tokens):
            note = token - FILLER - KEYS - VALUES
            if note >= 0:
                assert note // VALUES not in notes
                notes[note // VALUES] = note % VALUES, place
            elif FILLER <= token < FILLER + KEYS:
                value, noted = notes[token - FILLER]
                assert tokens[place + 1] == FILLER + KEYS + value
                (far if place - noted >= WINDOW else near)[row, place] = True
                asked.append(token - FILLER)
        assert sorted(asked) == list(range(KEYS))
    np.testing.assert_array_equal(text.far_BS, far)
    np.testing.assert_array_equal(text.near_BS, near)
    # Both are common enough for their shares to mean something.
    assert 0.2 < far.sum() / (far.sum() + near.sum()) < 0.8
    assert (make_text(64, 3).tokens_BS == text.tokens_BS).all()
    assert (make_text(64, 4).tokens_BS != text.tokens_BS).any()


def test_arms_differ_in_attention_alone() -> None:
    parent = configuration(None, 10)
    for arm in ARMS:
        config = configuration(arm, 10)
        assert (config.model, config.moe, config.data) == (parent.model, parent.moe, parent.data)
    assert {name for pair in (*PAIRS, *WEIGHTINGS) for name in pair} <= set(ARMS)
    assert len(set(SETTINGS)) == len(SETTINGS)
