"""In the repository: the families are in the folder ``adapters/`` beside this package's.

So its root can be imported as it is. An installed package has a folder of this name, which Python
prefers to a file, and not this file (``setup.py``).
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "adapters")]
