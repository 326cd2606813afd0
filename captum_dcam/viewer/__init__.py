r"""What people look at: overlays of heat, sheets of whole answers, panels of comparisons, text.

Everything here draws with Pillow and numpy (text strips with matplotlib's figures): no window, no
global state, any thread.
"""

from captum_dcam.viewer.edit_sheet import edit_sheet
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
    "models_panel",
    "overlay",
    "prepare_folder",
    "text_html",
    "text_strip",
    "word_map",
    "word_overlay",
    "write_comparison",
    "write_folder",
    "write_models",
]
