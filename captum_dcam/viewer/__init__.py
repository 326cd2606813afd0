r"""What people look at: overlays of heat on pictures, and contact sheets of whole answers.

Everything here draws with Pillow and numpy alone: no window, no global state, any thread.
"""

from captum_dcam.viewer.folder import prepare_folder, write_folder
from captum_dcam.viewer.overlay import overlay, word_map, word_overlay
from captum_dcam.viewer.sheet import contact_sheet
from captum_dcam.viewer.summary import WordSummary, scene_scores, summarise

__all__ = [
    "WordSummary",
    "contact_sheet",
    "overlay",
    "prepare_folder",
    "scene_scores",
    "summarise",
    "word_map",
    "word_overlay",
    "write_folder",
]
