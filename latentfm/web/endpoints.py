"""What programs call: the page's endpoints, by gradio_client or plain HTTP. They go the page's own way, through the same queue."""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from latentfm.errors import InputError
from latentfm.web.form import OWN, RULES, SCHEDULES, SOLVERS
from latentfm.web.html import address
from latentfm.web.studio import Studio
from latentfm.words import shown


def add(studio: Studio) -> None:
    """Adds the endpoints to the page."""

    async def generate(
        prompt: str,
        negative: str = "",
        size: str = "",
        steps: str = "",
        guidance: str = "",
        guidance_rule: str = "cfg",
        solver: str = OWN,
        schedule: str = "model",
        seed: int | None = None,
        count: int = 1,
        model: str | None = None,
        lora: str | None = None,
        lora_strength: float = 1.0,
        image: dict | None = None,
        mask: dict | None = None,
        strength: float | None = None,
    ) -> AsyncIterator[list[dict]]:
        """Draws pictures; gives {"name", "url", "settings"} of each that is finished, the last time of all of them.

        steps, guidance and solver may be several, "4,8,16". Those not given are the model's own. seed: a new
        one unless given. image, mask: gradio_client.handle_file of the picture to begin from, and of one that is white where it is drawn
        anew. A url is below the page's own.
        """
        values: dict[str, Any] = {
            "prompt": prompt, "negative": negative, "size": size, "steps": steps, "guidance": guidance, "guidance_rule": guidance_rule,
            "solver": solver, "schedule": schedule, "seed": seed, "count": count, "lora": lora, "lora_strength": lora_strength,
            "strength": strength, "canvas": {"background": image, "mask": mask},
        }  # fmt: skip
        try:
            for name, given, other, needed in (("strength", strength, "image", image), ("lora_strength", lora_strength, "lora", lora)):
                if needed is None and given not in (None, 1):
                    raise InputError(f"{name} {shown(repr(given), 60)} needs {other}; leave it out, or give both")
            async for job in studio.drawn(values | ({} if model is None else {"model": model})):
                if job.state == "failed" and not job.made:
                    raise InputError(job.error)
                yield [{"name": path.name, "url": address(path.name), "settings": settings} for path, settings in job.made]
        except InputError as error:
            raise gr.Error(shown(error, 2000), print_exception=False) from None

    def gallery(most: int = 48) -> list[dict]:
        """The newest pictures of the gallery: {"name", "url"} of each."""
        number = most if isinstance(most, int) and not isinstance(most, bool) and 0 < most <= 10_000 else 48
        return [{"name": name, "url": address(name)} for name in studio.gallery.names(number)]

    def choices() -> dict:
        """What may be chosen: models, LoRAs, solvers, schedules, guidance rules, and the limits."""
        limits = {name: getattr(studio.limits, name) for name in ("size", "steps", "batch", "prompt", "waiting")}
        names = {"models": studio.models.names(), "loras": list(studio.models.lora_paths())}
        return names | {"solvers": list(SOLVERS), "schedules": list(SCHEDULES), "guidance_rules": list(RULES), "limits": limits}

    gr.api(generate, api_name="generate", concurrency_limit=None)
    gr.api(gallery, api_name="gallery", concurrency_limit=None)
    gr.api(choices, api_name="choices", concurrency_limit=None)
