"""The code that makes a result again, from its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from captum_dcam.presets import PRESETS, preset
from captum_dcam.refine import refinement
from captum_dcam.results.comparison import Comparison
from captum_dcam.results.explanation import Explanation

#: settings of an explanation that explain() takes by the same names
READING = ("score", "step", "product", "center", "backward", "tagger")
#: and those of a comparison that compare() takes
COMPARING = ("layer", "score", "backward", "tagger", "seed")


def python_code(result: Explanation | Comparison) -> str:
    """A few lines that make the result again, with the images as the saved folder has them."""
    s = result.settings
    stages = (s.get("refinements") or {}).get("stages") or []
    given: dict[str, Any] = {"words": list(dict.fromkeys(result.words))}
    if isinstance(result, Comparison):
        function, usual, forced = "compare", not stages, result.forced
        generation = s.get("generation") or {}
        given |= {"methods": [row.name.partition("#")[0] for row in result.rows]}
        given |= {k: s[k] for k in COMPARING if k in s}
    else:
        function, usual, forced = "explain", _own(s), result.trajectory.forced
        generation = result.trajectory.settings
        given |= dict(_read(s))
        given |= {} if result.steps is None else {"every_step": True}
    given |= {"foil": s["foil"]} if s.get("foil") else {}
    given |= {"answer": result.answer} if forced else dict(generation)
    lines = [f"    {name}={value!r}," for name, value in given.items()]
    lines += [] if usual else [f"    refinements={_refinements(stages)},"]
    names = ", ".join(f'"image-{i}.png"' for i in range(len(result.images)))
    images = names if len(result.images) == 1 else f"[{names}]"
    cache = {"full": "none"}.get(s.get("regime", ""), s.get("regime"))
    load = repr(s.get("family")) + (f", cache={cache!r}" if cache else "")
    return "\n".join(
        [
            "import captum_dcam",
            *(["from captum_dcam.refine import refinement"] if stages and not usual else []),
            "",
            f"adapter = captum_dcam.load({load})",
            f"result = captum_dcam.{function}(",
            f"    adapter, {images}, {result.prompt!r},",
            *lines,
            ")",
            "result.show()",
        ]
    )


def _read(s: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Preset and layer, and what else differs from the preset."""
    yield "preset", s.get("preset", "default")
    yield "layer", s.get("layer")
    known = s.get("preset") in PRESETS
    usual = preset(s["preset"]).reading() if known else None
    for name in READING:
        if name in s and (usual is None or getattr(usual, name) != s[name]):
            yield name, s[name]


def _own(s: Mapping[str, Any]) -> bool:
    """Whether the refinements are the preset's."""
    known = s.get("preset") in PRESETS
    return known and preset(s["preset"]).refinements().describe() == s.get("refinements")


def _refinements(stages: Sequence[Mapping[str, Any]]) -> str:
    """A list of refinements as code; of each, the settings that are not its defaults."""
    made = []
    for record in stages:
        name, own = record["name"], {k: v for k, v in record.items() if k != "name"}
        usual = refinement(name).describe()
        changed = "".join(f", {k}={v!r}" for k, v in own.items() if usual.get(k) != v)
        made.append(f"refinement({name!r}{changed})")
    return f"[{', '.join(made)}]"
