r"""What people look at: the explorer (a page), overlays of heat, sheets of whole answers, panels of
comparisons, text, figures, animations.

Pictures are drawn with Pillow and numpy (text strips and figures with matplotlib's): no window, no
global state, any thread.
"""

from captum_dcam.viewer.animation import write_animation
from captum_dcam.viewer.edit_sheet import edit_sheet
from captum_dcam.viewer.explorer import explorer_page
from captum_dcam.viewer.figure import word_figure
from captum_dcam.viewer.folder import (
    prepare_folder,
    write_comparison,
    write_folder,
    write_models,
)
from captum_dcam.viewer.models_panel import models_panel
from captum_dcam.viewer.overlay import overlay, word_map, word_overlay
from captum_dcam.viewer.panel import comparison_panel
from captum_dcam.viewer.sheet import contact_sheet
from captum_dcam.viewer.text import text_html, text_strip

__all__ = [
    "comparison_panel",
    "contact_sheet",
    "edit_sheet",
    "explorer_page",
    "models_panel",
    "overlay",
    "prepare_folder",
    "text_html",
    "text_strip",
    "word_figure",
    "word_map",
    "word_overlay",
    "write_animation",
    "write_comparison",
    "write_folder",
    "write_models",
]
