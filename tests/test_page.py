"""What the pages share."""

import pytest

from orchestrator.page import figure, log_axis


@pytest.mark.parametrize(
    ("low", "high"),
    [(19.0, 92.0), (3.2, 21.6), (5e-5, 8e-4), (20.0, 23.0), (2e-5, 9.5e-4), (2e-5, 4e-3), (1e-6, 1e-1), (1e-6, 1e3)],
)
def test_a_logarithmic_axis_has_numbers_on_it_whatever_it_spans(low: float, high: float) -> None:
    with figure(3.0, 2.3) as (drawn, axes):
        axes.scatter([low, high], [0.0, 1.0])
        log_axis(axes)
        drawn.draw_without_rendering()
        told = [label.get_text() for label in axes.get_xticklabels()]
        shown = [
            t for t, at in zip(told, axes.get_xticks(), strict=True) if axes.get_xlim()[0] <= at <= axes.get_xlim()[1]
        ]
    assert len([text for text in shown if text]) >= 2
