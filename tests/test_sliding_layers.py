"""Layers that slide, from the lists that configs have: facts from FastDeploy's contract."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import RuleError, parse
from cases.cache_layout import layer_caches
from cases.models import load_model, model_names
from cases.sliding_layers import sliding_layers, window_of_sides


def test_ones_slide_over_packed_caches_and_zeros_are_full():
    layers = sliding_layers([0, 1, 1, 0], [513], 4)
    assert layers.windows == (0, 513, 513, 0)
    assert layers.caches == ("same", "packed", "packed", "same")


@pytest.mark.parametrize(
    ("frequencies", "num_layers", "windows"),
    [
        ([1, 1], 4, (128, 128, 0, 0)),
        ([], 3, (0, 0, 0)),
        ([1], 1, (128,)),
        # A layer that speculates stands behind the list of the model's own.
        ([0, 1, 0, 1], 5, (0, 128, 0, 128, 0)),
        ([0, 1, 0, 1], 2, (0, 128)),
        ([1, 0], 0, ()),
    ],
)
def test_layers_behind_the_list_are_full(frequencies, num_layers, windows):
    assert sliding_layers(frequencies, [128], num_layers).windows == windows


def test_the_first_entry_of_the_window_list_counts_the_keys_the_token_included():
    # A row of W + 1 tokens: the last does not see the first, all others do (B58).
    (window,) = sliding_layers([1], [9, 0], 1).windows
    seen = [[key for key in range(10) if token - window < key <= token] for token in range(10)]
    assert [0 in keys for keys in seen] == [True] * 9 + [False]
    assert len(seen[9]) == 9
    assert window_of_sides(8, 0) == window


@pytest.mark.parametrize(("sides", "window"), [((0, 0), 1), ((512, 0), 513), ((-1, 0), 0)])
def test_a_window_of_sides_does_not_count_the_token_itself(sides, window):
    assert window_of_sides(*sides) == window


@pytest.mark.parametrize("sides", [(3, 1), (3, -1), (-2, 0)])
def test_a_window_that_looks_ahead_is_refused(sides):
    with pytest.raises(ValueError, match=r"a causal window has \(left, 0\)"):
        window_of_sides(*sides)


@pytest.mark.parametrize("window", [[], [0], [-1], [0, 513]])
def test_a_sliding_layer_without_a_window_is_refused(window):
    with pytest.raises(ValueError, match="sliding_window begins with how many keys are seen, at least 1"):
        sliding_layers([0, 1], window, 2)
    assert sliding_layers([0, 0], window, 2).windows == (0, 0)
    assert sliding_layers([0, 1], window, 1).windows == (0,)


@pytest.mark.parametrize("entry", [2, -1])
def test_a_frequency_is_no_entry(entry):
    with pytest.raises(ValueError, match=f"1 for a sliding layer and 0 for a full one, got {entry}"):
        sliding_layers([0, entry], [9], 2)


@given(st.lists(st.integers(0, 1), max_size=6), st.integers(1, 600), st.integers(1, 8))
def test_a_case_on_these_layers_has_them(frequencies, window, num_layers):
    case = sliding_layers(frequencies, [window], num_layers).of_case(parse("mla_step/decode:5/heads=2"))
    assert parse(str(case)) == case
    for index, layer in enumerate(case.layers):
        slides = index < len(frequencies) and frequencies[index] == 1
        assert (layer.window, layer.cache) == ((window, "packed") if slides else (0, "same"))
        assert layer_caches(layer)[0].dtype == ("uint8" if slides else "bfloat16")


def test_a_case_whose_other_lists_are_of_another_length_is_refused():
    with pytest.raises(RuleError, match="block has 2 values for 3 layers"):
        sliding_layers([1], [9], 3).of_case(parse("mla_step/decode:5/layers=2,block=64+32"))


def test_models_of_sliding_layers_say_what_their_window_is():
    sliding = {name: load_model(name) for name in model_names() if load_model(name).sliding_window}
    assert {name: model.sliding_window for name, model in sliding.items()} == {"dots3-note-sliding": (513,)}
    for model in sliding.values():
        count = model.num_hidden_layers
        layers = sliding_layers([1] * count, model.sliding_window, count)
        assert layers.windows == (513,) * 33
        case = layers.of_case(parse(f"mla_step/decode:5/model={model.name}"))
        assert {layer_caches(layer)[0].row_bytes for layer in case.layers} == {1184}
