"""Figures from recorded arrays. Nothing here computes: detect and measure first, then draw.

Every function returns a `matplotlib.figure.Figure` made without pyplot, so no window opens, no backend is
chosen and nothing has to be closed. `matplotlib.pyplot.figure(figure)` (matplotlib 3.11) hands one to pyplot, whose
`show` then shows it.
"""

from dynloss_ext.plot._bifurcation import bifurcation
from dynloss_ext.plot._phase_diagram import phase_diagram
from dynloss_ext.plot._spectra import layer_spectra, spectral_density
from dynloss_ext.plot._style import (
    CLASS_COLOURS,
    EIGENVALUE_COLOURS,
    LINE_STYLES,
    LINEAR_CHANGE,
    OTHER_PERIOD_COLOUR,
    PERIOD_COLOURS,
    START_COLOUR,
    STOP_COLOUR,
    STYLE,
)
from dynloss_ext.plot._trajectory import trajectory

__all__ = [
    "CLASS_COLOURS",
    "EIGENVALUE_COLOURS",
    "LINEAR_CHANGE",
    "LINE_STYLES",
    "OTHER_PERIOD_COLOUR",
    "PERIOD_COLOURS",
    "START_COLOUR",
    "STOP_COLOUR",
    "STYLE",
    "bifurcation",
    "layer_spectra",
    "phase_diagram",
    "spectral_density",
    "trajectory",
]
