"""A picture's settings as values of the form. A PNG comes from anywhere: what it names is looked up among what is offered here."""

from typing import TYPE_CHECKING, Any

from latentfm.data.images import open_rgb
from latentfm.web.canvas import to_paint_on
from latentfm.web.form import OWN, RULES, SCHEDULES, SOLVERS

if TYPE_CHECKING:
    from latentfm.web.studio import Studio

DEFAULTS = {
    "negative": "", "steps": 28, "guidance": 3.0, "guidance_rule": "cfg", "solver": OWN, "schedule": "model", "count": 1, "strength": 0.6,
    "lora": None, "lora_strength": 1.0, "several_steps": "", "several_guidance": "", "several_solvers": [],
}  # fmt: skip
ELSEWHERE = ("shift", "guidance_rescale", "guidance_interval", "zero_init", "noise", "reference", "variant", "without")


def again(settings: dict[str, Any], studio: "Studio") -> tuple[dict[str, Any], list[str]]:
    """The form's values for another picture with these settings, and remarks on what the page cannot follow."""
    found = DEFAULTS | {name: settings[name] for name in DEFAULTS if name in settings and not name.startswith("lora")}
    found |= {"prompt": settings.get("prompt", ""), "negative": settings.get("negative_prompt", ""), "keep": True}
    found["seed"] = str(settings["seed"]) if "seed" in settings else ""
    found["size"] = f"{settings['width']}x{settings['height']}" if "width" in settings and "height" in settings else ""
    remarks = [f"{name} is not on this page" for name in ELSEWHERE if settings.get(name) is not None]
    for name, offered in (("solver", SOLVERS), ("schedule", SCHEDULES), ("guidance_rule", RULES)):
        if found[name] not in offered:
            remarks.append(f"{name} {found[name]} is not on this page")
            found[name] = DEFAULTS[name]
    model = studio.models.name_of(settings.get("model"))
    if model is None and "model" in settings:
        remarks.append("its model is not offered here")
    found["model"] = model or studio.models.names()[0]
    loras, strengths = settings.get("lora", []), settings.get("lora_strength", [])
    if loras:
        found["lora"] = studio.models.lora_of(loras[0])
        found["lora_strength"] = float(strengths[0]) if strengths else 1.0
        if found["lora"] is None or len(loras) > 1:
            remarks.append("not all of its LoRAs are offered here")
    found["canvas"] = canvas(settings, studio)
    if found["canvas"] is None and "image" in settings:
        remarks.append("the picture that it was drawn from is not here")
    return found, remarks


def canvas(settings: dict[str, Any], studio: "Studio") -> dict[str, Any] | None:
    """What was on the canvas, as Gradio's editor takes it; None where that is not kept here."""
    path, masked = studio.gallery.source(settings.get("image")), studio.gallery.source(settings.get("mask"))
    if path is None or (masked is None and "mask" in settings):
        return None
    return to_paint_on(open_rgb(path), None if masked is None else open_rgb(masked))
