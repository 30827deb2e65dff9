"""The cycles of EIE, compared with a simulation cycle by cycle and with published tables."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch

from trainer.errors import ConfigError
from trainer.hardware.eie import (
    EieCycles,
    EieSettings,
    EncodedMatrix,
    encode,
    layer_cycles,
    random_activations,
    random_codes,
    shared_matrix,
    simulate,
)
from trainer.hardware.eie.published import EIE_64, LAYERS, PublishedLayer

PUBLISHED = {layer.name: layer for layer in LAYERS}
SMALL = EieSettings(elements=4, queue_depth=3, pipeline_stages=2)


def step_by_step(matrix: EncodedMatrix, activations: np.ndarray, settings: EieSettings) -> int:
    """Cycles, by moving every queue in every cycle."""
    counts = matrix.counts()
    cycle = 0
    batch = settings.activations_per_batch
    for first in range(0, len(activations), batch):
        pending = deque(first + np.flatnonzero(activations[first : first + batch]))
        queues = [deque[int]() for _ in range(settings.elements)]
        if not pending:
            continue
        while pending or any(queues):
            full = any(len(queue) == settings.queue_depth for queue in queues)
            for queue in queues:
                if queue:
                    queue[0] -= 1
                    if queue[0] <= 0:
                        queue.popleft()
            # A place that becomes free in a cycle can be filled in the next one.
            if pending and not full:
                column = pending.popleft()
                for element, queue in enumerate(queues):
                    queue.append(max(1, int(counts[element, column])))
            cycle += 1
        cycle += settings.pipeline_stages
    return cycle


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
@pytest.mark.parametrize(("outputs", "density"), [(13, 0.5), (40, 0.1), (64, 0.02)])
def test_it_counts_as_a_simulation_of_each_cycle(outputs: int, density: float, depth: int) -> None:
    settings = replace(SMALL, queue_depth=depth, activations_per_batch=20)
    matrix = encode(random_codes(outputs, 50, density), settings)
    activations = random_activations(50, 0.6)
    assert simulate(matrix, activations, settings).cycles == step_by_step(
        matrix, activations, settings
    )


def test_columns_without_entries_take_a_cycle() -> None:
    matrix = encode(np.zeros((4, 10), np.uint16), SMALL)
    found = simulate(matrix, np.ones(10), SMALL)
    assert found.cycles == 1 + 10 + SMALL.pipeline_stages
    assert (found.entries, found.word_reads, found.broadcast_stalls) == (0, 0, 0)
    assert found.pointer_reads == 2 * 4 * 10


def test_nothing_to_do() -> None:
    found = simulate(encode(np.ones((4, 10), np.uint16), SMALL), np.zeros(10), SMALL)
    assert (found.cycles, found.broadcasts, found.efficiency) == (0, 0, 1.0)


def test_words_are_read_for_the_entries_of_a_column() -> None:
    """Of 8 entries each: columns of 10 entries lie in two, three and two words."""
    settings = EieSettings(elements=1)
    found = simulate(encode(np.ones((10, 3), np.uint16), settings), np.ones(3), settings)
    assert found.word_reads == 2 + 2 + 2
    assert found.entries == 30
    found = simulate(encode(np.ones((10, 3), np.uint16), settings), np.array([0, 1, 0]), settings)
    assert found.word_reads == 2


def test_too_small_memories_and_other_encodings_are_refused() -> None:
    matrix = encode(np.ones((8, 4), np.uint16), SMALL)
    with pytest.raises(ConfigError, match="entries_per_element=7: an element has to hold 8"):
        simulate(matrix, np.ones(4), replace(SMALL, entries_per_element=7))
    with pytest.raises(ConfigError, match="elements=8: the matrix is encoded for 4"):
        simulate(matrix, np.ones(4), replace(SMALL, elements=8))


def published_cycles(layer: PublishedLayer, weight_density: float, **settings: int) -> EieCycles:
    made = replace(EieSettings(), **settings)
    matrix = encode(random_codes(layer.outputs, layer.inputs, weight_density), made)
    return simulate(matrix, random_activations(layer.inputs, layer.activation_density), made)


@pytest.mark.parametrize("name", ["VGG-7", "NT-Wd", "NT-LSTM"])
def test_theoretical_times_are_inside_the_interval_of_the_rounded_density(name: str) -> None:
    layer = PUBLISHED[name]
    low, high = (
        published_cycles(layer, layer.weight_density + rounding).theoretical_seconds * 1e6
        for rounding in (-0.005, 0.005)
    )
    assert low < layer.theoretical < high


@pytest.mark.parametrize("name", ["Alex-8", "VGG-7", "NT-We", "NT-LSTM"])
def test_theoretical_times_follow_the_closed_form(name: str) -> None:
    """Without fillers: weights that meet an activation, one a cycle in each element.

    With fillers: up to q / (1 - q) more, with q the chance of 16 zeros in a row; fewer, because a
    gap at the end of a column needs none.
    """
    layer = PUBLISHED[name]
    found = published_cycles(layer, layer.weight_density)
    products = layer.inputs * layer.outputs * layer.weight_density * layer.activation_density
    without = products / 64 / 800e6
    q = (1 - layer.weight_density) ** 16
    assert 0.99 * without < found.theoretical_seconds < without / (1 - q)
    if layer.outputs <= 64 * 16:  # a column of 16 rows has no room for 16 zeros and a weight
        assert found.theoretical_seconds == pytest.approx(without, rel=0.01)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("Alex-7", 0.05), ("VGG-7", 0.03), ("NT-We", 0.03), ("NT-Wd", 0.05)]
)
def test_load_imbalance_is_the_published_one(name: str, tolerance: float) -> None:
    """Actual over theoretical time, which hardly depends on the exact densities."""
    layer = PUBLISHED[name]
    found = published_cycles(layer, layer.weight_density)
    ours = found.seconds / found.theoretical_seconds
    assert ours == pytest.approx(layer.actual / layer.theoretical, rel=tolerance)


def test_queues_hide_imbalance_up_to_a_depth_of_eight() -> None:
    """Figure 8: about half of the cycles are idle at depth 1; beyond 8 little is gained."""
    layer = PUBLISHED["Alex-7"]
    matrix = encode(random_codes(layer.outputs, layer.inputs, layer.weight_density), EieSettings())
    activations = random_activations(layer.inputs, layer.activation_density)
    efficiency = {
        depth: simulate(matrix, activations, EieSettings(queue_depth=depth)).efficiency
        for depth in (1, 2, 4, 8, 16, 256)
    }
    assert 0.45 < efficiency[1] < 0.6
    assert list(efficiency.values()) == sorted(efficiency.values())
    assert efficiency[8] - efficiency[4] > 2 * (efficiency[16] - efficiency[8])
    assert efficiency[256] - efficiency[8] < 0.02


def test_more_elements_are_faster_but_not_on_short_columns() -> None:
    """Figures 11 to 13: fewer fillers and less balance; NT-We has 9 rows for each of 64."""
    wide, short = PUBLISHED["VGG-7"], PUBLISHED["NT-We"]
    runs = {
        (layer.name, elements): published_cycles(layer, layer.weight_density, elements=elements)
        for layer in (wide, short)
        for elements in (64, 256)
    }
    speedups = {
        layer.name: runs[layer.name, 64].cycles / runs[layer.name, 256].cycles
        for layer in (wide, short)
    }
    assert speedups["VGG-7"] > 3
    assert speedups["NT-We"] < 1.5
    assert runs["VGG-7", 256].entries < runs["VGG-7", 64].entries
    assert runs["VGG-7", 256].efficiency < runs["VGG-7", 64].efficiency


def test_tables_4_and_5_come_out_together() -> None:
    seconds = PUBLISHED["Alex-7"].actual * 1e-6
    assert 1 / seconds == pytest.approx(EIE_64.frames_per_second, rel=1e-4)
    assert 1 / seconds / EIE_64.watts == pytest.approx(EIE_64.frames_per_joule, rel=1e-4)


def test_a_layer_of_a_model() -> None:
    weight = torch.tensor([0.0, 0.5, -0.5, 0.5]).repeat(8, 4)
    found = layer_cycles(shared_matrix(weight), 0.5, SMALL)
    assert found.broadcasts == 8
    assert found == layer_cycles(shared_matrix(weight), 0.5, SMALL)
