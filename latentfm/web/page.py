"""The page's layout. What its parts do is in `actions`; what is drawn goes through `form`, `line` and `gallery`."""

import os
from collections.abc import Callable

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal

from latentfm.web import actions, endpoints, html
from latentfm.web.canvas import STROKE, canvas
from latentfm.web.form import OWN, RULES, SCHEDULES, SOLVERS
from latentfm.web.reuse import DEFAULTS
from latentfm.web.studio import Studio

NO_LORA = "none"
# Gradio remembers its last 10,000 requests and makes a table of all after each, for a page of its own that is not offered here
NO_MONITORING = {"GRADIO_ANALYTICS_MAX_EVENTS": "1", "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9)}
SESSIONS = 200  # whose state is kept: Gradio's 10,000 would be a gigabyte, for each call of a program is one
CHOOSING = """
element.addEventListener("click", (event) => {
  const picture = event.target.closest(".choose");
  if (picture) trigger("choose", {name: picture.dataset.name});
  if (event.target.closest(".more")) trigger("more", {});
});
"""
HEADER = """<header><h1>latentfm</h1>
<button id="light" type="button" aria-label="Light or dark" title="Light or dark">&#9680;</button></header>"""


def theme() -> gr.themes.Base:
    """Colours and spacings; the fonts are the system's own, for nothing is fetched."""
    return gr.themes.Base(
        primary_hue="indigo", neutral_hue="zinc", radius_size="lg", spacing_size="md",
        font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_500", input_placeholder_color="*neutral_500", block_info_text_color="*neutral_500")  # fmt: skip


def page(studio: Studio, training: Callable[[], object] | None = None) -> gr.Blocks:
    """The page. `training` adds what belongs in the second tab, called inside of it; without it there is one tab."""
    for name, value in NO_MONITORING.items():
        os.environ.setdefault(name, value)
    with gr.Blocks(title="latentfm", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        gr.HTML(HEADER)
        if training is None:
            drawing(studio, blocks)
        else:
            with gr.Tabs(elem_id="tabs"):
                with gr.Tab("Draw"):
                    drawing(studio, blocks)
                with gr.Tab("Train"):
                    training()
        endpoints.add(studio)
    for block in blocks.blocks.values():
        take_what_was_sent(block)
    blocks.state_session_capacity = SESSIONS
    return blocks.queue(default_concurrency_limit=None)


def take_what_was_sent(block: gr.blocks.Block) -> None:
    """Has a part of the page take files in the folder of uploads alone.

    Of a page that is mounted, as this one is, Gradio would copy there, and hand to us, whatever path of the server a request names,
    and fetch what is behind an address.
    """
    move, move_later = block.move_resource_to_block_cache, block.async_move_resource_to_block_cache

    def check(path: object) -> None:
        given, uploads = str(path), os.path.realpath(get_upload_folder())
        if "://" in given or not is_in_or_equal(os.path.realpath(given), uploads) or not os.path.isfile(given):
            raise gr.Error("this is no file that was sent here", print_exception=False)

    def moved(path: object) -> str | None:
        check(path)
        return move(path)

    async def moved_later(path: object) -> str | None:
        check(path)
        return await move_later(path)

    block.move_resource_to_block_cache, block.async_move_resource_to_block_cache = moved, moved_later


def drawing(studio: Studio, blocks: gr.Blocks) -> None:
    """The tab that draws: the form beside the stage, the gallery below."""
    with gr.Row(elem_id="studio"):
        with gr.Column(elem_id="form"):
            controls = essentials(studio)
            with gr.Row(elem_id="go"):
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                cancel = gr.Button("Cancel", elem_id="cancel", visible=False)
        with gr.Column(elem_id="view"):
            stage = gr.HTML(html.welcome(), elem_id="stage", js_on_load=CHOOSING)
            with gr.Column(elem_id="chosen", visible=False) as chosen_part:
                details = gr.HTML(elem_id="details")
                with gr.Row(elem_id="ways"):
                    use = gr.Button("Use these settings", elem_id="use", size="sm")
                    begin = gr.Button("Draw from it", elem_id="begin", size="sm")
        with gr.Column(elem_id="settings"):
            dice = numbers(studio, controls)
            folded = further(studio, controls)
            dropped = gr.File(label="Settings of a PNG that was drawn here", file_types=[".png"], elem_id="dropped", height=96)
    gallery = gr.HTML(elem_id="gallery", js_on_load=CHOOSING)
    seen = actions.Seen(controls, stage, gallery, details, chosen_part, gr.State(None), gr.State(actions.PAGE), draw, cancel, folded)
    actions.connect(studio, seen, use, begin, dice, dropped)
    blocks.load(lambda: studio.tiles(actions.PAGE), None, gallery, **actions.QUIET)


def essentials(studio: Studio) -> dict[str, gr.components.Component]:
    """What is to be drawn."""
    return {
        "prompt": gr.Textbox(label="Prompt", lines=3, max_lines=8, autofocus=True, elem_id="prompt", placeholder="a slice of pizza"),
        "negative": gr.Textbox(label="Negative prompt", lines=1, max_lines=4, elem_id="negative", placeholder="what to steer away from"),
    }


def numbers(studio: Studio, controls: dict[str, gr.components.Component]) -> gr.Button:
    """How much of it, and the seed; the button that draws a new one."""
    limits, own = studio.limits, studio.models.usual(studio.models.names()[0])
    with gr.Row(elem_classes="pair"):
        controls["steps"] = gr.Slider(1, limits.steps, min(own.steps, limits.steps), step=1, label="Steps", elem_id="steps", buttons=[])
        controls["guidance"] = gr.Slider(0, 20, own.guidance, step=0.1, label="Guidance", elem_id="guidance", buttons=[])
    with gr.Row(elem_classes="pair"):
        controls["count"] = gr.Slider(1, limits.batch, 1, step=1, label="Pictures", elem_id="count", buttons=[])
        controls["size"] = gr.Textbox(label="Size", placeholder="the model's own", elem_id="size")
    with gr.Row(elem_id="seeds"):
        controls["seed"] = gr.Textbox(label="Seed", placeholder="new each time", elem_id="seed")
        dice = gr.Button("Dice", elem_id="dice", size="sm")
        controls["keep"] = gr.Checkbox(label="Lock", elem_id="keep")
    return dice


def further(studio: Studio, controls: dict[str, gr.components.Component]) -> gr.Accordion:
    """What is not needed every day, folded away; the fold with the canvas."""
    models, loras = studio.models.names(), list(studio.models.lora_paths())
    with gr.Row(elem_classes="pair", visible=len(models) > 1):
        controls["model"] = gr.Dropdown(models, value=models[0], label="Model", elem_id="model")
        controls["model"].input(studio.models.usual, controls["model"], [controls["steps"], controls["guidance"]], **actions.QUIET)
    with gr.Row(elem_classes="pair", visible=studio.models.loras is not None):
        controls["lora"] = gr.Dropdown([NO_LORA, *loras], value=NO_LORA, label="LoRA", elem_id="lora")
        controls["lora_strength"] = gr.Slider(-2, 2, 1, step=0.05, label="LoRA strength", elem_id="lora-strength", buttons=[])
    with gr.Accordion("From a picture", open=False, elem_id="from") as folded:
        gr.HTML('<p class="note">Paint over what is to be drawn anew; unpainted, all of it is.</p>')
        controls["canvas"] = canvas(
            label="Picture", show_label=False, elem_id="canvas", type="pil", format="png", layers=False, sources=("upload", "clipboard"),
            transforms=(), height=380, canvas_size=(512, 512), brush=gr.Brush(default_size=40, colors=[STROKE], color_mode="fixed"),
            eraser=gr.Eraser(default_size=40),
        )  # fmt: skip
        controls["strength"] = gr.Slider(
            0.05, 1, DEFAULTS["strength"], step=0.05, label="Strength", info="how much is drawn anew", elem_id="strength", buttons=[]
        )
    with gr.Accordion("Sampler", open=False):
        controls["solver"] = gr.Dropdown(SOLVERS, value=OWN, label="Solver", info="own: the model's scheduler", elem_id="solver")
        controls["schedule"] = gr.Dropdown(SCHEDULES, value="model", label="Schedule", elem_id="schedule")
        controls["guidance_rule"] = gr.Dropdown(RULES, value="cfg", label="Guidance rule", elem_id="rule")
    with gr.Accordion("Compare", open=False, elem_id="compare"):
        controls["several_steps"] = gr.Textbox(label="Steps", placeholder="4,8,16", elem_id="several-steps")
        controls["several_guidance"] = gr.Textbox(label="Guidance", placeholder="1..4", elem_id="several-guidance")
        controls["several_solvers"] = gr.Dropdown(SOLVERS, value=[], multiselect=True, label="Solvers", elem_id="several-solvers")
    return folded
