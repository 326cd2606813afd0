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


def python_code(result: Explanation | Comparison) -> str:
    """A few lines that make the result again, with the images as the saved folder has them."""
    comparison = isinstance(result, Comparison)
    s = result.settings
    given: dict[str, Any] = {"words": list(dict.fromkeys(result.words))}
    if comparison:
        given |= {"methods": [row.name.partition("#")[0] for row in result.rows]}
        given |= {k: s[k] for k in ("layer", "score", "backward", "tagger", "seed") if k in s}
    else:
        given |= dict(_read(s))
    stages = (s.get("refinements") or {}).get("stages") or []
    usual = not stages if comparison else _own(s)
    forced = comparison and result.forced or not comparison and result.trajectory.forced
    settings = s.get("generation") if comparison else result.trajectory.settings
    given |= {"foil": s["foil"]} if s.get("foil") else {}
    if forced:
        given["answer"] = result.answer
    else:
        given |= {k: v for k, v in (settings or {}).items() if k.isidentifier()}
    names = [f'"image-{i}.png"' for i in range(len(result.images))]
    shown = names[0] if len(names) == 1 else f"[{', '.join(names)}]"
    lines = [f"    {name}={value!r}," for name, value in given.items()]
    function = "compare" if comparison else "explain"
    cache = {"full": "none"}.get(s.get("regime", ""), s.get("regime"))
    load = f", cache={cache!r}" if cache else ""
    return "\n".join(
        [
            "import captum_dcam",
            *(["from captum_dcam.refine import refinement"] if stages and not usual else []),
            "",
            f"adapter = captum_dcam.load({s.get('family')!r}{load})",
            f"result = captum_dcam.{function}(",
            f"    adapter, {shown}, {result.prompt!r},",
            *lines,
            *([] if usual else [f"    refinements={_refinements(stages)},"]),
            *(["    every_step=True,"] if not comparison and result.steps is not None else []),
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
