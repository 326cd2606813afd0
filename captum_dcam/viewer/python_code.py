"""The code that makes a result again, from its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from captum_dcam.model.trajectory import STORED_CACHES, stored_cache
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
    single: Mapping[str, Any] = s.get("single") or {}  # of several models, by their names
    stages = (s.get("refinements") or {}).get("stages") or []
    given: dict[str, Any] = {"words": list(dict.fromkeys(result.words))}
    if isinstance(result, Comparison):
        function, usual, forced = "compare", not stages, result.forced
        generation, cache = s.get("generation") or {}, s.get("regime")
        rows = [row.name.removeprefix(f"{row.group}: ") for row in result.rows]
        given |= {"methods": list(dict.fromkeys(name.partition("#")[0] for name in rows))}
        given |= {k: s[k] for k in COMPARING if k in s and not (single and k == "layer")}
    else:
        function, usual, forced = "explain", _own(s), result.trajectory.forced
        generation, cache = result.trajectory.settings, STORED_CACHES[result.trajectory.cache]
        given |= dict(_read(s))
        given |= {} if result.steps is None else {"every_step": True}
    given |= {"foil": s["foil"]} if s.get("foil") else {}
    given |= {"answer": result.answer} if forced else dict(generation)
    given |= {"layers": [own["layer"] for own in single.values()]} if single else {}
    lines = [f"    {name}={value!r}," for name, value in given.items()]
    lines += [] if usual else [f"    refinements={_refinements(stages)},"]
    animated = function == "explain" and not forced and bool(result.words)
    drawn = function == "explain" and not forced and s.get("seed") is not None
    lines += [f"    generator=torch.Generator().manual_seed({s['seed']}),"] if drawn else []
    names = ", ".join(f'"image-{i}.png"' for i in range(len(result.images)))
    images = names if len(result.images) == 1 else f"[{names}]"
    if single:
        models = (f"{name!r}: {_load(own, own.get('regime'))}" for name, own in single.items())
        made, function = f"models = {{{', '.join(models)}}}", "compare_models"
    else:
        made = f"adapter = {_load(s, cache)}"
    return "\n".join(
        [
            *(["import torch", ""] if drawn else []),
            "import captum_dcam",
            *(["from captum_dcam.refine import refinement"] if stages and not usual else []),
            "",
            made,
            f"result = captum_dcam.{function}(",
            f"    {made.partition(' ')[0]}, {images}, {result.prompt!r},",
            *lines,
            ")",
            f"result.{'comparison.' if single else ''}show()",
            *(['result.animate("answer.gif")  # the answer filling in'] if animated else []),
        ]
    )


def _load(s: Mapping[str, Any], regime: str | None) -> str:
    """The call that loads the model of some settings; older ones hold its family alone."""
    given = {"revision": s.get("revision"), "cache": regime and stored_cache(regime)}
    more = "".join(f", {name}={value!r}" for name, value in given.items() if value)
    return f"captum_dcam.load({s.get('model') or s.get('family')!r}{more})"


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
