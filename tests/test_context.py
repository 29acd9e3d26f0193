"""Context: the coordinates of a place and the tables that are made of them."""

import json
from dataclasses import asdict

import pytest
import torch

import fastnca
from fastnca.context import Context, Places


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"frequency_octaves": 0}, "frequency_octaves must be an integer of at least 1, got 0"),
        ({"time_octaves": 2.5}, "time_octaves must be an integer of at least 1, got 2.5"),
        ({"pitch_hz": 0.0}, "a pitch must be a positive number of Hz, got 0.0"),
        ({"pitch_hz": float("nan")}, "a pitch must be a positive number of Hz, got nan"),
        ({"pitch_hz": "A4"}, "a pitch must be a positive number of Hz, got 'A4'"),
    ],
)
def test_wrong_places(fields, words):
    with pytest.raises(ValueError, match=words):
        Places(**fields)


@pytest.mark.parametrize("pitch_hz", [None, 440.0])
def test_places_survive_json(pitch_hz):
    places = Places(3, 4, pitch_hz)
    assert Places.from_dict(json.loads(json.dumps(asdict(places)))) == places


@pytest.mark.parametrize("pitch_hz", [None, 440.0])
def test_tables_are_linear_in_the_weights(pitch_hz):
    context = Context(Places(3, 2, pitch_hz), 6, 9)
    times = torch.linspace(-1, 1, 5)
    tables = context(times)
    assert [table.shape for table in tables] == [(1, 128, 6), (1, 128, 9), (1, 128, 5)]
    with torch.no_grad():
        for parameter in context.parameters():
            parameter.mul_(3.0)
    for table, three in zip(tables, context(times), strict=True):
        torch.testing.assert_close(three, 3.0 * table)


def test_another_pitch_changes_the_rows_alone():
    context = Context(Places(3, 2, 440.0), 6, 9)
    times = torch.linspace(-1, 1, 5)
    (mel, linear, columns), other = context(times), context(times, 330.0)
    assert not torch.equal(mel, other[0]) and not torch.equal(linear, other[1]) and torch.equal(columns, other[2])
    assert all(torch.equal(*pair) for pair in zip((mel, linear, columns), context(times, 440.0), strict=True))
    with pytest.raises(ValueError, match="a pitch must be a positive number"):
        context(times, -1.0)


def test_a_sound_without_a_pitch_has_no_other():
    for model, words in (
        (fastnca.DualSpecTNCA(context=Places()), "learned without a pitch"),
        (fastnca.DualSpecTNCA(), "the model has no context"),
    ):
        with pytest.raises(ValueError, match=words):
            model.tables(8, pitch_hz=330.0)
